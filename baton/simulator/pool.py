"""The KV pool in virtual time: the product's own accounts and index, and links that take time.

Each machine has a host tier, whose slots the product's ``HostTable`` accounts for; all instances of
the machine share it. An instance asks it at admission for a longer prefix than its own cache has,
fetches where that is predicted to be faster than computing, and offers what it has completed, in
batches, as ``baton/instance/write_back.py`` does. What a machine lacks may come from another one's
host tier. Instances and machines tell the controller's ``KVIndex`` of their changes a moment late,
so placement knows what it would know in the cluster.

Made simpler than it is: nobody dies, so leases end only where their owner ends them; blocks from
another machine enter the host tier when they are asked for, and whoever asked waits until they
would be there.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from baton.core.blocks import BlockKey
from baton.core.errors import ConfigError
from baton.engine.events import CacheChanged, PrefixComplete, Reserved
from controller.block_directory import BlockDirectory
from controller.events import MemberInfo, MemberSeen, PrefixMatch
from kvpool.event_log import Gap, KVEventLog
from kvpool.host_records import RECORD
from kvpool.host_table import HostTable
from kvpool.host_values import Grant, Hold, SkipReason
from kvpool.tiers import BlockMeta, KVEvent, KVEventKind, KVSnapshot, Tier

if TYPE_CHECKING:
    from baton.simulator.fleet import Fleet
    from baton.simulator.instances import SimInstance
    from baton.simulator.outcome import SimRequest

_LEASE_S = 1e9
_MAX_EVENTS = 1024
_WRITE_BATCH = 32
_MAX_KNOWN = 65536
"""As ``baton/instance/write_back.py``."""


@dataclasses.dataclass(frozen=True, slots=True)
class PoolSettings:
    """What there is below the instances' own caches."""

    host_tokens: int
    """Of each machine's host tier, in tokens; 0: there is none."""
    instances_per_node: int = 8
    report_s: float = 0.1
    """How much later the controller hears of changes (kvpool/block_reporter.py)."""

    def __post_init__(self) -> None:
        if self.host_tokens < 0 or self.instances_per_node < 1 or self.report_s < 0:
            raise ConfigError(f"a pool of these sizes cannot be: {self}", param="pool")


# The cluster's side.


class _Holder:
    """Tells the index of one holder, a moment late."""

    def __init__(self, pool: SimPool, name: str) -> None:
        self.log = KVEventLog(name, 1)
        self._pool = pool
        self._told = 0
        self._telling = False
        pool.directory.index.replace(KVSnapshot(name, 1, 0, ()))

    def changed(self) -> None:
        """There is something new in the log."""
        if not self._telling:
            self._telling = True
            fleet = self._pool.fleet
            later = fleet.now + self._pool.settings.report_s + fleet.config.message_s
            fleet.at(later, self._tell)

    def _tell(self) -> None:
        self._telling = False
        while (batch := self.log.batch_after(self._told, _MAX_EVENTS)) is not None:
            assert not isinstance(batch, Gap), "more changes at a time than the log keeps"
            self._pool.directory.index.apply(batch)
            self._told = batch.next_seq


