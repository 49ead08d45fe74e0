"""How much of a prompt is where, per row. Pure."""

from __future__ import annotations

import dataclasses

import numpy as np

from controller.columns import TIERS, PlacementView, Rows
from controller.events import PlaceQuery
from controller.policies.base import Costs

REMOTE = len(TIERS) - 1
"""The tier of what another machine has."""


@dataclasses.dataclass(frozen=True, slots=True)
class CachedTokens:
    """Leading tokens of a prompt."""

    device: Costs
    """In the instance's own cache, per row."""
    pool: int
    """In the pool: whoever has less in its own cache could fetch what is missing."""
    nearby: tuple[tuple[Rows, int], ...]
    """Rows that need not fetch it from another machine, and their tier: an index of ``TIERS``."""


def cached_tokens(query: PlaceQuery, view: PlacementView) -> CachedTokens | None:
    """``None`` where nobody has any of it."""
    if not query.prefix:
        return None
    num_rows = len(view.live)
    limit, row_of = query.num_prompt_tokens - 1, view.row_of
    held: list[int] = []
    lengths: list[int] = []
    most = 0
    nearby: dict[int, int] = {}
    """Machines whose own tiers have as much as any: the fastest of those tiers."""
    for holder, where, num_tokens in query.prefix:
        if num_tokens > limit:
            num_tokens = limit
        if where == "device":
            row = row_of.get(holder)
            if row is not None:
                held.append(row)
                lengths.append(num_tokens)
        elif num_tokens >= most:
            if num_tokens > most:
                most = num_tokens
                nearby.clear()
            node = view.node_of.get(holder)
            if node is not None:
                local = TIERS.index(where) if where in TIERS else REMOTE
                nearby[node] = min(local, nearby.get(node, local))
    device = np.zeros(num_rows)
    if held:
        # Longest first: of one row's, the last that is written is the longest.
        device[held[::-1]] = lengths[::-1]
    by_tier: dict[int, list[Rows]] = {}
    for node, tier in nearby.items():
        if (there := view.sides.of_node.get(node)) is not None:
            by_tier.setdefault(tier, []).append(there)
    near = tuple((np.concatenate(each), tier) for tier, each in by_tier.items())
    return CachedTokens(device, most, near)
