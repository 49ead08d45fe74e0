"""Cancels, kills, evictions and a full disk; half an hour of it: ``scripts/acceptance 4.6``."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.cluster.harness import assert_nothing_held, serving
from tests.cluster.soak import check, prompts, small_disk, soak, tiny_tiers


def test_soak(tmp_path: Path) -> None:
    asked = prompts(16)
    with (
        small_disk(tmp_path / "disk", 2) as disk,
        serving("--prefill", "1", "--decode", "1", settings=tiny_tiers(disk)) as cluster,
    ):
        result = asyncio.run(soak(cluster, asked, seconds=12.0, kill_every_s=1.0, seed=1))
        # Leases of those that were killed end by themselves.
        assert_nothing_held(cluster, within_s=20.0)
    check(asked, result)
    assert result.num_kills >= 2
    assert result.num_cancelled
    assert {"baton_pool_host_evictions", "baton_pool_disk_write_errors"} <= result.seen
