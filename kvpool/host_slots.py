"""The slots of the host tier and the blocks in them: who is where, below whom. Pure.

Each slot is free, or has one *entry*. The entries that a lookup could find, now or when they are
written, are *listed* under their keys and form a forest: an entry is below its parent's, and only
a ready entry has ready ones below it. The records in the arena follow each change, so that
the next pool node finds what is ready here (``host_records`` has the order of stores).
"""

from __future__ import annotations

import dataclasses
import enum
from collections import Counter

import numpy as np
import numpy.typing as npt

from baton.core.blocks import BlockKey
from kvpool.host_records import Records, RecordState
from kvpool.tiers import BlockMeta


class EntryState(enum.Enum):
    """What is known of the bytes in a slot."""

    FILLING = "filling"
    """Under a ticket."""
    WRITTEN = "written"
    """Complete, below a block that is not: counts when that one does."""
    READY = "ready"
    QUARANTINED = "quarantined"
    """Not listed; a writer that was late may still write here."""
    DETACHED = "detached"
    """Not listed, but somebody holds it."""


LISTED = frozenset({EntryState.FILLING, EntryState.WRITTEN, EntryState.READY})


@dataclasses.dataclass(eq=False, slots=True)
class Entry:
    """The block in one slot. Entries are the same only if they are one object."""

    slot: int
    generation: int
    key: BlockKey
    parent: Entry | None
    depth: int
    num_tokens: int
    priority: int
    transient: bool
    """Of one handoff: found by holds only, and gone when the last of them ends."""
    state: EntryState = EntryState.FILLING
    ticket: int | None = None
    checksum: int = 0
    on_disk: bool = False
    references: int = 0
    children: dict[int, Entry] = dataclasses.field(default_factory=dict)
    """By slot, oldest first."""
    num_not_on_disk: int = 0
    """Of the children."""
    pinned: bool = False
    """About to get a child: not evicted for it."""
    uses: int = 0
    value: int = 0
    touched: int = 0
    used_at: float = 0.0

    @property
    def meta(self) -> BlockMeta:
        """As a value."""
        return BlockMeta(
            key=self.key,
            parent=None if self.parent is None else self.parent.key,
            depth=self.depth,
            num_tokens=self.num_tokens,
            priority=self.priority,
        )


def _depth_below(parent: Entry | None) -> int:
    return 0 if parent is None else parent.depth + 1


