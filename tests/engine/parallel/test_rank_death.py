"""A rank or its driver dies: the error names it, and no process stays behind."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import os
import queue
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from baton.core.config import EngineConfig
from baton.core.errors import ConfigError, RankLost
from baton.engine.checkpoint import Checkpoint, open_checkpoint
from baton.engine.parallel.launch import ProcessLauncher, ProcessRank
from baton.engine.parallel.ranks import Meeting
from baton.engine.parallel.runner import RankedRunner
from baton.engine.parallel.spec import RankSpec
from baton.engine.plan import SequenceStep, SlotBegin, StepPlan
from tests.engine.parallel.parallel_kit import watched
from tests.engine.tiny_models import DENSE, GREEDY, save

SETTINGS = EngineConfig(block_size=4, num_blocks=24, max_num_seqs=4, tp=2)
PLAN = StepPlan(
    0, (SlotBegin(0, GREEDY, (5, 6, 7), ()),), (SequenceStep(0, 0, (5, 6, 7), (0,), sample=True),)
)
GONE_S = 5.0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("dense")
    save(folder, DENSE)
    return open_checkpoint(folder)


class Started:
    """A runner, and what it says of lost ranks."""

    def __init__(self, checkpoint: Checkpoint, **options: Any) -> None:
        self.lost: queue.SimpleQueue[RankLost] = queue.SimpleQueue()
        self.runner = RankedRunner(
            checkpoint,
            SETTINGS,
            launcher=ProcessLauncher(),
            instance_id="decode-3",
            on_lost=self.lost.put,
            **options,
        )


@contextlib.contextmanager
def started(checkpoint: Checkpoint, **options: Any) -> Iterator[Started]:
    made = Started(checkpoint, **options)
    try:
        with watched(made.runner.pids) as left:
            yield made
            assert not left(GONE_S), "a rank is still there"
    finally:
        made.runner.close()


def name_of(rank: int, runner: RankedRunner) -> str:
    return re.escape(f"rank {rank} (tp {rank}, dp 0) of decode-3, pid {runner.pids[rank]}, ")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_is_killed_between_steps(checkpoint: Checkpoint, rank: int) -> None:
    """It is noticed although nothing is asked, and every later step says the same."""
    with started(checkpoint) as made:
        runner = made.runner
        runner.execute(PLAN)
        os.kill(runner.pids[rank], signal.SIGKILL)
        lost = made.lost.get(timeout=GONE_S)
        assert re.match(name_of(rank, runner) + "was killed by SIGKILL", lost.message)
        assert lost.retryable
        for _ in range(2):
            with pytest.raises(RankLost, match=re.escape(lost.message)):
                runner.execute(PLAN)
        with pytest.raises(RankLost, match=re.escape(lost.message)):
            runner.warm_up()
        assert made.lost.empty()


def test_a_rank_is_killed_while_the_others_wait_for_it(checkpoint: Checkpoint) -> None:
    """The others complain of a lost peer at the same moment; the one that is dead is named."""
    with started(checkpoint) as made, concurrent.futures.ThreadPoolExecutor(1) as pool:
        runner = made.runner
        os.kill(runner.pids[1], signal.SIGSTOP)
        step = pool.submit(runner.execute, PLAN)
        with pytest.raises(concurrent.futures.TimeoutError):
            step.result(0.5)
        os.kill(runner.pids[1], signal.SIGKILL)
        with pytest.raises(RankLost, match=name_of(1, runner)):
            step.result(GONE_S)
        assert "rank 1" in made.lost.get(timeout=GONE_S).message


def test_a_frozen_rank(checkpoint: Checkpoint) -> None:
    """Its peer waits no longer than agreed; the instance is then ended, the frozen one too."""
    with started(checkpoint, collective_timeout_s=2.0) as made:
        os.kill(made.runner.pids[1], signal.SIGSTOP)
        with pytest.raises(RankLost, match=r"rank 1 \(tp 1, dp 0\) does not take part"):
            made.runner.execute(PLAN)


def test_ranks_that_do_not_answer(checkpoint: Checkpoint) -> None:
    with started(checkpoint, step_timeout_s=1.0) as made:
        for pid in made.runner.pids:
            os.kill(pid, signal.SIGSTOP)
        with pytest.raises(RankLost, match="does not answer, nor does rank 1"):
            made.runner.execute(PLAN)


def test_a_rank_that_raises(checkpoint: Checkpoint) -> None:
    """Its peers may be at any collective: the instance ends, and the error says who and what."""
    with started(checkpoint) as made:
        row = SequenceStep(77, 0, (5,), (0,), sample=True)
        with pytest.raises(RankLost, match=r"rank [01] \(.*\) of decode-3, pid \d+, failed: ") as e:
            made.runner.execute(StepPlan(0, (), (row,)))
        with pytest.raises(RankLost, match=re.escape(e.value.message)):
            made.runner.execute(PLAN)


DRIVER = """
import sys
from baton.core.config import EngineConfig
from baton.engine.checkpoint import open_checkpoint
from baton.engine.parallel.launch import ProcessLauncher
from baton.engine.parallel.runner import RankedRunner
config = EngineConfig(block_size=4, num_blocks=24, max_num_seqs=4, tp=2)
runner = RankedRunner(open_checkpoint(sys.argv[1]), config, launcher=ProcessLauncher())
assert "torch" not in sys.modules
print(*runner.pids, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("how", ["killed", "ended without a word", "frozen ranks"])
def test_the_driver_ends(checkpoint: Checkpoint, how: str) -> None:
    command = [sys.executable, "-c", DRIVER, str(checkpoint.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as driver:
        assert driver.stdin is not None
        assert driver.stdout is not None
        pids = tuple(map(int, driver.stdout.readline().split()))
        assert len(pids) == 2
        with watched(pids) as left:
            assert left(0.0) == set(pids)
            if how == "frozen ranks":
                # They cannot see the socket; the kernel ends them with their parent.
                for pid in pids:
                    os.kill(pid, signal.SIGSTOP)
            if how == "ended without a word":
                driver.stdin.close()
            else:
                driver.kill()
            driver.wait(GONE_S)
            assert not left(GONE_S)


class Dying(ProcessLauncher):
    """Its second rank dies before it can say anything."""

    def start(self, spec: RankSpec) -> ProcessRank:
        rank = super().start(spec)
        if spec.rank == 1:
            rank.kill()
        return rank


def test_a_rank_dies_at_its_start(checkpoint: Checkpoint) -> None:
    with pytest.raises(RankLost, match=r"rank 1 \(tp 1, dp 0\) of the engine.* killed by SIGKILL"):
        RankedRunner(checkpoint, SETTINGS, launcher=Dying())


def test_ranks_that_do_not_come_in_time(checkpoint: Checkpoint) -> None:
    with pytest.raises(RankLost, match="did not start in time"):
        RankedRunner(checkpoint, SETTINGS, launcher=ProcessLauncher(), start_timeout_s=0.0)


def test_what_a_rank_refuses_is_told_as_it_is(checkpoint: Checkpoint, tmp_path: Path) -> None:
    moved = dataclasses.replace(checkpoint, path=tmp_path / "moved")
    with pytest.raises(ConfigError, match="moved: there is no such folder"):
        RankedRunner(moved, SETTINGS, launcher=ProcessLauncher())


def test_a_closed_launcher_starts_nothing(checkpoint: Checkpoint) -> None:
    launcher = ProcessLauncher()
    launcher.close()
    launcher.close()
    with pytest.raises(RankLost, match="closed"):
        RankedRunner(checkpoint, SETTINGS, launcher=launcher)


def test_a_temporary_folder_with_a_long_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    with pytest.raises(ConfigError, match="TMPDIR"):
        Meeting(b"")
    assert not list(deep.iterdir())
