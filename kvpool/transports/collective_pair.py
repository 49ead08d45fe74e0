"""What the collective transport asks of a group of two, and the thread that uses it.

A pair is one ordered queue without tags: what one side sends first, the other receives first, and
what was begun cannot be taken back, only aborted together with the group. So a pair serves one
transfer at a time, and after a failure it is never used again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import queue
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np

from kvpool.transport import KVCache
from kvpool.transports.blocks import Budget, runs

log = logging.getLogger(__name__)

NUM_SLOTS = 2
"""Staging buffers per side of a pair: one travels while the other is filled or emptied."""


class GroupBroken(ConnectionError):
    """The group cannot be used any more: its peer is gone, it was aborted, its back end failed."""


class PairGroup(Protocol):
    """One side of a group of two. ``send`` and ``receive`` are called by one thread only.

    Both block until the bytes have left or arrived. They raise TimeoutError after ``timeout_s``
    and GroupBroken for all else. A back end may fail to return in time; ``abort`` is for that.
    """

    slots: Sequence[memoryview]
    """``NUM_SLOTS`` writable buffers of equal length in host memory. Bytes travel only between
    these and never straight into a cache, so that a late write cannot hurt one."""

    def send(self, slot: int, num_bytes: int, timeout_s: float) -> None:
        """Send the first bytes of a slot."""

    def receive(self, slot: int, num_bytes: int, timeout_s: float) -> None:
        """Fill the first bytes of a slot with exactly what the peer sent."""

    def abort(self) -> None:
        """End what is under way, here and at the peer. From any thread, repeatedly."""

    def close(self) -> None:
        """Release everything. By the thread that sends and receives; idempotent."""


class PendingGroup(Protocol):
    """The exporter's half of a group that is being made."""

    address: str
    """For the reader's ``join``: printable, at most 255 bytes."""

    def join(self, timeout_s: float) -> PairGroup:
        """Wait for the reader. Raises TimeoutError, GroupBroken."""

    def close(self) -> None:
        """Give up the place where both meet. Harmless for a group that was made."""


