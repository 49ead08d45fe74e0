"""Blocks of lower tiers, brought up into the host tier before they are read."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence, Set
from typing import TYPE_CHECKING

from baton.core.blocks import BlockKey
from kvpool.checksum import checksum
from kvpool.disk import DiskTier
from kvpool.external_tier import ExternalTier
from kvpool.host_values import Grant
from kvpool.remote import RemotePools
from kvpool.slot_filling import fill
from kvpool.tiers import Tier

if TYPE_CHECKING:
    from kvpool.host_tier import HostTier

log = logging.getLogger(__name__)

_BATCH = 16


def _among(tier: Tier, tiers: Set[Tier] | None) -> bool:
    return tiers is None or tier in tiers


class Promotion:
    """For one host tier. ``remote``: other machines, once they can be asked."""

    def __init__(self, tier: HostTier) -> None:
        self.remote: RemotePools | None = None
        self._tier = tier
        self._one_at_a_time = asyncio.Lock()

    async def bring_up(
        self,
        keys: Sequence[BlockKey],
        start: int,
        deadline: float,
        *,
        local_only: bool,
        tiers: Set[Tier] | None = None,
    ) -> list[Tier]:
        """What lower tiers have of ``keys[start:]`` without a gap; where each block was.

        Ends by ``deadline`` (the tier's clock), with what has come by then. ``tiers``: to look in;
        all by default.
        """
        disk = self._tier.disk if _among(Tier.DISK, tiers) else None
        remote = None if local_only or not _among(Tier.REMOTE, tiers) else self.remote
        asked = not local_only and _among(Tier.EXTERNAL, tiers)
        external = self._tier.external if asked else None
        nowhere_else = remote is None and (external is None or not external.connected)
        if nowhere_else and (disk is None or not disk.contains(keys[start])):
            return []
        found: list[Tier] = []
        try:
            async with asyncio.timeout(max(0.0, deadline - self._tier.clock.now())):
                # What a second one wants may be what the first one brings.
                async with self._one_at_a_time:
                    await self._bring_up(keys, start, disk, remote, external, deadline, found)
        except TimeoutError:
            log.info("bringing blocks up took too long; the rest is computed")
        return found

    async def _bring_up(
        self,
        keys: Sequence[BlockKey],
        start: int,
        disk: DiskTier | None,
        remote: RemotePools | None,
        external: ExternalTier | None,
        deadline: float,
        found: list[Tier],
    ) -> None:
        table, clock = self._tier.table, self._tier.clock
        at = max(start, table.match(keys, touch=False, now=clock.now()))
        found += [Tier.HOST] * (at - start)
        while at < len(keys):
            count, where = 0, Tier.DISK
            if disk is not None and disk.contains(keys[at]):
                count = await self._from_disk(disk, keys, at)
            if not count and remote is not None:
                count, where = await remote.fetch(self._tier, keys, at, deadline), Tier.REMOTE
            if not count and external is not None:
                count, where = await external.fetch(keys, at), Tier.EXTERNAL
            if not count:
                return
            found += [where] * count
            at += count

    async def _from_disk(self, disk: DiskTier, keys: Sequence[BlockKey], at: int) -> int:
        """The next blocks, up to a batch; how many came up."""
        metas = []
        for key in keys[at : at + _BATCH]:
            meta = disk.meta(key)
            if meta is None:
                break
            metas.append(meta)
        arena = self._tier.arena.blocks

        def read(grants: Sequence[Grant]) -> list[tuple[int, int]]:
            filled = []
            for meta, grant in zip(metas, grants, strict=False):
                target = arena.block(grant.slot)
                if not disk.get(meta.key, target):
                    break
                filled.append((grant.ticket, checksum(target)))
            return filled

        grants = await fill(self._tier, Tier.DISK, metas, read, self._tier.on_disk_thread)
        for meta, grant in zip(metas, grants, strict=False):
            # What the disk dropped meanwhile has been told of already.
            if disk.contains(meta.key):
                self._tier.table.mark_on_disk(grant.slot, grant.generation)
        return len(grants)
