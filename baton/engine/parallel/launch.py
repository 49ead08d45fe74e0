"""Starts ranks as processes, and tells of their ends. No torch here: drivers import this."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import pickle
import queue
import selectors
import signal
import subprocess
import sys
import threading
from typing import Protocol

from baton.core.errors import RankLost
from baton.engine.parallel.spec import RankSpec

_START_TIMEOUT_S = 30.0
_CLOSE_TIMEOUT_S = 5.0


class RankHandle(Protocol):
    """A rank that was started."""

    @property
    def ended(self) -> concurrent.futures.Future[str]:
        """Done when the rank's process has ended: how, in words (``was killed by SIGKILL``).

        Call backs run on a thread that may wait, and may kill other ranks.
        """

    def kill(self) -> None:
        """End it now, without waiting for the end. Idempotent."""


class RankLauncher(Protocol):
    """Starts the ranks of one instance, all on the driver's machine."""

    def start(self, spec: RankSpec) -> RankHandle:
        """Start one rank; it reports to its driver by itself. Raises if it cannot be started."""

    def close(self) -> None:
        """Kill what still runs and release everything. Bounded, idempotent."""


class ProcessRank:
    """A rank as a child process. Made by ``ProcessLauncher``."""

    def __init__(self, process: subprocess.Popen[bytes], pidfd: int) -> None:
        self.pid = process.pid
        self._process = process
        self._pidfd = pidfd
        self._ended: concurrent.futures.Future[str] = concurrent.futures.Future()

    @property
    def ended(self) -> concurrent.futures.Future[str]:
        """See ``RankHandle``."""
        return self._ended

    def kill(self) -> None:
        """See ``RankHandle``."""
        # By its descriptor: its number may be another process's by now.
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def fileno(self) -> int:
        """Readable once the process has ended."""
        return self._pidfd

    def reap(self) -> None:
        """The process has ended: take its exit status and tell."""
        code = self._process.wait()
        os.close(self._pidfd)
        self._pidfd = -1
        if code < 0:
            self._ended.set_result(f"was killed by {signal.Signals(-code).name}")
        else:
            self._ended.set_result(f"ended with exit status {code}")


class ProcessLauncher:
    """Ranks as child processes of this one.

    One thread starts them and waits for their ends. It has to live as long as they: the kernel
    ends a child whose parent's *thread* is gone, which is what keeps a rank from outliving a
    driver that was killed.
    """

    def __init__(self) -> None:
        self._asked: queue.SimpleQueue[tuple[RankSpec, concurrent.futures.Future[ProcessRank]]]
        self._asked = queue.SimpleQueue()
        self._ranks: list[ProcessRank] = []
        self._closed = False
        self._lock = threading.Lock()
        self._woken, self._wake = os.pipe()
        self._thread = threading.Thread(target=self._run, name="rank-launcher", daemon=True)
        self._thread.start()

    def start(self, spec: RankSpec) -> ProcessRank:
        """See ``RankLauncher``."""
        answer: concurrent.futures.Future[ProcessRank] = concurrent.futures.Future()
        with self._lock:
            if self._closed:
                raise RankLost(f"{spec.name} is not started: its launcher is closed")
            self._asked.put((spec, answer))
            os.write(self._wake, b"s")
        return answer.result(_START_TIMEOUT_S)

    def close(self) -> None:
        """See ``RankLauncher``."""
        with self._lock:
            if not self._closed:
                self._closed = True
                os.close(self._wake)
        if self._thread is not threading.current_thread():
            self._thread.join(_CLOSE_TIMEOUT_S)

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._woken, selectors.EVENT_READ)
            open_ranks, closing = 0, False
            while open_ranks or not closing:
                for key, _ in selector.select():
                    if isinstance(key.fileobj, ProcessRank):
                        selector.unregister(key.fileobj)
                        open_ranks -= 1
                        key.fileobj.reap()
                    elif os.read(self._woken, 1):
                        open_ranks += self._start_asked(selector)
                    else:
                        closing = True
                        selector.unregister(self._woken)
                        open_ranks += self._start_asked(selector)
                        for rank in self._ranks:
                            rank.kill()
        os.close(self._woken)

    def _start_asked(self, selector: selectors.BaseSelector) -> int:
        started = 0
        while True:
            try:
                spec, answer = self._asked.get_nowait()
            except queue.Empty:
                return started
            try:
                rank = _spawn(spec)
            except BaseException as error:
                answer.set_exception(error)
                continue
            self._ranks.append(rank)
            selector.register(rank, selectors.EVENT_READ)
            started += 1
            answer.set_result(rank)


def _spawn(spec: RankSpec) -> ProcessRank:
    command = [sys.executable, "-m", "baton.engine.parallel.rank"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE)
    assert process.stdin is not None
    try:
        # The secret must not be seen in a command line; the pipe has room for all of it.
        with process.stdin as stdin:
            pickle.dump((os.getpid(), spec), stdin, 5)
        return ProcessRank(process, os.pidfd_open(process.pid))
    except BaseException:
        process.kill()
        process.wait(_CLOSE_TIMEOUT_S)
        raise
