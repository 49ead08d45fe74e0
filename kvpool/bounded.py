"""Calling libraries that block without a time limit, and memory that they write to.

Such a call cannot be interrupted, only left alone: it goes on in a thread of its own, and what it
writes to must stay allocated until it has returned, and, where the library's own threads do the
writing, until the library is closed.
"""

from __future__ import annotations

import collections
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
import numpy.typing as npt

T = TypeVar("T")


class Overloaded(TimeoutError):
    """So many earlier calls have not returned that no other is begun."""


class BoundedCalls:
    """Runs calls and stops waiting for them at their deadlines. Any thread may call anything.

    ``max_late``: with so many calls past their deadlines, or after ``close``, none is begun.
    """

    def __init__(self, name: str, max_late: int = 4) -> None:
        self._name = name
        self._max_late = max_late
        self._lock = threading.Lock()
        self._threads: set[threading.Thread] = set()
        self._late: set[threading.Thread] = set()
        self._closed = False

    @property
    def num_late(self) -> int:
        """Calls that nobody waits for any more and that have not returned."""
        with self._lock:
            self._late = {thread for thread in self._late if thread.is_alive()}
            return len(self._late)

    def call(self, function: Callable[[], T], timeout_s: float) -> T:
        """What ``function`` returns or raises, if it does so in time.

        Raises TimeoutError, and Overloaded without having called it.
        """
        results: list[T] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                results.append(function())
            except BaseException as error:
                errors.append(error)

        late = self.num_late
        thread = threading.Thread(target=run, name=self._name, daemon=True)
        with self._lock:
            if self._closed or late >= self._max_late:
                why = "closed" if self._closed else f"{late} calls have not returned"
                raise Overloaded(f"{self._name}: {why}")
            self._threads = {one for one in self._threads if one.is_alive()}
            # Begun under the lock, so that ``close`` misses none.
            try:
                thread.start()
            except RuntimeError as error:
                raise Overloaded(f"{self._name}: {error}") from error
            self._threads.add(thread)
        thread.join(max(0.0, timeout_s))
        if errors:
            raise errors[0]
        if not results:
            with self._lock:
                self._late.add(thread)
            raise TimeoutError(f"{self._name}: no answer within {timeout_s:g} s")
        return results[0]

    def close(self, timeout_s: float) -> bool:
        """Begin no more calls and wait for those under way; whether all have returned."""
        with self._lock:
            self._closed = True
            threads = list(self._threads)
        give_up = time.monotonic() + timeout_s
        for thread in threads:
            thread.join(max(0.0, give_up - time.monotonic()))
        return not any(thread.is_alive() for thread in threads)


class Staging:
    """One buffer of a pool, held by a caller and by the call that fills it."""

    def __init__(self, num_bytes: int) -> None:
        self.data: npt.NDArray[np.uint8] = np.empty(num_bytes, dtype=np.uint8)
        self.holders = 0
        self.clean = True

    @property
    def address(self) -> int:
        """Of the first byte."""
        return int(self.data.ctypes.data)

    def view(self, start: int, count: int) -> memoryview:
        """``count`` bytes from ``start``."""
        return self.data[start : start + count].data


class StagingPool:
    """At most ``max_buffers`` buffers that a library writes to. Any thread may call anything.

    After a failed call the library may still write to the buffer. It rests for ``rest_s`` then,
    but that is only to avoid trouble: **what lies in a buffer is never to be believed**. Copy it
    and check the copy. For the same reason a buffer is never freed before the pool is.
    ``register`` is told address and bytes of each new one.
    """

    def __init__(
        self,
        num_bytes: int,
        max_buffers: int,
        register: Callable[[int, int], None],
        *,
        rest_s: float = 60.0,
    ) -> None:
        self.num_bytes = num_bytes
        self._max_buffers = max_buffers
        self._register = register
        self._rest_s = rest_s
        self._all: list[Staging] = []
        self._free: list[Staging] = []
        self._resting: collections.deque[tuple[float, Staging]] = collections.deque()
        self._changed = threading.Condition()

    def addresses(self) -> list[int]:
        """Of all buffers."""
        with self._changed:
            return [one.address for one in self._all]

    def take(self, timeout_s: float) -> Staging:
        """A buffer, to be released twice: by the caller and by the call. Raises TimeoutError."""
        give_up = time.monotonic() + timeout_s
        with self._changed:
            while True:
                now = time.monotonic()
                while self._resting and self._resting[0][0] <= now:
                    self._free.append(self._resting.popleft()[1])
                if not self._free and len(self._all) < self._max_buffers:
                    self._grow()
                if self._free:
                    buffer = self._free.pop()
                    buffer.holders, buffer.clean = 2, True
                    return buffer
                until = min([give_up, *(when for when, _ in self._resting)])
                if give_up <= now:
                    raise TimeoutError("no staging buffer is free: earlier transfers hold them")
                self._changed.wait(until - now)

    def release(self, buffer: Staging, *, clean: bool) -> None:
        """One of its two holders lets go. ``clean``: nothing writes to it any more."""
        with self._changed:
            buffer.holders -= 1
            buffer.clean = buffer.clean and clean
            if buffer.holders:
                return
            if buffer.clean:
                self._free.append(buffer)
            else:
                self._resting.append((time.monotonic() + self._rest_s, buffer))
            self._changed.notify()

    @contextlib.contextmanager
    def filled(
        self,
        calls: BoundedCalls,
        use: Callable[[Staging], bool],
        budget: Callable[[], float],
        prepare: Callable[[Staging], None] | None = None,
    ) -> Iterator[Staging | None]:
        """A buffer that ``use`` was called with; ``None`` if it says that it failed.

        ``prepare`` is called with it before, in this thread and so never late. ``budget``: seconds
        left. Raises TimeoutError, and what the two raise.
        """
        buffer = self.take(budget())

        def run() -> bool:
            done = False
            try:
                done = use(buffer)
            finally:
                self.release(buffer, clean=done)
            return done

        begun = False
        try:
            if prepare is not None:
                prepare(buffer)
            left = budget()
            begun = True
            try:
                done = calls.call(run, left)
            except Overloaded:
                begun = False
                raise
            yield buffer if done else None
        finally:
            if not begun:
                self.release(buffer, clean=True)
            self.release(buffer, clean=True)

    def _grow(self) -> None:
        buffer = Staging(self.num_bytes)
        self._register(buffer.address, self.num_bytes)
        self._all.append(buffer)
        self._free.append(buffer)
