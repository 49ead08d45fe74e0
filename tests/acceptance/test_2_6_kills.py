"""Issue 2, line 6, in full: ``kill -9`` of each instance in turn under 16 streams."""

from __future__ import annotations

import asyncio

import pytest

from tests.cluster import oracle
from tests.cluster.harness import assert_nothing_held, serving
from tests.cluster.kills import MAX_SILENCE_S, kill_under_load

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(3000)]

SHAPES = {"2P2D": (2, 2), "1P1D": (1, 1)}


@pytest.mark.parametrize("shape", list(SHAPES))
def test_kill_each(shape: str) -> None:
    prefill, decode = SHAPES[shape]
    prompts = oracle.prompts(32)
    victims = [f"prefill-{i}" for i in range(prefill)] + [f"decode-{i}" for i in range(decode)]
    with serving("--prefill", str(prefill), "--decode", str(decode)) as cluster:
        load, lives = asyncio.run(
            kill_under_load(cluster, prompts, victims, num_tokens=128, concurrency=16)
        )
        assert_nothing_held(cluster, within_s=10.0)
    assert set(lives) == set(victims)
    assert all(after > before for before, after in lives.values())
    silence_s = max(reply.longest_gap_s for _, reply in load.replies)
    assert silence_s < MAX_SILENCE_S
    for reply in load.failed:
        assert reply.error is not None
        assert reply.error["code"] in {"unavailable", "instance_lost"}, reply.error
        assert reply.retryable in (True, None), reply.error
    if shape == "2P2D":
        assert not load.failed, "another instance of each role was there to go on"
    assert len(load.replies) - len(load.failed) >= 16
    ties = load.check_tokens(prompts, num_tokens=128)
    print(
        f"{shape}: {len(load.replies)} requests, {len(load.failed)} ended with a retryable error, "
        f"longest silence {silence_s:.2f} s, ties {ties}"
    )
