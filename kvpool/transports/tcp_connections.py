"""A reader's connections: made, kept for the next exchange, and all of them ended at the end."""

from __future__ import annotations

import collections
import socket
import ssl
import threading

from kvpool.transport import Endpoint, TransferFault
from kvpool.transports.blocks import Budget, broken
from kvpool.transports.tcp_channel import Channel, TlsChannel
from kvpool.transports.tcp_tls import ADVICE, explain

_MAX_IDLE_PER_PEER = 16
_MAX_PEERS = 64


class Connections:
    """Channels to exporters, idle or busy. Any thread may call anything."""

    def __init__(self, tls: ssl.SSLContext | None) -> None:
        self._tls = tls
        self._lock = threading.Lock()
        self._idle: collections.OrderedDict[Endpoint, list[Channel]] = collections.OrderedDict()
        self._busy: set[Channel] = set()
        self._closed = False

    def take_idle(self, endpoint: Endpoint) -> Channel | None:
        """One that an earlier exchange left; ``None`` if there is none. Raises TransportBroken."""
        with self._lock:
            if self._closed:
                raise broken("the transport is closed", TransferFault.OTHER)
            idle = self._idle.get(endpoint)
            if not idle:
                return None
            channel = idle.pop()
            self._busy.add(channel)
            return channel

    def connect(self, endpoint: Endpoint, budget: Budget) -> Channel:
        """A new one. Raises TransportBroken, ConnectionError, TimeoutError."""
        host, _, port = endpoint.address.rpartition(":")
        if not port.isdecimal():
            raise broken(f"{endpoint.address!r} is not host:port", TransferFault.OTHER)
        sock = socket.create_connection((host.strip("[]"), int(port)), timeout=budget())
        channel = self._channel(sock)
        with self._lock:
            closed = self._closed
            if not closed:
                self._busy.add(channel)
        if closed:
            channel.close()
            raise broken("the transport is closed", TransferFault.OTHER)
        try:
            channel.handshake(budget)
        except ssl.SSLError as error:
            self.drop(channel)
            raise broken(
                f"no TLS with {endpoint.address}: {explain(error)}", TransferFault.OTHER
            ) from error
        except ConnectionError as error:
            self.drop(channel)
            raise broken(
                f"{endpoint.address} ended the TLS handshake; if it has no TLS: {ADVICE}",
                TransferFault.GONE,
            ) from error
        except BaseException:
            self.drop(channel)
            raise
        return channel

    def give_back(self, endpoint: Endpoint, channel: Channel) -> None:
        """The exchange is over, and the connection good for another."""
        surplus = []
        with self._lock:
            self._busy.discard(channel)
            idle = self._idle.setdefault(endpoint, [])
            self._idle.move_to_end(endpoint)
            if self._closed or len(idle) >= _MAX_IDLE_PER_PEER:
                surplus.append(channel)
            else:
                idle.append(channel)
            while len(self._idle) > _MAX_PEERS:
                surplus += self._idle.popitem(last=False)[1]
        for unwanted in surplus:
            unwanted.close()

    def drop(self, channel: Channel) -> None:
        """The exchange failed: nobody knows what comes next on this connection."""
        with self._lock:
            self._busy.discard(channel)
        channel.close()

    def forget(self, endpoint: Endpoint) -> None:
        """Close the idle connections to a peer that is gone."""
        with self._lock:
            idle = self._idle.pop(endpoint, [])
        for channel in idle:
            channel.close()

    def close(self) -> None:
        """End all; exchanges under way fail. Idempotent."""
        with self._lock:
            self._closed = True
            idle = [channel for channels in self._idle.values() for channel in channels]
            self._idle.clear()
            for channel in self._busy:
                # Its thread wakes, fails and closes it.
                channel.shut()
        for channel in idle:
            channel.close()

    def _channel(self, sock: socket.socket) -> Channel:
        try:
            if self._tls is None:
                return Channel(sock)
            return TlsChannel(self._tls.wrap_socket(sock, do_handshake_on_connect=False))
        except BaseException:
            sock.close()
            raise
