"""Instances die under load (short form of acceptance 2.6: two of them; the full form kills all)."""

from __future__ import annotations

import asyncio

from tests.cluster import oracle
from tests.cluster.harness import Cluster, assert_nothing_held
from tests.cluster.kills import MAX_SILENCE_S, kill_under_load


def test_killed_instances_cost_nobody_more_than_a_moment(two_pairs: Cluster) -> None:
    prompts = oracle.prompts(16, longest=600)
    load, lives = asyncio.run(
        kill_under_load(
            two_pairs, prompts, ["decode-0", "prefill-1"], num_tokens=96, concurrency=16
        )
    )
    for instance_id, (before, after) in lives.items():
        assert after > before, f"{instance_id} came back as {after}, was {before}"
    for _, reply in load.replies:
        assert reply.longest_gap_s < MAX_SILENCE_S
        if reply.error is not None:
            assert reply.error["code"] in {"unavailable", "instance_lost"}, reply.error
            assert reply.retryable in (True, None), reply.error
    finished = [reply for _, reply in load.replies if reply.error is None]
    assert len(finished) > len(load.replies) * 0.9, (len(finished), len(load.replies))
    load.check_tokens(prompts, num_tokens=96)
    assert_nothing_held(two_pairs, within_s=10.0)
