"""Blocks between an instance's cache and the host tier: copied, converted, and verified.

On a transport thread. The host tier keeps the canonical layout and a checksum of each block; a
cache has the layout of its ranks. A block counts only if both sides still were what they were
meant to be after the last byte: the cache's block and the slot by their generations, the bytes by
the checksum.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Sequence

import numpy as np

from kvpool.arena import BlockArena
from kvpool.checksum import checksum
from kvpool.host_values import Grant
from kvpool.layout import KVLayout
from kvpool.pool_link import Slot
from kvpool.reshard import plan_reshard
from kvpool.transport import KVCache, TransferFault


class BlockMover:
    """Moves blocks of one cache into the host tier and back. Raises ValueError if the layouts
    cannot be converted."""

    def __init__(self, cache: KVCache, host_layout: str) -> None:
        own, host = KVLayout.parse(cache.layout), KVLayout.parse(host_layout)
        self._cache = cache
        self._outward = plan_reshard(own, host)
        self._inward = plan_reshard(host, own)
        self.faults: collections.Counter[str] = collections.Counter()
        """Loads that ended at a block that failed, by ``TransferFault``. Written by the thread that
        loads; a reader may be behind by one."""

    def store(
        self, arena: BlockArena, moves: Sequence[tuple[int, int, Grant]]
    ) -> list[tuple[int, int] | None]:
        """Fill slots from (block, generation, grant).

        Returns (ticket, checksum) for each, ``None`` where the block or the slot was given to
        other content meanwhile.
        """
        return [self._store(arena, *move) for move in moves]

    def _store(
        self, arena: BlockArena, block: int, generation: int, grant: Grant
    ) -> tuple[int, int] | None:
        cache, slot = self._cache, grant.slot
        if cache.generation(block) != generation or arena.generation(slot) != grant.generation:
            return None
        target = arena.block(slot)
        if self._outward.is_identity:
            _copy(cache.block(block), target)
        else:
            self._outward.apply(cache.block(block), target)
        digest = checksum(target)
        if cache.generation(block) != generation or arena.generation(slot) != grant.generation:
            return None
        return grant.ticket, digest

    def load(
        self, arena: BlockArena, slots: Sequence[Slot], blocks: Sequence[int], deadline: float
    ) -> int:
        """Fill ``blocks`` from ``slots``, in order; how many leading ones arrived and verified.

        Stops at the first that did not, and at ``deadline`` (``time.monotonic`` seconds). A block
        that failed is zeroed: half-arrived bytes may be NaN, which attention's masks do not stop.
        """
        scratch = None if self._inward.is_identity else memoryview(bytearray(arena.block_bytes))
        for index, (slot, block) in enumerate(zip(slots, blocks, strict=True)):
            if time.monotonic() >= deadline:
                self.faults[TransferFault.LATE] += 1
                return index
            target = self._cache.block(block)
            arrived = target if scratch is None else scratch
            _copy(arena.block(slot.slot), arrived)
            good = checksum(arrived) == slot.checksum
            # Told first: a slot that was given away meanwhile does not match its checksum either.
            stale = arena.generation(slot.slot) != slot.generation
            if stale or not good:
                self.faults[TransferFault.STALE if stale else TransferFault.CORRUPT] += 1
                target[:] = bytes(len(target))
                return index
            if scratch is not None:
                self._inward.apply(scratch, target)
        return len(blocks)


def _copy(source: memoryview, target: memoryview) -> None:
    # numpy copies without holding the interpreter lock; memoryview assignment does not.
    np.copyto(np.frombuffer(target, dtype=np.uint8), np.frombuffer(source, dtype=np.uint8))
