"""Slots of the host tier, filled on a thread from wherever blocks come."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from kvpool.host_values import Grant, Skip
from kvpool.tiers import BlockMeta, Tier

if TYPE_CHECKING:
    from kvpool.host_tier import HostTier

LEASE_S = 30.0
"""Of slots being filled: longer than any read or pull takes."""


async def fill(
    tier: HostTier,
    source: Tier,
    metas: Sequence[BlockMeta],
    read: Callable[[Sequence[Grant]], list[tuple[int, int]]],
    run: Callable[[Callable[[], list[tuple[int, int]]]], asyncio.Future[list[tuple[int, int]]]],
) -> list[Grant]:
    """Reserve slots for ``metas``, have ``read`` fill them on a thread, and publish.

    ``read`` returns (ticket, checksum) of the leading ones that arrived and verified. Returns the
    grants of those that count, up to the first that does not. Whatever is raised, no ticket stays
    open longer than a thread may still write to its slot.
    """
    granted = tier.reserve(metas, owner=tier.events.holder, lease_s=LEASE_S, wanted=True)
    grants = leading(granted)
    rest = [item.ticket for item in granted[len(grants) :] if isinstance(item, Grant)]
    tier.publish((), rest)
    if not grants:
        return []
    future: asyncio.Future[list[tuple[int, int]]] | None = None
    try:
        future = run(lambda: read(grants))
        filled = await asyncio.shield(future)
    except BaseException as error:
        if future is not None and isinstance(error, asyncio.CancelledError):
            # The thread may still write. What it brings counts for the next one who asks.
            future.add_done_callback(lambda done: _settle(tier, source, grants, _result(done)))
        else:
            _settle(tier, source, grants, [])
        raise
    return grants[: _settle(tier, source, grants, filled)]


def _settle(
    tier: HostTier, source: Tier, grants: Sequence[Grant], filled: Sequence[tuple[int, int]]
) -> int:
    """Publish what was filled, give up the rest; how many leading ones count."""
    published = tier.publish(filled, [grant.ticket for grant in grants[len(filled) :]])
    count = next((n for n, good in enumerate(published) if not good), len(published))
    tier.counters.num_promoted[source] += count
    tier.counters.num_failed[source] += len(grants) - count
    return count


def _result(done: asyncio.Future[list[tuple[int, int]]]) -> list[tuple[int, int]]:
    good = not done.cancelled() and done.exception() is None
    return done.result() if good else []


def leading(granted: Sequence[Grant | Skip]) -> list[Grant]:
    """The grants before the first block that was not granted."""
    found = []
    for item in granted:
        if not isinstance(item, Grant):
            break
        found.append(item)
    return found
