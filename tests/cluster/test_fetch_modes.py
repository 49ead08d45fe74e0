"""Fetch or recompute on a running cluster: same tokens whatever is decided, and who decides it.

How fast each is: ``python -m benchmarks.kv_fetch_rule``.
"""

from __future__ import annotations

import pytest

from tests.cluster import oracle
from tests.cluster.harness import Cluster, assert_nothing_held, metrics, serving
from tests.cluster.pool_kit import ask, settle

ONE = ("--prefill", "0", "--decode", "0", "--mixed", "1")


def num_fetches(cluster: Cluster, outcome: str) -> float:
    """Prefixes of which this became, as the instance counts."""
    (instance,) = cluster.live_instances()
    return metrics(instance.metrics_address)[f"baton_kv_fetches_total{{outcome={outcome}}}"]


@pytest.mark.parametrize("fetch", ["auto", "always", "never"])
def test_all_modes_give_the_same_tokens(fetch: str) -> None:
    settings = {
        # The longest of the prompts fills the instance's own cache.
        "engine": {"num_blocks": 64},
        "pool": {"write_back": "all", "fetch": fetch},
    }
    ids = oracle.corpus()
    prompts = [ids[2000 * i : 2000 * i + length] for i, length in enumerate((900, 400, 850))]
    with serving(*ONE, settings=settings) as cluster:
        assert ask(cluster, prompts) == [{}] * 3
        settle(cluster)
        found = ask(cluster, prompts) + ask(cluster, prompts)
        asked, not_asked = (num_fetches(cluster, what) for what in ("asked", "not_asked"))
        num_prompts = 3 * len(prompts)
        if fetch == "never":
            assert not any(tiers.get("host") for tiers in found)
            assert not_asked == num_prompts
        elif fetch == "always":
            assert all(tiers.get("host") for tiers in found)
            assert asked == num_prompts
        else:
            assert asked + not_asked == num_prompts
            assert asked > 0, "before anything is known, a hit is believed in"
        settle(cluster)
        assert_nothing_held(cluster, within_s=10.0)
