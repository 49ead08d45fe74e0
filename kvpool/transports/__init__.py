"""The transports by name, and which of them to use for a peer."""

from __future__ import annotations

import collections
import logging
import threading
import time
from collections.abc import Callable, Sequence

from baton.core.errors import ConfigError
from kvpool.transport import (
    BlockCopy,
    Endpoint,
    KVCache,
    Receipt,
    TransferFailed,
    Transport,
    TransportBroken,
)
from kvpool.transports.blocks import broken, check_layouts, failed
from kvpool.transports.loopback import LoopbackTransport
from kvpool.transports.shm import ShmTransport
from kvpool.transports.tcp import TcpTransport

__all__ = ["TransportSet", "choose", "make_transports"]

log = logging.getLogger(__name__)

_MAX_PEERS = 256
_BUILDERS: dict[str, Callable[[str], Transport]] = {
    "loopback": lambda host: LoopbackTransport(),
    "shm": lambda host: ShmTransport(),
    "tcp": lambda host: TcpTransport(host),
}
_AUTO = ("shm", "tcp")


def make_transports(names: Sequence[str], host: str) -> list[Transport]:
    """Transports in the order of preference. ``auto`` stands for shm, then tcp.

    ``host``: own address as other machines reach it. Raises ConfigError for an unknown name.
    """
    wanted = [real for name in names for real in (_AUTO if name == "auto" else (name,))]
    unknown = sorted(set(wanted) - set(_BUILDERS))
    if unknown or not wanted:
        raise ConfigError(
            f"transport must be auto or of {sorted(_BUILDERS)}, got {unknown or 'none'}",
            param="handoff.transport",
        )
    return [_BUILDERS[name](host) for name in dict.fromkeys(wanted)]


def choose(
    transports: Sequence[Transport], endpoints: Sequence[Endpoint], layout: str
) -> tuple[Transport, Endpoint]:
    """The first transport that reaches the peer. ``layout`` is the reader's own.

    Raises TransferFailed if the layouts differ, TransportBroken if nothing reaches the peer.
    """
    for endpoint in endpoints:
        check_layouts(endpoint.layout, layout)
    for transport in transports:
        for endpoint in endpoints:
            if endpoint.transport == transport.name and transport.reachable(endpoint):
                return transport, endpoint
    offered = ", ".join(f"{endpoint.transport} at {endpoint.address}" for endpoint in endpoints)
    raise broken(
        f"no transport reaches the peer: it offers {offered or 'none'}, this side has"
        f" {', '.join(transport.name for transport in transports) or 'none left'}"
    )


class TransportSet:
    """An instance's transports: exports its cache on all, pulls over the best that works.

    ``pull`` may be called from several transport threads; all block.
    """

    def __init__(self, transports: Sequence[Transport]) -> None:
        self._transports = tuple(transports)
        self._chosen: collections.OrderedDict[tuple[Endpoint, ...], tuple[Transport, Endpoint]] = (
            collections.OrderedDict()
        )
        self._lock = threading.Lock()

    def endpoints(self, cache: KVCache) -> list[Endpoint]:
        """Export the cache on every transport that can. Call once.

        Raises TransferFailed if none can.
        """
        exported = []
        for transport in self._transports:
            try:
                exported.append(transport.export(cache))
            except TransferFailed as error:
                log.info("not exported over %s: %s", transport.name, error.message)
        if not exported:
            raise failed("the cache cannot be exported over any transport of this instance")
        return exported

    def pull(
        self,
        endpoints: Sequence[Endpoint],
        cache: KVCache,
        copies: Sequence[BlockCopy],
        timeout_s: float,
    ) -> Receipt:
        """Pull from a peer over the transport chosen for it.

        If that one turns out broken, the next one that reaches the peer does the whole pull again
        within the same time. Raises TransferFailed.
        """
        deadline = time.monotonic() + timeout_s
        key = tuple(endpoints)
        candidates = self._transports
        while True:
            transport, endpoint = self._choice(key, candidates, cache.layout)
            left = deadline - time.monotonic()
            if left <= 0:
                raise failed(f"the pull took longer than {timeout_s:g} s")
            try:
                return transport.pull(endpoint, cache, copies, timeout_s=left)
            except TransportBroken as error:
                with self._lock:
                    self._chosen.pop(key, None)
                candidates = tuple(one for one in candidates if one is not transport)
                offered = {endpoint.transport for endpoint in endpoints}
                if not any(one.name in offered for one in candidates):
                    raise
                log.warning("%s failed, trying another transport: %s", transport.name, error)

    def forget(self, endpoints: Sequence[Endpoint]) -> None:
        """A peer is gone: let go of its memory and connections now, not when they are missed."""
        with self._lock:
            self._chosen.pop(tuple(endpoints), None)
        for transport in self._transports:
            for endpoint in endpoints:
                if endpoint.transport == transport.name:
                    transport.forget(endpoint)

    def close(self) -> None:
        """Close all transports. Idempotent."""
        for transport in self._transports:
            transport.close()

    def _choice(
        self, key: tuple[Endpoint, ...], candidates: Sequence[Transport], layout: str
    ) -> tuple[Transport, Endpoint]:
        with self._lock:
            known = self._chosen.get(key)
            if known is not None and known[0] in candidates:
                self._chosen.move_to_end(key)
                return known
        # Outside the lock: a probe may take a second.
        choice = choose(candidates, key, layout)
        with self._lock:
            self._chosen[key] = choice
            while len(self._chosen) > _MAX_PEERS:
                self._chosen.popitem(last=False)
        return choice
