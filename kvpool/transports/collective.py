"""Over a process group of two, made for each pair of processes on first contact.

For machines where nothing one-sided is installed. The reader asks over a tcp connection; the
bytes come through the group, slice by slice, into staging buffers, and from there into the cache
when their checksum is right. So an untagged, ordered queue that cannot be taken back is all that
is asked of the group. What fails or is late costs the pair: its group is aborted, and only then
does the pull return.
"""

from __future__ import annotations

import collections
import contextlib
import threading
import time
from collections.abc import Sequence

from kvpool.transport import (
    BlockCopy,
    Endpoint,
    KVCache,
    Receipt,
    TransferFailed,
    TransferFault,
    TransportBroken,
)
from kvpool.transports import collective_wire as wire
from kvpool.transports.blocks import (
    Budget,
    broken,
    budget_until,
    check_layouts,
    check_targets,
    failed,
    late,
)
from kvpool.transports.collective_pair import Lane, PairGroups
from kvpool.transports.collective_reader import Pair, connect
from kvpool.transports.collective_server import PairServer

_PROBE_S = 1.0
MAX_PAIRS = 8
SLICE_BYTES = 8 << 20
END_S = 1.0

_FATAL = {wire.Status.TOKEN, wire.Status.BACKEND, wire.Status.BUSY}
"""Another transport may do better."""
_REFUSALS = {
    wire.Status.STALE: TransferFault.STALE,
    wire.Status.LAYOUT: TransferFault.LAYOUT,
    wire.Status.TOKEN: TransferFault.GONE,
    wire.Status.BUSY: TransferFault.GONE,
}


