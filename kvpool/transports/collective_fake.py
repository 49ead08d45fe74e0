"""Groups of two within one process, without torch, which fail as a script wants it."""

from __future__ import annotations

import collections
import enum
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Sequence

from kvpool.transports.collective_pair import NUM_SLOTS, GroupBroken

_FOREVER_S = 3600.0


class GroupFault(enum.StrEnum):
    """What happens to one ``receive`` of a reader."""

    NONE = "none"
    FAIL = "fail"
    """The back end reports an error."""
    SHORT = "short"
    """Half of the bytes arrive, and the back end says that all did."""
    CORRUPT = "corrupt"
    """A bit is wrong."""
    STALL = "stall"
    """It does not return, whatever its time limit and its peer, until this side is aborted."""
    STUCK = "stuck"
    """It does not even return then, only after ``FakeGroups.release``."""


class FakeGroups:
    """A :class:`kvpool.transports.collective_pair.PairGroups`; both sides use the same object.

    Each ``receive`` takes the next fault of the script; after the last one all is well.
    ``num_made``, ``num_aborted`` and ``num_closed`` count sides of groups, ``num_received`` the
    receives that were begun.
    """

    def __init__(self, script: Iterable[GroupFault] = (), *, slice_bytes: int = 1 << 16) -> None:
        self.backend = "fake"
        self.slice_bytes = slice_bytes
        self.num_made = self.num_aborted = self.num_closed = self.num_received = 0
        self.changed = threading.Condition()
        self.released = False
        self._script = collections.deque(script)
        self._pending: dict[str, FakePendingGroup] = {}

    def open(self, timeout_s: float) -> FakePendingGroup:
        """Note a place to meet."""
        pending = FakePendingGroup(self, secrets.token_hex(8))
        with self.changed:
            self._pending[pending.address] = pending
        return pending

    def join(self, address: str, timeout_s: float) -> FakePairGroup:
        """Meet the exporter there."""
        with self.changed:
            pending = self._pending.pop(address, None)
            if pending is None:
                raise GroupBroken(f"nobody waits at {address}")
            pending.link = link = _Link()
            self.num_made += 1
            self.changed.notify_all()
        return FakePairGroup(self, link, 1)

    def release(self) -> None:
        """Let groups go that are stuck."""
        with self.changed:
            self.released = True
            self.changed.notify_all()

    def withdraw(self, address: str) -> None:
        """Nobody waits there any more."""
        with self.changed:
            self._pending.pop(address, None)

    def next_fault(self) -> GroupFault:
        """The script's next word for a ``receive`` that begins. The lock is held."""
        self.num_received += 1
        self.changed.notify_all()
        return self._script.popleft() if self._script else GroupFault.NONE


class _Link:
    """What two sides share; the lock is that of their ``FakeGroups``."""

    def __init__(self) -> None:
        self.under_way: tuple[list[bytes], list[bytes]] = ([], [])
        """By receiver; one transfer at most."""
        self.broken = False


class FakePendingGroup:
    """See :class:`kvpool.transports.collective_pair.PendingGroup`."""

    def __init__(self, groups: FakeGroups, address: str) -> None:
        self._groups = groups
        self.address = address
        self.link: _Link | None = None

    def join(self, timeout_s: float) -> FakePairGroup:
        """Wait for the reader."""
        with self._groups.changed:
            if not self._groups.changed.wait_for(lambda: self.link is not None, timeout_s):
                raise TimeoutError
            assert self.link is not None, "waited for"
            self._groups.num_made += 1
            return FakePairGroup(self._groups, self.link, 0)

    def close(self) -> None:
        """Leave the place."""
        self._groups.withdraw(self.address)


class FakePairGroup:
    """See :class:`kvpool.transports.collective_pair.PairGroup`. The reader's rank is 1."""

    def __init__(self, groups: FakeGroups, link: _Link, rank: int) -> None:
        self._groups = groups
        self._changed = groups.changed
        self._link = link
        self._rank = rank
        self._open = True
        self._aborted = False
        self.slots: Sequence[memoryview] = [
            memoryview(bytearray(groups.slice_bytes)) for _ in range(NUM_SLOTS)
        ]

    def send(self, slot: int, num_bytes: int, timeout_s: float) -> None:
        """Hand over a copy; returns when the peer has taken what was sent before."""
        queue = self._link.under_way[1 - self._rank]
        with self._changed:
            self._wait(lambda: not queue, timeout_s)
            queue.append(bytes(self.slots[slot][:num_bytes]))
            self._changed.notify_all()

    def receive(self, slot: int, num_bytes: int, timeout_s: float) -> None:
        """Take what was sent, or do as the script wants."""
        queue = self._link.under_way[self._rank]
        with self._changed:
            fault = self._groups.next_fault()
            if fault is GroupFault.FAIL:
                raise GroupBroken("scripted: the back end failed")
            if fault is GroupFault.STUCK:
                self._changed.wait_for(lambda: self._groups.released, _FOREVER_S)
                raise GroupBroken("scripted: released")
            if fault is GroupFault.STALL:
                self._changed.wait_for(lambda: self._aborted, _FOREVER_S)
            self._wait(lambda: bool(queue), timeout_s)
            data = queue.pop()
            self._changed.notify_all()
        if len(data) != num_bytes:
            raise GroupBroken(f"{len(data)} bytes were sent, {num_bytes} expected")
        arrived = num_bytes // 2 if fault is GroupFault.SHORT else num_bytes
        self.slots[slot][:arrived] = data[:arrived]
        if fault is GroupFault.CORRUPT:
            self.slots[slot][num_bytes - 1] ^= 0x01

    def abort(self) -> None:
        """Break the link, for both."""
        with self._changed:
            self._groups.num_aborted += 1
            self._aborted = True
            self._link.broken = True
            self._changed.notify_all()

    def close(self) -> None:
        """The peer learns of it."""
        with self._changed:
            self._groups.num_closed += self._open
            self._open = False
            self._link.broken = True
            self._changed.notify_all()

    def _wait(self, ready: Callable[[], bool], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not self._link.broken and not ready():
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self._changed.wait(left)
        if self._link.broken:
            raise GroupBroken("the group was aborted")
