"""Blocks of the host tier, written to the disk before they are evicted.

Ahead of evictions and only while slots are short, so that nothing waits for the disk; and not
everything: what was asked for at least once since it was stored (all of it with ``write_back:
all``). A stop writes the rest, for the next start of the machine.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from baton.core.blocks import BlockKey
from kvpool.checksum import checksum
from kvpool.disk import DiskTier
from kvpool.host_values import StoredBlock

if TYPE_CHECKING:
    from kvpool.host_tier import HostTier

_BATCH = 16
_LOOK_AT = 64
"""Candidates, of which a batch of those that were asked for is written."""
_SHORT = 8
"""Slots are short while less than one in so many is free."""
_REUSED = 2
"""Uses: being stored is one."""


class Demotion:
    """For one host tier with a disk tier. ``run`` until cancelled."""

    def __init__(self, tier: HostTier, disk: DiskTier) -> None:
        self._tier = tier
        self._disk = disk
        self._wake = asyncio.Event()
        self._evicted: list[BlockKey] = []
        self._written: dict[int, int] = {}
        """Generations by slot. What the disk dropped since is not written again: in one that is
        smaller than this tier, blocks would take each other's place for ever."""
        self._min_uses = 1 if tier.spec.pool.write_back == "all" else _REUSED

    def evicted(self, keys: Sequence[BlockKey]) -> None:
        """Blocks left the host tier that are not on disk: what hangs on them there goes too."""
        self._evicted += keys
        self._wake.set()

    def changed(self) -> None:
        """The table changed."""
        if self._short():
            self._wake.set()

    async def run(self) -> None:
        """Write ahead of evictions, for ever."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            if self._evicted:
                gone, self._evicted = self._evicted, []
                await self._tier.on_disk_thread(functools.partial(self._disk.left_elsewhere, gone))
            while self._short():
                if not await self._write(self._candidates(self._min_uses)):
                    break

    async def flush(self) -> None:
        """Bring everything that is ready to the disk, or as much as it takes."""
        while await self._write(self._candidates(0)):
            pass

    def _candidates(self, min_uses: int) -> list[StoredBlock]:
        found = self._tier.table.demotable(_LOOK_AT)
        chosen = [
            item
            for item in found
            if item.frequency >= min_uses and self._written.get(item.slot) != item.generation
        ]
        return chosen[:_BATCH]

    def _short(self) -> bool:
        free = self._tier.table.statistics().num_free
        return free * _SHORT < self._tier.spec.num_slots

    async def _write(self, blocks: Sequence[StoredBlock]) -> int:
        """How many got there, or turned out to be damaged and are gone."""
        arena, disk = self._tier.arena.blocks, self._disk

        def write() -> tuple[list[StoredBlock], list[StoredBlock]]:
            written, damaged = [], []
            for item in blocks:
                # A copy: what is checked is what is written, whatever happens to the slot.
                payload = memoryview(bytearray(arena.block(item.slot)))
                put = disk.put(item.meta, payload, expected=item.checksum)
                if put or disk.contains(item.meta.key):
                    written.append(item)
                elif (
                    checksum(payload) != item.checksum
                    and arena.generation(item.slot) == item.generation
                ):
                    damaged.append(item)
            return written, damaged

        if not blocks:
            return 0
        written, damaged = await self._tier.on_disk_thread(write)
        for item in damaged:
            # Nobody can use it, and what is above it could never be written.
            self._tier.drop(item.meta.key)
        for item in written:
            self._written[item.slot] = item.generation
            # Asked now: the disk may have dropped a block for a later one, and has said so then.
            if disk.contains(item.meta.key):
                self._tier.table.mark_on_disk(item.slot, item.generation)
        self._tier.counters.num_demoted += len(written)
        return len(written) + len(damaged)
