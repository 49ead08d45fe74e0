"""Complete blocks of an instance's cache, copied to the host tier off the critical path.

The engine tells of prefixes when their sequences are done. Their blocks may be evicted any time:
a copy counts only if the block's generation is still the same after the last byte. What the pool
does not want (it has it, or other blocks are asked for more) is not copied; and where the host
falls behind, the oldest wishes are dropped.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import dataclasses
import logging
from collections.abc import Sequence

from baton.core.blocks import BlockKey
from baton.engine.events import PrefixComplete
from kvpool.block_io import BlockMover
from kvpool.host_values import Grant, SkipReason
from kvpool.pool_link import PoolLink
from kvpool.tiers import BlockMeta

log = logging.getLogger(__name__)

_MAX_QUEUED_BLOCKS = 8192
_BATCH_BLOCKS = 32
_MAX_KNOWN = 65536


@dataclasses.dataclass(frozen=True, slots=True)
class _Wish:
    meta: BlockMeta
    chain: tuple[BlockKey, ...]
    """Keys of its whole prefix, and of what comes after it."""
    block: int
    generation: int


@dataclasses.dataclass(slots=True)
class WriteBackCounters:
    """Totals since the start, in blocks, for metrics."""

    num_written: int = 0
    num_declined: int = 0
    """The pool had them, or had no room for them."""
    num_lost: int = 0
    """Evicted here before they were copied, or too late."""
    num_dropped: int = 0
    """Never tried: too many waited."""


class WriteBack:
    """Copies for one instance. ``run`` until cancelled, then ``stop``."""

    def __init__(self, link: PoolLink, mover: BlockMover, *, block_size: int) -> None:
        self._link = link
        self._mover = mover
        self._block_size = block_size
        self._queue: collections.deque[_Wish] = collections.deque()
        self._known: collections.OrderedDict[BlockKey, None] = collections.OrderedDict()
        """Keys that the pool was seen to have; a guess that saves questions."""
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="kv-write-back")
        self.counters = WriteBackCounters()

    @property
    def num_queued(self) -> int:
        """Blocks that wait to be copied."""
        return len(self._queue)

    def on_complete(self, event: PrefixComplete) -> None:
        """A sequence is done; its blocks are cached."""
        for depth, key in enumerate(event.keys):
            if key in self._known:
                continue
            meta = BlockMeta(
                key=key,
                parent=event.keys[depth - 1] if depth else None,
                depth=depth,
                num_tokens=self._block_size,
                priority=event.priority,
            )
            self._queue.append(
                _Wish(meta, event.keys, event.blocks[depth], event.generations[depth])
            )
        while len(self._queue) > _MAX_QUEUED_BLOCKS:
            self._queue.popleft()
            self.counters.num_dropped += 1
        if self._queue:
            self._idle.clear()
            self._wake.set()

    async def run(self) -> None:
        """Copy what is wished for, for ever."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._queue:
                count = min(_BATCH_BLOCKS, len(self._queue))
                wishes = [self._queue.popleft() for _ in range(count)]
                try:
                    await self._write(wishes)
                except Exception:  # a bug must not end all later copies
                    log.exception("writing %d blocks back", len(wishes))
                    self.counters.num_lost += len(wishes)
            self._idle.set()

    def forget(self, keys: Sequence[BlockKey]) -> None:
        """The pool does not have these (any more): the next time they are offered again."""
        for key in keys:
            self._known.pop(key, None)

    async def drained(self) -> None:
        """Wait until nothing is left to copy."""
        await self._idle.wait()

    async def stop(self) -> None:
        """Release the thread. Call after ``run`` has ended."""
        await asyncio.get_running_loop().run_in_executor(None, self._thread.shutdown)

    async def _write(self, wishes: list[_Wish]) -> None:
        counters = self.counters
        reply = await self._link.reserve([wish.meta for wish in wishes])
        if reply is None:
            counters.num_lost += len(wishes)
            return
        arena, grants = reply
        moves = []
        for wish, grant in zip(wishes, grants, strict=True):
            if isinstance(grant, Grant):
                moves.append((wish, grant))
                continue
            counters.num_declined += 1
            if grant == SkipReason.KNOWN:
                self._known[wish.meta.key] = None
            elif grant == SkipReason.NO_PARENT:
                # The pool let go of something before it: next time the whole prefix is offered.
                self.forget(wish.chain[: wish.meta.depth])
        if not moves:
            return
        filled: list[tuple[int, int] | None]
        try:
            filled = await asyncio.get_running_loop().run_in_executor(
                self._thread,
                self._mover.store,
                arena,
                [(wish.block, wish.generation, grant) for wish, grant in moves],
            )
        except Exception:  # the slots must be given back whatever it was
            log.exception("copying blocks to the host tier")
            filled = [None] * len(moves)
        good: list[tuple[int, int]] = []
        failed: list[int] = []
        lost: set[BlockKey] = set()
        for (wish, grant), item in zip(moves, filled, strict=True):
            if item is None or wish.meta.parent in lost:
                # What hangs on a block that is not there goes with it.
                lost.add(wish.meta.key)
                failed.append(grant.ticket)
            else:
                good.append(item)
        published = await self._link.publish(good, failed)
        counters.num_lost += len(failed) + published.count(False)
        counters.num_written += published.count(True)
        tickets = {ticket for (ticket, _), ok in zip(good, published, strict=True) if ok}
        for wish, grant in moves:
            if grant.ticket in tickets:
                self._known[wish.meta.key] = None
        while len(self._known) > _MAX_KNOWN:
            self._known.popitem(last=False)
