"""Requests that are cancelled or disconnected at random moments."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Sequence

import httpx

from baton.client import AsyncBatonClient, generate_request
from baton.core.errors import Aborted, DeadlineExceeded
from tests.cluster.harness import Cluster, body, http_client, sse


@dataclasses.dataclass(frozen=True, slots=True)
class End:
    """How one request of the storm went."""

    kind: str
    num_tokens: int
    cut: bool
    """It was still running when it was given up."""


async def cancel_storm(
    cluster: Cluster,
    prompts: Sequence[Sequence[int]],
    *,
    count: int,
    concurrency: int,
    seed: int,
) -> list[End]:
    """A third each: the HTTP connection dropped, the gRPC call cancelled, its deadline passed."""
    draw = random.Random(seed)
    plans = [
        (draw.choice(("disconnect", "cancel", "deadline")), draw.expovariate(1 / 0.3), prompt)
        for prompt in (draw.choice(prompts) for _ in range(count))
    ]
    gate = asyncio.Semaphore(concurrency)

    async with http_client(cluster) as client, AsyncBatonClient(cluster.grpc) as rpc:

        async def one(kind: str, after_s: float, prompt: Sequence[int]) -> End:
            async with gate:
                if kind == "disconnect":
                    return await _disconnect(client, prompt, after_s)
                return await _cancel(rpc, prompt, after_s, by_deadline=kind == "deadline")

        return list(await asyncio.gather(*(one(*plan) for plan in plans)))


async def _disconnect(client: httpx.AsyncClient, prompt: Sequence[int], after_s: float) -> End:
    num_tokens = 0

    async def read() -> None:
        nonlocal num_tokens
        request = body(prompt, max_tokens=400, stream=True)
        async with client.stream("POST", "/v1/completions", json=request) as response:
            assert response.status_code == 200, await response.aread()
            async for event in sse(response):
                num_tokens += len(event["choices"][0]["token_ids"])

    task = asyncio.ensure_future(read())
    await asyncio.wait([task], timeout=after_s)
    cut = task.cancel()
    [error] = await asyncio.gather(task, return_exceptions=True)
    assert error is None or isinstance(error, asyncio.CancelledError), repr(error)
    return End("disconnect", num_tokens, cut)


async def _cancel(
    rpc: AsyncBatonClient, prompt: Sequence[int], after_s: float, *, by_deadline: bool
) -> End:
    request = generate_request(prompt, temperature=0.0, max_tokens=400, ignore_eos=True)
    num_tokens = 0

    async def read() -> None:
        nonlocal num_tokens
        timeout_s = max(after_s, 0.001) if by_deadline else 60.0
        async for chunk in rpc.generate(request, timeout_s=timeout_s):
            num_tokens += len(chunk.token_ids)

    task = asyncio.ensure_future(read())
    await asyncio.wait([task], timeout=None if by_deadline else after_s)
    cut = task.cancel()
    [error] = await asyncio.gather(task, return_exceptions=True)
    expected = asyncio.CancelledError | Aborted | DeadlineExceeded
    assert error is None or isinstance(error, expected), repr(error)
    if by_deadline:
        return End("deadline", num_tokens, isinstance(error, DeadlineExceeded))
    return End("cancel", num_tokens, cut)
