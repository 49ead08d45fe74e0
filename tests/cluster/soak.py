"""A cluster with tiny tiers under a load that never lets up, while its processes are killed."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.cluster import oracle
from tests.cluster.harness import Cluster, body, complete, http_client
from tests.cluster.pool_kit import kill_instance, kill_pool_node, pool_numbers

NUM_TOKENS = 24
CONCURRENCY = 6
CANCELLED = 0.25
"""Share of the requests that are given up at a random moment."""


@dataclasses.dataclass(slots=True)
class Soaked:
    """What happened."""

    num_finished: int = 0
    num_cancelled: int = 0
    errors: list[dict[str, object]] = dataclasses.field(default_factory=list)
    num_kills: int = 0
    outputs: dict[int, set[tuple[int, ...]]] = dataclasses.field(default_factory=dict)
    """By prompt; greedy, so each has one, but for ties."""
    memory: list[tuple[float, int]] = dataclasses.field(default_factory=list)
    """(seconds, resident bytes of all processes)."""
    seen: set[str] = dataclasses.field(default_factory=set)
    """Names of pool counters that were above zero."""


def tiny_tiers(disk: Path) -> dict[str, Any]:
    """Settings with which each tier holds a part of what is asked for; the disk is to be full
    before it has as much as it may."""
    return {
        "engine": {"num_blocks": 192},
        "pool": {
            "host_bytes": 96 * 32768,
            "disk_path": str(disk),
            "disk_bytes": 32 << 20,
            "write_back": "all",
            "fetch": "always",
            # So that what the killed had ends soon, but not before others renew theirs.
            "lease_s": 5.0,
        },
        "handoff": {"lease_s": 6.0},
    }


@contextlib.contextmanager
def small_disk(path: Path, mebibytes: int) -> Iterator[Path]:
    """A file system of its own that is soon full. Needs root."""
    path.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(path)], check=True
    )
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


def prompts(count: int) -> list[list[int]]:
    """Conversations: each prompt continues one of a few beginnings, some by a lot."""
    ids = oracle.corpus()
    found = []
    for number in range(count):
        start = 3000 * (number % 4)
        found.append(ids[start : start + 120 + 90 * (number // 4)])
    return found


async def soak(
    cluster: Cluster,
    asked: Sequence[Sequence[int]],
    *,
    seconds: float,
    kill_every_s: float,
    seed: int,
) -> Soaked:
    """Load, cancels and kills for so long; then the load is let end."""
    result, draw = Soaked(), random.Random(seed)
    started = time.monotonic()
    stop = asyncio.Event()

    async with http_client(cluster) as client:

        async def worker() -> None:
            while not stop.is_set():
                number = draw.randrange(len(asked))
                request = body(asked[number], max_tokens=NUM_TOKENS)
                limit_s = draw.expovariate(4.0) if draw.random() < CANCELLED else None
                try:
                    async with asyncio.timeout(limit_s):
                        reply = await complete(client, request)
                except TimeoutError:
                    result.num_cancelled += 1
                    continue
                if reply.error is not None:
                    result.errors.append(reply.error)
                    continue
                result.num_finished += 1
                result.outputs.setdefault(number, set()).add(tuple(reply.token_ids))

        async def killer() -> None:
            instances = await asyncio.to_thread(cluster.live_instances)
            victims = ["pool", *sorted(item.instance_id for item in instances)]
            while not stop.is_set():
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), kill_every_s)
                if stop.is_set():
                    return
                victim = victims[result.num_kills % len(victims)]
                if victim == "pool":
                    await asyncio.to_thread(kill_pool_node, cluster)
                else:
                    await asyncio.to_thread(kill_instance, cluster, victim)
                result.num_kills += 1
                numbers = await asyncio.to_thread(pool_numbers, cluster)
                result.seen |= {name for name, value in numbers.items() if value}
                memory = sum(p.memory_info().rss for p in cluster.processes())
                result.memory.append((time.monotonic() - started, memory))

        tasks = [asyncio.ensure_future(worker()) for _ in range(CONCURRENCY)]
        tasks.append(asyncio.ensure_future(killer()))
        try:
            done, _ = await asyncio.wait(
                tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION
            )
            for task in done:
                task.result()
        finally:
            stop.set()
            await asyncio.gather(*tasks)
    return result


def check(asked: Sequence[Sequence[int]], result: Soaked) -> None:
    """No wrong token, no error but such as ask for another try, and each prompt was answered."""
    for error in result.errors:
        assert error["code"] in {"unavailable", "instance_lost"}, error
    ties = []
    for number, outputs in result.outputs.items():
        for output in outputs:
            ties += oracle.check_greedy(asked[number], output)
    assert len(ties) <= 3, ties
    assert len(result.outputs) == len(asked)
