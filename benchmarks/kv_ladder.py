"""Time to the first token of a long prompt, by the tier that its prefix comes from.

    python -m benchmarks.kv_ladder --model DIR             # a model where prefill costs seconds
    python benchmarks/shapes.py qwen3-small DIR            # makes such a one

Each prompt (``--prompts`` of them, of ``--prompt-tokens`` tokens, random) is asked for one token:

* *cold*: nobody has seen it;
* *device*: again, at once, on the instance that computed it;
* *host*: after ``kill -9`` of the prefill instance, so that only the host tier has it;
* *disk*: on a new cluster with the same disk folder, as after a restart of the machine;
* *remote*: on another Ray node, whose own pool node has to fetch it over TCP from the first one's.
  Both are on this machine, so the bytes cross the loopback interface.

Which tier it came from is checked with ``explain``: a rung that did not use its tier is an error.
Medians over prompts. The rungs of one prompt cannot be interleaved (a restart lies between them);
cold prompts come first and last, and the last ones say how much the machine has changed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from baton.client import AsyncBatonClient, generate_request
from baton.client.admin import AdminClient
from baton.core.errors import BatonError
from benchmarks import machine
from benchmarks.cluster import Cluster, serving
from benchmarks.shapes import SMALL_VOCABULARY

SCHEMA = "baton.benchmark.kv_ladder/1"
RUNGS = ("cold", "device", "host", "disk", "remote", "cold again")
RAY_PORT = 6397
WAIT_S = 120.0
LOOK_EVERY_S = 0.2

Rows = dict[str, list[dict[str, float]]]


async def _first_token_s(cluster: Cluster, prompt: Sequence[int]) -> tuple[float, str]:
    """Seconds to the first token, and the request's id."""
    request_id = f"ladder-{time.monotonic_ns()}"
    request = generate_request(
        prompt, request_id=request_id, max_tokens=1, temperature=0.0, ignore_eos=True
    )
    async with AsyncBatonClient(cluster.grpc) as client:
        started = time.perf_counter()
        async for _ in client.generate(request):
            return time.perf_counter() - started, request_id
    raise RuntimeError("the request ended without a token")


def _ask(cluster: Cluster, prompt: Sequence[int], rung: str, rows: Rows) -> None:
    """Measure one prompt, and check that its prefix came from where the rung says."""
    seconds, request_id = asyncio.run(_first_token_s(cluster, prompt))
    with AdminClient(cluster.controller) as admin:
        _until(lambda: admin.explain(request_id).outcome != "open", "its outcome")
        tiers = dict(admin.explain(request_id).cached_by_tier)
    wanted = None if rung.startswith("cold") else rung
    cached = sum(tiers.values())
    if (wanted is None and cached) or (wanted and tiers.get(wanted, 0) < 0.9 * len(prompt)):
        raise RuntimeError(f"{rung}: of {len(prompt)} tokens came {tiers or 'none'} from the tiers")
    rows[rung].append({"ttft_s": seconds, "cached_tokens": cached})
    print(f"{rung:>10}: {seconds * 1000:8.1f} ms  {tiers or ''}", file=sys.stderr)


def _until(done: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while True:
        with contextlib.suppress(BatonError):
            if done():
                return
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what} did not come within {WAIT_S:g} s")
        # A benchmark may look every so often.
        time.sleep(LOOK_EVERY_S)


def _written_back(cluster: Cluster) -> None:
    """Wait until the pool takes in no more blocks."""
    seen: list[float] = []

    def quiet() -> bool:
        with AdminClient(cluster.controller) as admin:
            pools = [m for m in admin.status().members if m.kind == "pool"]
            numbers = [admin.pool_status(member.address).numbers for member in pools]
        seen.append(sum(n["baton_pool_host_published"] for n in numbers))
        return len(seen) > 5 and len(set(seen[-5:])) == 1 and seen[-1] > 0

    _until(quiet, "the end of write-backs")


def _restart_prefill(cluster: Cluster) -> None:
    with AdminClient(cluster.controller) as admin:
        old = next(i for i in admin.status().instances if i.instance_id == "prefill-0")
        os.kill(old.pid, signal.SIGKILL)
        _until(
            lambda: any(
                i.instance_id == "prefill-0"
                and i.incarnation > old.incarnation
                and i.state == "ready"
                for i in admin.status().instances
            ),
            "the prefill instance's next life",
        )


