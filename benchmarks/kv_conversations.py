"""Conversations of a production trace through a cluster: hit rates, and what the pool is worth.

    python -m benchmarks.kv_conversations --trace mooncake_conversation.jsonl --model DIR

The trace (Mooncake's form) says which blocks of 512 tokens prompts share. Here a block is
``--block-tokens`` tokens, so that a laptop can compute them; the rest of the structure stays: who
continues whom, and in which order. Prompts longer than ``--max-prompt`` are cut, at their end.
``--concurrency`` requests are under way at a time, in the trace's order.

*Ideal*: what a cache without bounds would have found, in tokens of the prompts, if each request's
blocks were there as soon as it is sent. *Hit rate*: what the cluster reports as cached. Two prefill
instances whose own caches are small, once with the pool's host tier and once without, each on a new
cluster, alternately.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from baton.client import AsyncBatonClient, generate_request
from benchmarks import machine
from benchmarks.cluster import Cluster, serving

SCHEMA = "baton.benchmark.kv_conversations/1"
FIRST_TOKEN, NUM_TOKENS = 10, 1500
"""Prompts are made of these; the demo model's vocabulary holds them."""
SHAPE = ("--prefill", "2", "--decode", "1")


def read_prompts(
    trace: Path, count: int, *, block_tokens: int, max_prompt: int
) -> list[tuple[list[int], int]]:
    """(prompt, ideal cached tokens) of the first requests of the trace."""
    prompts: list[tuple[list[int], int]] = []
    seen: set[int] = set()
    with trace.open(encoding="utf-8") as file:
        for line in file:
            if len(prompts) == count:
                break
            ids = json.loads(line)["hash_ids"][: max_prompt // block_tokens]
            known = next((n for n, name in enumerate(ids) if name not in seen), len(ids))
            seen.update(ids)
            prompt = [token for name in ids for token in _block(name, block_tokens)]
            # The last token is always computed.
            prompts.append((prompt, min(known * block_tokens, len(prompt) - 1) // 16 * 16))
    return prompts


def _block(name: int, size: int) -> list[int]:
    drawn = np.random.default_rng([7, name]).integers(0, NUM_TOKENS, size) + FIRST_TOKEN
    return [int(token) for token in drawn]


async def _run(
    cluster: Cluster, prompts: Sequence[tuple[list[int], int]], concurrency: int, max_tokens: int
) -> list[tuple[float, int]]:
    """(seconds to the first token, cached tokens) of each request."""
    found: list[tuple[float, int]] = [(0.0, 0)] * len(prompts)
    waiting = iter(range(len(prompts)))

    async with AsyncBatonClient(cluster.grpc) as client:

        async def worker() -> None:
            for number in waiting:
                request = generate_request(
                    prompts[number][0], max_tokens=max_tokens, temperature=0.0, ignore_eos=True
                )
                started, first_s, cached = time.perf_counter(), 0.0, 0
                async for chunk in client.generate(request):
                    first_s = first_s or time.perf_counter() - started
                    cached = chunk.cached_tokens or cached
                found[number] = (first_s, cached)

        await asyncio.gather(*(worker() for _ in range(concurrency)))
    return found


def _settings(folder: Path, *, num_blocks: int, host_bytes: int) -> list[str]:
    path = folder / f"host-{host_bytes}.yaml"
    settings: dict[str, Any] = {
        "engine": {"num_blocks": num_blocks},
        "pool": {"host_bytes": host_bytes},
    }
    path.write_text(json.dumps(settings))
    return ["--config", str(path), "--cluster", f"conversations-{os.getpid()}", *SHAPE]


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--block-tokens", type=int, default=32)
    parser.add_argument("--max-prompt", type=int, default=1536)
    parser.add_argument("--max-tokens", type=int, default=8)
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--num-blocks", type=int, default=512, help="of each instance's own cache")
    parser.add_argument("--host-bytes", type=int, default=1 << 30)
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    prompts = read_prompts(
        arguments.trace,
        arguments.requests,
        block_tokens=arguments.block_tokens,
        max_prompt=arguments.max_prompt,
    )
    total = sum(len(prompt) for prompt, _ in prompts)
    ideal = sum(known for _, known in prompts) / total
    limits = machine.measure()
    runs: dict[str, list[dict[str, float]]] = {"on": [], "off": []}
    with tempfile.TemporaryDirectory(prefix="baton-conversations-") as temporary:
        for _ in range(arguments.repetitions):
            for name, host_bytes in (("on", arguments.host_bytes), ("off", 0)):
                options = _settings(
                    Path(temporary), num_blocks=arguments.num_blocks, host_bytes=host_bytes
                )
                with serving(arguments.model, options) as cluster:
                    started = time.perf_counter()
                    found = asyncio.run(
                        _run(cluster, prompts, arguments.concurrency, arguments.max_tokens)
                    )
                    seconds = time.perf_counter() - started
                ttft = sorted(first_s for first_s, _ in found)
                runs[name].append(
                    {
                        "hit_rate": sum(cached for _, cached in found) / total,
                        "ttft_p50_s": ttft[len(ttft) // 2],
                        "ttft_p90_s": ttft[len(ttft) * 9 // 10],
                        "seconds": seconds,
                    }
                )
                print(name, runs[name][-1], file=sys.stderr)
    table = Table(
        "pool", title=f"{len(prompts)} requests, {total} prompt tokens, ideal {ideal:.1%}"
    )
    for title in ("hit rate", "of ideal", "TTFT p50 ms", "p90 ms", "seconds"):
        table.add_column(title, justify="right")
    for name, of in runs.items():
        median = {key: statistics.median(run[key] for run in of) for key in of[0]}
        table.add_row(
            name,
            f"{median['hit_rate']:.1%}",
            f"{median['hit_rate'] / ideal:.1%}",
            f"{median['ttft_p50_s'] * 1000:.1f}",
            f"{median['ttft_p90_s'] * 1000:.1f}",
            f"{median['seconds']:.1f}",
        )
    Console().print(table)
    if arguments.json is not None:
        result = {
            "schema": SCHEMA,
            "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "machine": limits,
            "arguments": {
                key: value.name if isinstance(value, Path) else value  # no path of this machine
                for key, value in vars(arguments).items()
                if key != "json"
            },
            "prompt_tokens": total,
            "ideal_hit_rate": ideal,
            "runs": runs,
        }
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
