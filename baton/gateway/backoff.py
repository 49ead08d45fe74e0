"""Waiting a bounded, growing, jittered time between attempts to reach somebody."""

from __future__ import annotations

import asyncio
import random


class Backoff:
    """Doubles from ``first_s`` to ``max_s``; each wait is 50 to 100 % of that."""

    def __init__(self, first_s: float = 0.05, max_s: float = 1.0) -> None:
        self._first_s = first_s
        self._max_s = max_s
        self._next_s = first_s

    def reset(self) -> None:
        """It worked: begin again with the shortest wait."""
        self._next_s = self._first_s

    async def wait(self) -> None:
        """Sleep; the next sleep will be longer."""
        delay_s = self._next_s * random.uniform(0.5, 1.0)
        self._next_s = min(2 * self._next_s, self._max_s)
        await asyncio.sleep(delay_s)