class SimNode:
    """A machine's host tier."""

    def __init__(self, pool: SimPool, index: int, num_slots: int) -> None:
        self.name = f"pool-{index}"
        self.num_slots = num_slots
        self.holder = _Holder(pool, self.name)
        self._pool = pool
        self.table = HostTable(
            np.zeros(num_slots, RECORD),
            np.zeros(num_slots, np.uint64),
            on_event=self.holder.log.append,
        )
        self.remote_free_s = 0.0
        """When what comes from other machines is here."""

    def find(self, keys: Sequence[BlockKey], now: float) -> tuple[int, int]:
        """Blocks of a prompt that are here, and that are here or on another machine, as the index
        knows: it is asked only where something is missing here."""
        here = self.table.match(keys, now=now)
        if here == len(keys) or len(self._pool.nodes) < 2:
            return here, here
        peer = self._peer(keys, here)
        return here, max(here, peer.table.match(keys, now=now)) if peer is not None else here

    def bring(self, keys: Sequence[BlockKey], start: int, end: int, now: float) -> int:
        """Blocks from ``start`` on come from another machine: as many as there is room for."""
        metas = [block_meta(keys, i, self._pool.block_size) for i in range(start, end)]
        granted = self.table.reserve(metas, owner="remote", now=now, lease_s=_LEASE_S, wanted=True)
        count = 0
        for grant in granted:
            if isinstance(grant, Grant):
                self.table.publish(grant.ticket, 0, now)
            elif grant.reason is not SkipReason.KNOWN:
                break
            count += 1
        self.holder.changed()
        return count

    def _peer(self, keys: Sequence[BlockKey], here: int) -> SimNode | None:
        for match in self._pool.directory.index.lookup(keys):
            if match.num_blocks <= here:
                return None
            peer = self._pool.nodes.get(match.holder)
            if peer is not None and peer is not self:
                return peer
        return None


