"""Several rank processes against one runner in this process, on tiny models."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from baton.core.config import EngineConfig
from baton.core.errors import RankLost
from baton.engine.checkpoint import open_checkpoint
from baton.engine.models.config import kv_layout
from baton.engine.parallel.launch import ProcessLauncher
from baton.engine.parallel.runner import RankedGroupRunner, RankedRunner, make_ranked_runner
from baton.engine.plan import (
    GroupPlan,
    GroupResult,
    RowResult,
    SequenceStep,
    SlotBegin,
    StepPlan,
    StepResult,
)
from baton.engine.runner import InlineRunner
from kvpool.arena import BlockArena
from tests.engine.parallel.parallel_kit import watched
from tests.engine.tiny_models import DENSE, GREEDY, MOE, save

torch.set_num_threads(1)

PROMPTS = ((5, 17, 3, 88, 41, 2, 9), (60, 61, 62), (90, 1, 44, 23, 7, 7, 12, 31, 50, 4, 4))
STEPS = 8
BLOCKS_EACH = 6


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {name: tmp_path_factory.mktemp(name) for name in ("dense", "moe")}
    # More experts than ranks, and a number that they do not divide.
    save(folders["moe"], MOE | {"num_experts": 7})
    save(folders["dense"], DENSE)
    return folders


def config(**ranks: Any) -> EngineConfig:
    return EngineConfig(block_size=4, num_blocks=24, max_num_seqs=4, **ranks)


class Sequences:
    """Plans for sequences that prefill in two chunks and then decode greedily."""

    def __init__(self, prompts: Sequence[Sequence[int]]) -> None:
        self.prompts = [tuple(prompt) for prompt in prompts]
        self.outputs: list[list[int]] = [[] for _ in prompts]

    def plan(self, step: int) -> StepPlan | None:
        begins, rows = [], []
        for slot, prompt in enumerate(self.prompts):
            table = tuple(reversed(range(slot * BLOCKS_EACH, (slot + 1) * BLOCKS_EACH)))
            if step == 0:
                begins.append(SlotBegin(slot, GREEDY, prompt, ()))
                rows.append(SequenceStep(slot, 0, prompt[:2], table, sample=False))
            elif step == 1:
                rows.append(SequenceStep(slot, 2, prompt[2:], table, sample=True))
            else:
                rows.append(SequenceStep(slot, len(prompt) + step - 2, None, table, sample=True))
        return StepPlan(step, tuple(begins), tuple(rows)) if rows else None

    def take(self, rows: tuple[RowResult, ...]) -> None:
        for output, row in zip(self.outputs, rows, strict=True):
            output.extend([] if row.token_id is None else [row.token_id])


def generate(runner: InlineRunner | RankedRunner, prompts: Sequence[Sequence[int]]) -> Any:
    sequences = Sequences(prompts)
    for step in range(STEPS):
        plan = sequences.plan(step)
        assert plan is not None
        result = runner.execute(plan)
        assert isinstance(result, StepResult)
        assert result.step == step
        sequences.take(result.rows)
    return sequences.outputs


def expected(folder: Path, prompts: Sequence[Sequence[int]]) -> Any:
    runner = InlineRunner(open_checkpoint(folder), config())
    try:
        return generate(runner, prompts)
    finally:
        runner.close()


CUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense tp 2": ("dense", {"tp": 2}),
    "moe tp 2": ("moe", {"tp": 2}),
    "moe ep 2": ("moe", {"ep": 2}),
    "moe tp 2 ep 2": ("moe", {"tp": 2, "ep": 2}),
}


@pytest.mark.parametrize(("name", "ranks"), CUTS.values(), ids=CUTS)
def test_one_group(models: dict[str, Path], name: str, ranks: dict[str, Any]) -> None:
    checkpoint = open_checkpoint(models[name])
    runner = make_ranked_runner(checkpoint, config(**ranks), launcher=ProcessLauncher())
    assert isinstance(runner, RankedRunner)
    with watched(runner.pids) as left:
        try:
            runner.warm_up()
            assert generate(runner, PROMPTS) == expected(models[name], PROMPTS)
            assert runner.layout == kv_layout(checkpoint.config, config(**ranks))
        finally:
            runner.close()
        assert not left(5.0)
    runner.close()
    with pytest.raises(RankLost, match="closed"):
        generate(runner, PROMPTS)


GROUPS: dict[str, dict[str, Any]] = {
    "dp 2 ep 2": {"dp": 2, "ep": 2},
    "dp 2 ep 2 all-gather": {"dp": 2, "ep": 2, "exchange": "all_gather"},
    "dp 2": {"dp": 2},
    "dp 2 tp 2 ep 4": {"dp": 2, "tp": 2, "ep": 4, "exchange": "all_to_all"},
}


@pytest.mark.parametrize("ranks", GROUPS.values(), ids=GROUPS)
def test_groups_with_loads_of_their_own(models: dict[str, Path], ranks: dict[str, Any]) -> None:
    """Group 1 begins later and ends earlier than group 0, and then takes part idle."""
    checkpoint = open_checkpoint(models["moe"])
    runner = make_ranked_runner(checkpoint, config(**ranks), launcher=ProcessLauncher())
    assert isinstance(runner, RankedGroupRunner)
    groups = (Sequences(PROMPTS[:2]), Sequences(PROMPTS[2:]))
    try:
        runner.warm_up()
        for step in range(STEPS):
            late = groups[1].plan(step - 2) if 2 <= step < STEPS - 1 else None
            result = runner.execute(GroupPlan(step, (groups[0].plan(step), late)))
            assert isinstance(result, GroupResult)
            assert (result.step, result.results[1] is None) == (step, late is None)
            for group, own in zip(groups, result.results, strict=True):
                if own is not None:
                    group.take(own.rows)
    finally:
        runner.close()
    whole = expected(models["moe"], PROMPTS)
    assert groups[0].outputs == whole[:2]
    assert groups[1].outputs == [whole[2][: STEPS - 4]]


def test_ranks_write_to_the_arena(models: dict[str, Path], tmp_path: Path) -> None:
    """Each group in its part, each rank of a group in its shard of the group's blocks."""
    checkpoint = open_checkpoint(models["moe"])
    contents: list[torch.Tensor] = []
    for ranks in ({"dp": 2}, {"dp": 2, "tp": 2, "ep": 4}):
        settings = config(**ranks)
        layout = kv_layout(checkpoint.config, settings)
        arena = BlockArena.create(
            tmp_path, "test", "arena", len(contents), os.getpid(), 48, layout.block_bytes, "test"
        )
        runner = RankedGroupRunner(checkpoint, settings, launcher=ProcessLauncher(), arena=arena)
        try:
            plan = Sequences(PROMPTS[2:]).plan(0)
            runner.execute(GroupPlan(0, (None, plan)))
        finally:
            runner.close()
        blocks = [torch.frombuffer(arena.block(i), dtype=torch.float32) for i in range(48)]
        written = [i for i, block in enumerate(blocks) if block.any()]
        assert written == [24 + BLOCKS_EACH - 1]
        # Its shards lie one after the other; of one, heads are the last axis but one.
        shape = (layout.num_shards, layout.num_layers, 2, 4, layout.num_kv_heads, layout.head_dim)
        contents.append(blocks[written[0]].view(shape).movedim(0, 3).reshape(3, 2, 4, 2, -1))
        del blocks
        arena.close()
    torch.testing.assert_close(contents[0], contents[1], atol=1e-5, rtol=1e-5)


def test_an_arena_that_does_not_fit(models: dict[str, Path]) -> None:
    checkpoint = open_checkpoint(models["dense"])
    with pytest.raises(ValueError, match="a file"):
        RankedRunner(
            checkpoint,
            config(tp=2),
            launcher=ProcessLauncher(),
            arena=BlockArena.private(24, 64, "test"),
        )
