"""An instance's side of the KV pool: fetches prefixes, writes complete ones back, tells of its own.

Absent where the machine has no host tier; then an instance has its own cache only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from baton.core.blocks import BlockKey
from baton.core.config import PoolConfig
from baton.engine.events import CacheChanged
from baton.instance.fetch_rule import FetchRule
from baton.instance.prefix_fetch import FetchHooks, PrefixFetcher
from baton.instance.write_back import WriteBack
from kvpool.block_io import BlockMover
from kvpool.block_reporter import BlockReporter
from kvpool.event_log import KVEventLog
from kvpool.paced import PacedMover
from kvpool.pool_link import PoolLink
from kvpool.tiers import KVEvent, KVEventKind, KVSnapshot, Tier
from kvpool.transport import KVCache
from prefill_worker.spill import Spill

if TYPE_CHECKING:
    from baton.instance.instance import Instance

_FETCH_TIMEOUT_S = 5.0
"""For the pool node, to bring a prefix up to the host tier."""


class PoolSide:
    """What the instance's parts share. ``start`` on the event loop, then ``stop``."""

    def __init__(
        self,
        link: PoolLink,
        fetcher: PrefixFetcher,
        write_back: WriteBack | None,
        spill: Spill,
        *,
        log: KVEventLog,
        reporter: BlockReporter,
    ) -> None:
        """``write_back``: ``None`` where the settings want none. ``log``: of the device tier."""
        self.link = link
        self.fetcher = fetcher
        self.write_back = write_back
        self.spill = spill
        self.log = log
        self._reporter = reporter
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to write back and to report."""
        self._tasks.append(asyncio.ensure_future(self._reporter.run()))
        if self.write_back is not None:
            self._tasks.append(asyncio.ensure_future(self.write_back.run()))

    async def stop(self) -> None:
        """End fetches and copies; bounded."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.fetcher.stop()
        if self.write_back is not None:
            await self.write_back.stop()
        await self.spill.stop()
        await self.link.close()

    def cache_changed(self, event: CacheChanged) -> None:
        """Blocks entered or left the device tier."""
        for entered, key in event.changes:
            kind = KVEventKind.STORED if entered else KVEventKind.REMOVED
            self.log.append(KVEvent(kind, Tier.DEVICE, (key,)))
        self._reporter.changed()


def make_pool_side(
    instance: Instance,
    link: PoolLink,
    controller_address: str,
    *,
    config: PoolConfig,
    cache: KVCache,
    host_layout: str,
    block_size: int,
    life: int,
    load_s: Callable[[Mapping[str, int]], float] | None = None,
) -> PoolSide:
    """Joined to an instance. ``host_layout``: of the host tier's blocks; ``life``: of the log.

    ``load_s``: how long fetched blocks, by tier, are to take where that is emulated.
    """
    mover = BlockMover(cache, host_layout)
    if load_s is not None:
        mover = PacedMover(cache, host_layout, load_s)
    write_back = None
    if config.write_back != "off":
        write_back = WriteBack(link, mover, block_size=block_size)

    def missing(keys: Sequence[BlockKey]) -> None:
        if write_back is not None:
            write_back.forget(keys)

    hooks = FetchHooks(
        fetched=instance.prefix_fetched,
        engine_abort=instance.engine_abort,
        stage=instance.note_stage,
        missing=missing,
    )
    rule = FetchRule(
        config.fetch,
        block_size=block_size,
        block_bytes=cache.block_bytes,
        chunk=instance.engine.config.max_num_batched_tokens,
    )
    fetcher = PrefixFetcher(
        hooks, link, mover, rule, block_size=block_size, timeout_s=_FETCH_TIMEOUT_S
    )
    log = KVEventLog(instance.instance_id, life)

    def snapshot() -> KVSnapshot:
        keys = tuple(instance.engine.cached_keys())
        return KVSnapshot(log.holder, log.life, log.next_seq, ((Tier.DEVICE, keys),))

    reporter = BlockReporter(controller_address, log, snapshot)
    spill = Spill(link, mover)
    return PoolSide(link, fetcher, write_back, spill, log=log, reporter=reporter)
