"""A storm of cancels leaves nothing behind (acceptance 2.5; the full form fits here)."""

from __future__ import annotations

import asyncio

from tests.cluster import oracle
from tests.cluster.harness import Cluster, assert_nothing_held, body, complete_all
from tests.cluster.storm import cancel_storm

COUNT = 500
STEP_AND_A_SECOND_S = 1.5
"""A step of the demo model takes well under half a second."""


def test_cancel_storm(pair: Cluster) -> None:
    prompts = oracle.prompts(24, longest=1000)
    ends = asyncio.run(cancel_storm(pair, prompts, count=COUNT, concurrency=48, seed=3))
    assert len(ends) == COUNT
    for kind in ("disconnect", "cancel", "deadline"):
        cut = [end for end in ends if end.kind == kind and end.cut]
        assert len(cut) > COUNT // 6, f"only {len(cut)} ended by {kind}"
        assert sum(0 < end.num_tokens < 400 for end in cut) > len(cut) // 4, "cut in mid-stream"
    assert_nothing_held(pair, within_s=STEP_AND_A_SECOND_S)
    [reply] = asyncio.run(complete_all(pair, [body(prompts[5], max_tokens=16)], concurrency=1))
    assert reply.error is None
    assert len(oracle.check_greedy(prompts[5], reply.token_ids)) <= 1
