"""Between machines: the reader asks the exporter's block server, and receives into its own cache.

Bytes go from the socket straight into the destination blocks, frame by frame, each with a
checksum; the exporter re-checks the generations after the last byte. A large pull is divided over
several connections. Connections are kept for the next pull.
"""

from __future__ import annotations

import logging
import os
import ssl
import threading
import time
from collections.abc import Sequence

import numpy as np

from baton.core.config import TlsConfig
from kvpool.transport import (
    BlockCopy,
    Endpoint,
    KVCache,
    Receipt,
    TransferFailed,
    TransferFault,
    TransportBroken,
)
from kvpool.transports import tcp_wire as wire
from kvpool.transports.blocks import (
    Budget,
    broken,
    budget_until,
    check_layouts,
    check_targets,
    late,
)
from kvpool.transports.tcp_ask import ask, refusal
from kvpool.transports.tcp_channel import Channel
from kvpool.transports.tcp_connections import Connections
from kvpool.transports.tcp_faults import ends_connection, fault_of
from kvpool.transports.tcp_frames import receive_frames
from kvpool.transports.tcp_server import BlockServer
from kvpool.transports.tcp_tls import TlsContexts, explain

log = logging.getLogger(__name__)

MAX_STREAMS = 4
STREAM_BYTES = 4 << 20
"""A pull has a stream for each so many bytes. More than one also within a machine: the system tends
to run the two ends of a busy connection on one processor, in turn."""
_PROBE_S = 1.0


class TcpTransport:
    """A :class:`kvpool.transport.Transport` over tcp.

    ``host``: own address, as peers reach it. ``streams``: connections that one pull may use at the
    same time; default: one per processor, ``MAX_STREAMS`` at most. ``tls``: both directions use
    it, and peers without it are refused. Raises ConfigError for TLS files that cannot be used.
    """

    name = "tcp"

    def __init__(
        self,
        host: str = "127.0.0.1",
        *,
        tls: TlsConfig | None = None,
        streams: int | None = None,
        stream_bytes: int = STREAM_BYTES,
        max_connections: int = 256,
    ) -> None:
        contexts = TlsContexts(tls) if tls is not None and tls.enabled else None
        self._host = host
        self._server_tls = contexts.server if contexts is not None else None
        self._max_connections = max_connections
        self._streams = streams if streams is not None else _default_streams()
        self._stream_bytes = stream_bytes
        self._connections = Connections(contexts.client if contexts is not None else None)
        self._lock = threading.Lock()
        self._servers: list[BlockServer] = []

    def export(self, cache: KVCache) -> Endpoint:
        """Start a server for the cache. Raises ConfigError if the host cannot be bound."""
        server = BlockServer(
            self._host, cache, max_connections=self._max_connections, tls=self._server_tls
        )
        with self._lock:
            self._servers.append(server)
        return Endpoint(
            transport=self.name, address=server.address, token=server.token, layout=cache.layout
        )

    def reachable(self, endpoint: Endpoint) -> bool:
        """Ask the exporter whether it is the one meant; at most a second."""
        try:
            probe = _Stream(self._connections, endpoint, None, ())
            probe.run(budget_until(time.monotonic() + _PROBE_S))
        except (TransferFailed, TimeoutError) as error:
            # Whoever asks only learns that there is no way; certificates are mended by people.
            log.warning("%s cannot be reached over tcp: %s", endpoint.address, error or "no answer")
            return False
        return True

    def pull(
        self, endpoint: Endpoint, cache: KVCache, copies: Sequence[BlockCopy], *, timeout_s: float
    ) -> Receipt:
        """Receive into own blocks."""
        started = time.monotonic()
        check_targets(cache, copies)
        check_layouts(endpoint.layout, cache.layout)
        budget = budget_until(started + timeout_s)
        try:
            if copies:
                parts = divide(
                    copies,
                    cache.block_bytes,
                    streams=self._streams,
                    stream_bytes=self._stream_bytes,
                )
                _run_all(
                    [_Stream(self._connections, endpoint, cache, part) for part in parts], budget
                )
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
        self._connections.forget(endpoint)

    def close(self) -> None:
        """Stop the server, close all connections; pulls under way fail."""
        with self._lock:
            servers, self._servers = self._servers, []
        self._connections.close()
        for server in servers:
            server.close()