class SimPool:
    """All host tiers, and what the controller knows of them and of the instances' caches."""

    def __init__(self, fleet: Fleet, settings: PoolSettings, num_instances: int) -> None:
        """Before the fleet's instances are made."""
        self.fleet = fleet
        self.settings = settings
        self.block_size = fleet.config.profile.block_size
        self.directory = BlockDirectory()
        self.nodes: dict[str, SimNode] = {}
        self._sides: list[SimPoolSide] = []
        num_slots = settings.host_tokens // self.block_size
        if num_slots:
            for index in range(-(-num_instances // settings.instances_per_node)):
                node = SimNode(self, index, num_slots)
                self.nodes[node.name] = node
                member = MemberInfo("pool", node.name, node_id=f"node-{index}")
                fleet.core.on_event(MemberSeen(-1 - index, member), 0.0)

    def node_id_of(self, index: int) -> str:
        """The machine of the fleet's instance with that number."""
        return f"node-{index // self.settings.instances_per_node}"

    def join(self, instance: SimInstance, index: int) -> SimPoolSide:
        """An instance's side."""
        node = self.nodes.get(f"pool-{index // self.settings.instances_per_node}")
        side = SimPoolSide(self, instance, node)
        self._sides.append(side)
        return side

    def fetched_tokens(self) -> dict[str, int]:
        """That instances took from the pool, by the tier they came from."""
        total: collections.Counter[str] = collections.Counter()
        for side in self._sides:
            total.update(side.fetched_tokens)
        return {str(tier): count for tier, count in total.items()}

    def prefix_of(self, request: SimRequest) -> tuple[PrefixMatch, ...]:
        """What a placement is told, as the controller's servicer does it."""
        keys = self.lookup_keys(request)
        return self.directory.prefix_lookup(self.block_size)(keys)

    def lookup_keys(self, request: SimRequest) -> tuple[BlockKey, ...]:
        """Those that a lookup may find: the last token is always computed."""
        return request.keys[: (request.item.num_prompt_tokens - 1) // self.block_size]

    def check_empty(self) -> None:
        """Nothing is fetched, held or written, and all accounts are right."""
        assert not any(side.num_open for side in self._sides), "somebody still waits for a prefix"
        for node in self.nodes.values():
            node.table.check_integrity()
            statistics = node.table.statistics()
            left = (statistics.num_holds, statistics.num_tickets, statistics.num_filling)
            assert left == (0, 0, 0), f"{node.name}: holds, tickets, slots being filled: {left}"


# An instance's side.


@dataclasses.dataclass(slots=True)
class _Fetch:
    keys: tuple[BlockKey, ...]
    hold: Hold
    num_here: int
    """Blocks that the machine had itself."""
    ready_s: float
    """When the rest has come from another one."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Wish:
    keys: tuple[BlockKey, ...]
    depth: int
    block: int
    generation: int
    priority: int


class SimPoolSide:
    """Fetches for one instance, writes back what it completed, tells of its cache."""

    def __init__(self, pool: SimPool, instance: SimInstance, node: SimNode | None) -> None:
        self._pool = pool
        self._instance = instance
        self._node = node
        self._holder = _Holder(pool, instance.name)
        self._cost = pool.fleet.config.profile.cost
        self._fetches: dict[str, _Fetch] = {}
        self._fetch_free_s = 0.0
        self._wishes: collections.deque[_Wish] = collections.deque()
        self._known: collections.OrderedDict[BlockKey, None] = collections.OrderedDict()
        """Keys that the pool was seen to have; a guess that saves questions."""
        self._writing = False
        self.fetched_tokens: collections.Counter[str] = collections.Counter()
        """By the tier they came from."""
        self.num_recomputed = 0
        """Prompts that the pool had more of, and that were faster computed."""
        self.num_written = 0
        """Blocks."""

    @property
    def num_open(self) -> int:
        """Sequences that wait for a prefix."""
        return len(self._fetches)

    # Fetching.

    def ask(self, request: SimRequest, name: str) -> bool:
        """Whether a sequence is to be submitted with ``fetch``; then it is, and nothing else."""
        node, now, size = self._node, self._pool.fleet.now, self._pool.block_size
        keys = self._pool.lookup_keys(request)
        if node is None or not keys:
            return False
        num_cached = self._instance.engine.num_cached_blocks(list(keys))
        if num_cached == len(keys):
            return False
        num_here, num_found = node.find(keys, now)
        if self._known:
            for key in keys[num_found:]:
                self._known.pop(key, None)
        if num_found <= num_cached:
            return False
        num_prompt, cost = request.item.num_prompt_tokens, self._cost
        num_host = max(0, num_here - num_cached)
        num_remote = num_found - max(num_here, num_cached)
        remote_s = cost.fetch_s(Tier.REMOTE, num_remote * size)
        ready_s = max(now, node.remote_free_s) + remote_s if num_remote else now
        fetch_s = max(self._fetch_free_s, ready_s) - now + cost.fetch_s(Tier.HOST, num_host * size)
        saved_s = cost.prefill_s(num_prompt, num_cached * size)
        saved_s -= cost.prefill_s(num_prompt, num_found * size)
        if fetch_s >= saved_s and fetch_s - self._queue_s() >= saved_s:
            self.num_recomputed += 1
            return False
        if num_remote:
            num_found = num_here + node.bring(keys, num_here, num_found, now)
            node.remote_free_s = ready_s
        hold = node.table.hold(keys[:num_found], owner=name, now=now, lease_s=_LEASE_S, touch=False)
        if hold is None or len(hold.slots) <= num_cached:
            if hold is not None:
                node.table.release(hold.hold_id, now)
            return False
        self._fetches[name] = _Fetch(keys, hold, num_here, ready_s)
        return True

    def _queue_s(self) -> float:
        """Until what waits here is computed: a fetch goes on meanwhile."""
        num_tokens, costs = self._instance.load().num_waiting_tokens, self._cost.prefill
        num_steps = -(-num_tokens // self._pool.fleet.config.profile.max_num_batched_tokens)
        return num_tokens * costs.item_s + num_steps * costs.overhead_s

    def reserved(self, event: Reserved) -> bool:
        """The engine has blocks for a sequence. False: it does not fetch."""
        fetch = self._fetches.get(event.request_id)
        if fetch is None:
            return False
        now, size = self._pool.fleet.now, self._pool.block_size
        num_cached, num_held = event.num_cached_tokens // size, len(fetch.hold.slots)
        num_host = max(0, min(num_held, fetch.num_here) - num_cached)
        num_remote = max(0, num_held - max(fetch.num_here, num_cached))
        if not num_host and not num_remote:
            # Cached here by now.
            self._pool.fleet.at(now, self._fetched, event.request_id, 0)
            return True
        begin_s = max(now, self._fetch_free_s, fetch.ready_s if num_remote else 0.0)
        self._fetch_free_s = begin_s + self._cost.fetch_s(Tier.HOST, num_host * size)
        self.fetched_tokens[Tier.HOST] += num_host * size
        self.fetched_tokens[Tier.REMOTE] += num_remote * size
        self._pool.fleet.at(self._fetch_free_s, self._fetched, event.request_id, num_held * size)
        return True

    def _fetched(self, name: str, num_tokens: int) -> None:
        fetch = self._fetches.pop(name)
        assert self._node is not None
        self._node.table.release(fetch.hold.hold_id, self._pool.fleet.now)
        self._instance.touch()
        self._instance.engine.fetched(name, num_tokens)
        self._instance.wake()

    # Writing back.

    def completed(self, event: PrefixComplete) -> None:
        """A sequence is done; its blocks are cached."""
        if self._node is None:
            return
        for depth, key in enumerate(event.keys):
            if key not in self._known:
                block, generation = event.blocks[depth], event.generations[depth]
                self._wishes.append(_Wish(event.keys, depth, block, generation, event.priority))
        if self._wishes and not self._writing:
            self._writing = True
            self._pool.fleet.at(self._pool.fleet.now, self._write)

    def _write(self) -> None:
        """Ask for slots for the next batch, and copy what is wanted."""
        node, fleet, size = self._node, self._pool.fleet, self._pool.block_size
        assert node is not None
        moves: list[tuple[_Wish, Grant]] = []
        while self._wishes and not moves:
            count = min(_WRITE_BATCH, len(self._wishes))
            wishes = [self._wishes.popleft() for _ in range(count)]
            granted = node.table.reserve(
                [block_meta(w.keys, w.depth, size, w.priority) for w in wishes],
                owner=self._instance.name,
                now=fleet.now,
                lease_s=_LEASE_S,
            )
            for wish, grant in zip(wishes, granted, strict=True):
                if isinstance(grant, Grant):
                    moves.append((wish, grant))
                elif grant.reason is SkipReason.KNOWN:
                    self._known[wish.keys[wish.depth]] = None
                elif grant.reason is SkipReason.NO_PARENT:
                    # The pool let go of something before it: next time the whole is offered.
                    for key in wish.keys[: wish.depth]:
                        self._known.pop(key, None)
        if not moves:
            self._writing = False
            return
        seconds = self._cost.fetch_s(Tier.HOST, len(moves) * size)
        fleet.at(fleet.now + seconds, self._written, moves)

    def _written(self, moves: list[tuple[_Wish, Grant]]) -> None:
        node, now = self._node, self._pool.fleet.now
        assert node is not None
        lost: set[BlockKey] = set()
        generations = self._instance.generations.data
        for wish, grant in moves:
            key = wish.keys[wish.depth]
            parent = wish.keys[wish.depth - 1] if wish.depth else None
            evicted = generations[wish.block] != wish.generation
            if evicted or parent in lost:
                # What hangs on a block that is not there goes with it.
                lost.add(key)
                node.table.abandon(grant.ticket, now)
            elif node.table.publish(grant.ticket, 0, now):
                self.num_written += 1
                self._known[key] = None
        while len(self._known) > _MAX_KNOWN:
            self._known.popitem(last=False)
        node.holder.changed()
        self._write()

    # Telling.

    def cache_changed(self, event: CacheChanged) -> None:
        """Blocks entered or left the instance's own cache."""
        for entered, key in event.changes:
            kind = KVEventKind.STORED if entered else KVEventKind.REMOVED
            self._holder.log.append(KVEvent(kind, Tier.DEVICE, (key,)))
        self._holder.changed()


def block_meta(
    keys: Sequence[BlockKey], depth: int, block_size: int, priority: int = 0
) -> BlockMeta:
    """Of the block at ``depth``."""
    parent = keys[depth - 1] if depth else None
    return BlockMeta(keys[depth], parent, depth, block_size, priority)
