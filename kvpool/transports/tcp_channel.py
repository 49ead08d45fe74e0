"""Connections of the tcp transport: moving buffers within a budget, in the clear or over TLS.

A plain socket blocks in the kernel with a time limit of its own, so one call moves many buffers
and returns when all have moved. A TLS socket moves a record (16 KiB) per call.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
from collections.abc import Sequence

from kvpool.transports.blocks import Budget

_MAX_BUFFERS = 512
_MIN_TIMEOUT_S = 1e-6
_MAX_TIMEOUT_S = 1e9
_JOIN_BYTES = 1 << 14
_MAX_UNREAD_BYTES = 1 << 20
_LOCAL_BUFFER_BYTES = 128 << 10
"""Within a machine nothing is on its way for long, and what waits should wait in the processor's
cache: megabytes, which the system would choose, cost a third of the speed. Between machines the
system chooses, as it knows how long the way is."""
_TIMEVAL = struct.Struct("@ll")

Buffer = memoryview | bytes


class ConnectionEnded(ConnectionError):
    """The other side closed the connection in the middle, or before the first byte."""

    def __init__(self, received: int) -> None:
        super().__init__(f"the peer closed the connection after {received} bytes")
        self.received = received


class Channel:
    """A plain connection; owns the socket. One thread moves bytes; any may call ``shut``."""

    def __init__(self, sock: socket.socket) -> None:
        """Raises OSError if the peer is gone already."""
        self._sock = sock
        sock.settimeout(None)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if sock.getsockname()[0] == sock.getpeername()[0]:
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                sock.setsockopt(socket.SOL_SOCKET, option, _LOCAL_BUFFER_BYTES)

    def handshake(self, budget: Budget) -> None:
        """Agree on keys, where there are keys. Raises OSError (ssl.SSLError), TimeoutError."""

    def receive(self, buffers: Sequence[memoryview], budget: Budget) -> None:
        """Fill all buffers. Raises ConnectionError, TimeoutError."""
        pending = [buffer for buffer in buffers if len(buffer)]
        received = first = 0
        while first < len(pending):
            self._limit(socket.SO_RCVTIMEO, budget)
            try:
                count = self._sock.recvmsg_into(
                    pending[first : first + _MAX_BUFFERS], 0, socket.MSG_WAITALL
                )[0]
            except BlockingIOError:
                raise TimeoutError from None
            if count == 0:
                raise ConnectionEnded(received)
            received += count
            first = _advance(pending, first, count)

    def send(self, buffers: Sequence[Buffer], budget: Budget) -> None:
        """Send all buffers without joining them. Raises ConnectionError, TimeoutError."""
        pending = [memoryview(buffer) for buffer in buffers if len(buffer)]
        first = 0
        while first < len(pending):
            self._limit(socket.SO_SNDTIMEO, budget)
            try:
                count = self._sock.sendmsg(pending[first : first + _MAX_BUFFERS])
            except BlockingIOError:
                raise TimeoutError from None
            first = _advance(pending, first, count)

    def shut(self) -> None:
        """End the connection: wakes a thread that is blocked on it, which closing would not."""
        with contextlib.suppress(OSError):
            # Not the TLS socket's own method, which would take the keys from under that thread.
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)

    def close(self) -> None:
        """Idempotent."""
        self._sock.close()

    def refuse(self, words: bytes, budget: Budget) -> None:
        """Say ``words`` in the clear, and close so that they and what was said before arrive.

        With bytes of the peer's unread, closing would be a reset, which destroys what is on its
        way. Never raises for a peer that does not listen.
        """
        sock = self._sock
        with contextlib.suppress(OSError):
            sock.settimeout(budget())
            # The plain methods: a TLS socket without keys has none of its own.
            socket.socket.sendall(sock, words)
            socket.socket.shutdown(sock, socket.SHUT_WR)
            left = _MAX_UNREAD_BYTES
            while left > 0:
                sock.settimeout(budget())
                count = len(socket.socket.recv(sock, 1 << 16))
                if count == 0:
                    break
                left -= count
        self.close()

    def _limit(self, option: int, budget: Budget) -> None:
        seconds = min(max(budget(), _MIN_TIMEOUT_S), _MAX_TIMEOUT_S)
        whole = int(seconds)
        # Zero would mean no limit.
        micro = max(int((seconds - whole) * 1e6), 0 if whole else 1)
        self._sock.setsockopt(socket.SOL_SOCKET, option, _TIMEVAL.pack(whole, micro))


class TlsChannel(Channel):
    """A connection with TLS; ``handshake`` comes first."""

    def __init__(self, sock: ssl.SSLSocket) -> None:
        super().__init__(sock)
        self._tls = sock

    def handshake(self, budget: Budget) -> None:
        """Both sides check the other's certificate; a reader learns only later that it failed."""
        self._tls.settimeout(budget())
        self._tls.do_handshake()

    def receive(self, buffers: Sequence[memoryview], budget: Budget) -> None:
        """As over a plain connection."""
        received = 0
        for buffer in buffers:
            at = 0
            while at < len(buffer):
                self._tls.settimeout(budget())
                count = self._tls.recv_into(buffer[at:])
                if count == 0:
                    raise ConnectionEnded(received)
                at += count
                received += count

    def send(self, buffers: Sequence[Buffer], budget: Budget) -> None:
        """As over a plain connection; small buffers are joined to one record."""
        if sum(len(buffer) for buffer in buffers) <= _JOIN_BYTES:
            buffers = [b"".join(buffers)]
        for buffer in buffers:
            view = memoryview(buffer)
            at = 0
            while at < len(view):
                self._tls.settimeout(budget())
                at += self._tls.send(view[at:])


def receive_bytes(channel: Channel, count: int, budget: Budget) -> bytes:
    """Exactly ``count`` bytes. Raises ConnectionError, TimeoutError."""
    data = bytearray(count)
    channel.receive([memoryview(data)], budget)
    return bytes(data)


def discard(channel: Channel, count: int, budget: Budget) -> None:
    """Read ``count`` bytes and forget them. Raises ConnectionError, TimeoutError."""
    while count:
        size = min(count, 1 << 16)
        receive_bytes(channel, size, budget)
        count -= size


def _advance(pending: list[memoryview], first: int, count: int) -> int:
    """Drop ``count`` bytes off the front; returns the new first buffer."""
    while count:
        head = pending[first]
        if count < len(head):
            pending[first] = head[count:]
            return first
        count -= len(head)
        first += 1
    return first
