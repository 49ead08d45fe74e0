"""An external store in this process's memory: the tier's fake, with faults to order."""

from __future__ import annotations

import collections
import contextlib
import enum
import threading
from collections.abc import Iterator, Sequence

from kvpool.breaker import Breaker
from kvpool.external import CheckedStore
from kvpool.external_values import StoreFailed, Value


class StoreFault(enum.Enum):
    """What goes wrong as long as it is switched on."""

    MISS = "miss"
    """Says it has what it has, and does not hand it out."""
    SHORT = "short"
    """Values lack their last byte."""
    LONG = "long"
    """Values are too long to be handed out."""
    FLIP = "flip"
    """A bit of each value is another."""
    SWAP = "swap"
    """Hands out the value of another name, if it has any."""
    FAIL = "fail"
    STALL = "stall"
    """No answer."""


class MemoryValues:
    """``kvpool.external_values.Values`` with at most ``max_bytes``; the oldest values go first."""

    def __init__(self, max_bytes: int, batch_bytes: int) -> None:
        self.batch_bytes = batch_bytes
        self.fault: StoreFault | None = None
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._values: collections.OrderedDict[str, bytes] = collections.OrderedDict()
        self._num_bytes = 0
        self._closed = threading.Event()

    def exist(self, names: Sequence[str], timeout_s: float) -> list[bool]:
        """See ``Values``."""
        self._interfere(timeout_s)
        with self._lock:
            return [name in self._values for name in names]

    @contextlib.contextmanager
    def load(
        self, names: Sequence[str], num_bytes: Sequence[int], timeout_s: float
    ) -> Iterator[Sequence[Value]]:
        """See ``Values``."""
        self._interfere(timeout_s)
        with self._lock:
            found = [self._found(name) for name in names]
        yield [
            None if value is None else memoryview(value if len(value) <= most else b"")
            for value, most in zip(found, num_bytes, strict=True)
        ]

    def save(
        self, names: Sequence[str], values: Sequence[Sequence[bytes | memoryview]], timeout_s: float
    ) -> int:
        """See ``Values``. Keeps what it has for a name."""
        self._interfere(timeout_s)
        with self._lock:
            for done, (name, parts) in enumerate(zip(names, values, strict=True)):
                value = b"".join(parts)
                if len(value) > self._max_bytes:
                    return done
                if name not in self._values:
                    self._values[name] = value
                    self._num_bytes += len(value)
                while self._num_bytes > self._max_bytes:
                    self._num_bytes -= len(self._values.popitem(last=False)[1])
            return len(names)

    def drop(self, name: str, timeout_s: float) -> None:
        """See ``Values``."""
        self._interfere(timeout_s)
        with self._lock:
            self._num_bytes -= len(self._values.pop(name, b""))

    def close(self) -> None:
        """See ``Values``."""
        self._closed.set()
        with self._lock:
            self._values.clear()
            self._num_bytes = 0

    def _interfere(self, timeout_s: float) -> None:
        if self.fault is StoreFault.FAIL:
            raise StoreFailed("told to fail")
        if self.fault is StoreFault.STALL:
            self._closed.wait(timeout_s)
            raise TimeoutError

    def _found(self, name: str) -> bytes | None:
        value = self._values.get(name)
        if value is None or self.fault is StoreFault.MISS:
            return None
        if self.fault is StoreFault.SHORT:
            return value[:-1]
        if self.fault is StoreFault.LONG:
            return value + b"\0"
        if self.fault is StoreFault.FLIP:
            return value[:-1] + bytes([value[-1] ^ 1])
        if self.fault is StoreFault.SWAP:
            return next((other for key, other in self._values.items() if key != name), value)
        return value


class MemoryExternalStore(CheckedStore):
    """A :class:`kvpool.external.ExternalStore` in memory; ``fault`` makes it go wrong."""

    def __init__(
        self,
        layout: str,
        max_bytes: int,
        *,
        batch_bytes: int = 4 << 20,
        timeout_s: float = 5.0,
        breaker: Breaker | None = None,
    ) -> None:
        self.memory = MemoryValues(max_bytes, batch_bytes)
        super().__init__(
            self.memory,
            name="the external store (memory)",
            layout=layout,
            timeout_s=timeout_s,
            breaker=breaker,
        )

    @property
    def fault(self) -> StoreFault | None:
        """What goes wrong at present."""
        return self.memory.fault

    @fault.setter
    def fault(self, fault: StoreFault | None) -> None:
        self.memory.fault = fault
