"""Holds with a time limit: blocks stay while a peer may still pull them, and no longer.

Pure: time is an argument. The owner asks ``next_deadline`` to set one timer, and releases what
``expired`` names.
"""

from __future__ import annotations

LeaseKey = tuple[str, int]
"""(request_id, attempt)."""


class LeaseTable:
    """Leases by key. A lease has expired once ``now`` reaches its deadline."""

    def __init__(self) -> None:
        self._deadlines: dict[LeaseKey, float] = {}

    def __len__(self) -> int:
        return len(self._deadlines)

    def __contains__(self, key: LeaseKey) -> bool:
        return key in self._deadlines

    def grant(self, key: LeaseKey, now: float, duration: float) -> None:
        """Begin a lease of ``duration`` seconds. Raises ValueError if there is one already."""
        if key in self._deadlines:
            raise ValueError(f"a lease for {key} exists")
        if duration <= 0:
            raise ValueError(f"a lease must last, got {duration} s")
        self._deadlines[key] = now + duration

    def renew(self, key: LeaseKey, now: float, duration: float) -> bool:
        """Make it last at least until ``now + duration``; False if there is none to renew.

        A lease past its deadline that nobody has released yet is renewed too: its blocks are
        still there.
        """
        deadline = self._deadlines.get(key)
        if deadline is None:
            return False
        self._deadlines[key] = max(deadline, now + duration)
        return True

    def release(self, key: LeaseKey) -> bool:
        """End a lease; False if there was none."""
        return self._deadlines.pop(key, None) is not None

    def expired(self, now: float) -> list[LeaseKey]:
        """Leases past their deadline, the oldest first. They stay until released."""
        due = [(deadline, key) for key, deadline in self._deadlines.items() if deadline <= now]
        return [key for _, key in sorted(due)]

    def next_deadline(self) -> float | None:
        """When the next lease expires; ``None`` without leases."""
        return min(self._deadlines.values(), default=None)
