"""The host tier's accounts: added up, in words for a person, and checked."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice

from kvpool.host_blocks import HostBlocks
from kvpool.host_eviction import rank_of
from kvpool.host_leases import OwnedLeases
from kvpool.host_slots import Entry, EntryState
from kvpool.host_values import HostStatistics, SkipReason

Holds = Mapping[int, Sequence[Entry]]
"""By number."""


def take_statistics(blocks: HostBlocks, num_holds: int) -> HostStatistics:
    """A frozen account of every slot."""
    slots, counts, events = blocks.slots, blocks.slots.counts, blocks.events
    resident = counts[EntryState.READY] + counts[EntryState.DETACHED]
    return HostStatistics(
        num_slots=slots.num_slots,
        num_free=len(slots.free),
        num_filling=counts[EntryState.FILLING] + counts[EntryState.WRITTEN],
        num_quarantined=counts[EntryState.QUARANTINED],
        num_idle=resident - slots.num_held,
        num_held=slots.num_held,
        num_ready=counts[EntryState.READY],
        num_transient=slots.num_transient,
        num_on_disk=slots.num_on_disk,
        num_tickets=len(blocks.tickets),
        num_holds=num_holds,
        num_published=events["published"],
        num_evictions=events["evictions"],
        num_demotions=events["demotions"],
        num_not_admitted=events[SkipReason.NOT_ADMITTED],
        num_full=events[SkipReason.FULL],
        num_hits=events["hits"],
        num_misses=events["misses"],
        num_expired=events["expired"],
    )


def check_holds(blocks: HostBlocks, holds: Holds) -> None:
    """Account for every lease and reference; raises AssertionError with details."""
    both = blocks.tickets.keys() & holds.keys()
    assert not both, f"numbers of tickets and of holds: {both}"
    missing = [hold for hold in holds if hold not in blocks.leases]
    assert not missing, f"holds without a lease: {missing}"
    num_leases = len(blocks.tickets) + len(holds)
    assert len(blocks.leases) == num_leases, f"{len(blocks.leases)} leases for {num_leases}"
    for held in holds.values():
        for entry in held:
            occupant = blocks.slots.occupants[entry.slot]
            assert occupant is entry, f"slot {entry.slot} was given away while it was held"
    references = Counter(entry.slot for held in holds.values() for entry in held)
    for slot, occupant in enumerate(blocks.slots.occupants):
        counted = 0 if occupant is None else occupant.references
        assert counted == references[slot], (
            f"slot {slot} counts {counted} references, holds say {references[slot]}"
        )


def describe(blocks: HostBlocks, holds: Holds, limit: int, now: float) -> str:
    """Counts, then the holds, then the slots: those of most value first."""
    leases = blocks.leases
    numbers = dataclasses.asdict(take_statistics(blocks, len(holds)))
    lines = [", ".join(f"{name[4:]} {number}" for name, number in numbers.items())]
    lines.append(f"holds: {len(holds)}")
    lines += _first(
        limit,
        len(holds),
        (
            f"  hold {hold} of {leases.owner(hold)}: {len(entries)} blocks from slot"
            f" {entries[0].slot}, {leases.deadline(hold) - now:.1f} s left"
            for hold, entries in holds.items()
        ),
    )
    entries = [entry for entry in blocks.slots.occupants if entry is not None]
    entries.sort(key=rank_of, reverse=True)
    lines.append(f"slots in use: {len(entries)}")
    lines += _first(limit, len(entries), (_line(entry, leases, now) for entry in entries))
    return "\n".join(lines)


def _first(limit: int, count: int, lines: Iterable[str]) -> list[str]:
    first = list(islice(lines, limit))
    return first if count <= limit else [*first, f"  and {count - limit} more"]


def _line(entry: Entry, leases: OwnedLeases, now: float) -> str:
    words = [f"  slot {entry.slot} generation {entry.generation}: {entry.state.value}"]
    if entry.state is not EntryState.QUARANTINED:
        words.append(f"key {entry.key.hex()[:12]} depth {entry.depth} tokens {entry.num_tokens}")
        words.append(f"priority {entry.priority} uses {entry.uses}")
    if entry.state is EntryState.READY:
        words.append(f"used {now - entry.used_at:.1f} s ago")
    if entry.ticket is not None:
        left = leases.deadline(entry.ticket) - now
        words.append(
            f"ticket of {leases.owner(entry.ticket) or 'a former life'}, {left:.1f} s left"
        )
    if entry.references:
        words.append(f"held {entry.references} times")
    words += [name for name in ("transient", "on_disk") if getattr(entry, name)]
    return ", ".join(words)
