"""The exporter's side of the tcp transport: a small server of blocks, a thread per connection.

Threads and blocking sockets, because the work is moving large buffers, during which the
interpreter lock is free. Nothing polls: ``close`` shuts the sockets down, which wakes the threads.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import socket
import ssl
import threading
import time

from baton.core.errors import ConfigError
from kvpool.transport import KVCache, TransferFailed
from kvpool.transports import tcp_wire as wire
from kvpool.transports.blocks import Budget, budget_until, check_generation_table
from kvpool.transports.tcp_channel import Channel, TlsChannel, discard, receive_bytes
from kvpool.transports.tcp_frames import send_frames
from kvpool.transports.tcp_tls import ADVICE, explain, is_not_tls

log = logging.getLogger(__name__)

_MAX_EXCHANGE_S = 300.0
_JOIN_S = 5.0
_ACCEPT_PAUSE_S = 0.1
_HANDSHAKE_S = 10.0
_FAREWELL_S = 1.0
_MAX_DISCARD_BYTES = 16 << 20
_TLS_DIFFERS = wire.pack_reply(0, wire.Status.TLS, f"it speaks TLS only: {ADVICE}")


class BlockServer:
    """Serves the blocks of one cache until ``close``.

    ``host`` is bound and told to peers, so it must be an address of this machine that they reach.
    A connection may idle for ``idle_s``; the reader then makes a new one. With ``tls`` (made for
    servers) there are no plain connections. Raises ConfigError if the address cannot be bound.
    """

    def __init__(
        self,
        host: str,
        cache: KVCache,
        *,
        max_connections: int = 256,
        idle_s: float = 300.0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        if host in ("", "0.0.0.0", "::"):
            raise ConfigError(
                f"the tcp transport needs an address that peers reach, not {host!r}", param="host"
            )
        self.token = secrets.token_hex(16)
        self._cache = cache
        self._max_connections = max_connections
        self._idle_s = idle_s
        self._tls = tls
        self._lock = threading.Lock()
        self._connections: dict[Channel, threading.Thread] = {}
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
            for channel in self._connections:
                channel.shut()
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
            try:
                channel = self._channel(connection)
            except (OSError, ValueError) as error:
                log.info("a KV reader from %s went away at once: %s", peer, error)
                connection.close()
                continue
            with self._lock:
                refused = self._closing.is_set() or len(self._connections) >= self._max_connections
                if not refused:
                    thread = threading.Thread(
                        target=self._serve,
                        args=(channel,),
                        name=f"kv-tcp-peer-{peer[1]}",
                        daemon=True,
                    )
                    self._connections[channel] = thread
                    thread.start()
            if refused:
                log.warning("refused a connection for KV blocks from %s: too many", peer)
                channel.close()

    def _channel(self, connection: socket.socket) -> Channel:
        if self._tls is None:
            return Channel(connection)
        # The handshake is left to the connection's thread: it may take its time.
        wrapped = self._tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        return TlsChannel(wrapped)

    def _serve(self, channel: Channel) -> None:
        try:
            channel.handshake(budget_until(time.monotonic() + _HANDSHAKE_S))
            while self._exchange(channel):
                pass
        except ssl.SSLError as error:
            if not self._closing.is_set():
                log.warning("a KV reader was refused: %s", explain(error))
                words = _TLS_DIFFERS if is_not_tls(error) else b""
                channel.refuse(words, budget_until(time.monotonic() + _FAREWELL_S))
        except (OSError, wire.BadFrame) as error:
            if not self._closing.is_set() and getattr(error, "received", None) != 0:
                log.info("a KV reader's connection ended: %s", error or type(error).__name__)
        except Exception:
            log.exception("serving KV blocks failed")
        finally:
            channel.close()
            with self._lock:
                self._connections.pop(channel, None)

    def _exchange(self, channel: Channel) -> bool:
        """Answer one request; False if the connection cannot be used for another."""
        fixed = receive_bytes(channel, wire.REQUEST.size, lambda: self._idle_s)
        magic, version, token, count, block_bytes, budget_ms, layout_length, number = (
            wire.REQUEST.unpack(fixed)
        )
        if wire.is_tls_hello(fixed):
            # All that it understands is that this is not TLS, which a reset would not tell.
            channel.refuse(_TLS_DIFFERS, budget_until(time.monotonic() + _FAREWELL_S))
            raise wire.BadFrame(f"the reader wants TLS: {ADVICE}")
        if magic != wire.MAGIC or version != wire.VERSION:
            raise wire.BadFrame("not a KV reader of this version")
        seconds = min(budget_ms / 1000, _MAX_EXCHANGE_S)
        budget = budget_until(time.monotonic() + seconds)
        status, message = self._judge(token, count, layout_length)
        if status is not wire.Status.OK:
            # Closing a connection with unread bytes would destroy the reply on its way.
            rest = layout_length + wire.copies_bytes(count)
            discard(channel, min(rest, _MAX_DISCARD_BYTES), budget)
            channel.send([wire.pack_reply(number, status, message)], budget)
            return False
        layout = receive_bytes(channel, layout_length, budget).decode(errors="replace")
        table = receive_bytes(channel, wire.copies_bytes(count), budget)
        wrong_size = block_bytes not in (0, self._cache.block_bytes)
        if layout != self._cache.layout or wrong_size:
            message = f"the KV layouts differ: the peer has {self._cache.layout!r}, not {layout!r}"
            channel.send([wire.pack_reply(number, wire.Status.LAYOUT, message)], budget)
            return True
        if count:
            self._stream(channel, number, table, budget)
        else:
            channel.send([wire.pack_reply(number, wire.Status.OK)], budget)
        return True

    def _judge(self, token: bytes, count: int, layout_length: int) -> tuple[wire.Status, str]:
        if not secrets.compare_digest(token, self.token.encode()):
            return wire.Status.TOKEN, "this is another exporter: the token differs"
        if count > self._cache.num_blocks or layout_length > wire.MAX_LAYOUT_BYTES:
            return wire.Status.BAD_REQUEST, f"{count} blocks of {self._cache.num_blocks}"
        return wire.Status.OK, ""

    def _stream(self, channel: Channel, number: int, table: bytes, budget: Budget) -> None:
        blocks, generations = wire.unpack_copies(table)
        try:
            check_generation_table(self._cache, blocks, generations, "before the pull")
        except TransferFailed as error:
            channel.send([wire.pack_reply(number, wire.Status.STALE, error.message)], budget)
            return
        channel.send([wire.pack_reply(number, wire.Status.OK)], budget)
        send_frames(channel, self._cache, blocks, budget)
        try:
            check_generation_table(self._cache, blocks, generations, "during the pull")
            reply = wire.pack_reply(wire.last_number(number), wire.Status.OK)
        except TransferFailed as error:
            reply = wire.pack_reply(wire.last_number(number), wire.Status.STALE, error.message)
        channel.send([reply], budget)


def _shut(sock: socket.socket) -> None:
    # Wakes a thread that is blocked on the socket, which closing it would not.
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
