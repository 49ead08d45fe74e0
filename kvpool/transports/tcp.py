"""Between machines: the reader asks the exporter's block server, and receives into its own cache.

Bytes go from the socket straight into the destination blocks, frame by frame, each with a
checksum; the exporter re-checks the generations after the last byte. Connections are kept for the
next pull.
"""

from __future__ import annotations

import collections
import contextlib
import socket
import threading
import time
from collections.abc import Sequence

from kvpool.transport import BlockCopy, Endpoint, KVCache, Receipt, TransferFailed
from kvpool.transports import tcp_wire as wire
from kvpool.transports.blocks import (
    Budget,
    broken,
    budget_until,
    check_layouts,
    check_targets,
    failed,
    views,
)
from kvpool.transports.tcp_server import BlockServer

_PROBE_S = 1.0
_MAX_IDLE_PER_PEER = 4
_MAX_PEERS = 64


class TcpTransport:
    """A :class:`kvpool.transport.Transport` over tcp. ``host``: own address, as peers reach it."""

    name = "tcp"

    def __init__(self, host: str = "127.0.0.1", *, max_connections: int = 64) -> None:
        self._host = host
        self._max_connections = max_connections
        self._lock = threading.Lock()
        self._servers: list[BlockServer] = []
        self._idle: collections.OrderedDict[Endpoint, list[socket.socket]] = (
            collections.OrderedDict()
        )
        self._busy: set[socket.socket] = set()
        self._closed = False

    def export(self, cache: KVCache) -> Endpoint:
        """Start a server for the cache. Raises ConfigError if the host cannot be bound."""
        server = BlockServer(self._host, cache, max_connections=self._max_connections)
        with self._lock:
            self._servers.append(server)
        return Endpoint(
            transport=self.name, address=server.address, token=server.token, layout=cache.layout
        )

    def reachable(self, endpoint: Endpoint) -> bool:
        """Ask the exporter whether it is the one meant; at most a second."""
        try:
            self._exchange(endpoint, None, (), budget_until(time.monotonic() + _PROBE_S))
        except (TransferFailed, TimeoutError):
            return False
        return True

    def pull(
        self, endpoint: Endpoint, cache: KVCache, copies: Sequence[BlockCopy], *, timeout_s: float
    ) -> Receipt:
        """Receive into own blocks."""
        started = time.monotonic()
        check_targets(cache, copies)
        check_layouts(endpoint.layout, cache.layout)
        if copies:
            try:
                self._exchange(endpoint, cache, copies, budget_until(started + timeout_s))
            except TimeoutError:
                raise failed(
                    f"the pull from {endpoint.address} took longer than {timeout_s:g} s"
                ) from None
        return Receipt(
            num_blocks=len(copies),
            num_bytes=len(copies) * cache.block_bytes,
            seconds=time.monotonic() - started,
            transport=self.name,
        )

    def forget(self, endpoint: Endpoint) -> None:
        """Close the idle connections to a peer that is gone."""
        with self._lock:
            idle = self._idle.pop(endpoint, [])
        for sock in idle:
            sock.close()

    def close(self) -> None:
        """Stop the server, close all connections; pulls under way fail."""
        with self._lock:
            self._closed = True
            servers, self._servers = self._servers, []
            idle = [sock for socks in self._idle.values() for sock in socks]
            self._idle.clear()
            for sock in self._busy:
                # Its thread wakes, fails and closes it.
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
        for sock in idle:
            sock.close()
        for server in servers:
            server.close()

    def _exchange(
        self, endpoint: Endpoint, cache: KVCache | None, copies: Sequence[BlockCopy], budget: Budget
    ) -> None:
        """One exchange, on an idle connection if there is one.

        An idle connection may have died unnoticed (the exporter restarted, or closed it after
        its idle time): a connection error there says nothing, and a fresh one is tried, once.
        """
        sock = self._take_idle(endpoint)
        if sock is not None:
            try:
                self._exchange_on(sock, endpoint, cache, copies, budget)
            except TimeoutError:
                raise
            except OSError:
                self.forget(endpoint)
            else:
                return
        try:
            fresh = self._connect(endpoint, budget)
            self._exchange_on(fresh, endpoint, cache, copies, budget)
        except TimeoutError:
            raise
        except OSError as error:
            raise broken(f"the transfer from {endpoint.address} failed: {error}") from error

    def _exchange_on(
        self,
        sock: socket.socket,
        endpoint: Endpoint,
        cache: KVCache | None,
        copies: Sequence[BlockCopy],
        budget: Budget,
    ) -> None:
        try:
            _ask(sock, endpoint, cache, copies, budget)
            status, message = wire.receive_reply(sock, budget)
            if status is wire.Status.OK and cache is not None:
                _receive_blocks(sock, cache, copies, budget)
                status, message = wire.receive_reply(sock, budget)
        except wire.BadFrame as error:
            self._drop(sock)
            raise broken(f"the transfer from {endpoint.address} failed: {error}") from error
        except BaseException:
            self._drop(sock)
            raise
        if status is wire.Status.OK:
            self._give_back(endpoint, sock)
            return
        self._drop(sock)
        text = f"{endpoint.address} refused: {message}"
        raise broken(text) if status is wire.Status.TOKEN else failed(text)

    def _take_idle(self, endpoint: Endpoint) -> socket.socket | None:
        with self._lock:
            if self._closed:
                raise broken("the transport is closed")
            idle = self._idle.get(endpoint)
            if not idle:
                return None
            sock = idle.pop()
            self._busy.add(sock)
            return sock

    def _connect(self, endpoint: Endpoint, budget: Budget) -> socket.socket:
        host, _, port = endpoint.address.rpartition(":")
        if not port.isdecimal():
            raise broken(f"{endpoint.address!r} is not host:port")
        sock = socket.create_connection((host.strip("[]"), int(port)), timeout=budget())
        with self._lock:
            if not self._closed:
                self._busy.add(sock)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return sock
        sock.close()
        raise broken("the transport is closed")

    def _drop(self, sock: socket.socket) -> None:
        with self._lock:
            self._busy.discard(sock)
        sock.close()

    def _give_back(self, endpoint: Endpoint, sock: socket.socket) -> None:
        surplus = []
        with self._lock:
            self._busy.discard(sock)
            idle = self._idle.setdefault(endpoint, [])
            self._idle.move_to_end(endpoint)
            if self._closed or len(idle) >= _MAX_IDLE_PER_PEER:
                surplus.append(sock)
            else:
                idle.append(sock)
            while len(self._idle) > _MAX_PEERS:
                surplus += self._idle.popitem(last=False)[1]
        for unwanted in surplus:
            unwanted.close()


def _ask(
    sock: socket.socket,
    endpoint: Endpoint,
    cache: KVCache | None,
    copies: Sequence[BlockCopy],
    budget: Budget,
) -> None:
    """Send a request. Without a cache it is a probe, which any block size answers to."""
    layout = endpoint.layout.encode()
    fixed = wire.REQUEST.pack(
        wire.MAGIC,
        wire.VERSION,
        endpoint.token.encode(),
        len(copies),
        0 if cache is None else cache.block_bytes,
        min(int(budget() * 1000) + 1, 2**32 - 1),
        len(layout),
    )
    wire.send_from(sock, [fixed, layout, wire.pack_copies(copies)], budget)


def _receive_blocks(
    sock: socket.socket, cache: KVCache, copies: Sequence[BlockCopy], budget: Budget
) -> None:
    step = wire.frame_blocks(cache.block_bytes)
    for at in range(0, len(copies), step):
        frame = views(cache, [copy.dst for copy in copies[at : at + step]])
        trailer = bytearray(wire.CHECKSUM.size)
        wire.receive_into(sock, [*frame, memoryview(trailer)], budget)
        if wire.CHECKSUM.unpack(trailer)[0] != wire.checksum(frame):
            raise wire.BadFrame(f"blocks {at} to {at + step} arrived with a wrong checksum")
