"""Which block the host tier gives up next: by priority, then frequency, then recency. Pure.

Frequency ages without a clock: a block's *value* is the number of its uses, counted from the value
of what was evicted last. So one that was popular long ago is overtaken by newer ones, and values
only grow. That makes a heap with one entry per block enough: an entry that is out of date ranks
its block too low, so it comes up early and is put right.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

from kvpool.host_slots import Entry, EntryState

_MAX_USES = 15
_SPARE = 64

Rank = tuple[int, int, int]
"""(priority, value, touched); no two entries have the same ``touched``."""


class Usage:
    """Counts uses of entries."""

    def __init__(self) -> None:
        self._floor = 0
        self._sequence = 0

    def touch(self, entry: Entry, now: float) -> None:
        """It was used, or stored."""
        self._sequence += 1
        entry.touched = self._sequence
        entry.uses = min(entry.uses + 1, _MAX_USES)
        entry.value = self._floor + entry.uses
        entry.used_at = now

    def evicted(self, entry: Entry) -> None:
        """What is stored from now on is worth more than this was."""
        self._floor = max(self._floor, entry.value)


def rank_of(entry: Entry) -> Rank:
    """The lowest goes first."""
    return (entry.priority, entry.value, entry.touched)


def evictable(entry: Entry) -> bool:
    """Whether nobody needs it: a ready leaf that is not held. Transient ones have leases."""
    return (
        entry.state is EntryState.READY
        and not entry.children
        and not entry.references
        and not entry.transient
        and not entry.pinned
    )


def demotable(entry: Entry) -> bool:
    """Whether it is next to be written to disk: not there yet, and all below it are."""
    return (
        entry.state is EntryState.READY
        and not entry.on_disk
        and not entry.num_not_on_disk
        and not entry.transient
    )


class EvictionOrder:
    """The entries that ``eligible`` accepts, lowest rank first; O(log n) amortized.

    Whoever makes an entry eligible pushes it; entries that no longer are drop out by themselves.
    """

    def __init__(self, eligible: Callable[[Entry], bool]) -> None:
        self._eligible = eligible
        self._heap: list[tuple[Rank, Entry]] = []
        self._queued: set[Entry] = set()

    def __contains__(self, entry: Entry) -> bool:
        return entry in self._queued

    def push(self, entry: Entry) -> None:
        """Consider an entry, if it is eligible and not considered yet."""
        if entry not in self._queued and self._eligible(entry):
            self._queued.add(entry)
            heapq.heappush(self._heap, (rank_of(entry), entry))

    def discard(self, entry: Entry) -> None:
        """Forget an entry for good."""
        self._queued.discard(entry)
        if len(self._heap) > 2 * len(self._queued) + _SPARE:
            self._heap = [(rank_of(entry), entry) for entry in self._queued]
            heapq.heapify(self._heap)

    def peek(self) -> Entry | None:
        """The lowest; ``None`` without any."""
        heap = self._heap
        while heap:
            rank, entry = heap[0]
            if entry not in self._queued:
                heapq.heappop(heap)
            elif not self._eligible(entry):
                heapq.heappop(heap)
                self._queued.remove(entry)
            elif rank_of(entry) > rank:
                heapq.heapreplace(heap, (rank_of(entry), entry))
            else:
                return entry
        return None

    def lowest(self, count: int) -> list[Entry]:
        """Up to ``count`` entries in order; they stay."""
        found: list[Entry] = []
        while len(found) < count and (entry := self.peek()) is not None:
            heapq.heappop(self._heap)
            found.append(entry)
        for entry in found:
            heapq.heappush(self._heap, (rank_of(entry), entry))
        return found