class CollectiveTransport:
    """A :class:`kvpool.transport.Transport` over groups of two.

    Staging takes at most ``4 * max_pairs * slice_bytes`` of host memory: two buffers per pair, for
    as many pairs as reader and as many as exporter; back ends of devices take as much there, and
    what a communicator itself needs.

    Args:
        host: own address, as peers reach it.
        backend: of torch.distributed: ``gloo``, ``nccl`` or ``hccl``; the same on both sides.
        max_pairs: as reader, and for each exported cache. One more ends the pair that idles
            longest; if none is idle, a pull waits for one, and an exporter refuses.
        slice_bytes: length of a staging buffer; the smaller one of two sides counts.
        end_s: how long an abort, and then the end of a group, are waited for, in seconds.
        groups: makes the groups, instead of ``backend``.

    Raises ConfigError for a back end that is not there.
    """

    name = "collective"

    def __init__(
        self,
        host: str = "127.0.0.1",
        *,
        backend: str = "gloo",
        max_pairs: int = MAX_PAIRS,
        slice_bytes: int = SLICE_BYTES,
        end_s: float = END_S,
        groups: PairGroups | None = None,
    ) -> None:
        if groups is None:
            # Here, for it imports torch.
            from kvpool.transports.collective_group import TorchGroups

            groups = TorchGroups(host, backend, slice_bytes=slice_bytes)
        self._host = host
        self._groups: PairGroups = groups
        self._max_pairs = max_pairs
        self._end_s = end_s
        self._servers: list[PairServer] = []
        self._seats: collections.OrderedDict[Endpoint, _Seat] = collections.OrderedDict()
        self._stuck: list[Lane] = []
        self._changed = threading.Condition()
        self._closed = False

    def export(self, cache: KVCache) -> Endpoint:
        """Start a server for the cache. Raises ConfigError if the host cannot be bound."""
        server = PairServer(
            self._host, cache, self._groups, max_pairs=self._max_pairs, end_s=self._end_s
        )
        with self._changed:
            self._servers.append(server)
        return Endpoint(
            transport=self.name, address=server.address, token=server.token, layout=cache.layout
        )

    def reachable(self, endpoint: Endpoint) -> bool:
        """Ask the exporter whether it is the one meant; at most a second, and without a group."""
        budget = budget_until(time.monotonic() + _PROBE_S)
        try:
            with contextlib.closing(connect(endpoint.address, budget)) as sock:
                backend = self._groups.backend
                wire.send_hello(sock, endpoint.token, backend, 0, endpoint.layout, budget)
                return wire.receive_reply(sock, budget)[0] is wire.Status.OK
        except (OSError, TransferFailed, wire.BadMessage):
            return False

    def pull(
        self, endpoint: Endpoint, cache: KVCache, copies: Sequence[BlockCopy], *, timeout_s: float
    ) -> Receipt:
        """Receive into own blocks; one pull at a time from each exporter.

        After a failure it returns when the group's abort has, but at most ``2 * end_s`` late.
        """
        started = time.monotonic()
        check_targets(cache, copies)
        check_layouts(endpoint.layout, cache.layout)
        if copies:
            deadline = started + timeout_s
            try:
                self._pull(endpoint, cache, copies, budget_until(deadline))
            except TimeoutError:
                raise late(timeout_s, endpoint.address) from None
            except wire.BadMessage as error:
                raise _broken(endpoint, error, TransferFault.CORRUPT) from error
            except OSError as error:
                # An exporter that gave up at the deadline says no more than that.
                if time.monotonic() >= deadline:
                    raise late(timeout_s, endpoint.address) from None
                # Of a peer that ends, connection and group tell in no order: it is gone.
                raise _broken(endpoint, error, TransferFault.GONE) from error
        return Receipt(
            num_blocks=len(copies),
            num_bytes=len(copies) * cache.block_bytes,
            seconds=time.monotonic() - started,
            transport=self.name,
        )

    def forget(self, endpoint: Endpoint) -> None:
        """End the pair with a peer that is gone; one in use ends with its pull."""
        with self._changed:
            seat = self._seats.get(endpoint)
            if seat is None:
                return
            seat.forgotten = True
            if seat.taken:
                return
            seat.taken = True
        self._leave(endpoint, seat, keep=False)

    def close(self) -> None:
        """Stop the servers, end all pairs; pulls under way fail."""
        with self._changed:
            self._closed = True
            servers, self._servers = self._servers, []
            seats = list(self._seats.items())
            idle = [(endpoint, seat) for endpoint, seat in seats if not seat.taken]
            busy = [seat.pair for _, seat in seats if seat.taken and seat.pair is not None]
            for _, seat in idle:
                seat.taken = True
            self._changed.notify_all()
        for endpoint, seat in idle:
            self._leave(endpoint, seat, keep=False)
        for pair in busy:
            # Its pull wakes, fails and clears the rest away.
            pair.shut()
        for server in servers:
            server.close()

    def _pull(
        self, endpoint: Endpoint, cache: KVCache, copies: Sequence[BlockCopy], budget: Budget
    ) -> None:
        """One pull, on the pair that there is, if there is one.

        That one may have ended unnoticed (the exporter restarted, or needed its place): an error
        there before the answer says nothing, and a fresh pair is tried, once.
        """
        seat = self._take(endpoint, budget)
        keep = False
        try:
            answer = None
            if seat.pair is not None:
                try:
                    answer = seat.pair.pull(cache, copies, budget)
                except TimeoutError:
                    raise
                except OSError:
                    if seat.pair.begun:
                        raise
                    self._end(seat)
            if answer is None:
                pair = Pair(connect(endpoint.address, budget))
                with self._changed:
                    seat.pair = pair
                    if self._closed:
                        raise broken("the transport is closed", TransferFault.OTHER)
                answer = pair.meet(endpoint, self._groups, self._end_s, budget)
                if answer[0] is wire.Status.OK:
                    answer = pair.pull(cache, copies, budget)
            status, message = answer
            keep = status in (wire.Status.OK, wire.Status.STALE)
        finally:
            self._leave(endpoint, seat, keep=keep)
        if status is not wire.Status.OK:
            text = f"{endpoint.address} refused: {message}"
            fault = _REFUSALS.get(status, TransferFault.OTHER)
            raise broken(text, fault) if status in _FATAL else failed(text, fault)

    def _take(self, endpoint: Endpoint, budget: Budget) -> _Seat:
        """The exporter's seat, for this thread alone. Raises TransportBroken, TimeoutError."""
        while True:
            with self._changed:
                if self._closed:
                    raise broken("the transport is closed", TransferFault.OTHER)
                seat = self._seats.get(endpoint)
                if seat is not None and not seat.taken:
                    seat.taken = True
                    self._seats.move_to_end(endpoint)
                    return seat
                unwanted = None
                if seat is None:
                    self._stuck = [lane for lane in self._stuck if lane.alive]
                    if len(self._stuck) >= self._max_pairs:
                        raise broken(
                            "all groups are stuck in their back end: restart the instance",
                            TransferFault.OTHER,
                        )
                    if len(self._seats) + len(self._stuck) < self._max_pairs:
                        seat = self._seats[endpoint] = _Seat()
                        return seat
                    idle = (one for one in self._seats.items() if not one[1].taken)
                    unwanted = next(idle, None)
                if unwanted is None:
                    self._changed.wait(budget())
                    continue
                unwanted[1].taken = True
            self._leave(*unwanted, keep=False)

    def _leave(self, endpoint: Endpoint, seat: _Seat, *, keep: bool) -> None:
        with self._changed:
            if keep and not seat.forgotten and not self._closed:
                seat.taken = False
                self._changed.notify_all()
                return
        self._end(seat)
        with self._changed:
            del self._seats[endpoint]
            self._changed.notify_all()

    def _end(self, seat: _Seat) -> None:
        with self._changed:
            pair, seat.pair = seat.pair, None
        if pair is not None and not pair.end() and pair.lane is not None:
            with self._changed:
                self._stuck.append(pair.lane)


class _Seat:
    """The place of one exporter; who has taken it may use and change the pair."""

    def __init__(self) -> None:
        self.taken = True
        self.forgotten = False
        self.pair: Pair | None = None


def _broken(endpoint: Endpoint, error: Exception, fault: TransferFault) -> TransportBroken:
    return broken(f"the transfer from {endpoint.address} failed: {error}", fault)
