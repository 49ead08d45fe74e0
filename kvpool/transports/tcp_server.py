"""The exporter's side of the tcp transport: a small server of blocks, a thread per connection.

Threads and blocking sockets, because the work is moving large buffers, during which the
interpreter lock is free. Nothing polls: ``close`` shuts the sockets down, which wakes the threads.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import socket
import threading
import time

from baton.core.errors import ConfigError
from kvpool.transport import KVCache, TransferFailed
from kvpool.transports import tcp_wire as wire
from kvpool.transports.blocks import Budget, budget_until, check_generations, views

log = logging.getLogger(__name__)

_MAX_EXCHANGE_S = 300.0
_JOIN_S = 5.0
_ACCEPT_PAUSE_S = 0.1
_MAX_DISCARD_BYTES = 16 << 20


class BlockServer:
    """Serves the blocks of one cache until ``close``.

    ``host`` is bound and told to peers, so it must be an address of this machine that they reach.
    A connection may idle for ``idle_s``; the reader then makes a new one. Raises ConfigError if
    the address cannot be bound.
    """

    def __init__(
        self, host: str, cache: KVCache, *, max_connections: int = 64, idle_s: float = 300.0
    ) -> None:
        if host in ("", "0.0.0.0", "::"):
            raise ConfigError(
                f"the tcp transport needs an address that peers reach, not {host!r}", param="host"
            )
        self.token = secrets.token_hex(16)
        self._cache = cache
        self._max_connections = max_connections
        self._idle_s = idle_s
        self._lock = threading.Lock()
        self._connections: dict[socket.socket, threading.Thread] = {}
        self._closing = threading.Event()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._listener = socket.create_server((host, 0), family=family, reuse_port=False)
        except OSError as error:
            raise ConfigError(f"cannot serve KV blocks on {host}: {error}", param="host") from error
        port = self._listener.getsockname()[1]
        self.address = f"[{host}]:{port}" if family == socket.AF_INET6 else f"{host}:{port}"
        self._acceptor = threading.Thread(target=self._accept, name=f"kv-tcp-{port}", daemon=True)
        self._acceptor.start()

    def close(self) -> None:
        """Stop serving; waits, bounded, for the threads. Idempotent."""
        with self._lock:
            self._closing.set()
            threads = [self._acceptor, *self._connections.values()]
            _shut(self._listener)
            for connection in self._connections:
                _shut(connection)
        give_up = time.monotonic() + _JOIN_S
        for thread in threads:
            thread.join(max(0.0, give_up - time.monotonic()))
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, peer = self._listener.accept()
            except OSError as error:
                if self._closing.is_set():
                    return
                # Out of descriptors, or the caller went away again: neither ends the service.
                log.warning("cannot accept a connection for KV blocks: %s", error)
                self._closing.wait(_ACCEPT_PAUSE_S)
                continue
            with self._lock:
                refused = self._closing.is_set() or len(self._connections) >= self._max_connections
                if not refused:
                    thread = threading.Thread(
                        target=self._serve,
                        args=(connection,),
                        name=f"kv-tcp-peer-{peer[1]}",
                        daemon=True,
                    )
                    self._connections[connection] = thread
                    thread.start()
            if refused:
                log.warning("refused a connection for KV blocks from %s: too many", peer)
                connection.close()

    def _serve(self, connection: socket.socket) -> None:
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while self._exchange(connection):
                pass
        except (OSError, wire.BadFrame) as error:
            if not self._closing.is_set() and getattr(error, "received", None) != 0:
                log.info("a KV reader's connection ended: %s", error or type(error).__name__)
        except Exception:
            log.exception("serving KV blocks failed")
        finally:
            with self._lock:
                self._connections.pop(connection, None)
            connection.close()

    def _exchange(self, connection: socket.socket) -> bool:
        """Answer one request; False if the connection cannot be used for another."""
        fixed = wire.receive_bytes(connection, wire.REQUEST.size, lambda: self._idle_s)
        magic, version, token, count, block_bytes, budget_ms, layout_length = wire.REQUEST.unpack(
            fixed
        )
        if magic != wire.MAGIC or version != wire.VERSION:
            raise wire.BadFrame("not a KV reader of this version")
        seconds = min(budget_ms / 1000, _MAX_EXCHANGE_S)
        budget = budget_until(time.monotonic() + seconds)
        status, message = self._judge(token, count, layout_length)
        if status is not wire.Status.OK:
            # Closing a connection with unread bytes would destroy the reply on its way.
            rest = layout_length + wire.copies_bytes(count)
            wire.discard(connection, min(rest, _MAX_DISCARD_BYTES), budget)
            wire.send_from(connection, [wire.pack_reply(status, message)], budget)
            return False
        layout = wire.receive_bytes(connection, layout_length, budget).decode(errors="replace")
        table = wire.receive_bytes(connection, wire.copies_bytes(count), budget)
        wrong_size = block_bytes not in (0, self._cache.block_bytes)
        if layout != self._cache.layout or wrong_size:
            message = f"the KV layouts differ: the peer has {self._cache.layout!r}, not {layout!r}"
            reply = wire.pack_reply(wire.Status.LAYOUT, message)
            wire.send_from(connection, [reply], budget)
            return True
        if count:
            self._stream(connection, table, budget)
        else:
            wire.send_from(connection, [wire.pack_reply(wire.Status.OK)], budget)
        return True

    def _judge(self, token: bytes, count: int, layout_length: int) -> tuple[wire.Status, str]:
        if not secrets.compare_digest(token, self.token.encode()):
            return wire.Status.TOKEN, "this is another exporter: the token differs"
        if count > self._cache.num_blocks or layout_length > wire.MAX_LAYOUT_BYTES:
            return wire.Status.BAD_REQUEST, f"{count} blocks of {self._cache.num_blocks}"
        return wire.Status.OK, ""

    def _stream(self, connection: socket.socket, table: bytes, budget: Budget) -> None:
        copies = wire.unpack_copies(table)
        try:
            check_generations(self._cache, copies, "before the pull")
        except TransferFailed as error:
            reply = wire.pack_reply(wire.Status.STALE, error.message)
            wire.send_from(connection, [reply], budget)
            return
        wire.send_from(connection, [wire.pack_reply(wire.Status.OK)], budget)
        step = wire.frame_blocks(self._cache.block_bytes)
        for at in range(0, len(copies), step):
            frame = views(self._cache, [copy.src for copy in copies[at : at + step]])
            trailer = wire.CHECKSUM.pack(wire.checksum(frame))
            wire.send_from(connection, [*frame, trailer], budget)
        try:
            check_generations(self._cache, copies, "during the pull")
            reply = wire.pack_reply(wire.Status.OK)
        except TransferFailed as error:
            reply = wire.pack_reply(wire.Status.STALE, error.message)
        wire.send_from(connection, [reply], budget)


def _shut(sock: socket.socket) -> None:
    # Wakes a thread that is blocked on the socket, which closing it would not.
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
