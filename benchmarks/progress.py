"""What a person sees while a load runs: a bar at a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.outcome import Outcome

LINE_EVERY_S = 10.0


class LoadProgress:
    """A context manager; give :meth:`on_change` to the load."""

    def __init__(self, console: Console, total: int, title: str = "requests") -> None:
        self._console = console
        self._total = total
        self._sent = self._ended = self._failed = self._tokens = 0
        self._start_s = self._line_s = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[status]}"),
            console=console,
            refresh_per_second=4,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(title, total=total, status="")

    def __enter__(self) -> LoadProgress:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def on_change(self, outcome: Outcome, ended: bool) -> None:
        """A request was sent, or has ended."""
        if not ended:
            self._sent += 1
        else:
            self._ended += 1
            self._failed += outcome.failure is not None
            self._tokens += len(outcome.token_times_s)
        self._bar.update(self._task, completed=self._ended, status=self.status())
        now_s = time.monotonic()
        if not self._console.is_terminal and now_s - self._line_s >= LINE_EVERY_S:
            self._line_s = now_s
            self._console.print(f"{self._ended}/{self._total} {self.status()}")

    def status(self) -> str:
        """Open and failed requests, and tokens per second of those that have ended."""
        elapsed_s = max(time.monotonic() - self._start_s, 1e-3)
        failed = f", {self._failed} failed" if self._failed else ""
        return f"{self._sent - self._ended} open{failed}, {self._tokens / elapsed_s:,.0f} tokens/s"
