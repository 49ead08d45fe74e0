"""The exporter's side of the collective transport: a listener, and a thread per pair."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import secrets
import socket
import threading
import time

from baton.core.errors import ConfigError
from kvpool.checksum import checksum
from kvpool.transport import BlockCopy, KVCache, TransferFailed
from kvpool.transports import collective_wire as wire
from kvpool.transports.blocks import Budget, budget_until, check_generations
from kvpool.transports.collective_pair import Lane, PairGroups, gather, slices
from kvpool.transports.tcp_wire import last_number

log = logging.getLogger(__name__)

_MAX_STRANGERS = 16
_HELLO_S = 5.0
_MAX_EXCHANGE_S = 300.0
_ACCEPT_PAUSE_S = 0.1
_MAX_COPIES = 1 << 20


@dataclasses.dataclass(eq=False)
class _Peer:
    """A connection and, from its place among the pairs on, a pair."""

    thread: threading.Thread
    lane: Lane | None = None
    paired: bool = False
    busy: bool = False
    """Between pulls it may lose its place to another."""


class PairServer:
    """Serves the blocks of one cache to at most ``max_pairs`` readers at a time until ``close``.

    One more reader ends the pair that has been idle longest; if none is idle, it is refused. A
    pair may idle for ``idle_s`` (seconds). ``host`` is bound and told to peers. ``end_s``: as of
    ``Lane``. Raises ConfigError if the address cannot be bound.
    """

    def __init__(
        self,
        host: str,
        cache: KVCache,
        groups: PairGroups,
        *,
        max_pairs: int,
        end_s: float,
        idle_s: float = 300.0,
    ) -> None:
        if host in ("", "0.0.0.0", "::"):
            raise ConfigError(
                f"the collective transport needs an address that peers reach, not {host!r}",
                param="host",
            )
        self.token = secrets.token_hex(16)
        self._cache = cache
        self._groups = groups
        self._max_pairs = max_pairs
        self._end_s = end_s
        self._idle_s = idle_s
        self._peers: collections.OrderedDict[socket.socket, _Peer] = collections.OrderedDict()
        self._changed = threading.Condition()
        self._stuck: list[Lane] = []
        self._closing = threading.Event()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._listener = socket.create_server((host, 0), family=family)
        except OSError as error:
            raise ConfigError(f"cannot serve KV blocks on {host}: {error}", param="host") from error
        port = self._listener.getsockname()[1]
        self.address = f"[{host}]:{port}" if family == socket.AF_INET6 else f"{host}:{port}"
        self._acceptor = threading.Thread(
            target=self._accept, name=f"kv-collective-{port}", daemon=True
        )
        self._acceptor.start()

    def close(self) -> None:
        """Stop serving; waits, bounded, for the threads. Idempotent."""
        with self._changed:
            self._closing.set()
            peers = dict(self._peers)
            _shut(self._listener)
            for connection in peers:
                _shut(connection)
        for peer in peers.values():
            if peer.lane is not None:
                peer.lane.end()
        give_up = time.monotonic() + self._end_s
        for thread in (self._acceptor, *(peer.thread for peer in peers.values())):
            thread.join(max(0.0, give_up - time.monotonic()))
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, address = self._listener.accept()
            except OSError as error:
                if self._closing.is_set():
                    return
                # Out of descriptors, or the caller went away again: neither ends the service.
                log.warning("cannot accept a collective KV reader: %s", error)
                self._closing.wait(_ACCEPT_PAUSE_S)
                continue
            with self._changed:
                many = len(self._peers) >= self._max_pairs + _MAX_STRANGERS
                refused = self._closing.is_set() or many
                if not refused:
                    thread = threading.Thread(
                        target=self._serve,
                        args=(connection,),
                        name=f"kv-collective-peer-{address[1]}",
                        daemon=True,
                    )
                    self._peers[connection] = _Peer(thread)
                    thread.start()
            if refused:
                log.warning("refused a collective KV reader from %s: too many", address)
                connection.close()

    def _serve(self, connection: socket.socket) -> None:
        with self._changed:
            peer = self._peers[connection]
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            met = self._meet(connection, peer)
            while met is not None:
                self._exchange(connection, peer, *met)
        except (OSError, wire.BadMessage) as error:
            if not self._closing.is_set():
                log.info("a collective KV reader ended: %s", error or type(error).__name__)
        except Exception:
            log.exception("serving KV blocks failed")
        finally:
            # First the connection, so that the reader learns of it at once.
            _shut(connection)
            stuck = peer.lane is not None and not peer.lane.end()
            with self._changed:
                if stuck and peer.lane is not None:
                    self._stuck.append(peer.lane)
                del self._peers[connection]
                self._changed.notify_all()
            connection.close()

    def _meet(self, connection: socket.socket, peer: _Peer) -> tuple[Lane, int] | None:
        """Answer the hello and make the group: its lane and the bytes per slice."""
        hello = wire.receive_hello(connection, budget_until(time.monotonic() + _HELLO_S))
        budget = budget_until(time.monotonic() + min(hello.budget_s, _MAX_EXCHANGE_S))
        status, message = self._judge(hello)
        if status is wire.Status.OK and hello.slice_bytes:
            status, message = self._make_room(connection, peer, budget)
        if status is not wire.Status.OK or not hello.slice_bytes:
            wire.send_reply(connection, status, message, budget)
            return None
        slice_bytes = min(hello.slice_bytes, self._groups.slice_bytes)
        pending = self._groups.open(budget())
        try:
            name = f"{peer.thread.name}-group"
            lane = Lane(lambda: pending.join(budget()), connection, name, self._end_s)
            with self._changed:
                peer.lane = lane
            # Asked after the lane can be seen: whoever closes either ends it or is seen here.
            if self._closing.is_set():
                return None
            message = f"{slice_bytes} {pending.address}"
            wire.send_reply(connection, wire.Status.OK, message, budget)
            lane.joined(budget)
        finally:
            pending.close()
        self._rest(peer)
        return lane, slice_bytes

    def _judge(self, hello: wire.Hello) -> tuple[wire.Status, str]:
        if not secrets.compare_digest(hello.token, self.token.encode()):
            return wire.Status.TOKEN, "this is another exporter: the token differs"
        if hello.backend != self._groups.backend:
            message = f"the back ends differ: {self._groups.backend} here, not {hello.backend}"
            return wire.Status.BACKEND, message
        if hello.layout != self._cache.layout:
            message = f"the peer has {self._cache.layout!r}, not {hello.layout!r}"
            return wire.Status.LAYOUT, f"the KV layouts differ: {message}"
        return wire.Status.OK, ""

    def _make_room(
        self, connection: socket.socket, peer: _Peer, budget: Budget
    ) -> tuple[wire.Status, str]:
        """Take a place among the pairs, if need be that of the one that idles longest.

        Waits until that one's buffers are released: they are what the limit is for.
        """
        with self._changed:
            while True:
                self._stuck = [lane for lane in self._stuck if lane.alive]
                pairs = {at: one for at, one in self._peers.items() if one.paired}
                if len(pairs) + len(self._stuck) < self._max_pairs:
                    peer.paired = peer.busy = True
                    self._peers.move_to_end(connection)
                    return wire.Status.OK, ""
                idle = [at for at, one in pairs.items() if not one.busy]
                if not idle:
                    return wire.Status.BUSY, f"all {self._max_pairs} pairs are in use"
                _shut(idle[0])
                self._changed.wait(budget())

    def _exchange(
        self, connection: socket.socket, peer: _Peer, lane: Lane, slice_bytes: int
    ) -> None:
        """Answer one pull. Raises OSError, BadMessage if the pair is of no more use."""
        pull = wire.receive_pull(connection, lambda: self._idle_s)
        with self._changed:
            peer.busy = True
            self._peers.move_to_end(connection)
        try:
            budget = budget_until(time.monotonic() + min(pull.budget_s, _MAX_EXCHANGE_S))
            if pull.num_copies > _MAX_COPIES:
                raise wire.BadMessage(f"a pull of {pull.num_copies} blocks")
            copies = wire.receive_copies(connection, pull.num_copies, budget)
            status, message = self._check(pull, copies)
            wire.send_reply(connection, status, message, budget, pull.number)
            if status is wire.Status.OK:
                self._send_blocks(connection, lane, slice_bytes, copies, budget)
                status, message = self._check_generations(copies, "during the pull")
                number = last_number(pull.number)
                wire.send_reply(connection, status, message, budget, number)
        finally:
            self._rest(peer)

    def _rest(self, peer: _Peer) -> None:
        with self._changed:
            peer.busy = False
            self._changed.notify_all()

    def _check(self, pull: wire.Pull, copies: list[BlockCopy]) -> tuple[wire.Status, str]:
        if pull.block_bytes != self._cache.block_bytes:
            message = f"blocks of {self._cache.block_bytes} bytes here, not {pull.block_bytes}"
            return wire.Status.LAYOUT, f"the KV layouts differ: {message}"
        if pull.num_copies > self._cache.num_blocks:
            message = f"{pull.num_copies} blocks of {self._cache.num_blocks}"
            return wire.Status.BAD_REQUEST, message
        return self._check_generations(copies, "before the pull")

    def _check_generations(self, copies: list[BlockCopy], when: str) -> tuple[wire.Status, str]:
        try:
            check_generations(self._cache, copies, when)
        except TransferFailed as error:
            return wire.Status.STALE, error.message
        return wire.Status.OK, ""

    def _send_blocks(
        self,
        connection: socket.socket,
        lane: Lane,
        slice_bytes: int,
        copies: list[BlockCopy],
        budget: Budget,
    ) -> None:
        under_way = 0
        sources = [copy.src for copy in copies]
        for index, pieces in enumerate(slices(self._cache, sources, slice_bytes)):
            slot = index % len(lane.slots)
            if under_way == len(lane.slots):
                lane.finish(budget)
                under_way -= 1
            size = gather(pieces, lane.slots[slot])
            told = checksum(lane.slots[slot][:size])
            wire.send(connection, wire.CHECKSUM.pack(told), budget)
            lane.send(slot, size, budget)
            under_way += 1
        for _ in range(under_way):
            lane.finish(budget)


def _shut(sock: socket.socket) -> None:
    # Wakes a thread that is blocked on the socket, which closing it would not.
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
