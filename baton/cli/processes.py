"""The processes of an embedded Ray: their end is noticed, and none is left behind.

Ray's own clean-up runs in its raylet. When that is what died, or when a stop is cut short, the
processes it had started belong to nobody; so this process takes orphans in and can end them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import threading
from collections.abc import Callable, Iterator

import psutil
import ray

_PARTS = ("raylet", "gcs_server")
_PR_SET_CHILD_SUBREAPER = 36
_KILL_TIMEOUT_S = 3.0
_KILL_ROUNDS = 3


class RayProcesses:
    """Made before Ray is started; what is a child of this process already is left alone."""

    def __init__(self) -> None:
        self._others = {process.pid for process in psutil.Process().children(recursive=True)}
        self._thread: threading.Thread | None = None
        self._wake: int | None = None
        _take_orphans_in()

    def watch(self, on_death: Callable[[str], None]) -> None:
        """Call ``on_death`` once, from a thread, with a sentence, when a part of Ray ends."""
        fds: dict[int, str] = {}
        for process in psutil.Process().children():
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                if (name := process.name()) in _PARTS:
                    fds[os.pidfd_open(process.pid)] = f"{name} (process {process.pid})"
        self._wake, woken = os.pipe()[::-1]
        self._thread = threading.Thread(
            target=self._wait, args=(fds, woken, on_death), name="ray-watch", daemon=True
        )
        self._thread.start()

    def unwatch(self) -> None:
        """Ray is about to end on purpose. Idempotent."""
        if self._wake is not None and self._thread is not None:
            os.close(self._wake)
            self._wake = None
            self._thread.join(_KILL_TIMEOUT_S)

    def kill(self) -> None:
        """End all that Ray started and that still runs. Bounded."""
        # Those that a killed process leaves become our children only then.
        for _ in range(_KILL_ROUNDS):
            left = [
                process
                for process in psutil.Process().children(recursive=True)
                if process.pid not in self._others
            ]
            if not left:
                return
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(left, timeout=_KILL_TIMEOUT_S)

    @staticmethod
    def _wait(fds: dict[int, str], woken: int, on_death: Callable[[str], None]) -> None:
        poll = select.poll()
        for fd in (*fds, woken):
            poll.register(fd, select.POLLIN)
        ready = [fd for fd, _ in poll.poll()]
        for fd in (*fds, woken):
            os.close(fd)
        if woken not in ready:
            on_death(f"Ray is gone: its {fds[ready[0]]} ended")


def _take_orphans_in() -> None:
    # Without it (not Linux) orphans still end by themselves, only later.
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


@contextlib.contextmanager
def signals_kept() -> Iterator[None]:
    """Around Ray's start and end, which put handlers for SIGTERM in the place of ours.

    That of its Python part raises SystemExit wherever the process happens to be: it tears what is
    half done, or is lost, as what is raised in a callback is printed and ignored. It is not let in.
    That of its C++ part prints where the process was and then calls ours, and Ray's end leaves
    the default, which ends a stop half-way: ours takes their place.
    """
    utils = ray._private.utils
    theirs = utils.set_sigterm_handler
    ours = signal.getsignal(signal.SIGTERM)
    utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = theirs
        signal.signal(signal.SIGTERM, ours)
