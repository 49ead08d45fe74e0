"""Between instances of one machine: the reader maps the peer's arena file and copies.

Whether two processes are on the same machine is not asked but tried: if the peer's file can be
opened here and carries the peer's token, its memory is shared. That stays right whatever
network, mount or pid namespaces lie between them.
"""

from __future__ import annotations

import collections
import os
import threading
import time
from collections.abc import Sequence

from kvpool.arena import BlockArena
from kvpool.transport import BlockCopy, Endpoint, KVCache, Receipt, TransferFailed, TransferFault
from kvpool.transports.blocks import (
    broken,
    budget_until,
    check_layouts,
    check_targets,
    copy_blocks,
    late,
)

MAX_MAPPINGS = 64


class ShmTransport:
    """A :class:`kvpool.transport.Transport` over arena files."""

    name = "shm"

    def __init__(self, max_mappings: int = MAX_MAPPINGS) -> None:
        self._max_mappings = max_mappings
        self._mappings: collections.OrderedDict[str, BlockArena] = collections.OrderedDict()
        self._lock = threading.Lock()
        self._closed = False

    def export(self, cache: KVCache) -> Endpoint:
        """Tell where the file is. Raises TransferFailed for a cache that is not in one."""
        if not isinstance(cache, BlockArena) or cache.path is None:
            raise broken(
                "the cache is private memory: it cannot be mapped by a peer", TransferFault.OTHER
            )
        return Endpoint(
            transport=self.name, address=cache.path, token=cache.token, layout=cache.layout
        )

    def reachable(self, endpoint: Endpoint) -> bool:
        """Whether the peer's file is here and really the peer's."""
        try:
            self._mapping(endpoint)
        except TransferFailed:
            return False
        return True

    def pull(
        self, endpoint: Endpoint, cache: KVCache, copies: Sequence[BlockCopy], *, timeout_s: float
    ) -> Receipt:
        """Copy from the peer's memory into own blocks."""
        started = time.monotonic()
        check_targets(cache, copies)
        check_layouts(endpoint.layout, cache.layout)
        source = self._mapping(endpoint)
        check_layouts(source.layout, cache.layout)
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
        """Give up the mapping of a peer that is gone; its memory is freed with it."""
        with self._lock:
            self._mappings.pop(endpoint.token, None)

    def close(self) -> None:
        """Give up all mappings."""
        with self._lock:
            self._closed = True
            self._mappings.clear()

    def _mapping(self, endpoint: Endpoint) -> BlockArena:
        """The peer's arena, mapped once.

        A mapping leaves the table without being closed: another thread may be copying from it,
        and it is unmapped when the last user lets go.
        """
        with self._lock:
            if self._closed:
                raise broken("the transport is closed", TransferFault.OTHER)
            for token, arena in list(self._mappings.items()):
                if not os.path.exists(arena.path or ""):
                    del self._mappings[token]
            known = self._mappings.get(endpoint.token)
            if known is not None:
                self._mappings.move_to_end(endpoint.token)
                return known
            opened = BlockArena.open(endpoint.address, endpoint.token, writable=False)
            self._mappings[endpoint.token] = opened
            while len(self._mappings) > self._max_mappings:
                self._mappings.popitem(last=False)
            return opened
