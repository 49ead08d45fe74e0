"""The accounts of a machine's host tier: who may write, read, and what has to go. Pure.

The pool node calls this from one event loop; instances ask it for slots and copy the bytes
themselves. A block's way:

``reserve`` grants a slot under a *ticket*, a lease for its writer → ``publish`` says the bytes are
there → ``match`` and ``hold`` find it, as the next of a prefix that is here → it is evicted, its
children first.

What is ready is closed under prefixes. A block is reserved only below one that is ready or being
written; it counts when that one does, and goes with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt

from baton.core.blocks import BlockKey
from kvpool.host_accounts import check_holds, describe, take_statistics
from kvpool.host_blocks import HostBlocks
from kvpool.host_records import key_problem
from kvpool.host_slots import Entry, EntryState
from kvpool.host_values import (
    Grant,
    Hold,
    HostSettings,
    HostStatistics,
    Skip,
    SkipReason,
    StoredBlock,
)
from kvpool.tiers import BlockMeta, KVEvent


def _ignore(event: KVEvent) -> None:
    """Nobody listens."""


class HostTable:
    """Accounts for the slots of one arena.

    ``table``: ``[num_slots]`` of ``host_records.RECORD``; ``generations``: ``[num_slots]``, uint64,
    raised by one whenever a slot is handed out. Both may lie in shared memory, but nobody else
    writes to them. ``on_event`` is called while the table changes, and must not call it.
    """

    def __init__(
        self,
        table: npt.NDArray[np.void],
        generations: npt.NDArray[np.uint64],
        *,
        on_event: Callable[[KVEvent], None] = _ignore,
        settings: HostSettings | None = None,
        adopted_at: float | None = None,
    ) -> None:
        """For a new arena: raises ValueError if its records say otherwise.

        ``adopted_at``: see :meth:`rebuild`.
        """
        self._blocks = HostBlocks(table, generations, on_event, settings or HostSettings())
        self._holds: dict[int, list[Entry]] = {}
        if adopted_at is not None:
            self._blocks.load(adopted_at)
        elif any(self._blocks.slots.records.states()):
            raise ValueError("the arena was used before: take it over with HostTable.rebuild")

    @classmethod
    def rebuild(
        cls,
        table: npt.NDArray[np.void],
        generations: npt.NDArray[np.uint64],
        *,
        now: float,
        on_event: Callable[[KVEvent], None] = _ignore,
        settings: HostSettings | None = None,
    ) -> HostTable:
        """Take over what a former pool node left, killed at whatever point.

        Ready blocks with their whole prefix stay, without holds; there are no events for them
        (``snapshot_keys`` has them). All other slots that were in use get a new generation, and
        those that somebody was writing to are quarantined first. Which blocks are on disk is
        believed: say ``clear_on_disk`` for those that are not.
        """
        return cls(table, generations, on_event=on_event, settings=settings, adopted_at=now)

    # Writing.

    def reserve(
        self,
        blocks: Sequence[BlockMeta],
        *,
        owner: str,
        now: float,
        lease_s: float,
        transient: bool = False,
        wanted: bool = False,
    ) -> list[Grant | Skip]:
        """A slot for each block, or why not; in order, so parents come before children.

        The owner writes the bytes, and then calls :meth:`publish` or :meth:`abandon` before
        ``lease_s`` is over. Where all slots are taken, the least valuable block that nobody needs
        is evicted, if the new one is worth it: asked for at least as often, or of higher priority.
        ``wanted``: somebody waits for these (a promotion), so only priority counts.

        ``transient`` blocks are one handoff's: under random keys, without parents, not found by
        :meth:`match`. They stay until the last hold on them ends, or their ticket does while
        nobody holds them; publishing does not end it.

        Raises ValueError, and changes nothing, for a block or lease that cannot be.
        """
        _check_lease(lease_s)
        for meta in blocks:
            if (problem := key_problem(meta)) is not None:
                raise ValueError(problem)
        deadline, wanted = now + lease_s, wanted or transient
        return [self._reserve(meta, owner, now, deadline, transient, wanted) for meta in blocks]

    def _reserve(
        self,
        meta: BlockMeta,
        owner: str,
        now: float,
        deadline: float,
        transient: bool,
        wanted: bool,
    ) -> Grant | Skip:
        self._blocks.sketch.add(meta.key)
        known = self._blocks.slots.listed.get(meta.key)
        if known is not None:
            self._blocks.slots.raise_priority(known, meta.priority)
            if known.state is EntryState.READY:
                self._blocks.usage.touch(known, now)
            return Skip(SkipReason.KNOWN)
        parent = None
        if meta.parent is not None and not transient:
            parent = self._blocks.slots.listed.get(meta.parent)
            if parent is None or parent.transient:
                return Skip(SkipReason.NO_PARENT)
        if not self._blocks.slots.free:
            reason = self._blocks.make_room(meta, parent, now, wanted)
            if reason is not None:
                self._blocks.events[reason] += 1
                return Skip(reason)
        entry = self._blocks.slots.take(meta, parent, transient=transient)
        ticket = self._blocks.open_ticket(entry, owner, deadline)
        return Grant(ticket=ticket, slot=entry.slot, generation=entry.generation)

    def publish(self, ticket: int, checksum: int, now: float) -> bool:
        """The bytes are in the slot; False if the ticket is over, and they do not count.

        A ticket past its deadline counts until :meth:`expire` has ended it. ``checksum`` is what
        readers will check (64 bits); ValueError for a longer one.
        """
        if not 0 <= checksum < 1 << 64:
            raise ValueError(f"a checksum has 64 bits, got {checksum:#x}")
        entry = self._blocks.tickets.get(ticket)
        if entry is None:
            return False
        if entry.state is EntryState.READY:
            return entry.checksum == checksum
        if entry.state is EntryState.QUARANTINED:
            self.abandon(ticket, now)
            return False
        entry.checksum = checksum
        if not entry.transient:
            self._blocks.close_ticket(entry)
        if entry.parent is None or entry.parent.state is EntryState.READY:
            self._blocks.complete(entry, now)
        else:
            self._blocks.slots.move(entry, EntryState.WRITTEN)
        return True

    def abandon(self, ticket: int, now: float) -> bool:
        """The owner will not write (any more); False if the ticket is over."""
        entry = self._blocks.tickets.get(ticket)
        if entry is None:
            return False
        self._blocks.close_ticket(entry)
        if entry.state is EntryState.QUARANTINED:
            self._blocks.slots.give_back(entry)
        elif entry.state is EntryState.FILLING or not entry.references:
            self._blocks.uproot(entry, now)
        return True

    # Reading.

    def match(self, keys: Sequence[BlockKey], *, touch: bool = True, now: float) -> int:
        """How many blocks of a prompt, from the first on, are ready here.

        With ``touch`` they count as used, which keeps them here longer.
        """
        found = self._blocks.find(keys)
        count = next((n for n, entry in enumerate(found) if entry.transient), len(found))
        if touch:
            self._blocks.count_lookup(found[:count], len(keys), now)
        return count

    def hold(
        self,
        keys: Sequence[BlockKey],
        *,
        owner: str,
        now: float,
        lease_s: float,
        touch: bool = True,
    ) -> Hold | None:
        """Keep the ready blocks of ``keys``, from the first on, until :meth:`release`.

        None if the first is not here. Raises ValueError for a lease that cannot be.
        """
        _check_lease(lease_s)
        found = self._blocks.find(keys)
        if touch:
            self._blocks.count_lookup(
                [entry for entry in found if not entry.transient], len(keys), now
            )
        if not found:
            return None
        for entry in found:
            self._blocks.slots.refer(entry)
        hold_id = self._blocks.grant(owner, now + lease_s)
        self._holds[hold_id] = found
        return Hold(
            hold_id=hold_id,
            slots=tuple(entry.slot for entry in found),
            generations=tuple(entry.generation for entry in found),
            checksums=tuple(entry.checksum for entry in found),
            num_tokens=tuple(entry.num_tokens for entry in found),
            priorities=tuple(entry.priority for entry in found),
        )

    def release(self, hold_id: int, now: float) -> bool:
        """End a hold; False if there is none."""
        entries = self._holds.pop(hold_id, None)
        if entries is None:
            return False
        self._blocks.leases.end(hold_id)
        for entry in reversed(entries):
            if not self._blocks.slots.unrefer(entry):
                continue
            if entry.state is EntryState.DETACHED:
                self._blocks.slots.give_back(entry)
            elif entry.transient:
                self._blocks.uproot(entry, now)
            else:
                self._blocks.reconsider(entry)
        return True

    # Leases.

    def renew(self, lease: int, now: float, lease_s: float) -> bool:
        """Make a hold or a ticket last until ``now + lease_s`` at least; False if it is over.

        One past its deadline lasts until :meth:`expire` has ended it.
        """
        _check_lease(lease_s)
        entry = self._blocks.tickets.get(lease)
        if lease not in self._blocks.leases or (entry and entry.state is EntryState.QUARANTINED):
            return False
        self._blocks.leases.extend(lease, now + lease_s)
        return True

    def release_owner(self, owner: str, now: float) -> int:
        """A process has ended: so do its holds and tickets, whose number is returned.

        It writes no more, so nothing of it is quarantined.
        """
        leases = self._blocks.leases.owned_by(owner)
        for lease in leases:
            if not self.release(lease, now):
                self.abandon(lease, now)
        return len(leases)

    def expire(self, now: float) -> int:
        """End all leases that are over by now, and quarantines; returns the number of leases."""
        count = 0
        while (lease := self._blocks.leases.first_due(now)) is not None:
            entry = self._blocks.tickets.get(lease)
            if entry is not None and entry.state is EntryState.QUARANTINED:
                self.abandon(lease, now)
                continue
            count += 1
            if entry is None:
                self.release(lease, now)
            elif entry.state is EntryState.FILLING:
                self._blocks.uproot(entry, now)
            else:
                self.abandon(lease, now)
        self._blocks.events["expired"] += count
        return count

    def next_deadline(self) -> float | None:
        """When :meth:`expire` has something to do next; None if nothing is pending."""
        return self._blocks.leases.next_deadline()

    # Lower tiers.

    def demotable(self, count: int) -> list[StoredBlock]:
        """Up to ``count`` blocks that are not on disk, those that will be evicted soonest first.

        Only such as have everything below them on disk: mark these to get the next.
        """
        return [self._described(entry) for entry in self._blocks.demotions.lowest(count)]

    def stored(self, keys: Iterable[BlockKey]) -> list[StoredBlock]:
        """Those of ``keys`` that lookups find here, in their order."""
        entries = (self._blocks.slots.listed.get(key) for key in keys)
        return [
            self._described(entry)
            for entry in entries
            if entry is not None and entry.state is EntryState.READY and not entry.transient
        ]

    def _described(self, entry: Entry) -> StoredBlock:
        return StoredBlock(
            slot=entry.slot,
            generation=entry.generation,
            checksum=entry.checksum,
            meta=entry.meta,
            frequency=self._blocks.sketch.estimate(entry.key),
        )

    def mark_on_disk(self, slot: int, generation: int) -> bool:
        """The disk has the block too; False if it is no longer in that slot."""
        in_range = 0 <= slot < self._blocks.slots.num_slots
        entry = self._blocks.slots.occupants[slot] if in_range else None
        if (
            entry is None
            or entry.generation != generation
            or entry.state is not EntryState.READY
            or entry.transient
        ):
            return False
        self._blocks.slots.set_on_disk(entry, True)
        if entry.parent is not None:
            self._blocks.reconsider(entry.parent)
        return True

    def clear_on_disk(self, keys: Iterable[BlockKey]) -> None:
        """The disk has these no longer; keys that are not here do not matter."""
        for key in keys:
            entry = self._blocks.slots.listed.get(key)
            if entry is not None:
                self._blocks.slots.set_on_disk(entry, False)
                self._blocks.reconsider(entry)

    def drop(self, key: BlockKey, now: float) -> int:
        """Let a block (one that did not verify) and all below it be found no more.

        Slots that are held are free once they are not. Returns the number of blocks.
        """
        entry = self._blocks.slots.listed.get(key)
        return 0 if entry is None else self._blocks.uproot(entry, now)

    def has(self, key: BlockKey) -> bool:
        """Whether a block is ready here."""
        entry = self._blocks.slots.listed.get(key)
        return entry is not None and entry.state is EntryState.READY

    def snapshot_keys(self) -> tuple[BlockKey, ...]:
        """All keys that :meth:`match` finds, parents before children."""
        # Entries are listed after their parents, and unlisted before them.
        return tuple(
            key
            for key, entry in self._blocks.slots.listed.items()
            if entry.state is EntryState.READY and not entry.transient
        )

    # Accounts.

    def statistics(self) -> HostStatistics:
        """A frozen account of every slot."""
        return take_statistics(self._blocks, len(self._holds))

    def dump(self, limit: int, *, now: float) -> str:
        """All of it for a person to read; at most ``limit`` lines of each kind."""
        return describe(self._blocks, self._holds, limit, now)

    def check_integrity(self) -> None:
        """Account for every slot, lease and reference; raises AssertionError with details."""
        self._blocks.check()
        check_holds(self._blocks, self._holds)


def _check_lease(lease_s: float) -> None:
    if not lease_s > 0:
        raise ValueError(f"a lease must last, got {lease_s} s")
