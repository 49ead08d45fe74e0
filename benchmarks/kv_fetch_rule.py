"""Fetch or recompute: what the rule decides, against always fetching and never fetching.

    python benchmarks/shapes.py qwen3-small DIR            # a model where prefill costs seconds
    python -m benchmarks.kv_fetch_rule --model DIR --json benchmarks/results/kv_fetch_rule.json

Three clusters of one instance each stand beside each other, with ``pool.fetch`` at *auto*, *always*
and *never*. Each is asked for one token of the same prompts, of several lengths, in turns: one
prompt at a time goes to all three, in an order that rotates. The instance's own cache holds no more
than the longest prompt, so that whenever a prompt comes again, the others have taken its place and
its prefix lies in the pool alone:

* *host*: the host tier holds everything;
* *disk*: the host tier holds little more than the longest prompt either, the rest is on the disk;
* *cold*: new prompts, of which nobody has anything: what it costs to ask in vain.

Which tier a prefix came from is checked with ``explain`` where it is always fetched. One round that
does not count comes first, in which the rule learns. A line passes where the median of *auto* is at
most a tenth above the smaller one of the other two.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
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

SCHEMA = "baton.benchmark.kv_fetch_rule/1"
MODES = ("auto", "always", "never")
LENGTHS = (256, 1024, 4096)
PER_LENGTH = 2
"""Prompts of each length: so many that those between two turns of one fill the cache."""
BLOCK = 16
ONE_INSTANCE = ("--prefill", "0", "--decode", "0", "--mixed", "1")
LARGEST_LOSS = 0.10
FIRST_TOKEN, NUM_TOKENS = 10, 1500
"""Prompts are made of these; the demo model's vocabulary holds them too."""
WAIT_S = 120.0
LOOK_EVERY_S = 0.1

Line = tuple[str, int, str]
"""(tier, prompt tokens, mode)."""
Rows = dict[Line, list[float]]


async def _first_token_s(cluster: Cluster, prompt: Sequence[int], request_id: str) -> float:
    request = generate_request(
        prompt, request_id=request_id, max_tokens=1, temperature=0.0, ignore_eos=True
    )
    async with AsyncBatonClient(cluster.grpc) as client:
        started = time.perf_counter()
        async for _ in client.generate(request):
            return time.perf_counter() - started
    raise RuntimeError("the request ended without a token")


def _tiers(cluster: Cluster, request_id: str) -> dict[str, int]:
    """Where the prompt's tokens came from, once its end is reported."""
    deadline = time.monotonic() + WAIT_S
    with AdminClient(cluster.controller) as admin:
        while time.monotonic() < deadline:
            with contextlib.suppress(BatonError):
                reply = admin.explain(request_id)
                if reply.outcome != "open":
                    return dict(reply.cached_by_tier)
            # A benchmark may look every so often.
            time.sleep(LOOK_EVERY_S)
    raise RuntimeError(f"the end of {request_id} was not reported within {WAIT_S:g} s")


def _settle(cluster: Cluster) -> None:
    """Wait until the pool takes in no more blocks, and writes none to the disk."""
    seen: list[float] = []
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        with contextlib.suppress(BatonError), AdminClient(cluster.controller) as admin:
            pools = [member for member in admin.status().members if member.kind == "pool"]
            numbers = [admin.pool_status(member.address).numbers for member in pools]
            names = ("baton_pool_host_published", "baton_pool_demoted")
            seen.append(sum(each[name] for each in numbers for name in names))
            if len(seen) > 3 and len(set(seen[-3:])) == 1:
                return
        time.sleep(LOOK_EVERY_S)
    raise RuntimeError(f"write-backs did not end within {WAIT_S:g} s")


class Bench:
    """Clusters by mode, and what was measured."""

    def __init__(self, clusters: Mapping[str, Cluster], tier: str, rows: Rows) -> None:
        self._clusters = clusters
        self._tier = tier
        self._rows = rows
        self._num_asked = 0

    def ask(self, prompt: Sequence[int], tier: str, *, count: bool) -> None:
        """One prompt, to all modes, in an order that rotates."""
        self._num_asked += 1
        first = self._num_asked % len(MODES)
        for mode in (*MODES[first:], *MODES[:first]):
            cluster = self._clusters[mode]
            request_id = f"{mode}-{tier}-{self._num_asked}"
            seconds = asyncio.run(_first_token_s(cluster, prompt, request_id))
            tiers = _tiers(cluster, request_id)
            if count:
                self._check(prompt, tier, mode, tiers)
                self._rows.setdefault((tier, len(prompt), mode), []).append(seconds)
            print(
                f"{tier:>5} {len(prompt):6} {mode:>7}: {seconds * 1000:8.1f} ms  {tiers or ''}",
                file=sys.stderr,
            )

    def settle(self) -> None:
        """Wait for the pools."""
        for cluster in self._clusters.values():
            _settle(cluster)

    def _check(self, prompt: Sequence[int], tier: str, mode: str, tiers: dict[str, int]) -> None:
        """It must have been as the line says, or the numbers mean nothing."""
        device, whole = tiers.get("device", 0), len(prompt)
        fetched = sum(tiers.values()) - device
        wrong = device > 0.1 * whole + BLOCK
        wrong |= mode == "never" and fetched > 0
        wrong |= tier == "cold" and fetched > 0
        if tier != "cold" and mode == "always":
            wrong |= tiers.get(tier, 0) < 0.8 * whole - BLOCK
        if wrong:
            raise RuntimeError(f"{tier}, {mode}, {whole} tokens: these came from {tiers}")


