"""Requests that are cancelled or disconnected at random moments."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import statistics
from collections.abc import Sequence

import httpx

from baton.client import AsyncBatonClient, generate_request
from baton.core.errors import Aborted, DeadlineExceeded
from tests.cluster.harness import Cluster, body, complete_all, http_client, sse


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
    """A third each: the HTTP connection dropped, the gRPC call cancelled, its deadline passed.

    The moments are drawn around the time that this cluster, on this machine as busy as it is now,
    takes for a few tokens: so some come before the first one and most in mid-stream.
    """
    draw = random.Random(seed)
    mean_s = 2 * await _time_of_a_few_tokens(cluster, prompts, concurrency)
    plans = [
        (draw.choice(("disconnect", "cancel", "deadline")), draw.expovariate(1 / mean_s), prompt)
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


async def _time_of_a_few_tokens(
    cluster: Cluster, prompts: Sequence[Sequence[int]], concurrency: int
) -> float:
    """Median seconds of ``concurrency`` requests at a time for 16 tokens each."""
    requests = [body(prompts[i % len(prompts)], max_tokens=16) for i in range(2 * concurrency)]
    replies = await complete_all(cluster, requests, concurrency=concurrency)
    assert all(reply.error is None for reply in replies)
    return statistics.median(reply.seconds for reply in replies)


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
