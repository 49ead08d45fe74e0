"""``baton serve``: run a cluster in the foreground until a signal."""

from __future__ import annotations

import contextlib
import json
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


class StopRequested(BaseException):
    """A signal came. Not an Exception: nothing on the way may take it for an error of its own."""


class Stopper:
    """Turns SIGINT and SIGTERM into :class:`StopRequested`, where that is safe, and an event."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self.reason: str | None = None
        """Why the cluster ended by itself, if it did."""
        self._armed = False
        self._install()

    @contextlib.contextmanager
    def until_signal(self) -> Iterator[None]:
        """Inside, a signal raises StopRequested, also one that came before."""
        self._arm()
        if self.event.is_set():
            self._armed = False
            raise StopRequested
        try:
            yield
        finally:
            self._armed = False

    @contextlib.contextmanager
    def until_another(self) -> Iterator[None]:
        """Inside, a signal that comes only now raises StopRequested."""
        self._arm()
        try:
            yield
        finally:
            self._armed = False

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside :meth:`until_signal`: signals wait till the end, for what must not be torn."""
        self._armed = False
        try:
            yield
        except SystemExit:
            # Ray's start has a handler of its own for SIGTERM.
            self.event.set()
        finally:
            self._arm()
        if self.event.is_set():
            raise StopRequested

    def fail(self, reason: str) -> None:
        """The cluster is gone: have the main thread stop. From any thread."""
        self.reason = reason
        os.kill(os.getpid(), signal.SIGTERM)

    def _arm(self) -> None:
        self._install()
        self._armed = True

    def _install(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.event.set()
        if self._armed:
            self._armed = False
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
        deferred=stopper.deferred,
        on_dead=stopper.fail,
    )
    up = False
    try:
        with stopper.until_signal():
            endpoints = run.start()
            if ready_file is not None:
                _write_ready(ready_file, endpoints)
            up = True
            address = f"HTTP http://{endpoints.http}  gRPC {endpoints.grpc}"
            console.print(f"[bold]ready[/bold]: {address}")
            if while_up is not None:
                while_up(endpoints, stopper)
            else:
                stopper.event.wait()
    except StopRequested:
        if stopper.reason is None and not up:
            console.print("stopped before it was ready")
    finally:
        _stop(run, stopper, console)
        if ready_file is not None:
            ready_file.unlink(missing_ok=True)
    if stopper.reason is not None:
        raise Unavailable(f"{stopper.reason}; the cluster is stopped", stage=Stage.CONTROL)


def _stop(run: ClusterRun, stopper: Stopper, console: Console) -> None:
    console.print("stopping")
    try:
        # What is gone cannot be asked to stop.
        if stopper.reason is None:
            with stopper.until_another():
                run.stop()
    except StopRequested:
        console.print("stopping at once")
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
