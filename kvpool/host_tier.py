"""The host tier of a machine as its pool node runs it: accounts, timers, and the tiers below.

Instances copy bytes in and out of the arena by themselves; this is who says where, for how long,
and what is there. Blocks of lower tiers (the disk, other machines) come up into the arena before
they are read, and blocks that will be evicted soon go down to the disk before they are.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
from collections.abc import Callable, Sequence, Set
from typing import TypedDict, TypeVar

from baton.core.blocks import BlockKey
from baton.core.clock import Clock, SystemClock
from kvpool.checksum import checksum
from kvpool.demotion import Demotion
from kvpool.disk import DiskTier
from kvpool.event_log import KVEventLog
from kvpool.external_tier import ExternalTier
from kvpool.host_arena import HostArena
from kvpool.host_table import HostTable
from kvpool.host_values import Grant, HeldSlot, HostSettings, Skip, TierCounters
from kvpool.index_hot import HotPrefixes
from kvpool.promotion import Promotion
from kvpool.tier_spec import HostTierSpec
from kvpool.tiers import BlockMeta, KVEvent, KVEventKind, KVSnapshot, Tier

T = TypeVar("T")

_DUMPED_LINES = 1000
_FLUSH_S = 10.0
"""How long a stop may take to bring the host tier to the disk."""


class _Sizes(TypedDict):
    num_slots: int
    slot_bytes: int
    layout: str


class HostTier:
    """One machine's. Made by :meth:`open`; then ``start``, use on one event loop, ``stop``."""

    def __init__(
        self,
        spec: HostTierSpec,
        arena: HostArena,
        disk: Callable[[HostTier], DiskTier | None],
        events: KVEventLog,
        *,
        adopted: bool,
        on_changed: Callable[[], None],
        clock: Clock,
    ) -> None:
        self.spec = spec
        self.arena = arena
        self.adopted = adopted
        self.events = events
        self.counters = TierCounters()
        self.hot = HotPrefixes()
        self.clock = clock
        self._on_changed = on_changed
        settings = HostSettings(
            life=events.life % (1 << 31), admit_all=spec.pool.write_back == "all"
        )
        if adopted:
            self.table = HostTable.rebuild(
                arena.table,
                arena.blocks.generations,
                now=clock.now(),
                on_event=self._on_event,
                settings=settings,
            )
        else:
            self.table = HostTable(
                arena.table, arena.blocks.generations, on_event=self._on_event, settings=settings
            )
        self.disk = disk(self)
        self.external: ExternalTier | None = None
        """Set before ``start``, if there is one."""
        self.promotion = Promotion(self)
        self._demotion = None if self.disk is None else Demotion(self, self.disk)
        self._demoting: asyncio.Task[None] | None = None
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="kv-disk")
        self._timer: asyncio.TimerHandle | None = None
        self._stopped = False
        self._loop = asyncio.get_running_loop()

    @classmethod
    def open(
        cls,
        spec: HostTierSpec,
        *,
        directory: str,
        cluster: str,
        holder: str,
        on_changed: Callable[[], None],
        clock: Clock | None = None,
    ) -> HostTier:
        """Adopt the arena that a former pool node left, or make one; open the disk tier.

        ``holder``: who it is in the index, the same at each start. ``on_changed``: called when
        there is something new in ``events``. Raises ConfigError.
        """
        clock = clock or SystemClock()
        sizes: _Sizes = {
            "num_slots": spec.num_slots,
            "slot_bytes": spec.slot_bytes,
            "layout": spec.layout,
        }
        arena = HostArena.adopt(directory, cluster, holder, **sizes)
        adopted = arena is not None
        if arena is None:
            arena = HostArena.create(directory, cluster, holder, **sizes)
        pool = spec.pool

        def disk(tier: HostTier) -> DiskTier | None:
            if pool.disk_path is None:
                return None
            return DiskTier.open(
                pool.disk_path,
                layout=spec.layout,
                block_bytes=spec.slot_bytes,
                max_bytes=pool.disk_bytes,
                on_event=tier._on_disk_event,
                elsewhere=tier._is_here,
            )

        try:
            return cls(
                spec,
                arena,
                disk,
                KVEventLog(holder, int(clock.wall() * 1000)),
                adopted=adopted,
                on_changed=on_changed,
                clock=clock,
            )
        except BaseException:
            arena.close()
            if not adopted:
                arena.unlink()
            raise

    async def start(self) -> None:
        """Begin to write to lower tiers, and to end leases."""
        if self.external is not None:
            self.external.start()
        if self.disk is not None:
            disk = self.disk
            for key in self.table.snapshot_keys():
                if not disk.contains(key):
                    self.table.clear_on_disk([key])
        if self._demotion is not None:
            self._demoting = asyncio.create_task(self._demotion.run(), name="demotion")
        self._arm()

    async def stop(self, *, keep: bool = False) -> None:
        """End what runs, bring blocks to the disk (bounded), and let go of the arena.

        ``keep``: leave the file for another pool node to adopt.
        """
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._demoting is not None:
            self._demoting.cancel()
            await asyncio.wait([self._demoting])
        if self.promotion.remote is not None:
            await self.promotion.remote.close()
        if self.external is not None:
            await self.external.stop()
        if self.disk is not None and self._demotion is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_FLUSH_S):
                    await self._demotion.flush()
            await self._loop.run_in_executor(self._thread, self.disk.close)
        await self._loop.run_in_executor(None, self._thread.shutdown)
        self.arena.close()
        if not keep:
            self.arena.unlink()

    # Writers.

    def reserve(
        self,
        blocks: Sequence[BlockMeta],
        *,
        owner: str,
        lease_s: float,
        transient: bool = False,
        wanted: bool = False,
    ) -> list[Grant | Skip]:
        """See ``HostTable.reserve``."""
        granted = self.table.reserve(
            blocks,
            owner=owner,
            now=self.clock.now(),
            lease_s=lease_s,
            transient=transient,
            wanted=wanted,
        )
        self._changed()
        return granted

    def publish(
        self, filled: Sequence[tuple[int, int]], abandoned: Sequence[int] = ()
    ) -> list[bool]:
        """(ticket, checksum) of what is filled; which of these count."""
        now = self.clock.now()
        published = [self.table.publish(ticket, digest, now) for ticket, digest in filled]
        for ticket in abandoned:
            self.table.abandon(ticket, now)
        self._changed()
        return published

    # Readers.

    async def hold_prefix(
        self,
        keys: Sequence[BlockKey],
        *,
        owner: str,
        skip: int,
        lease_s: float,
        timeout_s: float,
        local_only: bool = False,
        tiers: Set[Tier] | None = None,
    ) -> tuple[int, list[HeldSlot]]:
        """Bring the longest prefix of ``keys`` up, and keep it; the hold, and the slots after
        ``skip``. (0, []) for nothing beyond these.

        ``local_only``: another machine asks; it must not be sent on. ``tiers``: to bring up from;
        all by default.
        """
        deadline = self.clock.now() + timeout_s
        here = self.table.match(keys, now=self.clock.now())
        if here:
            self.hot.count(keys[here - 1], here)
        where = [Tier.HOST] * here
        if here < len(keys):
            where += await self.promotion.bring_up(
                keys, here, deadline, local_only=local_only, tiers=tiers
            )
        if len(where) <= skip:
            return 0, []
        now = self.clock.now()
        hold = self.table.hold(keys, owner=owner, now=now, lease_s=lease_s, touch=False)
        if hold is None:
            return 0, []
        if len(hold.slots) <= skip:
            self.table.release(hold.hold_id, now)
            return 0, []
        where += [Tier.HOST] * (len(hold.slots) - len(where))
        if self.external is not None:
            # Asked for since they were stored.
            self.external.offer(keys[: len(hold.slots)])
        self._changed()
        slots = zip(
            *(hold.slots, hold.generations, hold.checksums, hold.num_tokens, hold.priorities),
            where,
            strict=False,
        )
        return hold.hold_id, [HeldSlot(*slot) for slot in slots][skip:]

    def renew(self, hold_ids: Sequence[int], lease_s: float) -> None:
        """Make holds last for another lease."""
        for hold_id in hold_ids:
            self.table.renew(hold_id, self.clock.now(), lease_s)

    def release(self, hold_ids: Sequence[int]) -> None:
        """End holds."""
        for hold_id in hold_ids:
            self.table.release(hold_id, self.clock.now())
        self._changed()

    def release_owner(self, owner: str) -> None:
        """A process ended."""
        self.table.release_owner(owner, self.clock.now())
        self._changed()

    async def verify(self, keys: Sequence[BlockKey]) -> None:
        """A reader found other bytes than were written: see for ourselves, and drop what is so."""
        arena = self.arena.blocks

        def damaged() -> list[BlockKey]:
            return [
                block.meta.key
                for block in blocks
                if checksum(arena.block(block.slot)) != block.checksum
                and arena.generation(block.slot) == block.generation
            ]

        blocks = self.table.stored(keys)
        for key in await self._loop.run_in_executor(None, damaged):
            self.drop(key)

    def drop(self, key: BlockKey) -> None:
        """A block did not verify: nobody finds it any more, nor what is below it."""
        self.counters.num_damaged += 1
        self.table.drop(key, self.clock.now())
        self._changed()

    def dump(self) -> str:
        """The accounts, for a person to read."""
        return self.table.dump(_DUMPED_LINES, now=self.clock.now())

    def snapshot(self) -> KVSnapshot:
        """Everything that this machine has."""
        blocks = [(Tier.HOST, self.table.snapshot_keys())]
        if self.disk is not None:
            blocks.append((Tier.DISK, self.disk.snapshot_keys()))
        events = self.events
        return KVSnapshot(events.holder, events.life, events.next_seq, tuple(blocks))

    def on_disk_thread(self, work: Callable[[], T]) -> asyncio.Future[T]:
        """Run what reads or writes the disk."""
        return self._loop.run_in_executor(self._thread, work)

    # Changes.

    def _on_event(self, event: KVEvent) -> None:
        self.events.append(event)
        if event.kind is KVEventKind.REMOVED and self._demotion is not None:
            self._demotion.evicted(event.keys)
        if (
            self.external is not None
            and event.kind is KVEventKind.STORED
            and self.spec.pool.write_back == "all"
        ):
            self.external.offer(event.keys)

    def _on_disk_event(self, event: KVEvent) -> None:
        """On the disk's thread."""
        self._loop.call_soon_threadsafe(self._took_disk_event, event)

    def _took_disk_event(self, event: KVEvent) -> None:
        if event.kind is KVEventKind.REMOVED:
            self.table.clear_on_disk(event.keys)
        self.events.append(event)
        self._on_changed()

    def _is_here(self, key: BlockKey) -> bool:
        """Whether the arena has a block; asked on the disk's thread. A guess is good enough: what
        hangs on a block that is gone is found out when it is asked for."""
        return self.table.has(key)

    def _changed(self) -> None:
        """After each change of the table: the timer, the disk, the index."""
        if self._stopped:
            return
        self._arm()
        if self._demotion is not None:
            self._demotion.changed()
        self._on_changed()

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        deadline = self.table.next_deadline()
        if deadline is not None:
            delay_s = max(0.0, deadline - self.clock.now())
            self._timer = self._loop.call_later(delay_s, self._expire)

    def _expire(self) -> None:
        self._timer = None
        self.table.expire(self.clock.now())
        self._changed()
