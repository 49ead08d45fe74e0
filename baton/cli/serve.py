"""``baton serve``: run a cluster in the foreground until a signal."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from rich.console import Console

from baton.cli.cluster import ClusterRun, Endpoints
from baton.core.config import ServeConfig
from baton.core.errors import Stage, Unavailable

logger = logging.getLogger(__name__)


class StopRequested(BaseException):
    """A signal came. Not an Exception: nothing on the way may take it for an error of its own."""


class Stopper:
    """Turns SIGINT and SIGTERM into an event, and into :class:`StopRequested` at waits.

    Only there: raised in the middle of something it would tear it, Ray's calls above all.
    """

    def __init__(self) -> None:
        self.event = threading.Event()
        self.reason: str | None = None
        """Why the cluster ended by itself, if it did."""
        self._num_signals = 0
        self._num_obeyed = 0
        self._waits = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around a wait: ended by a signal, also by one that came before."""
        self._waits = True
        try:
            if self._num_signals > self._num_obeyed:
                raise StopRequested
            yield
        finally:
            self._waits = False

    def obey(self) -> None:
        """The stop begins: only signals from now on end a wait."""
        self._num_obeyed = self._num_signals

    def fail(self, reason: str) -> None:
        """The cluster is gone: have the main thread stop. From any thread."""
        self.reason = reason
        os.kill(os.getpid(), signal.SIGTERM)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # A handler that Ray's start has in place for a moment aborts in three seconds.
        signal.alarm(0)
        self._num_signals += 1
        self.event.set()
        if self._waits:
            self._waits = False
            raise StopRequested


def run_cluster(
    config: ServeConfig,
    *,
    console: Console,
    ready_file: Path | None = None,
    while_up: Callable[[Endpoints, Stopper], None] | None = None,
) -> None:
    """Start, call ``while_up`` (default: wait for a signal), stop; a second signal hurries.

    Raises ConfigError for what cannot be started, and Unavailable if Ray dies underneath.
    """
    stopper = Stopper()
    run = ClusterRun(
        config,
        progress=lambda text: console.print(f"[dim]· {text}[/dim]"),
        waiting=stopper.waiting,
        on_dead=stopper.fail,
    )
    try:
        endpoints = run.start()
        if ready_file is not None:
            _write_ready(ready_file, endpoints)
        console.print(f"[bold]ready[/bold]: HTTP http://{endpoints.http}  gRPC {endpoints.grpc}")
        if while_up is not None:
            while_up(endpoints, stopper)
        else:
            stopper.event.wait()
    except StopRequested:
        if stopper.reason is None:
            console.print("a signal came before everything was ready")
    finally:
        _stop(run, stopper, console)
        if ready_file is not None:
            ready_file.unlink(missing_ok=True)
    if stopper.reason is not None:
        raise Unavailable(f"{stopper.reason}; the cluster is stopped", stage=Stage.CONTROL)


def _stop(run: ClusterRun, stopper: Stopper, console: Console) -> None:
    console.print("stopping")
    stopper.obey()
    try:
        # What is gone cannot be asked to stop.
        if stopper.reason is None:
            run.stop()
    except StopRequested:
        console.print("stopping at once")
    except Exception:
        # Whatever Ray raises while it goes down: what is left is killed all the same.
        logger.exception("the cluster did not stop by itself")
    finally:
        run.kill()


def _write_ready(path: Path, endpoints: Endpoints) -> None:
    text = json.dumps(
        {
            "http": endpoints.http,
            "grpc": endpoints.grpc,
            "controller": endpoints.controller,
            "pid": os.getpid(),
        }
    )
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(path)
