"""Issue 2, line 10: the idle demo cluster over 30 s, and each process's memory."""

from __future__ import annotations

import pytest

from tests.cluster.harness import serving
from tests.cluster.idle import IDLE_LIMIT, measure_idle

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(600)]


def test_idle() -> None:
    with serving("--prefill", "1", "--decode", "1") as cluster:
        usage = measure_idle(cluster, seconds=30.0)
    total = sum(item.cpu for item in usage)
    for item in usage:
        print(f"{item.cpu:7.2%} {item.rss_bytes / 2**20:7.0f} MiB  {item.name}")
    print(f"{total:7.2%} {sum(i.rss_bytes for i in usage) / 2**20:7.0f} MiB  all")
    assert total < IDLE_LIMIT
