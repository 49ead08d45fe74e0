"""Starts real clusters for tests, and looks at them from outside."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from baton.client.admin import AdminClient
from protos.baton.v1 import cluster_pb2

ROOT = Path(__file__).resolve().parents[2]
DEMO_MODEL = ROOT / "deploy" / "demo-model"
START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 40.0
RUN_ID = "BATON_TEST_RUN_ID"


@dataclasses.dataclass(slots=True)
class Cluster:
    """A running ``baton serve``."""

    name: str
    run_id: str
    process: subprocess.Popen[bytes]
    http: str
    grpc: str
    controller: str
    log: Path
    env: dict[str, str]
    model: str = DEMO_MODEL.name

    @property
    def url(self) -> str:
        return f"http://{self.http}"

    def command(self, *args: str, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
        """Run ``baton ARGS --cluster NAME`` as a user would."""
        return subprocess.run(
            [sys.executable, "-m", "baton.cli.main", *args, "--cluster", self.name],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env=self.env,
            cwd=ROOT,
            check=False,
        )

    def status(self) -> dict[str, Any]:
        """``baton status --json``, from a fresh process."""
        result = self.command("status", "--json")
        assert result.returncode == 0, result.stderr
        loaded: dict[str, Any] = json.loads(result.stdout)
        return loaded

    def live_instances(self) -> list[cluster_pb2.InstanceStatus]:
        """What the controller says now, without the dead."""
        with AdminClient(self.controller) as admin:
            return [item for item in admin.status().instances if item.state != "dead"]

    def processes(self) -> list[psutil.Process]:
        """Every process that was started by, or for, this cluster."""
        return processes_of(self.run_id)


def processes_of(run_id: str) -> list[psutil.Process]:
    mark = f"{RUN_ID}={run_id}".encode()
    found = []
    for process in psutil.process_iter():
        try:
            environ = Path(f"/proc/{process.pid}/environ").read_bytes()
        except OSError:
            continue
        if mark in environ.split(b"\0") and process.pid != os.getpid():
            found.append(process)
    return found


def shared_files(cluster: str) -> list[str]:
    return sorted(path.name for path in Path("/dev/shm").glob(f"baton-{cluster}-*"))


def wait_until(
    check: Callable[[], bool], *, timeout_s: float, what: str, every_s: float = 0.1
) -> None:
    """Poll from outside the system under test; fails with ``what`` after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(every_s)


@contextlib.contextmanager
def serving(
    *args: str,
    model: Path | str = DEMO_MODEL,
    settings: Mapping[str, Any] | None = None,
    expect_clean: bool = True,
    stop_signal: signal.Signals = signal.SIGTERM,
    command: Sequence[str] | None = None,
    extra_env: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
) -> Iterator[Cluster]:
    """Run ``baton serve`` for the block; then no process and no shared memory may be left."""
    name = f"t{uuid.uuid4().hex[:8]}"
    run_id = uuid.uuid4().hex
    env = {**os.environ, RUN_ID: run_id, **(extra_env or {})}
    with tempfile.TemporaryDirectory(prefix="baton-test-") as folder:
        log = Path(folder) / "serve.log"
        ready_file = Path(folder) / "ready.json"
        line = [
            *(command or [sys.executable, "-m", "baton.cli.main"]),
            "serve",
            "--model",
            str(model),
        ]
        line += ["--http-port", "0", "--grpc-port", "0", "--cluster", name]
        line += ["--ready-file", str(ready_file), *args]
        if settings is not None:
            config = Path(folder) / "config.yaml"
            config.write_text(json.dumps(settings))  # JSON is YAML
            line += ["--config", str(config)]
        with log.open("wb") as output:
            process = subprocess.Popen(
                line, stdout=output, stderr=subprocess.STDOUT, env=env, cwd=cwd
            )
        try:
            _wait_ready(process, ready_file, log)
            ready = json.loads(ready_file.read_text())
            yield Cluster(
                name=name,
                run_id=run_id,
                process=process,
                http=ready["http"],
                grpc=ready["grpc"],
                controller=ready["controller"],
                log=log,
                env=env,
                model=Path(model).name,
            )
        finally:
            _stop(process, stop_signal)
            left = _leftovers(run_id)
            for straggler in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    straggler.kill()
            files = shared_files(name)
            for file in files:
                Path("/dev/shm", file).unlink(missing_ok=True)
            if sys.exc_info()[0] is not None:
                sys.stderr.write(log.read_text(errors="replace")[-4000:])
        if expect_clean:
            assert not left, f"processes left behind: {left}"
            assert not files, f"shared memory left behind: {files}"


def _wait_ready(process: subprocess.Popen[bytes], ready_file: Path, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not ready_file.exists():
        code = process.poll()
        assert code is None, f"baton serve ended with {code}: {log.read_text()[-4000:]}"
        assert time.monotonic() < deadline, f"not ready: {log.read_text()[-4000:]}"
        time.sleep(0.1)


def _stop(process: subprocess.Popen[bytes], stop_signal: signal.Signals) -> None:
    if process.poll() is None:
        process.send_signal(stop_signal)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)
            raise


