"""A transport that fails on purpose, by a script: for tests of whoever pulls."""

from __future__ import annotations

import collections
import enum
import threading
from collections.abc import Iterable, Sequence

from kvpool.transport import BlockCopy, Endpoint, KVCache, Receipt, TransferFault, Transport
from kvpool.transports.blocks import broken, failed


class Fault(enum.StrEnum):
    """What happens to one pull."""

    NONE = "none"
    FAIL = "fail"
    """The connection is refused; nothing is written."""
    SHORT = "short"
    """Only the first half of the blocks arrives."""
    CORRUPT = "corrupt"
    """All arrives, with a wrong byte in the last block; the checksum tells."""
    STALE = "stale"
    """All arrives, but a block was given to other content meanwhile."""
    STALL = "stall"
    """Nothing happens until the time is over."""


class FaultyTransport:
    """Wraps another transport and takes its name. Each pull takes the next fault of the script;
    after the last one all is well."""

    def __init__(self, inner: Transport, script: Iterable[Fault] = ()) -> None:
        self.name = inner.name
        self._inner = inner
        self._script = collections.deque(script)
        self._closed = threading.Event()

    def export(self, cache: KVCache) -> Endpoint:
        """As the inner one."""
        return self._inner.export(cache)

    def reachable(self, endpoint: Endpoint) -> bool:
        """As the inner one."""
        return self._inner.reachable(endpoint)

    def pull(
        self, endpoint: Endpoint, cache: KVCache, copies: Sequence[BlockCopy], *, timeout_s: float
    ) -> Receipt:
        """As the inner one, or as the script wants it."""
        fault = self._script.popleft() if self._script else Fault.NONE
        match fault:
            case Fault.NONE:
                return self._inner.pull(endpoint, cache, copies, timeout_s=timeout_s)
            case Fault.FAIL:
                raise broken("scripted: connection refused", TransferFault.GONE)
            case Fault.STALL:
                self._closed.wait(timeout_s)
                raise failed(
                    f"scripted: the pull took longer than {timeout_s:g} s", TransferFault.LATE
                )
            case Fault.SHORT:
                half = copies[: len(copies) // 2]
                self._inner.pull(endpoint, cache, half, timeout_s=timeout_s)
                raise broken(
                    f"scripted: {len(half)} of {len(copies)} blocks arrived", TransferFault.SHORT
                )
            case Fault.CORRUPT:
                self._inner.pull(endpoint, cache, copies, timeout_s=timeout_s)
                if copies:
                    cache.block(copies[-1].dst)[-1] ^= 0xFF
                raise broken(
                    "scripted: a block arrived with a wrong checksum", TransferFault.CORRUPT
                )
            case Fault.STALE:
                self._inner.pull(endpoint, cache, copies, timeout_s=timeout_s)
                raise failed(
                    "scripted: a block was given to other content during the pull",
                    TransferFault.STALE,
                )

    def forget(self, endpoint: Endpoint) -> None:
        """As the inner one."""
        self._inner.forget(endpoint)

    def close(self) -> None:
        """Ends a stalled pull too."""
        self._closed.set()
        self._inner.close()
