"""Requests that are cancelled or disconnected at random moments."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

import httpx

from baton.client import AsyncBatonClient, generate_request
from baton.core.errors import Aborted, DeadlineExceeded
from tests.cluster.harness import Cluster, body, http_client, sse


async def cancel_storm(
    cluster: Cluster,
    prompts: Sequence[Sequence[int]],
    *,
    count: int,
    concurrency: int,
    seed: int,
) -> dict[str, int]:
    """Half over HTTP (the connection is dropped), half over gRPC (cancel, deadline)."""
    draw = random.Random(seed)
    plans = [
        (draw.choice(("disconnect", "cancel", "deadline")), draw.expovariate(1 / 0.3), prompt)
        for prompt in (draw.choice(prompts) for _ in range(count))
    ]
    gate = asyncio.Semaphore(concurrency)
    ends: dict[str, int] = {}

    async with http_client(cluster) as client, AsyncBatonClient(cluster.grpc) as rpc:

        async def one(kind: str, after_s: float, prompt: Sequence[int]) -> None:
            async with gate:
                if kind == "disconnect":
                    await _disconnect(client, prompt, after_s)
                else:
                    await _cancel(rpc, prompt, after_s, by_deadline=kind == "deadline")
            ends[kind] = ends.get(kind, 0) + 1

        await asyncio.gather(*(one(*plan) for plan in plans))
    return ends


async def _disconnect(client: httpx.AsyncClient, prompt: Sequence[int], after_s: float) -> None:
    async def read() -> None:
        request = body(prompt, max_tokens=400, stream=True)
        async with client.stream("POST", "/v1/completions", json=request) as response:
            async for _ in sse(response):
                pass

    task = asyncio.ensure_future(read())
    await asyncio.wait([task], timeout=after_s)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def _cancel(
    rpc: AsyncBatonClient, prompt: Sequence[int], after_s: float, *, by_deadline: bool
) -> None:
    request = generate_request(prompt, temperature=0.0, max_tokens=400, ignore_eos=True)

    async def read() -> None:
        timeout_s = max(after_s, 0.001) if by_deadline else 60.0
        async for _ in rpc.generate(request, timeout_s=timeout_s):
            pass

    task = asyncio.ensure_future(read())
    await asyncio.wait([task], timeout=None if by_deadline else after_s)
    task.cancel()
    [error] = await asyncio.gather(task, return_exceptions=True)
    expected = asyncio.CancelledError | Aborted | DeadlineExceeded
    assert error is None or isinstance(error, expected), repr(error)
