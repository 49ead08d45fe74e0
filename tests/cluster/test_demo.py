"""``scripts/demo`` as people run it, with the environment that the tests run in."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import uuid
from pathlib import Path

from tests.cluster.harness import ROOT, RUN_ID, processes_of, shared_files, wait_until

ANY_PORTS = ("--http-port", "0", "--grpc-port", "0")


def _start(log: Path, cluster: str, *args: str) -> tuple[subprocess.Popen[bytes], str]:
    run_id = uuid.uuid4().hex
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(ROOT / "scripts" / "demo"), *ANY_PORTS, "--cluster", cluster, *args],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, RUN_ID: run_id},
            cwd=ROOT,
        )
    return process, run_id


def test_once(tmp_path: Path) -> None:
    log, cluster = tmp_path / "log", f"d{uuid.uuid4().hex[:8]}"
    process, run_id = _start(log, cluster, "--once")
    assert process.wait(120) == 0, log.read_text()
    text = log.read_text()
    for word in ("prefill on prefill-0, decode on decode-0", "TTFT", "TPOT", "96 tokens"):
        assert word in text
    assert processes_of(run_id) == []
    assert shared_files(cluster) == []


def test_stays_up_until_a_signal(tmp_path: Path) -> None:
    log, cluster = tmp_path / "log", f"d{uuid.uuid4().hex[:8]}"
    process, run_id = _start(log, cluster)
    try:
        wait_until(
            lambda: "Ctrl-C stops" in log.read_text() or process.poll() is not None,
            timeout_s=120.0,
            what="the demo is up",
        )
        text = log.read_text()
        for word in (
            "curl -N http://",
            "from openai import OpenAI",
            "grpcurl",
            f"--cluster {cluster}",
        ):
            assert word in text
        time.sleep(0.5)
        assert process.poll() is None
    finally:
        process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    assert processes_of(run_id) == []
    assert shared_files(cluster) == []


def test_failure_says_why(tmp_path: Path) -> None:
    log = tmp_path / "log"
    process, _ = _start(log, "nomodel", "--once", "--model", str(tmp_path / "nowhere"))
    assert process.wait(60) == 2
    assert "nowhere" in log.read_text()