class HostSlots:
    """Entries by slot and by key. Starts with all slots free, whatever the records say."""

    def __init__(self, table: npt.NDArray[np.void], generations: npt.NDArray[np.uint64]) -> None:
        self.records = Records(table)
        self.num_slots = self.records.num_slots
        if generations.shape != (self.num_slots,) or generations.dtype != np.uint64:
            raise ValueError(
                f"generations must be uint64 of shape ({self.num_slots},), "
                f"got {generations.dtype} of shape {generations.shape}"
            )
        self.generations = generations
        self.listed: dict[BlockKey, Entry] = {}
        self.occupants: list[Entry | None] = [None] * self.num_slots
        self.free = list(range(self.num_slots - 1, -1, -1))
        self.counts: Counter[EntryState] = Counter()
        self.num_held = 0
        self.num_transient = 0
        self.num_on_disk = 0
        self._order = 0

    def take(self, meta: BlockMeta, parent: Entry | None, *, transient: bool) -> Entry:
        """Put a block that will be written into a free slot, below ``parent``."""
        slot = self.free.pop()
        self.records.begin(slot)
        self.generations[slot] += np.uint64(1)
        entry = Entry(
            slot=slot,
            generation=int(self.generations[slot]),
            key=meta.key,
            parent=parent,
            depth=meta.depth if transient else _depth_below(parent),
            num_tokens=meta.num_tokens,
            priority=meta.priority,
            transient=transient,
        )
        self.records.describe(slot, entry.meta, transient=transient)
        self.occupants[slot] = entry
        self.counts[entry.state] += 1
        self._list(entry)
        return entry

    def restore(self, slot: int, meta: BlockMeta) -> Entry:
        """Enter a ready block that the records have; its parent is here already."""
        parent = None if meta.parent is None else self.listed[meta.parent]
        entry = Entry(
            slot=slot,
            generation=int(self.generations[slot]),
            key=meta.key,
            parent=parent,
            depth=_depth_below(parent),
            num_tokens=meta.num_tokens,
            priority=meta.priority,
            transient=False,
            state=EntryState.READY,
            checksum=self.records.checksum(slot),
        )
        self._order = max(self._order, self.records.order(slot))
        self.occupants[slot] = entry
        self.counts[entry.state] += 1
        self._list(entry)
        return entry

    def quarantine_record(self, slot: int) -> Entry:
        """Somebody was writing to this slot when the records were left."""
        entry = Entry(
            slot=slot,
            generation=int(self.generations[slot]),
            key=b"",
            parent=None,
            depth=0,
            num_tokens=0,
            priority=0,
            transient=False,
            state=EntryState.QUARANTINED,
        )
        self.occupants[slot] = entry
        self.counts[entry.state] += 1
        return entry

    def finish(self, entry: Entry) -> None:
        """The block's bytes are there, and so are those of its prefix."""
        self._order += 1
        self.records.finish(entry.slot, entry.checksum, self._order)
        self.move(entry, EntryState.READY)

    def move(self, entry: Entry, state: EntryState) -> None:
        """Change an entry's state."""
        self.counts[entry.state] -= 1
        self.counts[state] += 1
        entry.state = state

    def unlist(self, entry: Entry) -> None:
        """No lookup finds it any more. It has no children now."""
        assert not entry.children, f"slot {entry.slot} is unlisted with blocks below it"
        if entry.state is EntryState.READY:
            self.records.clear(entry.slot)
        del self.listed[entry.key]
        self.num_transient -= entry.transient
        self.num_on_disk -= entry.on_disk
        if entry.parent is not None:
            del entry.parent.children[entry.slot]
            entry.parent.num_not_on_disk -= not entry.on_disk
            entry.parent = None
        entry.on_disk = False

    def give_back(self, entry: Entry) -> None:
        """The slot of an entry that is not listed is free."""
        self.records.clear(entry.slot)
        self.counts[entry.state] -= 1
        self.occupants[entry.slot] = None
        self.free.append(entry.slot)

    def refer(self, entry: Entry) -> None:
        """One more hold has it."""
        self.num_held += not entry.references
        entry.references += 1

    def unrefer(self, entry: Entry) -> bool:
        """One hold less; True if that was the last."""
        assert entry.references > 0, f"slot {entry.slot} is released once too often"
        entry.references -= 1
        self.num_held -= not entry.references
        return not entry.references

    def set_on_disk(self, entry: Entry, on_disk: bool) -> None:
        """Whether the disk has it too."""
        if entry.on_disk is on_disk:
            return
        change = 1 if on_disk else -1
        entry.on_disk = on_disk
        self.num_on_disk += change
        if entry.parent is not None:
            entry.parent.num_not_on_disk -= change
        self.records.set_on_disk(entry.slot, on_disk)

    def raise_priority(self, entry: Entry, priority: int) -> None:
        """A block that several requests want has the highest of their priorities."""
        if priority > entry.priority:
            entry.priority = priority
            self.records.set_priority(entry.slot, priority)

    def below(self, entry: Entry) -> list[Entry]:
        """The entry and all under it, children before their parents."""
        found: list[Entry] = []
        pending = [entry]
        while pending:
            found.append(pending.pop())
            pending.extend(found[-1].children.values())
        found.reverse()
        return found

    def _list(self, entry: Entry) -> None:
        self.listed[entry.key] = entry
        self.num_transient += entry.transient
        if entry.parent is not None:
            entry.parent.children[entry.slot] = entry
            entry.parent.num_not_on_disk += 1

    def check(self) -> None:
        """Account for every slot; raises AssertionError with details."""
        free = set(self.free)
        assert len(free) == len(self.free), "a slot is twice in the free list"
        empty = {slot for slot, entry in enumerate(self.occupants) if entry is None}
        assert free == empty, f"slots free and occupied, or neither: {sorted(free ^ empty)}"
        entries = [entry for entry in self.occupants if entry is not None]
        listed = {entry.key: entry for entry in entries if entry.state in LISTED}
        assert self.listed == listed, "keys lead to other entries than the slots have"
        assert len(listed) == sum(entry.state in LISTED for entry in entries), "a key is twice here"
        assert +self.counts == Counter(entry.state for entry in entries), "states are miscounted"
        held = sum(entry.references > 0 for entry in entries)
        assert self.num_held == held, f"{held} slots are held, {self.num_held} counted"
        transient = sum(entry.transient for entry in listed.values())
        assert self.num_transient == transient, f"{transient} transient, not {self.num_transient}"
        on_disk = sum(entry.on_disk for entry in entries)
        assert self.num_on_disk == on_disk, f"{on_disk} on disk, not {self.num_on_disk}"
        states = self.records.states()
        for slot in free:
            assert states[slot] == RecordState.FREE, f"record {slot} is not free"
        for slot, entry in enumerate(self.occupants):
            if entry is not None:
                assert entry.slot == slot, f"the entry of slot {slot} is of {entry.slot}"
                self._check(entry, RecordState(states[slot]))

    def _check(self, entry: Entry, recorded: RecordState) -> None:
        slot, state = entry.slot, entry.state
        assert entry.generation == self.generations[slot], f"slot {slot} has another generation"
        expected = {
            EntryState.READY: RecordState.READY,
            EntryState.DETACHED: RecordState.FREE,
        }.get(state, RecordState.FILLING)
        assert recorded is expected, f"slot {slot} is {state.value}, its record {recorded.name}"
        away = sum(not child.on_disk for child in entry.children.values())
        assert entry.num_not_on_disk == away, f"children of slot {slot} on disk are miscounted"
        for child in entry.children.values():
            assert child.parent is entry, f"slot {child.slot} is not below {slot}"
            assert self.listed.get(child.key) is child, f"slot {child.slot} is below, not listed"
        if state not in LISTED:
            assert not entry.children, f"slot {slot} is {state.value} with blocks below it"
            assert entry.parent is None, f"slot {slot} is {state.value} below a block"
            return
        assert not entry.pinned, f"slot {slot} was left pinned"
        assert self.records.meta(slot) == entry.meta, f"record {slot} is of another block"
        if state is EntryState.READY:
            assert self.records.checksum(slot) == entry.checksum, f"record {slot}: other checksum"
        if entry.parent is not None:
            ready = entry.parent.state is EntryState.READY
            assert ready or state is not EntryState.READY, f"slot {slot} is ready before its parent"
            assert not ready or state is not EntryState.WRITTEN, f"slot {slot} was forgotten"
            assert entry.parent.children.get(slot) is entry, f"slot {slot} is unknown to its parent"
