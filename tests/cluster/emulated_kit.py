"""Clusters of emulated instances for tests, and loads whose every token is checked."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import random
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

from baton.core.slo import percentile
from baton.engine.fingerprints import emulated_tokens
from tests.cluster.harness import Cluster, Reply, body, complete, http_client, serving

VOCABULARY, EOS = 4096, (0, 2)
"""Of the demo model, whose tokenizer is used."""
PROFILE = {
    "name": "steady",
    "source": "derived: none, for a test",
    "prefill": {"overhead_s": 0.01, "item_s": 2e-4, "context_s": 0.0},
    "decode": {"overhead_s": 0.03, "item_s": 1e-3, "context_s": 0.0},
    "handoff": {"latency_s": 0.001, "bytes_per_s": 1e9},
    "tiers": {"host": {"latency_s": 0.001, "bytes_per_s": 1e10}},
    "kv_bytes_per_token": 1000,
    "kv_capacity_tokens": 40000,
    "max_model_len": 8000,
    "max_num_seqs": 32,
    "max_num_batched_tokens": 512,
    "block_size": 16,
}
"""Steps long enough for two cores to bear eight instances of them."""


@contextlib.contextmanager
def emulated_cluster(
    folder: Path,
    sizes: Sequence[str],
    *,
    settings: dict[str, Any] | None = None,
    profile: dict[str, Any] | None = None,
) -> Iterator[Cluster]:
    """``sizes``: flags such as ``--prefill 2``."""
    path = folder / "profile.yaml"
    path.write_text(json.dumps(profile or PROFILE))  # JSON is YAML
    line = (*sizes, "--device", "emulated", "--profile", str(path))
    with serving(*line, settings=settings or {}) as cluster:
        yield cluster


@dataclasses.dataclass(frozen=True, slots=True)
class Ask:
    """One request."""

    prompt: tuple[int, ...]
    num_tokens: int

    def check(self, reply: Reply) -> None:
        """It ended well, and with exactly the tokens it must have."""
        assert (reply.error, reply.finish_reason) == (None, "length"), reply.error
        expected = emulated_tokens(self.prompt, self.num_tokens, vocab_size=VOCABULARY, avoid=EOS)
        assert reply.token_ids == expected


def asks(count: int, *, prompt: int, output: int, seed: int) -> list[Ask]:
    """Of about these lengths, each of its own tokens."""
    draw = random.Random(seed)
    return [
        Ask(
            tuple(draw.randrange(3, VOCABULARY) for _ in range(draw.randint(prompt // 2, prompt))),
            draw.randint(max(1, output // 2), output),
        )
        for _ in range(count)
    ]


async def send(client: httpx.AsyncClient, ask: Ask, **more: Any) -> Reply:
    return await complete(client, body(ask.prompt, max_tokens=ask.num_tokens, **more))


async def send_at(cluster: Cluster, timed: Sequence[tuple[float, Ask]], **more: Any) -> list[Reply]:
    """Each at its time, in seconds from now; all replies, in that order, every token checked."""

    async def one(client: httpx.AsyncClient, at_s: float, ask: Ask) -> Reply:
        await asyncio.sleep(at_s)
        reply = await send(client, ask, **more)
        ask.check(reply)
        return reply

    async with http_client(cluster, timeout_s=300.0) as client:
        return list(await asyncio.gather(*(one(client, at_s, ask) for at_s, ask in timed)))


@contextlib.asynccontextmanager
async def emulated_load(
    cluster: Cluster, requests: Sequence[Ask], *, concurrency: int
) -> AsyncIterator[list[Reply]]:
    """So many streams at all times during the block; each reply is checked as it ends."""
    replies: list[Reply] = []
    stop = asyncio.Event()

    async with http_client(cluster) as client:

        async def worker(number: int) -> None:
            index = number
            while not stop.is_set():
                ask = requests[index % len(requests)]
                reply = await send(client, ask)
                ask.check(reply)
                replies.append(reply)
                index += concurrency

        workers = [asyncio.ensure_future(worker(i)) for i in range(concurrency)]
        try:
            yield replies
        finally:
            stop.set()
            await asyncio.gather(*workers)


def describe_s(values: Sequence[float]) -> str:
    """Percentiles of seconds, for people."""
    parts = [f"p{q} {1000 * (percentile(values, q) or 0.0):.1f} ms" for q in (50, 90, 99, 100)]
    return ", ".join(parts)
