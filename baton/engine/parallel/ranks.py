"""An instance's ranks, from the driver's side: started, spoken to, watched, ended.

Ranks live and die together. One that ends, fails or does not answer breaks the instance: its
peers may be waiting for it in a collective, and what they have computed of the step is worth
nothing. So the others are killed, and every later call raises what happened first. No torch here.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import logging
import os
import select
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Sequence

from baton.core.errors import Code, ConfigError, RankLost
from baton.engine.parallel.launch import RankHandle, RankLauncher
from baton.engine.parallel.spec import RankSpec
from baton.engine.parallel.wire import Failure, Kind, Link, accept, decode_failure

logger = logging.getLogger(__name__)

MAX_SOCKET_PATH = 107
_BLAME_TIMEOUT_S = 1.0
"""A rank that lost a peer may say so before the peer's own end is seen: which is the cause."""
_REASON_TIMEOUT_S = 0.3
_CLOSE_TIMEOUT_S = 5.0


class Ranks:
    """The ranks of one instance. Calls may come from several threads, and wait for each other.

    Args:
        specs: the ranks, in order, with the path and the secret of ``Meeting``.
        meeting: where they connect. Used up here.
        launcher: starts them. Owned: ``close`` closes it.
        on_lost: called once, from some thread, when the instance is broken, busy or idle.
        start_timeout_s: until all have loaded.
        step_timeout_s: for each call afterwards.

    The constructor returns when all have loaded. Raises ConfigError for what a rank refuses,
    RankLost for one that ends or does not come.
    """

    def __init__(
        self,
        specs: Sequence[RankSpec],
        meeting: Meeting,
        launcher: RankLauncher,
        *,
        on_lost: Callable[[RankLost], None] | None,
        start_timeout_s: float,
        step_timeout_s: float,
    ) -> None:
        self._specs = tuple(specs)
        self._launcher = launcher
        self._on_lost = on_lost
        self._step_timeout_s = step_timeout_s
        self._handles: list[RankHandle] = []
        self._links: dict[int, Link] = {}
        self._pids: dict[int, int] = {}
        self._lock = threading.Lock()
        self._calls = threading.Lock()
        """Held for as long as one call takes, which is bounded."""
        self._broken: RankLost | None = None
        self._closing = False
        self._woken, self._wake = os.pipe()
        """The write end is closed when the instance breaks or closes: this wakes all waits."""
        self._watch: threading.Thread | None = None
        deadline = time.monotonic() + start_timeout_s
        try:
            with meeting:
                for spec in self._specs:
                    handle = launcher.start(spec)
                    self._handles.append(handle)
                    handle.ended.add_done_callback(functools.partial(self._ended, spec.rank))
                self._accept(meeting, deadline)
            self._watch = threading.Thread(target=self._watch_links, name="ranks", daemon=True)
            self._watch.start()
            address = self._collect([0], deadline)[0]
            self._send([Kind.JOIN] * len(self._specs), [address] * len(self._specs))
            self._collect(range(len(self._specs)), deadline)
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> tuple[int, ...]:
        """Processes of the ranks, in order."""
        return tuple(self._pids[spec.rank] for spec in self._specs)

    def call(self, kind: Kind, bodies: Sequence[bytes]) -> list[bytes]:
        """Send each rank its frame and return the answers' bodies, in order of ranks.

        Raises RankLost if one ends, fails, or does not answer in time, now or before.
        """
        with self._calls:
            self._check()
            deadline = time.monotonic() + self._step_timeout_s
            self._send([kind] * len(bodies), bodies)
            return self._collect(range(len(self._specs)), deadline)

    def close(self) -> None:
        """End all ranks, in peace if they are well. Bounded, idempotent."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
            well = self._broken is None and len(self._links) == len(self._specs)
            if self._broken is None:
                os.close(self._wake)
        if well:
            for link in self._links.values():
                with contextlib.suppress(OSError):
                    link.send(Kind.EXIT)
            concurrent.futures.wait(
                [handle.ended for handle in self._handles], timeout=_CLOSE_TIMEOUT_S
            )
        for handle in self._handles:
            handle.kill()
        if self._watch is not None and self._watch is not threading.current_thread():
            self._watch.join(_CLOSE_TIMEOUT_S)
        for link in self._links.values():
            link.close()
        self._launcher.close()
        os.close(self._woken)

    def _accept(self, meeting: Meeting, deadline: float) -> None:
        poll = select.poll()
        poll.register(meeting.listener, select.POLLIN)
        poll.register(self._woken, select.POLLIN)
        while len(self._links) < len(self._specs):
            ready = {fd for fd, _ in poll.poll(_left_ms(deadline))}
            self._check()
            if not ready:
                missing = next(s.rank for s in self._specs if s.rank not in self._links)
                raise self._lose(missing, "did not start in time")
            found = accept(meeting.listener.accept()[0], meeting.secret, len(self._specs))
            if found is None or found[0] in self._links:
                logger.warning("a stranger connected to the ranks' socket and was turned away")
                if found is not None:
                    found[1].close()
                continue
            rank, link = found
            self._links[rank] = link
            self._pids[rank] = link.peer_pid()
        self._by_fd = {link.fileno(): rank for rank, link in self._links.items()}

    def _send(self, kinds: Sequence[Kind], bodies: Sequence[bytes]) -> None:
        for rank, (kind, body) in enumerate(zip(kinds, bodies, strict=True)):
            try:
                self._links[rank].send(kind, body)
            except OSError as error:
                raise self._gone(rank, f"takes no message: {error}") from error

    def _collect(self, ranks: Sequence[int] | range, deadline: float) -> list[bytes]:
        """One DONE from each of ``ranks``."""
        answers: dict[int, bytes] = {}
        poll = select.poll()
        for fd in (*self._by_fd, self._woken):
            poll.register(fd, select.POLLIN)
        while len(answers) < len(ranks):
            ready = [fd for fd, _ in poll.poll(_left_ms(deadline))]
            if not ready:
                late, *others = [rank for rank in ranks if rank not in answers]
                nor = "".join(f", nor does rank {rank}" for rank in others)
                raise self._lose(late, f"does not answer{nor}")
            if self._woken in ready:
                self._check()
            for fd in ready:
                rank = self._by_fd[fd]
                answers[rank] = self._receive(rank)
        return [answers[rank] for rank in ranks]

    def _receive(self, rank: int) -> bytes:
        try:
            kind, body = self._links[rank].receive()
        except (OSError, EOFError) as error:
            raise self._gone(rank, f"is gone: {error}") from error
        if kind is Kind.FAILED:
            raise self._failed(rank, decode_failure(body))
        assert kind is Kind.DONE, kind
        return body

    def _failed(self, rank: int, failure: Failure) -> Exception:
        if failure.lost_peer:
            poll = select.poll()
            poll.register(self._woken, select.POLLIN)
            poll.poll(_BLAME_TIMEOUT_S * 1000)
            return self._lose(rank, f"was left alone: {failure.message}")
        lost = self._lose(rank, f"failed: {failure.message}")
        if failure.code is Code.CONFIG:
            return ConfigError(failure.message, param=failure.param)
        return lost

    def _gone(self, rank: int, reason: str) -> RankLost:
        """The rank's socket says so; its launcher soon knows why."""
        with contextlib.suppress(concurrent.futures.TimeoutError):
            reason = self._handles[rank].ended.result(_REASON_TIMEOUT_S)
        return self._lose(rank, reason)

    def _ended(self, rank: int, ended: concurrent.futures.Future[str]) -> None:
        self._lose(rank, ended.result())

    def _watch_links(self) -> None:
        """See a rank's end also when nothing is asked of it."""
        poll = select.poll()
        for fd in self._by_fd:
            # Data is for the thread that asked.
            poll.register(fd, select.POLLRDHUP)
        poll.register(self._woken, select.POLLIN)
        ready = [fd for fd, _ in poll.poll()]
        if self._woken not in ready:
            self._gone(self._by_fd[ready[0]], "closed its connection")

    def _lose(self, rank: int, reason: str) -> RankLost:
        """Break the instance, if it is not broken yet. Returns what broke it."""
        spec = self._specs[rank]
        pid = f", pid {self._pids[rank]}" if rank in self._pids else ""
        error = RankLost(f"{spec.name}{pid}, {reason}")
        with self._lock:
            if self._broken is not None:
                return self._broken
            if self._closing:
                return error
            self._broken = error
            os.close(self._wake)
        logger.error("%s; its instance ends", error.message)
        for handle in tuple(self._handles):
            handle.kill()
        if self._on_lost is not None:
            self._on_lost(error)
        return error

    def _check(self) -> None:
        if self._broken is not None:
            # A new object each time: a traceback belongs to one raise.
            raise RankLost(self._broken.message)
        if self._closing:
            raise RankLost(f"the ranks of {self._specs[0].instance_id} are closed")


class Meeting:
    """A socket at a path that only this user can reach, until all ranks have connected."""

    def __init__(self, secret: bytes) -> None:
        self.secret = secret
        self._folder = tempfile.TemporaryDirectory(prefix="baton-")
        self.path = os.path.join(self._folder.name, "ranks")
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            if len(os.fsencode(self.path)) > MAX_SOCKET_PATH:
                raise ConfigError(
                    f"{self.path} is too long for a socket: set TMPDIR to a shorter folder"
                )
            self.listener.bind(self.path)
            self.listener.listen()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Meeting:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Close and remove the socket. Connections stay. Idempotent."""
        self.listener.close()
        self._folder.cleanup()


def _left_ms(deadline: float) -> float:
    return max(0.0, deadline - time.monotonic()) * 1000
