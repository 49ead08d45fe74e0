"""More requests than memory: caches so small that most of the load waits or is preempted."""

from __future__ import annotations

import asyncio

import pytest

from tests.cluster import oracle, tokens
from tests.cluster.harness import assert_nothing_held, body, complete_all, serving

SHAPES = {
    "1P1D": ("--prefill", "1", "--decode", "1"),
    "2 mixed": ("--prefill", "0", "--decode", "0", "--mixed", "2"),
}
TINY = {"engine": {"num_blocks": 128, "max_num_seqs": 16}}
"""2,048 tokens per instance: about three of the prompts below."""


@pytest.mark.parametrize("shape", list(SHAPES))
def test_everything_ends_and_is_right(shape: str) -> None:
    ids = oracle.corpus()
    prompts = [ids[i * 700 : i * 700 + 300 + (i * 37) % 400] for i in range(32)]
    requests = [body(prompt, max_tokens=64) for prompt in prompts]
    with serving(*SHAPES[shape], settings=TINY) as cluster:
        replies = asyncio.run(complete_all(cluster, requests, concurrency=len(requests)))
        assert [reply.error for reply in replies if reply.error] == []
        assert_nothing_held(cluster, within_s=5.0)
    tokens.check_greedy(prompts, [reply.token_ids for reply in replies])
    assert max(reply.longest_gap_s for reply in replies) < 60.0