class PairGroups(Protocol):
    """Makes groups of two. Called from several threads."""

    backend: str
    """Both sides must have the same one; at most 16 bytes."""
    slice_bytes: int
    """Length of a slot."""

    def open(self, timeout_s: float) -> PendingGroup:
        """Begin a group as the exporter. Raises TimeoutError, GroupBroken."""

    def join(self, address: str, timeout_s: float) -> PairGroup:
        """Complete a group as the reader. Raises TimeoutError, GroupBroken."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Order:
    sends: bool
    slot: int
    num_bytes: int
    deadline: float


class Lane:
    """A thread that makes a group, sends and receives on it, and closes it.

    Whoever gives orders waits for them against his own clock, in ``finish``. So neither a back end
    that does not return in time nor one that never returns can hold him up. A second thread
    watches the connection beside the group: a peer that dies is noticed there, which back ends do
    not promise (gloo forgets who waits for a message of which a part has arrived).

    Args:
        make: makes the group, on the lane's thread.
        control: the connection beside the group; to be closed after ``end``, not before.
        name: of the thread.
        end_s: the most that ``end`` waits for the abort, and then for the thread, in seconds.
    """

    def __init__(
        self, make: Callable[[], PairGroup], control: socket.socket, name: str, end_s: float
    ) -> None:
        self._name = name
        self._end_s = end_s
        self._orders: queue.SimpleQueue[_Order | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._group: PairGroup | None = None
        self._working = False
        self._ended = False
        self.slots: Sequence[memoryview] = ()
        """Those of the group, from ``joined`` on."""
        self._control = control
        self._watch = threading.Thread(target=self._look, name=f"{name}-watch", daemon=True)
        self._watch.start()
        self._thread = threading.Thread(target=self._run, args=(make,), name=name, daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread still holds the group."""
        return self._thread.is_alive()

    def joined(self, budget: Budget) -> None:
        """Wait, once, for the group, before the first order. Raises TimeoutError, GroupBroken."""
        self.finish(budget)

    def send(self, slot: int, num_bytes: int, budget: Budget) -> None:
        """Order bytes of a slot to be sent; returns at once. The slot is not to be touched
        until ``finish`` returned for it."""
        self._orders.put(_Order(True, slot, num_bytes, time.monotonic() + budget()))

    def receive(self, slot: int, num_bytes: int, budget: Budget) -> None:
        """Order a slot to be filled; otherwise as ``send``."""
        self._orders.put(_Order(False, slot, num_bytes, time.monotonic() + budget()))

    def finish(self, budget: Budget) -> None:
        """Wait for the oldest order not yet waited for. Raises TimeoutError, GroupBroken.

        After either the lane has to be ended.
        """
        try:
            error = self._done.get(timeout=budget())
        except queue.Empty:
            raise TimeoutError from None
        if error is not None:
            raise error

    def end(self) -> bool:
        """Abort what is under way, close the group, end the thread; wakes ``finish``.

        From any thread, repeatedly. False if the back end does not let go in time: then the
        thread keeps group and slots (nothing else) until it does. Shuts the connection down.
        """
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)
        with self._lock:
            self._ended = True
            group = self._group if self._working else None
        self._orders.put(None)
        self._done.put(GroupBroken("the pair was ended"))
        if group is not None:
            # On a thread of its own, for an abort may be what never returns.
            abort = threading.Thread(
                target=self._abort, args=(group,), name=f"{self._name}-abort", daemon=True
            )
            abort.start()
            abort.join(self._end_s)
        self._watch.join(self._end_s)
        self._thread.join(self._end_s)
        if self._thread.is_alive():
            log.warning(
                "%s: the group did not end within %g s; until it does it keeps its place and"
                " %d bytes",
                self._name,
                self._end_s,
                sum(map(len, self.slots)),
            )
            return False
        return True

    def _look(self) -> None:
        poll = select.poll()
        poll.register(self._control, select.POLLRDHUP)
        # Without a limit: ``end`` shuts the connection down, which is an event, too.
        poll.poll()
        self._done.put(GroupBroken("the peer closed the connection"))

    def _abort(self, group: PairGroup) -> None:
        try:
            group.abort()
        except Exception:
            log.exception("%s: the abort failed", self._name)

    def _run(self, make: Callable[[], PairGroup]) -> None:
        try:
            group = make()
        except Exception as error:
            self._done.put(self._plain(error))
            return
        try:
            self.slots = group.slots
            with self._lock:
                self._group = group
            self._done.put(None)
            while (order := self._orders.get()) is not None and self._begin():
                left = max(0.0, order.deadline - time.monotonic())
                act = group.send if order.sends else group.receive
                act(order.slot, order.num_bytes, left)
                with self._lock:
                    self._working = False
                self._done.put(None)
        except Exception as error:
            self._done.put(self._plain(error))
        finally:
            with self._lock:
                self._group = None
            try:
                group.close()
            except Exception:
                log.exception("%s: the group did not close cleanly", self._name)

    def _plain(self, error: Exception) -> Exception:
        # A fresh one: the traceback of the old one would keep the group alive with its frames.
        if isinstance(error, TimeoutError):
            return TimeoutError(*error.args)
        if not isinstance(error, OSError):
            log.error("%s: the group failed in an unforeseen way", self._name, exc_info=error)
        return GroupBroken(str(error) or type(error).__name__)

    def _begin(self) -> bool:
        with self._lock:
            self._working = not self._ended
            return self._working


def slice_sizes(total_bytes: int, slice_bytes: int) -> list[int]:
    """Lengths of the slices that ``slices`` cuts."""
    whole, rest = divmod(total_bytes, slice_bytes)
    return [slice_bytes] * whole + [rest] * (rest > 0)


def slices(cache: KVCache, indices: Sequence[int], slice_bytes: int) -> Iterator[list[memoryview]]:
    """The bytes of blocks in the given order, cut into slices; each a list of views.

    Views are made when a slice is asked for, not before.
    """
    pieces: list[memoryview] = []
    room = slice_bytes
    for first, count in runs(indices):
        rest = cache.run(first, count)
        while len(rest):
            head, rest = rest[:room], rest[room:]
            pieces.append(head)
            room -= len(head)
            if room == 0:
                yield pieces
                pieces, room = [], slice_bytes
    if pieces:
        yield pieces


def gather(pieces: Sequence[memoryview], slot: memoryview) -> int:
    """Copy pieces into a slot, one after the other; returns their bytes."""
    return _copy(pieces, slot, into_slot=True)


def scatter(slot: memoryview, pieces: Sequence[memoryview]) -> int:
    """The way back."""
    return _copy(pieces, slot, into_slot=False)


def _copy(pieces: Sequence[memoryview], slot: memoryview, *, into_slot: bool) -> int:
    staged = np.frombuffer(slot, dtype=np.uint8)
    at = 0
    for piece in pieces:
        there = np.frombuffer(piece, dtype=np.uint8)
        here = staged[at : at + len(piece)]
        # numpy copies without holding the interpreter lock; memoryview assignment does not.
        np.copyto(here, there) if into_slot else np.copyto(there, here)
        at += len(piece)
    return at
