"""When to leave something alone that keeps failing. Pure: time is an argument."""

from __future__ import annotations


class Breaker:
    """After ``max_failures`` in a row, nothing is tried for ``first_pause_s``; then one trial.

    Each trial that fails doubles the pause, up to ``max_pause_s``; a success ends it. Times are
    seconds of any clock that does not go back.
    """

    def __init__(
        self, max_failures: int = 3, first_pause_s: float = 1.0, max_pause_s: float = 60.0
    ) -> None:
        self._max_failures = max_failures
        self._first_pause_s = first_pause_s
        self._max_pause_s = max_pause_s
        self._failures = 0
        self._pause_s = 0.0
        self._until: float | None = None
        self._trying = False

    @property
    def open(self) -> bool:
        """Whether it is being left alone."""
        return self._until is not None

    @property
    def pause_s(self) -> float:
        """How long the pause is that was made last; 0 if all is well."""
        return self._pause_s

    def allows(self, now: float) -> bool:
        """Whether to try. During a pause no; after it once, and again a pause later."""
        if self._until is None:
            return True
        if now < self._until:
            return False
        # One trial: others wait for what comes of it.
        self._until = now + self._pause_s
        self._trying = True
        return True

    def succeeded(self) -> bool:
        """A try went well. True if that ends a pause."""
        ended = self._until is not None
        self._failures, self._pause_s, self._until, self._trying = 0, 0.0, None, False
        return ended

    def failed(self, now: float) -> bool:
        """A try failed. True if that begins the first pause of a row."""
        if self._until is None:
            self._failures += 1
            if self._failures < self._max_failures:
                return False
            self._pause_s = self._first_pause_s
            self._until = now + self._pause_s
            return True
        # Tries that began before the pause say nothing new.
        if self._trying:
            self._trying = False
            self._pause_s = min(2 * self._pause_s, self._max_pause_s)
            self._until = now + self._pause_s
        return False
