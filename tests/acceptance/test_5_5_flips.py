"""Issue 5, line 5, in full: a thousand flips, roles at rest, and a queue that grows unseen.

Each prints what it found.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from baton.core.slo import Slo
from tests.cluster import oracle, planner_load
from tests.cluster.emulated_kit import asks, emulated_cluster
from tests.cluster.flip_storm import check_tokens, storm_on_emulated, storm_on_model
from tests.cluster.harness import assert_nothing_held, metrics, serving
from tests.simulator import planner_runs as runs

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(3600)]

NUM_SIDE = 4


def test_a_thousand_flips_on_emulated_instances(tmp_path: Path) -> None:
    requests = asks(400, prompt=600, output=60, seed=1)
    sizes = ("--prefill", str(NUM_SIDE), "--decode", str(NUM_SIDE))
    with emulated_cluster(tmp_path, sizes) as cluster:
        storm = asyncio.run(
            storm_on_emulated(cluster, requests, flips=1000, concurrency=24, seed=2)
        )
        faults = [
            metrics(item.metrics_address)["baton_emulated_faults_total"]
            for item in cluster.live_instances()
        ]
        assert_nothing_held(cluster, within_s=20.0)
    print(storm.describe())
    assert (storm.num_flips, len(storm.seconds), len(storm.names)) == (1000, 1000, 8)
    assert len(storm.kinds) == 6
    assert not any(faults)


def test_a_hundred_flips_on_the_real_engine() -> None:
    prompts = oracle.prompts(24, longest=900)
    with serving("--prefill", "2", "--decode", "2") as cluster:
        storm, load = asyncio.run(
            storm_on_model(cluster, prompts, flips=100, num_tokens=48, concurrency=12, seed=3)
        )
        assert_nothing_held(cluster, within_s=10.0)
    ties = check_tokens(load, prompts, num_tokens=48)
    print(storm.describe(), "ties", ties)
    assert (storm.num_flips, len(storm.seconds), len(storm.names)) == (100, 100, 4)
    assert len(storm.kinds) == 6


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("prompt", "output"), [(2000, 30), (1000, 200), (300, 400)])
@pytest.mark.parametrize("rate", [5.0, 10.0, 20.0])
def test_roles_rest_under_a_steady_load_in_simulation(
    rate: float, prompt: int, output: int, seed: int
) -> None:
    """Ten virtual minutes."""
    trace = runs.poisson(rate, 600.0, prompt, output, seed)
    fleet = runs.run(trace, Slo(1.0, 0.05))
    flips = runs.flips_of(fleet)
    back = runs.returns(flips, runs.start_roles())
    print(f"attainment {runs.attained(fleet):.3f}, {len(flips)} flips", *flips, *back, sep="\n")
    assert runs.shortest_gap_s(flips) >= runs.COOLDOWN_S
    assert not back


def test_roles_rest_under_a_steady_load_on_a_cluster(tmp_path: Path) -> None:
    with planner_load.planned_cluster(tmp_path, NUM_SIDE) as cluster:
        run = asyncio.run(planner_load.send(cluster, planner_load.steady(6.0, 120.0, seed=1)))
    print(f"attainment {run.attained(0.0, 120.0):.3f}", run.describe(), sep="\n")
    assert run.shortest_gap_s() >= planner_load.COOLDOWN_S
    assert not run.returns()


@pytest.mark.parametrize("seed", range(3))
def test_a_queue_that_grows_unseen_is_answered_in_simulation(seed: int) -> None:
    trace = runs.hidden_shift(8.5, seed=10 * seed)
    attained = []
    for frozen in (True, False):
        fleet = runs.run(trace, runs.SHIFT_SLO, frozen=frozen, cooldown_s=5.0)
        attained.append(runs.attained(fleet, runs.late))
        seen = runs.attained(fleet, runs.ended_soon_after)
        print(
            f"frozen {frozen}: of those that ended in the first ten seconds {seen:.3f} were well; "
            f"late attainment {attained[-1]:.3f}, {len(runs.flips_of(fleet))} flips"
        )
        assert seen > 0.9
    assert attained[1] >= 0.85
    assert attained[0] < attained[1] - 0.2


def test_a_queue_that_grows_unseen_is_answered_on_a_cluster(tmp_path: Path) -> None:
    before_s, after_s = 10.0, 50.0
    load = planner_load.shift(7.2, before_s, after_s, seed=3)
    attained = []
    for frozen in (True, False):
        with planner_load.planned_cluster(tmp_path, NUM_SIDE, frozen=frozen) as cluster:
            run = asyncio.run(planner_load.send(cluster, load))
        seen = run.ended_well(before_s, before_s + 3.0)
        attained.append(run.attained(before_s + after_s / 2, before_s + after_s))
        print(
            f"frozen {frozen}: of those that ended in the first three seconds {seen:.3f} were "
            f"well; late attainment {attained[-1]:.3f}",
            run.describe(),
            sep="\n",
        )
        assert seen > 0.9
    assert attained[1] >= 0.8
    assert attained[0] < attained[1] - 0.2
