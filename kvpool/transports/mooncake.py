"""Through Mooncake's transfer engine: the reader reads the exporter's memory, past its processor.

A one-sided read proves nothing: neither that the memory is still the exporter's, nor that it did
not change half-way. So a small server of the exporter vouches for the bytes, over a connection of
its own: it looks at the generations before, tells a checksum per chunk, and looks at the
generations again when all chunks have arrived. The reader checks what lies in its own blocks.

Run over Mooncake's ``tcp``. ``rdma`` and ``ascend`` take the same way and are untested: there was
no such hardware. Not encrypted, and memory is open to whoever reaches the engine's ports.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
import time
from collections.abc import Iterator, Sequence

import numpy as np

from baton.core.errors import ConfigError
from kvpool.bounded import Staging
from kvpool.transport import (
    BlockCopy,
    Endpoint,
    KVCache,
    Receipt,
    TransferFailed,
    TransferFault,
)
from kvpool.transports import mooncake_engine as engines
from kvpool.transports import tcp_wire as wire
from kvpool.transports.blocks import (
    Budget,
    broken,
    budget_until,
    check_layouts,
    check_targets,
    late,
    runs,
)
from kvpool.transports.mooncake_engine import MooncakeEngine
from kvpool.transports.mooncake_server import ARRIVED, VouchingServer, checksum, chunks
from kvpool.transports.tcp_ask import ask, refusal
from kvpool.transports.tcp_channel import Channel, discard, receive_bytes
from kvpool.transports.tcp_connections import Connections
from kvpool.transports.tcp_faults import fault_of

_PROBE_S = 1.0


class MooncakeTransport:
    """A :class:`kvpool.transport.Transport` over Mooncake's transfer engine.

    ``host``: own address, as peers reach it. ``protocol``: of the engine, on both sides alike;
    ``device``: which of the machine's devices, by the engine's names. Raises ConfigError if
    Mooncake is not installed.
    """

    name = "mooncake"

    def __init__(self, host: str = "127.0.0.1", *, protocol: str = "tcp", device: str = "") -> None:
        engines.library("engine", "handoff.transport")
        self._host = host
        self._protocol = protocol
        self._device = device
        self._connections = Connections(None)
        self._lock = threading.Lock()
        self._servers: list[tuple[VouchingServer, int]] = []
        self._engine: MooncakeEngine | None = None
        self._closed = False

    def export(self, cache: KVCache) -> Endpoint:
        """Register the cache's memory and vouch for it. Raises ConfigError."""
        engine = self._acquired()
        server = VouchingServer(self._host, cache)
        try:
            base = engine.export(cache)
        except BaseException:
            server.close()
            raise
        with self._lock:
            self._servers.append((server, base))
        return Endpoint(
            transport=self.name,
            address=f"{server.address}/{engine.session}/{base:x}",
            token=server.token,
            layout=cache.layout,
        )

    def reachable(self, endpoint: Endpoint) -> bool:
        """Ask the exporter whether it is the one meant; at most a second."""
        budget = budget_until(time.monotonic() + _PROBE_S)
        try:
            if self._reading().calls.num_late:
                return False
            with self._asked(_Peer.of(endpoint), None, (), budget):
                return True
        except (TransferFailed, TimeoutError):
            return False

    def pull(
        self, endpoint: Endpoint, cache: KVCache, copies: Sequence[BlockCopy], *, timeout_s: float
    ) -> Receipt:
        """Read to staging memory, copy to own blocks, verify.

        Returns or raises when nothing writes to the blocks any more, by the deadline: a read that
        the engine does not return from writes to staging memory only.
        """
        started = time.monotonic()
        check_targets(cache, copies)
        check_layouts(endpoint.layout, cache.layout)
        if copies:
            try:
                self._transfer(_Peer.of(endpoint), cache, copies, budget_until(started + timeout_s))
            except TimeoutError:
                raise late(timeout_s, endpoint.address) from None
        return Receipt(
            num_blocks=len(copies),
            num_bytes=len(copies) * cache.block_bytes,
            seconds=time.monotonic() - started,
            transport=self.name,
        )

    def forget(self, endpoint: Endpoint) -> None:
        """Close the idle connections to a peer that is gone."""
        with contextlib.suppress(TransferFailed):
            self._connections.forget(_Peer.of(endpoint).control)

    def close(self) -> None:
        """Withdraw the exports, close all connections, give the engine back. Idempotent."""
        with self._lock:
            self._closed = True
            servers, self._servers = self._servers, []
            engine, self._engine = self._engine, None
        self._connections.close()
        for server, base in servers:
            server.close()
            if engine is not None:
                engine.withdraw(base)
        if engine is not None:
            engines.release(engine)

    def _acquired(self) -> MooncakeEngine:
        with self._lock:
            if self._closed:
                raise broken("the transport is closed", TransferFault.OTHER)
            if self._engine is None:
                self._engine = engines.acquire(self._host, self._protocol, self._device)
            return self._engine

    def _reading(self) -> MooncakeEngine:
        try:
            return self._acquired()
        except ConfigError as error:
            raise broken(error.message, TransferFault.OTHER) from error

    def _transfer(
        self, peer: _Peer, cache: KVCache, copies: Sequence[BlockCopy], budget: Budget
    ) -> None:
        engine = self._reading()
        budget()
        if engine.calls.num_late:
            raise broken("Mooncake has not returned from an earlier read", TransferFault.LATE)
        with self._asked(peer, cache, copies, budget) as (channel, number):
            wrong = self._read(engine, peer, cache, copies, channel, budget)
            channel.send([ARRIVED], budget)
            _accept(peer, *wire.receive_reply(channel, wire.last_number(number), budget))
            # Told last: blocks that were given away meanwhile are the likelier reason.
            if wrong:
                raise broken(
                    f"blocks arrived from {peer.session} with a wrong checksum",
                    TransferFault.CORRUPT,
                )

    def _read(
        self,
        engine: MooncakeEngine,
        peer: _Peer,
        cache: KVCache,
        copies: Sequence[BlockCopy],
        channel: Channel,
        budget: Budget,
    ) -> bool:
        """Read all chunks; True if one has a wrong checksum (the others are left out then)."""
        size = cache.block_bytes
        left = len(list(chunks(copies, size)))
        for chunk in chunks(copies, size):
            pieces = list(runs([copy.src for copy in chunk]))
            engine.read(
                peer.session,
                [peer.base + first * size for first, _ in pieces],
                [count * size for _, count in pieces],
                functools.partial(_scatter, cache, chunk),
                budget,
            )
            (told,) = wire.CHECKSUM.unpack(receive_bytes(channel, wire.CHECKSUM.size, budget))
            left -= 1
            if told != checksum(cache, [copy.dst for copy in chunk]):
                discard(channel, left * wire.CHECKSUM.size, budget)
                return True
        return False

    @contextlib.contextmanager
    def _asked(
        self, peer: _Peer, cache: KVCache | None, copies: Sequence[BlockCopy], budget: Budget
    ) -> Iterator[tuple[Channel, int]]:
        """A connection on which the exporter has agreed to a request, and that one's number; the
        connection is kept for later if all goes well.

        An idle one may have died unnoticed, which says nothing: then a fresh one is tried, once.
        Raises TransferFailed, TimeoutError.
        """
        channel = self._connections.take_idle(peer.control)
        reply: tuple[wire.Status, str] | None = None
        number, begun = wire.new_number(), False
        try:
            if channel is not None:
                try:
                    reply = _ask(channel, peer, number, cache, copies, budget)
                except TimeoutError:
                    raise
                except OSError:
                    self._connections.drop(channel)
                    self._connections.forget(peer.control)
                    channel = None
            if channel is None:
                channel = self._connections.connect(peer.control, budget)
            if reply is None:
                reply = _ask(channel, peer, number, cache, copies, budget)
            _accept(peer, *reply)
            begun = True
            yield channel, number
        except TimeoutError:
            raise
        except (OSError, wire.BadFrame) as error:
            fault = TransferFault.CORRUPT
            if isinstance(error, OSError):
                budget()  # an exporter that gave up at the deadline says no more than that
                fault = fault_of(error, begun=begun)
            text = f"the transfer from {peer.control.address} failed: {error}"
            raise broken(text, fault) from error
        else:
            kept, channel = channel, None
            self._connections.give_back(peer.control, kept)
        finally:
            if channel is not None:
                self._connections.drop(channel)


