"""Many named deadlines behind one timer: set, move, clear, take what is due."""

from __future__ import annotations

import heapq
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class Deadlines(Generic[K]):
    """A heap with lazy deletion. Equal times come out in the order they were set."""

    def __init__(self) -> None:
        self._at: dict[K, tuple[float, int]] = {}
        self._heap: list[tuple[float, int, K]] = []
        self._num_set = 0

    def __len__(self) -> int:
        return len(self._at)

    def set(self, key: K, at_s: float) -> None:
        """Set or move ``key`` to ``at_s``."""
        self._num_set += 1
        self._at[key] = (at_s, self._num_set)
        heapq.heappush(self._heap, (at_s, self._num_set, key))
        # A key that moves often (each heartbeat moves one) leaves its old entries behind.
        if len(self._heap) > 64 + 4 * len(self._at):
            self._heap = [(at, number, k) for k, (at, number) in self._at.items()]
            heapq.heapify(self._heap)

    def clear(self, key: K) -> None:
        """Forget ``key``, if it is known."""
        self._at.pop(key, None)

    def next(self) -> float | None:
        """The earliest deadline, or ``None``."""
        while self._heap:
            at_s, number, key = self._heap[0]
            if self._at.get(key) == (at_s, number):
                return at_s
            heapq.heappop(self._heap)
        return None

    def pop_due(self, now: float) -> list[K]:
        """Take everything that is due, earliest first."""
        due: list[K] = []
        while (at_s := self.next()) is not None and at_s <= now:
            key = heapq.heappop(self._heap)[2]
            del self._at[key]
            due.append(key)
        return due