def _leftovers(run_id: str) -> list[psutil.Process]:
    # Children of Ray may still be on their way out for a moment.
    deadline = time.monotonic() + 10.0
    while (left := processes_of(run_id)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


# Metrics.


def metrics(address: str) -> dict[str, float]:
    """``name{label=value,...}`` → value of one process's /metrics."""
    text = httpx.get(f"http://{address}/metrics", timeout=10.0).text
    values = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()))
            values[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return values


HELD_GAUGES = (
    "baton_kv_blocks{state=held}",
    "baton_sequences_open",
    "baton_kv_leases",
    "baton_kv_pulls_open",
)


POOL_GAUGES = ("baton_pool_host_tickets", "baton_pool_host_holds")


def held(cluster: Cluster) -> dict[str, float]:
    """Everything that requests hold anywhere, by process and gauge; zero when idle."""
    found: dict[str, float] = {}
    for item in cluster.live_instances():
        values = metrics(item.metrics_address)
        found |= {f"{item.instance_id} {name}": values[name] for name in HELD_GAUGES}
    with AdminClient(cluster.controller) as admin:
        pools = [member for member in admin.status().members if member.kind == "pool"]
    for member in pools:
        values = metrics(member.http_address)
        found |= {f"{member.member_id} {n}": values[n] for n in POOL_GAUGES if n in values}
    return found


def assert_nothing_held(cluster: Cluster, *, within_s: float) -> None:
    """All held gauges reach zero within ``within_s``."""
    last: dict[str, float] = {}

    def free() -> bool:
        nonlocal last
        last = held(cluster)
        return not any(last.values())

    try:
        wait_until(free, timeout_s=within_s, what="nothing held")
    except AssertionError:
        raise AssertionError(f"still held: { {k: v for k, v in last.items() if v} }") from None


# Requests.


@dataclasses.dataclass(slots=True)
class Reply:
    """What one streamed completion gave."""

    token_ids: list[int] = dataclasses.field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    error: dict[str, Any] | None = None
    retryable: bool | None = None
    """What ``x-should-retry`` said of a refused request."""
    status: int = 0
    request_id: str = ""
    first_s: float = 0.0
    longest_gap_s: float = 0.0
    seconds: float = 0.0


def body(prompt: Sequence[int] | str, **more: Any) -> dict[str, Any]:
    """A greedy streaming completion that ignores the end token, unless ``more`` says otherwise."""
    return {
        "model": DEMO_MODEL.name,
        "prompt": list(prompt) if not isinstance(prompt, str) else prompt,
        "temperature": 0.0,
        "ignore_eos": True,
        "return_token_ids": True,
        "stream": True,
    } | more


async def complete(client: httpx.AsyncClient, request: dict[str, Any]) -> Reply:
    """Stream one completion to its end; errors are in the reply, never raised."""
    reply = Reply()
    started = last = time.monotonic()
    async with client.stream("POST", "/v1/completions", json=request) as response:
        reply.status = response.status_code
        reply.request_id = response.headers.get("x-request-id", "")
        if response.status_code != 200:
            reply.error = json.loads(await response.aread())["error"]
            reply.retryable = response.headers.get("x-should-retry") == "true"
            reply.seconds = reply.longest_gap_s = time.monotonic() - started
            return reply
        async for event in sse(response):
            now = time.monotonic()
            reply.longest_gap_s = max(reply.longest_gap_s, now - last)
            last = now
            if "error" in event:
                reply.error = event["error"]
                break
            for choice in event["choices"]:
                if choice.get("token_ids"):
                    reply.first_s = reply.first_s or now - started
                    reply.token_ids += choice["token_ids"]
                reply.text += choice.get("text") or ""
                reply.finish_reason = choice.get("finish_reason") or reply.finish_reason
    now = time.monotonic()
    reply.longest_gap_s = max(reply.longest_gap_s, now - last)
    reply.seconds = now - started
    return reply


async def sse(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """Parsed ``data:`` events until ``[DONE]``."""
    async for line in response.aiter_lines():
        if line.startswith("data: "):
            data = line.removeprefix("data: ")
            if data == "[DONE]":
                return
            yield json.loads(data)


def http_client(cluster: Cluster, *, timeout_s: float = 120.0) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(base_url=cluster.url, timeout=timeout_s, limits=limits)


async def complete_all(
    cluster: Cluster, requests: Sequence[dict[str, Any]], *, concurrency: int
) -> list[Reply]:
    """All requests, at most ``concurrency`` at a time, replies in order."""
    gate = asyncio.Semaphore(concurrency)

    async with http_client(cluster) as client:

        async def one(request: dict[str, Any]) -> Reply:
            async with gate:
                return await complete(client, request)

        return list(await asyncio.gather(*(one(request) for request in requests)))
