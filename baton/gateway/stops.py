"""Stop strings on streaming text. Pure.

The text ends at the stop string that is *complete* first; of several that complete on the same
character, the longest one. This does not depend on how the text is cut into pieces.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Feeds on pieces of text, gives out what can no longer be part of a stop string."""

    def __init__(self, stops: Sequence[str], *, include_stop: bool = False) -> None:
        """``stops`` must not hold empty strings (ValueError); no stops: text passes through."""
        if any(not stop for stop in stops):
            raise ValueError("a stop string must not be empty")
        self._stops = tuple(stops)
        self._max_held = max((len(stop) for stop in stops), default=1) - 1
        self._include_stop = include_stop
        self._held = ""
        self._matched: str | None = None

    @property
    def matched(self) -> str | None:
        """The stop string that ended the text; afterwards :meth:`push` must not be called."""
        return self._matched

    def push(self, piece: str) -> str:
        """Text to give out now. Check :attr:`matched` after each call."""
        assert self._matched is None, "text after the stop string"
        if not self._stops:
            return piece
        text = self._held + piece
        found = [
            (start + len(stop), start, stop)
            for stop in self._stops
            if (start := text.find(stop)) >= 0
        ]
        if found:
            end, start, self._matched = min(found)
            self._held = ""
            return text[: end if self._include_stop else start]
        num_held = self._num_open(text)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def flush(self) -> str:
        """What was held back: the text ended without a stop string."""
        text, self._held = self._held, ""
        return text

    def _num_open(self, text: str) -> int:
        """Length of the longest end of ``text`` that a stop string begins with."""
        for length in range(min(self._max_held, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
