"""What a middle man does to an exporter's answers, on a test's word."""

from __future__ import annotations

import threading
from collections.abc import Callable

_HOLD_S = 30.0
"""The most that an answer is held back."""

Act = Callable[[int, bytes], bytes | None]
"""(bytes that a connection's peer has sent since the act began, a piece) -> what passes."""


def _pass(at: int, data: bytes) -> bytes:
    return data


class Meddler:
    """A filter of a ``MiddleMan`` that passes everything until it is told to ``act``."""

    def __init__(self) -> None:
        self._own = threading.local()
        """Of a connection: each has a thread."""
        self._act: tuple[int, Act] = (0, _pass)
        self.go_on = threading.Event()
        self.recorded = bytearray()

    def __call__(self, offset: int, data: bytes) -> bytes | None:
        number, act = self._act
        if offset == 0 or self._own.number != number:
            self._own.number, self._own.seen = number, 0
        at = self._own.seen
        self._own.seen += len(data)
        passed = act(at, data)
        if passed != data:
            # Once: who tries again on another connection gets through, and is to say why.
            self._act = (number, _pass)
        return passed

    def act(self, act: Act) -> None:
        """From now on, on connections that are there and on new ones."""
        self._act = (self._act[0] + 1, act)

    def record(self, at: int, data: bytes) -> bytes:
        self.recorded += data
        return data

    def release(self, at: int, data: bytes) -> bytes:
        """Lets go what ``stall`` holds back, when others already talk."""
        self.go_on.set()
        return data

    def replay(self, at: int, data: bytes) -> bytes:
        return bytes(self.recorded) + data if at == 0 else data

    def short(self, where: int) -> Act:
        return lambda at, data: data[: max(0, where - at)]

    def reset(self, where: int) -> Act:
        return lambda at, data: data if at + len(data) <= where else None

    def double(self, where: int) -> Act:
        """What comes before that place comes again."""

        def act(at: int, data: bytes) -> bytes:
            self._own.before = data if at == 0 else self._own.before + data
            if not at < where <= at + len(data):
                return data
            rest = at + len(data) - where
            before: bytes = self._own.before[:where]
            return data[: len(data) - rest] + before + data[len(data) - rest :]

        return act

    def flip(self, where: int) -> Act:
        """In the byte before that place."""

        def act(at: int, data: bytes) -> bytes:
            changed = bytearray(data)
            if at < where <= at + len(data):
                changed[where - at - 1] ^= 0x04
            return bytes(changed)

        return act

    def stall(self, where: int) -> Act:
        def act(at: int, data: bytes) -> bytes:
            if at + len(data) > where:
                self.go_on.wait(_HOLD_S)
            return data

        return act
