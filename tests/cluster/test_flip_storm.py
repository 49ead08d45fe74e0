"""Roles that switch all the time, or as the planner wants (short form of acceptance 5.5)."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.cluster import planner_load
from tests.cluster.emulated_kit import asks, emulated_cluster
from tests.cluster.flip_storm import storm_on_emulated
from tests.cluster.harness import assert_nothing_held, metrics


def test_no_token_is_lost_in_a_storm_of_flips(tmp_path: Path) -> None:
    requests = asks(60, prompt=400, output=40, seed=1)
    sizes = ("--prefill", "2", "--decode", "2")
    with emulated_cluster(tmp_path, sizes) as cluster:
        storm = asyncio.run(storm_on_emulated(cluster, requests, flips=40, concurrency=16, seed=2))
        faults = [
            metrics(item.metrics_address)["baton_emulated_faults_total"]
            for item in cluster.live_instances()
        ]
        assert_nothing_held(cluster, within_s=10.0)
    assert (storm.num_flips, len(storm.seconds), len(storm.names)) == (40, 40, 4)
    assert len(storm.kinds) == 6, "every role became every other"
    assert storm.num_replies >= 10
    assert not any(faults)


def test_the_planner_rests_and_then_answers_a_shift(tmp_path: Path) -> None:
    with planner_load.planned_cluster(tmp_path, 2) as cluster:
        quiet = asyncio.run(planner_load.send(cluster, planner_load.steady(3.8, 8.0, seed=1)))
        assert quiet.shortest_gap_s() >= planner_load.COOLDOWN_S - 0.1, quiet.describe()
        assert not quiet.returns(), quiet.describe()
        moved = asyncio.run(planner_load.send(cluster, planner_load.shift(3.8, 1.0, 17.0, seed=3)))
        assert_nothing_held(cluster, within_s=10.0)
    assert moved.flips
    assert moved.attained(11.0, 18.0) > 0.5, moved.describe()
