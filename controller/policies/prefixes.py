"""How much of a prompt is where, per row. Pure."""

from __future__ import annotations

import dataclasses

import numpy as np

from controller.columns import TIERS, PlacementView
from controller.events import PlaceQuery
from controller.policies.base import Costs


@dataclasses.dataclass(frozen=True, slots=True)
class CachedTokens:
    """Leading tokens of a prompt; arrays have shape [rows]."""

    device: Costs
    """In the instance's own cache."""
    pool: Costs
    """In the fastest tier of the pool that has more than the device: what could be fetched."""
    pool_tier: Costs
    """Which: index into ``TIERS``; meaningless where ``pool`` is 0."""


def cached_tokens(query: PlaceQuery, view: PlacementView) -> CachedTokens | None:
    """``None`` where nobody has any of it."""
    if not query.prefix:
        return None
    num_rows = len(view.live)
    device, pool, tier_of = np.zeros(num_rows), np.zeros(num_rows), np.zeros(num_rows)
    limit = query.num_prompt_tokens - 1
    for match in query.prefix:
        num_tokens = float(min(match.num_tokens, limit))
        if match.tier == "device":
            row = view.row_of.get(match.holder)
            if row is not None:
                device[row] = max(device[row], num_tokens)
            continue
        node = view.node_of.get(match.holder)
        here = (view.node == node) if node is not None else np.zeros(num_rows, dtype=bool)
        local = TIERS.index(match.tier) if match.tier in TIERS else len(TIERS) - 1
        tier = np.where(here, local, len(TIERS) - 1)
        better = (num_tokens > pool) | ((num_tokens == pool) & (tier < tier_of))
        pool = np.where(better, num_tokens, pool)
        tier_of = np.where(better, tier, tier_of)
    return CachedTokens(device, np.where(pool > device, pool, 0.0), tier_of)
