"""``baton serve``: run a cluster in the foreground until a signal."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from rich.console import Console

from baton.cli.cluster import ClusterRun, Endpoints
from baton.core.config import ServeConfig


class Stopper:
    """Turns SIGINT and SIGTERM into an event. A second signal raises at once."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self.install()

    def install(self) -> None:
        """Take the signals; again after Ray took them."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.event.is_set():
            raise KeyboardInterrupt
        self.event.set()


def run_cluster(
    config: ServeConfig,
    *,
    console: Console,
    ready_file: Path | None = None,
    while_up: Callable[[Endpoints, Stopper], None] | None = None,
) -> None:
    """Start, call ``while_up`` (default: wait for a signal), stop. Raises ConfigError."""
    stopper = Stopper()
    run = ClusterRun(
        config,
        progress=lambda text: _progress(console, stopper, text),
        after_ray=stopper.install,
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
    except InterruptedError:
        console.print("stopped before it was ready")
    finally:
        console.print("stopping")
        run.stop()
        if ready_file is not None:
            ready_file.unlink(missing_ok=True)


def _progress(console: Console, stopper: Stopper, text: str) -> None:
    # Between the steps of a start is where a signal takes effect.
    if stopper.event.is_set():
        raise InterruptedError
    console.print(f"[dim]· {text}[/dim]")


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
