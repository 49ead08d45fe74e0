"""Issue 4, line 6, in full: half an hour of cancels, kills, evictions and a full disk."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.cluster.harness import assert_nothing_held, serving
from tests.cluster.soak import check, prompts, small_disk, soak, tiny_tiers

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(3600)]

SECONDS = 1800.0
SHAPE = ("--prefill", "2", "--decode", "2")


def test_soak(tmp_path: Path) -> None:
    asked = prompts(40)
    with (
        small_disk(tmp_path / "disk", 6) as disk,
        serving(*SHAPE, settings=tiny_tiers(disk)) as cluster,
    ):
        result = asyncio.run(soak(cluster, asked, seconds=SECONDS, kill_every_s=15.0, seed=1))
        # Leases of those that were killed end by themselves.
        assert_nothing_held(cluster, within_s=20.0)
    check(asked, result)
    assert {"baton_pool_host_evictions", "baton_pool_disk_write_errors"} <= result.seen
    half = len(result.memory) // 2
    early = sorted(m for _, m in result.memory[half // 2 : half])
    late = sorted(m for _, m in result.memory[-half // 2 :])
    growth = late[len(late) // 2] / early[len(early) // 2]
    print(
        f"{result.num_finished} requests, {result.num_cancelled} cancelled, "
        f"{len(result.errors)} retryable errors, {result.num_kills} kills, memory x{growth:.3f}"
    )
    assert growth < 1.05, result.memory