@dataclasses.dataclass(frozen=True, slots=True)
class _Peer:
    """What an endpoint's address says."""

    control: Endpoint
    """Of the server that vouches."""
    session: str
    base: int
    """Address of block 0 in the exporter's process."""

    @classmethod
    def of(cls, endpoint: Endpoint) -> _Peer:
        """Raises TransportBroken."""
        try:
            control, session, base = endpoint.address.split("/")
            return cls(dataclasses.replace(endpoint, address=control), session, int(base, 16))
        except ValueError:
            text = f"{endpoint.address!r} is not server/session/base"
            raise broken(text, TransferFault.OTHER) from None


def _ask(
    channel: Channel,
    peer: _Peer,
    number: int,
    cache: KVCache | None,
    copies: Sequence[BlockCopy],
    budget: Budget,
) -> tuple[wire.Status, str]:
    """Send a request, as a reader of the tcp transport does, and return the answer."""
    ask(channel, peer.control, number, cache, copies, budget)
    return wire.receive_reply(channel, number, budget)


def _accept(peer: _Peer, status: wire.Status, message: str) -> None:
    if status is not wire.Status.OK:
        raise refusal(peer.control.address, status, message)


def _scatter(cache: KVCache, chunk: Sequence[BlockCopy], staging: Staging) -> None:
    """Copy a chunk's blocks to where they belong."""
    size = cache.block_bytes
    at = 0
    for first, count in runs([copy.dst for copy in chunk]):
        target = np.frombuffer(cache.run(first, count), dtype=np.uint8)
        np.copyto(target, staging.data[at : at + len(target)])
        at += count * size
