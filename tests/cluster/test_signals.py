"""SIGINT and SIGTERM at any moment of a start: all of it ends, and nothing is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from tests.cluster.harness import (
    DEMO_MODEL,
    ROOT,
    RUN_ID,
    processes_of,
    shared_files,
    wait_until,
)

ENDS_WITHIN_S = 15.0


@pytest.mark.parametrize(
    ("line", "number", "count"),
    [
        ("starting Ray", signal.SIGTERM, 1),
        ("starting Ray", signal.SIGINT, 1),
        ("starting pool nodes", signal.SIGINT, 1),
        ("loading the model", signal.SIGTERM, 1),
        ("loading the model", signal.SIGINT, 2),
    ],
)
def test_during_the_start(tmp_path: Path, line: str, number: signal.Signals, count: int) -> None:
    run_id, cluster = uuid.uuid4().hex, f"t{uuid.uuid4().hex[:8]}"
    log, ready_file = tmp_path / "serve.log", tmp_path / "ready.json"
    command = [sys.executable, "-m", "baton.cli.main", "serve", "--model", str(DEMO_MODEL)]
    command += ["--http-port", "0", "--grpc-port", "0", "--cluster", cluster]
    command += ["--prefill", "1", "--decode", "1", "--ready-file", str(ready_file)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={**os.environ, RUN_ID: run_id},
        )
    try:
        wait_until(lambda: line in log.read_text(), timeout_s=120.0, what=line, every_s=0.02)
        for _ in range(count):
            process.send_signal(number)
        assert process.wait(ENDS_WITHIN_S) == 0
        assert "Traceback" not in log.read_text()
        assert not ready_file.exists()
        assert not shared_files(cluster)
        wait_until(lambda: not processes_of(run_id), timeout_s=5.0, what="no process left")
    finally:
        process.kill()
        process.wait(10)
        for left in processes_of(run_id):
            left.kill()
