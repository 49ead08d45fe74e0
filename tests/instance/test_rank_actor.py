"""Ranks as Ray actors: they compute, die as one, and go with their driver."""

from __future__ import annotations

import os
import queue
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray.util.placement_group import placement_group_table

from baton.core.config import EngineConfig
from baton.core.errors import ConfigError, RankLost
from baton.engine.checkpoint import Checkpoint, open_checkpoint
from baton.engine.parallel.runner import RankedRunner
from baton.engine.plan import SequenceStep, SlotBegin, StepPlan
from baton.engine.runner import InlineRunner
from baton.instance import rank_actor
from baton.instance.rank_actor import RayRankLauncher
from tests.engine.parallel.parallel_kit import watched
from tests.engine.tiny_models import DENSE, GREEDY, save

PLAN = StepPlan(
    0, (SlotBegin(0, GREEDY, (5, 6, 7), ()),), (SequenceStep(0, 0, (5, 6, 7), (0,), sample=True),)
)
GONE_S = 5.0


def config(**ranks: Any) -> EngineConfig:
    return EngineConfig(block_size=4, num_blocks=8, max_num_seqs=4, **ranks)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, configure_logging=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("dense")
    save(folder, DENSE)
    return open_checkpoint(folder)


def groups() -> dict[str, dict[str, Any]]:
    """Placement groups that hold or wait for a place, by id."""
    table = placement_group_table()
    return {name: group for name, group in table.items() if group["state"] != "REMOVED"}


def test_ranks_compute_in_one_placement_group(checkpoint: Checkpoint) -> None:
    runner = RankedRunner(checkpoint, config(tp=2), launcher=RayRankLauncher())
    with watched(runner.pids) as left:
        try:
            (group,) = groups().values()
            assert group["strategy"] == "STRICT_PACK"
            assert len(group["bundles"]) == 2
            runner.warm_up()
            alone = InlineRunner(checkpoint, config())
            expected = alone.execute(PLAN).rows
            alone.close()
            assert runner.execute(PLAN).rows == expected
        finally:
            runner.close()
        assert not left(GONE_S)
    assert not groups()


def test_a_dead_rank_ends_the_others(checkpoint: Checkpoint) -> None:
    lost: queue.SimpleQueue[RankLost] = queue.SimpleQueue()
    runner = RankedRunner(
        checkpoint,
        config(tp=2),
        launcher=RayRankLauncher(),
        instance_id="decode-3",
        on_lost=lost.put,
    )
    with watched(runner.pids) as left:
        try:
            os.kill(runner.pids[1], signal.SIGKILL)
            message = lost.get(timeout=GONE_S).message
            assert message.startswith(f"rank 1 (tp 1, dp 0) of decode-3, pid {runner.pids[1]}, ")
            with pytest.raises(RankLost, match="rank 1"):
                runner.execute(PLAN)
            assert not left(GONE_S)
        finally:
            runner.close()


def test_a_dead_driver_ends_its_ranks(checkpoint: Checkpoint) -> None:
    class Driver:
        """An instance's process, as far as its ranks can tell. In here, it travels as it is."""

        def __init__(self, settings: EngineConfig) -> None:
            self._runner = RankedRunner(checkpoint, settings, launcher=RayRankLauncher())

        def pids(self) -> tuple[int, ...]:
            return (os.getpid(), *self._runner.pids)

    driver = ray.remote(num_cpus=0, max_restarts=0)(Driver).remote(config(tp=2))
    pids = ray.get(driver.pids.remote(), timeout=120)
    with watched(pids) as left:
        os.kill(pids[0], signal.SIGKILL)
        assert not left(GONE_S)


def test_no_room(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_actor, "_PLACE_TIMEOUT_S", 0.5)
    before = groups()
    with pytest.raises(ConfigError, match="no room for the 2 ranks"):
        RankedRunner(checkpoint, config(tp=2), launcher=RayRankLauncher(num_cpus=2))
    assert set(groups()) <= set(before)
