"""Start ``baton serve`` for a measurement, and stop it again."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

READY_S = 180.0
STOP_S = 60.0
LOOK_EVERY_S = 0.2


@dataclasses.dataclass(frozen=True, slots=True)
class Cluster:
    """Addresses (``host:port``) of a running cluster, and the process that holds it."""

    http: str
    grpc: str
    controller: str
    pid: int

    @property
    def url(self) -> str:
        """Of the HTTP server."""
        return f"http://{self.http}"


@contextlib.contextmanager
def serving(model: Path, options: Sequence[str] = ()) -> Iterator[Cluster]:
    """A cluster that is ready; stopped, with everything it started, at the end.

    Raises RuntimeError, with the end of its log, if it does not become ready.
    """
    with tempfile.TemporaryDirectory(prefix="baton-benchmark-") as folder:
        ready, log = Path(folder) / "ready.json", Path(folder) / "log"
        command = [sys.executable, "-m", "baton.cli.main", "serve", "--model", str(model)]
        command += ["--http-port", "0", "--grpc-port", "0", "--ready-file", str(ready), *options]
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            yield _wait(process, ready, log)
        finally:
            _stop(process)


def _wait(process: subprocess.Popen[bytes], ready: Path, log: Path) -> Cluster:
    deadline_s = time.monotonic() + READY_S
    while time.monotonic() < deadline_s:
        if process.poll() is not None:
            raise RuntimeError(f"baton serve ended with {process.returncode}:\n{_end(log)}")
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
            told = json.loads(ready.read_text())
            return Cluster(told["http"], told["grpc"], told["controller"], told["pid"])
        # A benchmark may look every so often; nothing else tells when a file appears.
        time.sleep(LOOK_EVERY_S)
    raise RuntimeError(f"baton serve was not ready after {READY_S} s:\n{_end(log)}")


def _end(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-30:])


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(10)
