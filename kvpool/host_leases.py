"""Leases by number and owner, with a timer's next deadline at hand. Pure."""

from __future__ import annotations

import heapq

_SPARE = 64


class OwnedLeases:
    """Deadlines of numbered leases, each with an owner. A lease is over once ``now`` reaches it.

    Deadlines only move on. So each lease has one entry in a heap, possibly with a deadline of
    before, which is put right when it comes up.
    """

    def __init__(self) -> None:
        self._leases: dict[int, tuple[str, float]] = {}
        self._owned: dict[str, set[int]] = {}
        self._heap: list[tuple[float, int]] = []

    def __len__(self) -> int:
        return len(self._leases)

    def __contains__(self, lease: int) -> bool:
        return lease in self._leases

    def grant(self, lease: int, owner: str, deadline: float) -> None:
        """Begin a lease whose number was never used."""
        assert lease not in self._leases, f"lease {lease} exists"
        self._leases[lease] = (owner, deadline)
        self._owned.setdefault(owner, set()).add(lease)
        heapq.heappush(self._heap, (deadline, lease))

    def extend(self, lease: int, deadline: float) -> None:
        """Make it last at least until ``deadline``."""
        owner, before = self._leases[lease]
        self._leases[lease] = (owner, max(before, deadline))

    def end(self, lease: int) -> None:
        """Forget a lease."""
        owner, _ = self._leases.pop(lease)
        mine = self._owned[owner]
        mine.remove(lease)
        if not mine:
            del self._owned[owner]
        if len(self._heap) > 2 * len(self._leases) + _SPARE:
            self._heap = [(deadline, number) for number, (_, deadline) in self._leases.items()]
            heapq.heapify(self._heap)

    def deadline(self, lease: int) -> float:
        """When it ends."""
        return self._leases[lease][1]

    def owner(self, lease: int) -> str:
        """Whose it is."""
        return self._leases[lease][0]

    def owned_by(self, owner: str) -> list[int]:
        """The leases of one owner, oldest first."""
        return sorted(self._owned.get(owner, ()))

    def first_due(self, now: float) -> int | None:
        """The lease that has been over the longest; ``None`` if none is."""
        deadline = self.next_deadline()
        return self._heap[0][1] if deadline is not None and deadline <= now else None

    def next_deadline(self) -> float | None:
        """When the next one ends; ``None`` without leases."""
        heap = self._heap
        while heap:
            deadline, lease = heap[0]
            known = self._leases.get(lease)
            if known is None:
                heapq.heappop(heap)
            elif known[1] > deadline:
                heapq.heapreplace(heap, (known[1], lease))
            else:
                return deadline
        return None
