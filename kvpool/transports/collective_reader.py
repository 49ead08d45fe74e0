"""A reader's connection to an exporter of the collective transport, and the group beside it."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Sequence

from kvpool.checksum import checksum
from kvpool.transport import BlockCopy, Endpoint, KVCache, TransferFault
from kvpool.transports import collective_wire as wire
from kvpool.transports.blocks import Budget, broken
from kvpool.transports.collective_pair import Lane, PairGroups, scatter, slice_sizes, slices
from kvpool.transports.tcp_wire import last_number, new_number


class Pair:
    """A connection to an exporter and, after ``meet``, the group beside it."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._slice_bytes = 0
        self._ended = False
        self._lock = threading.Lock()
        self.lane: Lane | None = None
        self.begun = False
        """The exporter has agreed to answer the last pull."""

    def meet(
        self, endpoint: Endpoint, groups: PairGroups, end_s: float, budget: Budget
    ) -> tuple[wire.Status, str]:
        """Introduce this side and make the group."""
        hello = (endpoint.token, groups.backend, groups.slice_bytes, endpoint.layout)
        wire.send_hello(self._sock, *hello, budget)
        status, message = wire.receive_reply(self._sock, budget)
        if status is not wire.Status.OK:
            return status, message
        size, _, address = message.partition(" ")
        if not size.isdecimal() or not 0 < int(size) <= groups.slice_bytes:
            raise wire.BadMessage(f"slices of {size!r} bytes")
        self._slice_bytes = int(size)
        name = f"kv-collective-{endpoint.address}"
        lane = Lane(lambda: groups.join(address, budget()), self._sock, name, end_s)
        with self._lock:
            self.lane = lane
            ended = self._ended
        if ended:
            lane.end()
        lane.joined(budget)
        return status, ""

    def pull(
        self, cache: KVCache, copies: Sequence[BlockCopy], budget: Budget
    ) -> tuple[wire.Status, str]:
        """Raises OSError, BadMessage: the pair is of no more use."""
        self.begun = False
        number = new_number()
        wire.send_pull(self._sock, copies, cache.block_bytes, number, budget)
        status, message = wire.receive_reply(self._sock, budget, number)
        if status is not wire.Status.OK:
            return status, message
        self.begun = True
        self._receive_blocks(cache, copies, budget)
        return wire.receive_reply(self._sock, budget, last_number(number))

    def _receive_blocks(self, cache: KVCache, copies: Sequence[BlockCopy], budget: Budget) -> None:
        lane = self.lane
        assert lane is not None, "meet comes first"
        slots = lane.slots
        sizes = slice_sizes(len(copies) * cache.block_bytes, self._slice_bytes)
        targets = slices(cache, [copy.dst for copy in copies], self._slice_bytes)
        for slot, size in enumerate(sizes[: len(slots)]):
            lane.receive(slot, size, budget)
        for index, size in enumerate(sizes):
            slot = index % len(slots)
            # First the checksum: if the exporter is gone, its connection tells at once, which
            # not every back end does.
            told = wire.receive(self._sock, wire.CHECKSUM.size, budget)
            lane.finish(budget)
            if wire.CHECKSUM.unpack(told)[0] != checksum(slots[slot][:size]):
                raise wire.BadMessage(f"slice {index} arrived with a wrong checksum")
            scatter(slots[slot], next(targets))
            if index + len(slots) < len(sizes):
                lane.receive(slot, sizes[index + len(slots)], budget)

    def shut(self) -> None:
        """Wake the thread that uses it; from any thread."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        with self._lock:
            self._ended = True
            lane = self.lane
        if lane is not None:
            lane.end()

    def end(self) -> bool:
        """Abort the group, close all; False if the group's back end does not let go."""
        ended = self.lane is None or self.lane.end()
        self._sock.close()
        return ended


def connect(address: str, budget: Budget) -> socket.socket:
    """To an exporter. Raises TransportBroken, OSError, TimeoutError."""
    host, _, port = address.rpartition(":")
    if not port.isdecimal():
        raise broken(f"{address!r} is not host:port", TransferFault.OTHER)
    sock = socket.create_connection((host.strip("[]"), int(port)), timeout=budget())
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock
