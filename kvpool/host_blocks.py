"""What happens to the host tier's blocks: they become ready, are evicted, lose their parents. Pure.

The rules that hold between slots, tickets and the order of eviction live here; who may ask for
what is ``host_table``'s.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from baton.core.blocks import BlockKey
from kvpool.frequency import FrequencySketch
from kvpool.host_eviction import EvictionOrder, Usage, demotable, evictable
from kvpool.host_leases import OwnedLeases
from kvpool.host_records import RecordFlag, RecordState
from kvpool.host_slots import Entry, EntryState, HostSlots
from kvpool.host_values import HostSettings, SkipReason
from kvpool.tiers import BlockMeta, KVEvent, KVEventKind, Tier

_LEASES_PER_LIFE = 1 << 32
_FORMER_LIFE = ""


class HostBlocks:
    """Slots, tickets, uses and events of one arena; ``events`` counts what statistics tell."""

    def __init__(
        self,
        table: npt.NDArray[np.void],
        generations: npt.NDArray[np.uint64],
        on_event: Callable[[KVEvent], None],
        settings: HostSettings,
    ) -> None:
        self.slots = HostSlots(table, generations)
        self.usage = Usage()
        self.sketch = FrequencySketch(self.slots.num_slots)
        self.evictions = EvictionOrder(evictable)
        self.demotions = EvictionOrder(demotable)
        self.leases = OwnedLeases()
        self.tickets: dict[int, Entry] = {}
        self.events: Counter[str] = Counter()
        self._settings = settings
        self._on_event = on_event
        self._next_lease = settings.life * _LEASES_PER_LIFE + 1

    def load(self, now: float) -> None:
        """Take over what the records say; once, before anything else."""
        slots, records = self.slots, self.slots.records
        kept = list(records.whole_chains())
        ready = {slot for slot, _ in kept}
        for slot, state in enumerate(records.states()):
            if slot in ready or state == RecordState.FREE:
                continue
            slots.generations[slot] += np.uint64(1)
            if state == RecordState.READY:
                records.clear(slot)
                continue
            # Said again: the state may have been none that we know.
            records.begin(slot)
            entry = slots.quarantine_record(slot)
            self.open_ticket(entry, _FORMER_LIFE, now + self._settings.quarantine_s)
        for slot, meta in kept:
            entry = slots.restore(slot, meta)
            slots.set_on_disk(entry, RecordFlag.ON_DISK in records.flags(slot))
        slots.free = [slot for slot in slots.free if slots.occupants[slot] is None]
        for slot in sorted(ready, key=records.order):
            restored = slots.occupants[slot]
            assert restored is not None
            self.usage.touch(restored, now)
            self.reconsider(restored)

    # Leases.

    def grant(self, owner: str, deadline: float) -> int:
        """Number of a new lease."""
        lease = self._next_lease
        self._next_lease += 1
        self.leases.grant(lease, owner, deadline)
        return lease

    def open_ticket(self, entry: Entry, owner: str, deadline: float) -> int:
        """Let ``owner`` write to the entry's slot, or assume that somebody does."""
        entry.ticket = self.grant(owner, deadline)
        self.tickets[entry.ticket] = entry
        return entry.ticket

    def close_ticket(self, entry: Entry) -> None:
        """Its owner will not write any more."""
        assert entry.ticket is not None
        self.leases.end(entry.ticket)
        del self.tickets[entry.ticket]
        entry.ticket = None

    # Blocks.

    def find(self, keys: Sequence[BlockKey]) -> list[Entry]:
        """The ready entries of ``keys``, up to the first that is not."""
        found: list[Entry] = []
        for key in keys:
            entry = self.slots.listed.get(key)
            if entry is None or entry.state is not EntryState.READY:
                break
            found.append(entry)
        return found

    def count_lookup(self, found: Sequence[Entry], num_keys: int, now: float) -> None:
        """A lookup of ``num_keys`` blocks found these."""
        for entry in found:
            self.sketch.add(entry.key)
            self.usage.touch(entry, now)
        self.events["hits"] += len(found)
        self.events["misses"] += num_keys - len(found)

    def reconsider(self, entry: Entry) -> None:
        """It may have become one to evict, or to write to disk."""
        self.evictions.push(entry)
        self.demotions.push(entry)

    def complete(self, entry: Entry, now: float) -> None:
        """It is ready, and so is what was written below it."""
        pending, chain = [entry], list[Entry]()
        while pending:
            ready = pending.pop()
            if chain and ready.parent is not chain[-1]:
                self._tell(KVEventKind.STORED, chain)
                chain = []
            chain.append(ready)
            self.slots.finish(ready)
            self.usage.touch(ready, now)
            self.reconsider(ready)
            self.events["published"] += 1
            pending += [e for e in ready.children.values() if e.state is EntryState.WRITTEN]
        self._tell(KVEventKind.STORED, chain)

    def make_room(
        self, meta: BlockMeta, parent: Entry | None, now: float, wanted: bool
    ) -> SkipReason | None:
        """Evict a block for a new one below ``parent``; or say why not."""
        if parent is not None:
            parent.pinned = True
        victim = self.evictions.peek()
        if parent is not None:
            parent.pinned = False
            self.reconsider(parent)
        if victim is None:
            return SkipReason.FULL
        if not self._admits(meta, victim, wanted):
            return SkipReason.NOT_ADMITTED
        self.usage.evicted(victim)
        self.events["evictions"] += 1
        self.events["demotions"] += victim.on_disk
        self.uproot(victim, now)
        return None

    def _admits(self, meta: BlockMeta, victim: Entry, wanted: bool) -> bool:
        """Higher priority always; else the one that is asked for more, the new one in a tie.

        Where somebody waits for the new one, it does not matter how many others ask for it.
        """
        if self._settings.admit_all or meta.priority > victim.priority:
            return True
        newcomer, resident = self.sketch.estimate(meta.key), self.sketch.estimate(victim.key)
        if meta.priority < victim.priority:
            # Not never, or a pool full of what nobody asks for any more would stay so.
            return newcomer > resident
        return wanted or newcomer >= resident

    def uproot(self, entry: Entry, now: float) -> int:
        """Unlist an entry and all below it; returns their number.

        What a ticket is open for is quarantined, what is held stays for its holders.
        """
        parent = entry.parent
        below = self.slots.below(entry)
        for gone in below:
            self.evictions.discard(gone)
            self.demotions.discard(gone)
            if gone.state is EntryState.READY:
                self._tell(KVEventKind.DEMOTED if gone.on_disk else KVEventKind.REMOVED, [gone])
            self.slots.unlist(gone)
            if gone.state is EntryState.FILLING and gone.ticket is not None:
                self.slots.move(gone, EntryState.QUARANTINED)
                start = max(now, self.leases.deadline(gone.ticket))
                self.leases.extend(gone.ticket, start + self._settings.quarantine_s)
                continue
            if gone.ticket is not None:
                self.close_ticket(gone)
            if gone.references:
                self.slots.move(gone, EntryState.DETACHED)
            else:
                self.slots.give_back(gone)
        if parent is not None:
            self.reconsider(parent)
        return len(below)

    def _tell(self, kind: KVEventKind, entries: Sequence[Entry]) -> None:
        keys = tuple(entry.key for entry in entries if not entry.transient)
        if keys:
            to = Tier.DISK if kind is KVEventKind.DEMOTED else None
            self._on_event(KVEvent(kind=kind, tier=Tier.HOST, keys=keys, to=to))

    def check(self) -> None:
        """Account for every slot and ticket; raises AssertionError with details."""
        self.slots.check()
        for ticket, ticketed in self.tickets.items():
            assert ticketed.ticket == ticket, f"ticket {ticket} is of slot {ticketed.slot}"
            assert ticket in self.leases, f"ticket {ticket} has no lease"
        for slot, entry in enumerate(self.slots.occupants):
            if entry is None:
                continue
            where = f"slot {slot}, {entry.state.value}"
            if entry.ticket is not None:
                assert self.tickets.get(entry.ticket) is entry, f"{where}: a stranger's ticket"
            needed = entry.state in (EntryState.FILLING, EntryState.QUARANTINED)
            allowed = needed or (entry.transient and entry.state is EntryState.READY)
            assert entry.ticket is None or allowed, f"{where}: it has a ticket"
            assert entry.ticket is not None or not needed, f"{where}: it has no ticket"
            assert entry in self.evictions or not evictable(entry), f"{where}: never evicted"
            assert entry in self.demotions or not demotable(entry), f"{where}: never demoted"
            if entry.state is EntryState.DETACHED:
                assert entry.references, f"{where}: held by nobody"
            if entry.transient and entry.state is EntryState.READY:
                assert entry.references or entry.ticket is not None, f"{where}: kept by nobody"