@contextlib.contextmanager
def _two_ray_nodes() -> Iterator[str]:
    """Two Ray nodes on this machine; the address of their cluster."""
    address = f"127.0.0.1:{RAY_PORT}"
    ray = str(Path(sys.executable).with_name("ray"))
    common = ["--block", "--num-cpus=1", "--object-store-memory=80000000", "--disable-usage-stats"]
    starts = (
        ["--head", f"--port={RAY_PORT}", "--include-dashboard=false"],
        [f"--address={address}"],
    )
    with tempfile.TemporaryFile() as log, contextlib.ExitStack() as stack:
        for start in starts:
            process = subprocess.Popen(
                [ray, "start", "--node-ip-address=127.0.0.1", *start, *common],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "RAY_AUTH_MODE": "disabled"},
            )
            stack.callback(process.wait, 60)
            stack.callback(process.terminate)
            offset = log.tell()

            def up(offset: int = offset) -> bool:
                log.seek(offset)
                return b"Ray runtime started" in log.read()

            _until(up, "a Ray node")
        yield address


def _options(folder: Path, name: str, settings: dict[str, Any], *more: str) -> list[str]:
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(settings))
    return ["--config", str(path), "--cluster", f"ladder-{os.getpid()}", *more]


def measure(model: Path, num_prompts: int, num_tokens: int, *, seed: int = 0) -> Rows:
    """Climb the ladder; one row per prompt and rung."""
    random = np.random.default_rng(seed)
    prompts = random.integers(10, SMALL_VOCABULARY, size=(2 * num_prompts, num_tokens)).tolist()
    first, last = prompts[:num_prompts], prompts[num_prompts:]
    rows: Rows = {rung: [] for rung in RUNGS}
    num_blocks = 2 * num_prompts * (num_tokens // 16 + 8)
    settings: dict[str, Any] = {
        "engine": {"num_blocks": num_blocks, "num_threads": 2},
        "pool": {"host_bytes": 2 << 30, "write_back": "all", "fetch": "always"},
    }
    with tempfile.TemporaryDirectory(prefix="baton-ladder-") as temporary:
        folder = Path(temporary)
        on_disk = {**settings, "pool": {**settings["pool"], "disk_path": str(folder / "disk")}}
        pair = ("--prefill", "1", "--decode", "1")
        with serving(model, _options(folder, "disk", on_disk, *pair)) as cluster:
            for prompt in first:
                _ask(cluster, prompt, "cold", rows)
                _ask(cluster, prompt, "device", rows)
            _written_back(cluster)
            _restart_prefill(cluster)
            for prompt in first:
                _ask(cluster, prompt, "host", rows)
        with serving(model, _options(folder, "disk", on_disk, *pair)) as cluster:
            for prompt in first:
                _ask(cluster, prompt, "disk", rows)
        with _two_ray_nodes() as address:
            options = ("--prefill", "2", "--decode", "1", "--address", address)
            with serving(model, _options(folder, "two", settings, *options)) as cluster:
                with AdminClient(cluster.controller) as admin:
                    admin.drain("prefill-1", wait=False)
                    for prompt in last:
                        _ask(cluster, prompt, "cold again", rows)
                    _written_back(cluster)
                    admin.drain("prefill-1", undo=True, wait=False)
                    admin.drain("prefill-0", wait=False)
                for prompt in last:
                    _ask(cluster, prompt, "remote", rows)
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=4096)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    limits = machine.measure()
    rows = measure(arguments.model, arguments.prompts, arguments.prompt_tokens)
    medians = {rung: statistics.median(r["ttft_s"] for r in rows[rung]) for rung in RUNGS}
    table = Table("prefix from", title=f"TTFT of {arguments.prompt_tokens} tokens")
    table.add_column("median ms", justify="right")
    table.add_column("of cold", justify="right")
    for rung in RUNGS:
        cold = medians["cold again" if rung in ("remote", "cold again") else "cold"]
        table.add_row(rung, f"{medians[rung] * 1000:.1f}", f"{medians[rung] / cold:.1%}")
    Console().print(table)
    if arguments.json is not None:
        result = {
            "schema": SCHEMA,
            "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "machine": limits,
            "model": arguments.model.name,
            "prompt_tokens": arguments.prompt_tokens,
            "median_ttft_s": medians,
            "rows": rows,
        }
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