@contextlib.contextmanager
def _clusters(
    model: Path, tier: str, lengths: Sequence[int], *, num_threads: int, host_bytes: int
) -> Iterator[dict[str, Cluster]]:
    """One of each mode."""
    device_blocks = max(lengths) // BLOCK + 8
    with (
        tempfile.TemporaryDirectory(prefix="baton-fetch-") as temporary,
        contextlib.ExitStack() as stack,
    ):
        folder, clusters = Path(temporary), {}
        for mode in MODES:
            pool: dict[str, Any] = {"host_bytes": host_bytes, "write_back": "all", "fetch": mode}
            if tier == "disk":
                pool["disk_path"] = str(folder / f"disk-{mode}")
            engine = {"num_blocks": device_blocks, "num_threads": num_threads}
            path = folder / f"{mode}.yaml"
            path.write_text(json.dumps({"engine": engine, "pool": pool}))
            name = f"fetch-{tier}-{mode}-{os.getpid()}"
            options = ["--config", str(path), "--cluster", name, *ONE_INSTANCE]
            clusters[mode] = stack.enter_context(serving(model, options))
        yield clusters


def _host_bytes(tier: str, lengths: Sequence[int], num_rounds: int, block_bytes: int) -> int:
    """Of the host tier: room for everything that is asked, or for the longest prompt alone."""
    if tier == "disk":
        return (max(lengths) // BLOCK + 16) * block_bytes
    num_tokens = sum(lengths) * (PER_LENGTH + num_rounds + 2)
    return (num_tokens // BLOCK + 64) * block_bytes


def measure(
    model: Path,
    *,
    block_bytes: int,
    lengths: Sequence[int] = LENGTHS,
    tiers: Sequence[str] = ("host", "disk"),
    num_rounds: int = 7,
    num_threads: int = 2,
    seed: int = 0,
) -> Rows:
    """TTFT in seconds by line; one for each round and prompt. ``block_bytes``: of the model."""
    random = np.random.default_rng(seed)

    def prompts(count: int) -> list[list[int]]:
        tokens = (FIRST_TOKEN, FIRST_TOKEN + NUM_TOKENS)
        made = [random.integers(*tokens, size=n).tolist() for _ in range(count) for n in lengths]
        return sorted(made, key=len, reverse=True) if count == 1 else made

    rows: Rows = {}
    for tier in tiers:
        size = _host_bytes(tier, lengths, num_rounds, block_bytes)
        options = {"num_threads": num_threads, "host_bytes": size}
        with _clusters(model, tier, lengths, **options) as clusters:
            bench = Bench(clusters, tier, rows)
            known = prompts(PER_LENGTH)
            for prompt in known:
                bench.ask(prompt, "first", count=False)
            bench.settle()
            for number in range(num_rounds + 1):
                for prompt in known:
                    bench.ask(prompt, tier, count=number > 0)
                    if tier == "disk":
                        bench.settle()
                if tier == "host":
                    for prompt in prompts(1):
                        bench.ask(prompt, "cold", count=number > 0)
                    bench.settle()
    return rows


def verdicts(rows: Rows) -> list[dict[str, Any]]:
    """One record per tier and length."""
    found = []
    for tier, length in dict.fromkeys((tier, length) for tier, length, _ in rows):
        median = {mode: statistics.median(rows[tier, length, mode]) for mode in MODES}
        best = min(median["always"], median["never"])
        loss = median["auto"] / best - 1.0
        found.append(
            {
                "tier": tier,
                "prompt_tokens": length,
                "median_ttft_s": median,
                "auto_over_best": loss,
                "passes": loss <= LARGEST_LOSS,
            }
        )
    return found


def _show(found: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("prefix in", title="TTFT in ms, medians")
    for name in ("tokens", *MODES, "auto over best"):
        table.add_column(name, justify="right")
    for item in found:
        median = item["median_ttft_s"]
        table.add_row(
            item["tier"],
            str(item["prompt_tokens"]),
            *(f"{median[mode] * 1000:.1f}" for mode in MODES),
            f"{item['auto_over_best']:+.1%}{'' if item['passes'] else '  MISSED'}",
        )
    return table


def block_bytes_of(model: Path) -> int:
    """Of one KV block of a checkpoint."""
    from baton.core.config import EngineConfig
    from baton.engine.checkpoint import open_checkpoint
    from baton.engine.models.config import kv_layout

    return kv_layout(open_checkpoint(model).config, EngineConfig()).block_bytes


def main(argv: Sequence[str] | None = None) -> None:
    """The command. Exit code 1 where a line misses."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--tiers", nargs="+", choices=("host", "disk"), default=["host", "disk"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    limits = machine.measure()
    rows = measure(
        arguments.model,
        block_bytes=block_bytes_of(arguments.model),
        lengths=arguments.lengths,
        tiers=arguments.tiers,
        num_rounds=arguments.rounds,
        num_threads=arguments.threads,
    )
    found = verdicts(rows)
    Console().print(_show(found))
    if arguments.json is not None:
        result = {
            "schema": SCHEMA,
            "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "machine": limits,
            "model": arguments.model.name,
            "rounds": arguments.rounds,
            "lines": found,
            "rows": [
                {"tier": tier, "prompt_tokens": length, "mode": mode, "ttft_s": seconds}
                for (tier, length, mode), seconds in rows.items()
            ],
        }
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    if not all(item["passes"] for item in found):
        sys.exit(1)


if __name__ == "__main__":
    main()
