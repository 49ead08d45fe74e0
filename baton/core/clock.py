"""Time as an argument: a monotonic clock, and its virtual twin for tests and the simulator."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Seconds. ``now`` is monotonic and process-local; ``wall`` is for people only."""

    def now(self) -> float:
        """Monotonic seconds since an arbitrary start."""

    def wall(self) -> float:
        """Seconds since the Unix epoch, for timelines and logs."""


class SystemClock:
    """The machine's clocks."""

    def now(self) -> float:
        """See :class:`Clock`."""
        return time.monotonic()

    def wall(self) -> float:
        """See :class:`Clock`."""
        return time.time()


class VirtualClock:
    """A clock that moves only when told to."""

    def __init__(self, start_s: float = 0.0) -> None:
        self._now_s = start_s

    def now(self) -> float:
        """See :class:`Clock`."""
        return self._now_s

    def wall(self) -> float:
        """See :class:`Clock`; equal to :meth:`now`."""
        return self._now_s

    def advance(self, seconds: float) -> None:
        """Move forward. Raises ValueError for negative ``seconds``."""
        if seconds < 0:
            raise ValueError(f"a clock cannot go back: {seconds=}")
        self._now_s += seconds
