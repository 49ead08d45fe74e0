"""A pool node's external tier: a store that is not ours, below its machine's own tiers.

What the host tier, the disk and the other machines do not have is asked for there, and comes up
into the arena like everything else. Written are, off the critical path, blocks that were asked for
since they were stored (all of them with ``write_back: all``), each once, as far as this pool node
remembers. The store is asked what it has, so nothing of it is in the controller's index.

A store that cannot be reached is tried again, and nobody waits for it.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

from baton.core.blocks import BlockKey
from baton.core.errors import ConfigError
from kvpool.checksum import checksum
from kvpool.external import ExternalStatistics, ExternalStore
from kvpool.host_values import Grant
from kvpool.layout import KVLayout
from kvpool.mooncake_store import MooncakeStore
from kvpool.slot_filling import fill
from kvpool.tiers import BlockMeta, Tier
from kvpool.transports.mooncake_engine import library

if TYPE_CHECKING:
    from kvpool.host_tier import HostTier

log = logging.getLogger(__name__)

T = TypeVar("T")

_BATCH = 16
_MAX_QUEUED = 8192
_MAX_KNOWN = 65536
_FIRST_PAUSE_S = 1.0
_MAX_PAUSE_S = 60.0
_STOP_S = 10.0


@dataclasses.dataclass(slots=True)
class ExternalCounters:
    """Totals since the start, in blocks."""

    num_dropped: int = 0
    """Not written: too many waited."""
    num_gone: int = 0
    """Not written: evicted before it was their turn."""


class ExternalTier:
    """For one host tier. ``start`` on the event loop, then ``stop``."""

    def __init__(self, tier: HostTier, connect: Callable[[], ExternalStore]) -> None:
        """``connect``: opens the store; runs on a thread, raises ConfigError where it cannot."""
        self.counters = ExternalCounters()
        self._tier = tier
        self._connect = connect
        self._store: ExternalStore | None = None
        self._block_size = KVLayout.parse(tier.spec.layout).block_size
        self._queue: collections.OrderedDict[BlockKey, None] = collections.OrderedDict()
        self._known: collections.OrderedDict[BlockKey, None] = collections.OrderedDict()
        """Keys that the store was seen to have; a guess that saves writes."""
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        # A read does not wait for a write.
        self._reads = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="kv-external")
        self._writes = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="kv-external")

    @property
    def connected(self) -> bool:
        """Whether the store could be opened."""
        return self._store is not None

    @property
    def num_queued(self) -> int:
        """Blocks that wait to be written."""
        return len(self._queue)

    def statistics(self) -> ExternalStatistics:
        """The store's counts; zeros before it could be opened."""
        return ExternalStatistics() if self._store is None else self._store.statistics()

    def start(self) -> None:
        """Begin to connect, then to write."""
        self._task = asyncio.create_task(self._run(), name="external tier")

    async def stop(self) -> None:
        """Release the store and the threads. What waits to be written is not.

        Bounded: a store that hangs is left to its thread.
        """
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_STOP_S):
                await asyncio.get_running_loop().run_in_executor(None, self._end)

    async def fetch(self, keys: Sequence[BlockKey], at: int) -> int:
        """Bring up what the store has of ``keys[at:]``, up to a batch; how many blocks came."""
        store = self._store
        if store is None:
            return 0
        wanted = keys[at : at + _BATCH]
        found = await _on(self._reads, lambda: store.match(wanted))
        for key in wanted[found:]:
            self._known.pop(key, None)
        if not found:
            return 0
        metas = [
            BlockMeta(
                key=key,
                parent=keys[at + index - 1] if at + index else None,
                depth=at + index,
                # Only full blocks are found by lookups.
                num_tokens=self._block_size,
            )
            for index, key in enumerate(wanted[:found])
        ]
        arena = self._tier.arena.blocks

        def read(grants: Sequence[Grant]) -> list[tuple[int, int]]:
            targets = [arena.block(grant.slot) for grant in grants]
            arrived = store.get([meta.key for meta in metas[: len(grants)]], targets)
            return [
                (grant.ticket, checksum(target))
                for grant, target in zip(grants[:arrived], targets, strict=False)
            ]

        # Before they are published: what is stored here is offered to the store.
        self._remember(wanted[:found])
        granted = await fill(
            self._tier, Tier.EXTERNAL, metas, read, lambda work: _on(self._reads, work)
        )
        for key in wanted[len(granted) : found]:
            self._known.pop(key, None)
        return len(granted)

    def offer(self, keys: Iterable[BlockKey]) -> None:
        """Write these to the store when there is time, if they are in the host tier then."""
        if self._store is None:
            return
        for key in keys:
            if key not in self._known:
                self._queue[key] = None
        while len(self._queue) > _MAX_QUEUED:
            self._queue.popitem(last=False)
            self.counters.num_dropped += 1
        if self._queue:
            self._wake.set()

    async def _run(self) -> None:
        store = await self._connected()
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._queue:
                keys = [self._queue.popitem(last=False)[0] for _ in range(self._batch())]
                try:
                    await self._write(store, keys)
                except Exception:  # a bug must not end all later writes
                    log.exception("writing %d blocks to the external store", len(keys))

    def _batch(self) -> int:
        return min(_BATCH, len(self._queue))

    async def _connected(self) -> ExternalStore:
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                store = await _on(self._writes, self._open)
            except ConfigError as error:
                log.error("no external store for now: %s", error.message)
            else:
                log.info("the external store is there")
                return store
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _MAX_PAUSE_S)

    def _open(self) -> ExternalStore:
        store = self._connect()
        # On the thread: whoever awaits it may be cancelled, and the store has to be closed.
        self._store = store
        return store

    def _end(self) -> None:
        """Off the event loop: each step may take seconds."""
        for executor in (self._writes, self._reads):
            executor.shutdown(cancel_futures=True)
        if self._store is not None:
            self._store.close()

    async def _write(self, store: ExternalStore, keys: Sequence[BlockKey]) -> None:
        arena = self._tier.arena.blocks
        blocks = self._tier.table.stored(keys)
        self.counters.num_gone += len(keys) - len(blocks)

        def write() -> list[BlockKey]:
            copies = []
            for block in blocks:
                # A copy: what is checked is what is written, whatever happens to the slot.
                payload = memoryview(bytearray(arena.block(block.slot)))
                if checksum(payload) == block.checksum:
                    copies.append((block.meta, payload))
            accepted = store.put(copies)
            return [meta.key for meta, _ in copies[:accepted]]

        if blocks:
            self._remember(await _on(self._writes, write))

    def _remember(self, keys: Iterable[BlockKey]) -> None:
        for key in keys:
            self._known[key] = None
        while len(self._known) > _MAX_KNOWN:
            self._known.popitem(last=False)


def mooncake_tier(tier: HostTier, host: str) -> ExternalTier:
    """As ``pool.external`` wants it. ``host``: own address, as the store's other clients reach it.

    Raises ConfigError if Mooncake is not installed.
    """
    settings = tier.spec.pool.external
    master = settings.master
    assert master is not None
    library("store", "pool.external.master")

    def connect() -> ExternalStore:
        return MooncakeStore(
            master,
            layout=tier.spec.layout,
            host=host,
            metadata=settings.metadata,
            protocol=settings.protocol,
            device=settings.device,
            segment_bytes=settings.segment_bytes,
            batch_bytes=settings.batch_bytes,
            timeout_s=settings.timeout_s,
        )

    return ExternalTier(tier, connect)


def _on(executor: concurrent.futures.Executor, work: Callable[[], T]) -> asyncio.Future[T]:
    return asyncio.get_running_loop().run_in_executor(executor, work)
