"""Between caches of one process: the seam's fake, and the instance that hands over to itself."""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Sequence

from kvpool.transport import BlockCopy, Endpoint, KVCache, Receipt, TransferFault
from kvpool.transports.blocks import (
    broken,
    budget_until,
    check_layouts,
    check_targets,
    copy_blocks,
    late,
)

_exported: dict[str, KVCache] = {}
_lock = threading.Lock()


class LoopbackTransport:
    """A :class:`kvpool.transport.Transport` over a table of this process."""

    name = "loopback"

    def __init__(self) -> None:
        self._tokens: list[str] = []

    def export(self, cache: KVCache) -> Endpoint:
        """Put the cache into the process's table."""
        token = secrets.token_hex(16)
        with _lock:
            _exported[token] = cache
            self._tokens.append(token)
        return Endpoint(
            transport=self.name, address=str(os.getpid()), token=token, layout=cache.layout
        )

    def reachable(self, endpoint: Endpoint) -> bool:
        """Whether it was exported in this process."""
        with _lock:
            return endpoint.token in _exported

    def pull(
        self, endpoint: Endpoint, cache: KVCache, copies: Sequence[BlockCopy], *, timeout_s: float
    ) -> Receipt:
        """Copy memory."""
        started = time.monotonic()
        check_targets(cache, copies)
        check_layouts(endpoint.layout, cache.layout)
        with _lock:
            source = _exported.get(endpoint.token)
        if source is None:
            raise broken(
                "the peer's cache is not exported in this process (any more)", TransferFault.GONE
            )
        try:
            num_bytes = copy_blocks(source, cache, copies, budget_until(started + timeout_s))
        except TimeoutError:
            raise late(timeout_s) from None
        return Receipt(
            num_blocks=len(copies),
            num_bytes=num_bytes,
            seconds=time.monotonic() - started,
            transport=self.name,
        )

    def forget(self, endpoint: Endpoint) -> None:
        """Nothing is kept for a peer."""

    def close(self) -> None:
        """Withdraw the exports."""
        with _lock:
            while self._tokens:
                _exported.pop(self._tokens.pop(), None)
