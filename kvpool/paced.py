"""Transfers that take as long as another link would: for emulated instances, with small blocks.

The bytes move as ever; then the rest of the time is waited for.
"""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from kvpool.arena import BlockArena
from kvpool.block_io import BlockMover
from kvpool.pool_link import Slot
from kvpool.transport import BlockCopy, Endpoint, KVCache, Receipt, TransferFault, Transport
from kvpool.transports.blocks import failed


class PacedTransport:
    """Wraps another transport and takes its name. ``seconds``: of a pull of so many blocks."""

    def __init__(self, inner: Transport, seconds: Callable[[int], float]) -> None:
        self.name = inner.name
        self._inner = inner
        self._seconds = seconds
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
        """As the inner one, but no sooner. Late where the time limit is over before that."""
        started = time.monotonic()
        receipt = self._inner.pull(endpoint, cache, copies, timeout_s=timeout_s)
        wanted = self._seconds(len(copies)) if copies else 0.0
        left = started + min(wanted, timeout_s) - time.monotonic()
        if left > 0:
            self._closed.wait(left)
        if wanted > timeout_s:
            raise failed(
                f"the pull of {len(copies)} blocks is to take {wanted:g} s, longer than "
                f"{timeout_s:g} s",
                TransferFault.LATE,
            )
        return Receipt(
            receipt.num_blocks, receipt.num_bytes, time.monotonic() - started, receipt.transport
        )

    def forget(self, endpoint: Endpoint) -> None:
        """As the inner one."""
        self._inner.forget(endpoint)

    def close(self) -> None:
        """Ends a wait too."""
        self._closed.set()
        self._inner.close()


class PacedMover(BlockMover):
    """A mover whose loads take ``seconds`` of blocks by tier; stores are not waited for."""

    def __init__(
        self, cache: KVCache, host_layout: str, seconds: Callable[[Mapping[str, int]], float]
    ) -> None:
        super().__init__(cache, host_layout)
        self._seconds = seconds
        self._never = threading.Event()

    def load(
        self, arena: BlockArena, slots: Sequence[Slot], blocks: Sequence[int], deadline: float
    ) -> int:
        """As the plain one, but no sooner, up to the deadline."""
        started = time.monotonic()
        count = super().load(arena, slots, blocks, deadline)
        wanted = self._seconds(collections.Counter(str(slot.tier) for slot in slots[:count]))
        left = min(started + wanted, deadline) - time.monotonic()
        if left > 0:
            self._never.wait(left)
        return count
