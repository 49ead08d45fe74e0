"""The transports by name, and which of them to use for a peer."""

from __future__ import annotations

import collections
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from baton.core.config import TlsConfig
from baton.core.errors import ConfigError
from kvpool.arena import BlockArena
from kvpool.reshard import ReshardPlan
from kvpool.transport import (
    BlockCopy,
    Endpoint,
    KVCache,
    Receipt,
    TransferFailed,
    TransferFault,
    Transport,
    TransportBroken,
)
from kvpool.transports.blocks import (
    broken,
    check_layouts,
    check_targets,
    failed,
    late,
    plan_between,
    runs,
)
from kvpool.transports.collective import CollectiveTransport
from kvpool.transports.loopback import LoopbackTransport
from kvpool.transports.mooncake import MooncakeTransport
from kvpool.transports.shm import ShmTransport
from kvpool.transports.tcp import TcpTransport

__all__ = ["NO_TRANSPORT", "TransportSet", "choose", "make_transports"]

log = logging.getLogger(__name__)

NO_TRANSPORT = "none"
"""What a pull is counted under for which no transport was found."""
_MAX_PEERS = 256
SCRATCH_BYTES = 4 << 20
"""One frame of tcp. More is slower: new memory costs more than another round."""
_BUILDERS: dict[str, Callable[[str], Transport]] = {
    "loopback": lambda host: LoopbackTransport(),
    "shm": lambda host: ShmTransport(),
    "tcp": lambda host: TcpTransport(host),
    "collective": lambda host: CollectiveTransport(host),
    "mooncake": lambda host: MooncakeTransport(host),
}
_AUTO = ("shm", "tcp")


def make_transports(
    names: Sequence[str], host: str, *, tls: TlsConfig | None = None
) -> list[Transport]:
    """Transports in the order of preference. ``auto`` stands for shm, then tcp.

    ``host``: own address as other machines reach it. ``tls``: of tcp. Raises ConfigError for an
    unknown name, or TLS files that cannot be used.
    """
    wanted = [real for name in names for real in (_AUTO if name == "auto" else (name,))]
    unknown = sorted(set(wanted) - set(_BUILDERS))
    if unknown or not wanted:
        raise ConfigError(
            f"transport must be auto or of {sorted(_BUILDERS)}, got {unknown or 'none'}",
            param="handoff.transport",
        )
    builders = _BUILDERS | {"tcp": lambda host: TcpTransport(host, tls=tls)}
    return [builders[name](host) for name in dict.fromkeys(wanted)]


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
        f" {', '.join(transport.name for transport in transports) or 'none left'}",
        TransferFault.GONE,
    )


class TransportSet:
    """An instance's transports: exports its cache on all, pulls over the best that works.

    ``pull`` may be called from several transport threads; all block. ``scratch_bytes``: private
    memory of one pull from a peer with another number of shards, but at least one block.
    """

    def __init__(
        self, transports: Sequence[Transport], *, scratch_bytes: int = SCRATCH_BYTES
    ) -> None:
        self._transports = tuple(transports)
        self._scratch_bytes = scratch_bytes
        self._chosen: collections.OrderedDict[tuple[Endpoint, ...], tuple[Transport, Endpoint]] = (
            collections.OrderedDict()
        )
        self._faults: collections.Counter[tuple[str, str]] = collections.Counter()
        self._lock = threading.Lock()

    @property
    def names(self) -> tuple[str, ...]:
        """The transports, best first."""
        return tuple(transport.name for transport in self._transports)

    @property
    def faults(self) -> dict[tuple[str, str], int]:
        """Attempts that failed since the start, those that another transport mended included, by
        transport (``NO_TRANSPORT`` if there was none) and ``TransferFault``. From any thread."""
        with self._lock:
            return dict(self._faults)

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
            raise failed(
                "the cache cannot be exported over any transport of this instance",
                TransferFault.OTHER,
            )
        return exported

    def pull(
        self,
        endpoints: Sequence[Endpoint],
        cache: KVCache,
        copies: Sequence[BlockCopy],
        timeout_s: float,
    ) -> Receipt:
        """Pull from a peer over the transport chosen for it.

        If that one turns out broken, the next one that reaches the peer does the pull again within
        the same time. A peer whose layout differs in the number of shards only is pulled from in
        slices, each of which is resharded when it has been verified. Raises TransferFailed.
        """
        started = time.monotonic()
        key = tuple(endpoints)
        with self._counting(NO_TRANSPORT):
            plan = plan_between(key[0].layout, cache.layout) if key else None
        if plan is None:
            return self._pull(key, cache, copies, started, timeout_s)
        return self._pull_resharded(plan, key, cache, copies, started, timeout_s)

    def _pull(
        self,
        key: tuple[Endpoint, ...],
        cache: KVCache,
        copies: Sequence[BlockCopy],
        started: float,
        timeout_s: float,
    ) -> Receipt:
        candidates = self._transports
        while True:
            with self._counting(NO_TRANSPORT):
                transport, endpoint = self._choice(key, candidates, cache.layout)
            try:
                with self._counting(transport.name):
                    left = _left(started, timeout_s)
                    return transport.pull(endpoint, cache, copies, timeout_s=left)
            except TransportBroken as error:
                with self._lock:
                    self._chosen.pop(key, None)
                candidates = tuple(one for one in candidates if one is not transport)
                offered = {endpoint.transport for endpoint in key}
                if not any(one.name in offered for one in candidates):
                    raise
                log.warning("%s failed, trying another transport: %s", transport.name, error)

    def _pull_resharded(
        self,
        plan: ReshardPlan,
        key: tuple[Endpoint, ...],
        cache: KVCache,
        copies: Sequence[BlockCopy],
        started: float,
        timeout_s: float,
    ) -> Receipt:
        """Into blocks as the peer has them, and from there into our own."""
        check_targets(cache, copies)
        size = plan.source.block_bytes
        step = max(1, min(len(copies), self._scratch_bytes // size))
        scratch = BlockArena.private(step, size, plan.source.text)
        name = ""
        try:
            # Also without copies: whether the peer is there is told.
            for at in range(0, max(1, len(copies)), step):
                part = copies[at : at + step]
                staged = [BlockCopy(copy.src, copy.generation, i) for i, copy in enumerate(part)]
                name = self._pull(key, scratch, staged, started, timeout_s).transport
                done = 0
                for first, count in runs([copy.dst for copy in part]):
                    plan.apply(scratch.run(done, count), cache.run(first, count))
                    done += count
                with self._counting(name):
                    _left(started, timeout_s)
        finally:
            scratch.close()
        return Receipt(
            num_blocks=len(copies),
            num_bytes=len(copies) * size,
            seconds=time.monotonic() - started,
            transport=name,
        )

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

    @contextlib.contextmanager
    def _counting(self, transport: str) -> Iterator[None]:
        """What fails within it is counted, and raised."""
        try:
            yield
        except Exception as error:
            fault = error.fault if isinstance(error, TransferFailed) else TransferFault.OTHER
            with self._lock:
                self._faults[transport, fault] += 1
            raise

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


def _left(started: float, timeout_s: float) -> float:
    """Seconds of the pull that are left. Raises TransferFailed when none are."""
    left = started + timeout_s - time.monotonic()
    if left <= 0:
        raise late(timeout_s)
    return left
