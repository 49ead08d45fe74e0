"""The host tier's accounts against a naive model of them, with crashes at any point."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvpool.host_records import RECORD
from kvpool.host_table import HostTable
from kvpool.host_values import HostSettings
from kvpool.tiers import BlockMeta, KVEvent, KVEventKind
from tests.kvpool.host_model import QUARANTINE_S, HostModel, Path, chain, every_path, key_of

PATHS = st.lists(st.integers(0, 1), min_size=1, max_size=4).map(tuple)
OWNERS = st.sampled_from("ab")
LEASES = st.integers(1, 5)
INDEXES = st.integers(0, 1000)


class HostMachine(HostModel, RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.spilled: list[bytes] = []
        self.told: set[bytes] = set()

    @initialize(num_slots=st.integers(1, 7), admit_all=st.booleans())
    def start(self, num_slots: int, admit_all: bool) -> None:
        self.num_slots, self.admit_all = num_slots, admit_all
        self.table = np.zeros(num_slots, dtype=RECORD)
        self.generations = np.zeros(num_slots, dtype=np.uint64)
        self.host = HostTable(
            self.table, self.generations, on_event=self.hear, settings=self.settings()
        )

    def settings(self) -> HostSettings:
        return HostSettings(life=self.life, quarantine_s=QUARANTINE_S, admit_all=self.admit_all)

    def hear(self, event: KVEvent) -> None:
        keys = set(event.keys)
        if event.kind is KVEventKind.STORED:
            assert not keys & self.told
            by_key = {key_of(block): block for block in every_path()}
            paths = [by_key[key] for key in event.keys]
            assert all(b[:-1] == a for a, b in itertools.pairwise(paths))
            self.told |= keys
        else:
            assert keys <= self.told
            [block] = [b for b in self.listed() if b.meta.key == event.keys[0]]
            assert (event.kind is KVEventKind.DEMOTED) is block.on_disk
            self.told -= keys

    # What may happen.

    @rule(
        path=PATHS, start=st.integers(0, 2), priority=st.integers(-1, 1), owner=OWNERS, lease=LEASES
    )
    def reserve(self, path: Path, start: int, priority: int, owner: str, lease: int) -> None:
        metas = [
            BlockMeta(
                key=key_of(path[: depth + 1]),
                parent=key_of(path[:depth]) if depth else None,
                depth=depth,
                num_tokens=16,
                priority=priority,
            )
            for depth in range(min(start, len(path) - 1), len(path))
        ]
        # One by one, so that events meet a model that is up to date; together is the same.
        for meta in metas:
            [answer] = self.host.reserve([meta], owner=owner, now=self.now, lease_s=lease)
            self.expect(meta, answer, owner, lease, False)

    @rule(priority=st.integers(-1, 1), owner=OWNERS, lease=LEASES, tokens=st.integers(1, 16))
    def spill(self, priority: int, owner: str, lease: int, tokens: int) -> None:
        key = key_of((2, len(self.spilled)))
        self.spilled.append(key)
        meta = BlockMeta(key=key, parent=None, depth=3, num_tokens=tokens, priority=priority)
        [answer] = self.host.reserve(
            [meta], owner=owner, now=self.now, lease_s=lease, transient=True
        )
        self.expect(meta, answer, owner, lease, True)

    @rule(path=PATHS, priority=st.integers(-1, 1), checksum=st.integers(0, 9))
    def store(self, path: Path, priority: int, checksum: int) -> None:
        """Reserved and written at once: most blocks are. Without it, nearly nothing is ready."""
        self.reserve(path, 0, priority, "a", 5)
        for block in [b for b in self.listed() if b.ticket is not None and b.owner == "a"]:
            assert block.ticket is not None
            self.publish_ticket(block.ticket, checksum)

    @rule(index=INDEXES, checksum=st.integers(0, 2**64 - 1))
    def publish(self, index: int, checksum: int) -> None:
        open_tickets = [b.ticket for b in self.blocks if b.ticket in self.numbers]
        some = self.numbers if index % 4 == 0 else [t for t in open_tickets if t is not None]
        if some:
            self.publish_ticket(some[index % len(some)], checksum)

    def publish_ticket(self, ticket: int, checksum: int) -> None:
        block = next((b for b in self.blocks if b.ticket == ticket), None)
        published = self.host.publish(ticket, checksum, self.now)
        if block is None:
            assert not published
        elif block.state == "quarantined":
            assert not published
            self.blocks.remove(block)
        elif block.state == "ready":
            assert published is (block.checksum == checksum)
        else:
            assert published
            block.checksum = checksum
            parent = None if block.transient else self.at(block.meta.parent)
            block.ticket = block.ticket if block.transient else None
            block.state = "written"
            if parent is None or parent.state == "ready":
                self.become_ready(block)

    @rule(index=INDEXES)
    def abandon(self, index: int) -> None:
        if not self.numbers:
            return
        ticket = self.numbers[index % len(self.numbers)]
        block = next((b for b in self.blocks if b.ticket == ticket), None)
        assert self.host.abandon(ticket, self.now) is (block is not None)
        if block is not None:
            self.give_up(block)

    @rule(path=PATHS, touch=st.booleans())
    def match(self, path: Path, touch: bool) -> None:
        found = self.prefix(chain(path))
        assert self.host.match(chain(path), touch=touch, now=self.now) == len(found)
        for block in found if touch else ():
            self.touch(block)

    @rule(path=PATHS, spilled=st.booleans(), index=INDEXES, owner=OWNERS, lease=LEASES)
    def hold(self, path: Path, spilled: bool, index: int, owner: str, lease: int) -> None:
        keys = self.spilled[index % len(self.spilled) :][:2] if spilled and self.spilled else []
        keys = keys or chain(path)
        found = self.prefix(keys)
        hold = self.host.hold(keys, owner=owner, now=self.now, lease_s=lease)
        for block in found:
            if not block.transient:
                self.touch(block)
        if not found:
            assert hold is None
            return
        assert hold is not None
        assert hold.hold_id not in self.numbers
        assert hold.slots == tuple(b.slot for b in found)
        assert hold.generations == tuple(b.generation for b in found)
        assert hold.checksums == tuple(b.checksum for b in found)
        assert hold.num_tokens == tuple(b.meta.num_tokens for b in found)
        self.numbers.append(hold.hold_id)
        self.holds[hold.hold_id] = (owner, found, self.now + lease)

    @rule(index=INDEXES)
    def release(self, index: int) -> None:
        if not self.numbers:
            return
        number = self.numbers[index % len(self.numbers)]
        known = number in self.holds
        assert self.host.release(number, self.now) is known
        if known:
            self.let_go(number)

    @rule(index=INDEXES, lease=LEASES)
    def renew(self, index: int, lease: int) -> None:
        if not self.numbers:
            return
        number = self.numbers[index % len(self.numbers)]
        block = next(
            (b for b in self.blocks if b.ticket == number and b.state != "quarantined"), None
        )
        known = number in self.holds or block is not None
        assert self.host.renew(number, self.now, lease) is known
        if number in self.holds:
            owner, held, deadline = self.holds[number]
            self.holds[number] = (owner, held, max(deadline, self.now + lease))
        elif block is not None:
            block.deadline = max(block.deadline, self.now + lease)

    @rule(owner=OWNERS)
    def owner_ends(self, owner: str) -> None:
        mine = [hold for hold, (whose, _, _) in self.holds.items() if whose == owner]
        tickets = [b for b in self.blocks if b.owner == owner and b.ticket is not None]
        assert self.host.release_owner(owner, self.now) == len(mine) + len(tickets)
        for number in sorted([*mine, *(b.ticket or 0 for b in tickets)]):
            block = next((b for b in self.blocks if b.ticket == number), None)
            if number in self.holds:
                self.let_go(number)
            elif block is not None:
                self.give_up(block)

    @rule(seconds=st.integers(0, 3))
    def time_passes(self, seconds: int) -> None:
        self.now += seconds
        count = self.host.expire(self.now)
        expired = 0
        while due := self.due():
            deadline, number, block = min(due, key=lambda item: item[:2])
            assert deadline <= self.now
            if block is None:
                self.let_go(number)
            elif block.state == "quarantined":
                self.blocks.remove(block)
                continue
            elif block.state == "filling":
                self.remove(block, busy=True)
            else:
                self.give_up(block)
            expired += 1
        assert count == expired

    @rule(path=PATHS)
    def drop(self, path: Path) -> None:
        block = self.at(key_of(path))
        before = len(self.listed())
        count = self.host.drop(key_of(path), self.now)
        if block is not None:
            self.remove(block, busy=True)
        assert count == before - len(self.listed())

    @rule(count=st.integers(1, 4), mark=st.booleans(), stale=st.booleans())
    def demote(self, count: int, mark: bool, stale: bool) -> None:
        able = [
            b
            for b in self.blocks
            if b.state == "ready"
            and not b.transient
            and not b.on_disk
            and all(child.on_disk for child in self.children(b))
        ]
        able.sort(key=lambda b: (b.meta.priority, b.value, b.touched))
        answer = self.host.demotable(count)
        expected = [(b.slot, b.generation, b.checksum, b.meta) for b in able[:count]]
        assert [(d.slot, d.generation, d.checksum, d.meta) for d in answer] == expected
        for block in able[:count] if mark else ():
            assert self.host.mark_on_disk(block.slot, block.generation + stale) == (not stale)
            block.on_disk = not stale

    @rule(path=PATHS)
    def disk_forgets(self, path: Path) -> None:
        self.host.clear_on_disk([key_of(path)])
        block = self.at(key_of(path))
        if block is not None:
            block.on_disk = False

    @rule()
    def crash(self) -> None:
        """The pool node is killed: what is left is the file."""
        self.life += 1
        before = self.generations.copy()
        self.table, self.generations = self.table.copy(), self.generations.copy()
        self.holds.clear()
        self.floor = self.sequence = 0
        raised = {b.slot for b in self.blocks if b.state in ("filling", "written", "quarantined")}
        for block in list(self.blocks):
            if block.slot in raised:
                block.state, block.deadline = "quarantined", self.now + QUARANTINE_S
                block.owner, block.ticket = "", -1 - block.slot
                block.generation += 1
            elif block.transient or block.state == "detached":
                self.blocks.remove(block)
                raised |= {block.slot} if block.state == "ready" else set()
        for block in sorted(self.listed(), key=lambda b: b.order):
            block.uses = 0
            self.touch(block)
        self.orders = max((b.order for b in self.listed()), default=0)
        self.host = HostTable.rebuild(
            self.table,
            self.generations,
            now=self.now,
            on_event=self.hear,
            settings=self.settings(),
        )
        self.told = set(self.host.snapshot_keys())
        for slot in range(self.num_slots):
            assert self.generations[slot] - before[slot] == (slot in raised)

    # What always holds.

    @invariant()
    def accounts_agree(self) -> None:
        self.host.check_integrity()
        numbers = self.host.statistics()
        states = [b.state for b in self.blocks]
        held = [b for b in self.blocks if self.references(b)]
        assert numbers.num_free == self.num_slots - len(self.blocks)
        assert numbers.num_filling == states.count("filling") + states.count("written")
        assert numbers.num_quarantined == states.count("quarantined")
        assert numbers.num_held == len(held)
        assert numbers.num_ready == states.count("ready")
        assert numbers.num_transient == sum(b.transient for b in self.listed())
        assert numbers.num_on_disk == sum(b.on_disk for b in self.listed())
        assert numbers.num_holds == len(self.holds)
        places = numbers.num_free + numbers.num_filling + numbers.num_quarantined
        assert places + numbers.num_idle + numbers.num_held == self.num_slots
        deadlines = [deadline for deadline, _, _ in self.leases()]
        assert self.host.next_deadline() == min(deadlines, default=None)

    @invariant()
    def what_is_ready_is_closed_under_prefixes(self) -> None:
        keys = self.host.snapshot_keys()
        ready = [b for b in self.listed() if b.state == "ready" and not b.transient]
        assert set(keys) == {b.meta.key for b in ready} == self.told
        assert len(keys) == len(ready)
        for block in ready:
            parent = block.meta.parent
            assert parent is None or keys.index(parent) < keys.index(block.meta.key)
            assert self.host.has(block.meta.key)

    @invariant()
    def held_bytes_are_not_given_away(self) -> None:
        for _, held, _ in self.holds.values():
            assert all(self.generations[b.slot] == b.generation for b in held)

    def teardown(self) -> None:
        for owner in "ab":
            self.host.release_owner(owner, self.now)
        self.host.expire(self.now + 100)
        self.host.check_integrity()
        numbers = self.host.statistics()
        assert (numbers.num_held, numbers.num_filling, numbers.num_quarantined) == (0, 0, 0)
        assert (numbers.num_holds, numbers.num_tickets, numbers.num_transient) == (0, 0, 0)
        assert numbers.num_free + numbers.num_ready == self.num_slots


TestHostMachine = HostMachine.TestCase
TestHostMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
