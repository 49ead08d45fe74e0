"""Line 2 of issue 2, in a size: same tokens however the cluster is cut."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from tests.cluster import oracle
from tests.cluster.harness import Cluster, Reply, body, complete_all

TEMPERATURE = 0.8
FILTERED = 40
"""A ``top_k`` that keeps the draws off the model's flat tail."""
SEED = 20_261_120


def run_greedy(
    cluster: Cluster, prompts: Sequence[Sequence[int]], *, num_tokens: int, concurrency: int
) -> list[list[int]]:
    """Greedy outputs of all prompts; every request must end normally."""
    requests = [body(prompt, max_tokens=num_tokens) for prompt in prompts]
    return _outputs(
        asyncio.run(complete_all(cluster, requests, concurrency=concurrency)), num_tokens
    )


def run_sampled(
    cluster: Cluster,
    prompts: Sequence[Sequence[int]],
    *,
    num_tokens: int,
    concurrency: int,
    top_k: int | None = None,
) -> list[list[int]]:
    """Seeded draws, from the whole vocabulary unless filtered; the seed differs by prompt."""
    filters = {} if top_k is None else {"top_k": top_k}
    requests = [
        body(prompt, max_tokens=num_tokens, temperature=TEMPERATURE, seed=SEED + i, **filters)
        for i, prompt in enumerate(prompts)
    ]
    return _outputs(
        asyncio.run(complete_all(cluster, requests, concurrency=concurrency)), num_tokens
    )


def _outputs(replies: Sequence[Reply], num_tokens: int) -> list[list[int]]:
    for reply in replies:
        assert reply.error is None, reply.error
        assert reply.finish_reason == "length"
        assert len(reply.token_ids) == num_tokens
    return [reply.token_ids for reply in replies]


def check_greedy(prompts: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]]) -> list[str]:
    """All against the oracle; returns the ties, of which there may be few."""
    ties = [
        tie
        for prompt, output in zip(prompts, outputs, strict=True)
        for tie in oracle.check_greedy(prompt, output)
    ]
    assert len(ties) <= oracle.MAX_TIES, ties
    return ties


def check_sampled(
    prompts: Sequence[Sequence[int]],
    outputs: Sequence[Sequence[int]],
    *,
    top_k: int | None = None,
) -> list[str]:
    """Every draw against the oracle's distribution; returns the ties, of which there may be few.

    Without a filter more than three: the oracle's logits differ from ours by about 1e-6, and with
    this small model one draw in a hundred lands in a tail so flat that several boundaries lie
    within a tie's width. One in a thousand then falls on the other side.
    """
    ties = [
        tie
        for i, (prompt, output) in enumerate(zip(prompts, outputs, strict=True))
        for tie in oracle.check_sampled(
            prompt, output, seed=SEED + i, temperature=TEMPERATURE, top_k=top_k
        )
    ]
    draws = sum(map(len, outputs))
    limit = oracle.MAX_TIES if top_k is not None else max(oracle.MAX_TIES, draws // 500)
    assert len(ties) <= limit, ties
    return ties


def same_draws(
    prompts: Sequence[Sequence[int]],
    first: Sequence[Sequence[int]],
    second: Sequence[Sequence[int]],
    *,
    top_k: int | None = None,
) -> list[str]:
    """Two runs that passed :func:`check_sampled` are equal; returns where a tie parted them."""
    ties = []
    for prompt, one, other in zip(prompts, first, second, strict=True):
        if list(one) != list(other):
            i = next(i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
            near = oracle.near_boundary(
                prompt,
                one[: i + 1],
                other[i],
                temperature=TEMPERATURE,
                top_k=top_k,
                seed=_seed(prompts, prompt),
            )
            where = f"prompt of {len(prompt)} tokens, output token {i}: {one[i]} and {other[i]}"
            assert near is not None, f"different draws: {where}"
            ties.append(f"{where}; {near}")
    return ties


def _seed(prompts: Sequence[Sequence[int]], prompt: Sequence[int]) -> int:
    return SEED + next(i for i, item in enumerate(prompts) if item is prompt)