def divide(
    copies: Sequence[BlockCopy], block_bytes: int, *, streams: int, stream_bytes: int
) -> list[Sequence[BlockCopy]]:
    """Each stream's copies, in order: a stream for each ``stream_bytes``, ``streams`` at most.

    Sizes differ by a block at most.
    """
    wanted = len(copies) * block_bytes // stream_bytes
    count = max(1, min(streams, wanted, len(copies)))
    bounds = [len(copies) * i // count for i in range(count + 1)]
    return [copies[bounds[i] : bounds[i + 1]] for i in range(count)]


def _default_streams() -> int:
    return min(MAX_STREAMS, len(os.sched_getaffinity(0)))


def _run_all(streams: Sequence[_Stream], budget: Budget) -> None:
    """Run all streams, the first in this thread; if one fails, the others are ended.

    Returns or raises only when no thread writes to the cache any more; the budget that all of
    them have bounds that.
    """
    errors: list[BaseException] = []

    def run(stream: _Stream) -> None:
        try:
            stream.run(budget)
        except BaseException as error:
            errors.append(error)
            for other in streams:
                other.stop()

    threads = [
        threading.Thread(target=run, args=(stream,), name="kv-tcp-stream", daemon=True)
        for stream in streams[1:]
    ]
    for thread in threads:
        thread.start()
    run(streams[0])
    for thread in threads:
        thread.join()
    if errors:
        # The others failed because they were ended.
        raise errors[0]


class _Stream:
    """One connection's part of a pull. Without a cache it is a probe."""

    def __init__(
        self,
        connections: Connections,
        endpoint: Endpoint,
        cache: KVCache | None,
        copies: Sequence[BlockCopy],
    ) -> None:
        self._connections = connections
        self._endpoint = endpoint
        self._cache = cache
        self._copies = copies
        self._lock = threading.Lock()
        self._channel: Channel | None = None
        self._stopped = False
        self._begun = False
        """The exporter has agreed to answer."""

    def run(self, budget: Budget) -> None:
        """One exchange, on an idle connection if there is one.

        An idle connection may have died unnoticed (the exporter restarted, or closed it after
        its idle time): an error there before the answer says nothing, and a fresh one is tried,
        once. Raises TransferFailed, TimeoutError.
        """
        endpoint = self._endpoint
        idle = self._connections.take_idle(endpoint)
        if idle is not None:
            try:
                self._exchange(idle, budget)
                return
            except TimeoutError:
                raise
            except OSError as error:
                self._connections.forget(endpoint)
                if self._begun or not ends_connection(error):
                    raise self._broken(error, budget) from error
        try:
            self._exchange(self._connections.connect(endpoint, budget), budget)
        except TimeoutError:
            raise
        except OSError as error:
            raise self._broken(error, budget) from error

    def _broken(self, error: OSError, budget: Budget) -> TransportBroken:
        budget()  # an exporter that gave up at the deadline says no more than that
        reason = explain(error) if isinstance(error, ssl.SSLError) else str(error)
        text = f"the transfer from {self._endpoint.address} failed: {reason}"
        return broken(text, fault_of(error, begun=self._begun))

    def stop(self) -> None:
        """End it, now and if it has not begun yet."""
        with self._lock:
            self._stopped = True
            if self._channel is not None:
                self._channel.shut()

    def _exchange(self, channel: Channel, budget: Budget) -> None:
        number = wire.new_number()
        self._begun = False
        try:
            self._begin(channel)
            ask(channel, self._endpoint, number, self._cache, self._copies, budget)
            status, message = wire.receive_reply(channel, number, budget)
            if status is wire.Status.OK and self._cache is not None:
                self._begun = True
                targets = np.array([copy.dst for copy in self._copies], dtype=np.int64)
                receive_frames(channel, self._cache, targets, budget)
                status, message = wire.receive_reply(channel, wire.last_number(number), budget)
        except wire.BadFrame as error:
            self._end(channel)
            text = f"the transfer from {self._endpoint.address} failed: {error}"
            raise broken(text, TransferFault.CORRUPT) from error
        except BaseException:
            self._end(channel)
            raise
        if status is wire.Status.OK:
            self._end(channel, keep=True)
            return
        self._end(channel)
        raise refusal(self._endpoint.address, status, message)

    def _begin(self, channel: Channel) -> None:
        with self._lock:
            if self._stopped:
                raise broken("another stream of the pull failed", TransferFault.OTHER)
            self._channel = channel

    def _end(self, channel: Channel, *, keep: bool = False) -> None:
        # Once it is another pull's, it must not be ended by this one.
        with self._lock:
            self._channel = None
            keep = keep and not self._stopped
        if keep:
            self._connections.give_back(self._endpoint, channel)
        else:
            self._connections.drop(channel)
