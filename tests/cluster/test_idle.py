"""An idle cluster sleeps (acceptance 2.10 measures 30 s and reports each process)."""

from __future__ import annotations

from tests.cluster.harness import Cluster
from tests.cluster.idle import IDLE_LIMIT, measure_idle


def test_idle_cpu(pair: Cluster) -> None:
    usage = measure_idle(pair, seconds=10.0)
    assert sum(item.cpu for item in usage) < IDLE_LIMIT, usage
    assert all(item.rss_bytes > 0 for item in usage)
