"""Issue 2, line 3, in full: each instance's role back and forth 20 times under 16 streams."""

from __future__ import annotations

import asyncio

import pytest

from tests.cluster import oracle
from tests.cluster.flips import flip_under_load
from tests.cluster.harness import assert_nothing_held, serving

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(3000)]


def test_twenty_switches_each() -> None:
    prompts = oracle.prompts(32)
    with serving("--prefill", "2", "--decode", "2") as cluster:
        load, flips = asyncio.run(
            flip_under_load(cluster, prompts, num_tokens=128, rounds=20, concurrency=16)
        )
        assert_nothing_held(cluster, within_s=5.0)
    assert flips == 20 * 2 * 4
    assert not load.failed, load.failed[0].error
    ties = load.check_tokens(prompts, num_tokens=128)
    print(f"{flips} switches, {len(load.replies)} requests, none failed, ties {ties}")
