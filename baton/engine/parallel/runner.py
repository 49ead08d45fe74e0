"""Runners whose ranks are other processes. No torch here: it is theirs.

Plans go over a local socket to all ranks of their group; rank 0 of each group answers with the
result and the others with an empty frame, so that after a step all ranks have written their KV.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

from baton.core.config import EngineConfig
from baton.core.errors import ConfigError, RankLost
from baton.engine.checkpoint import Checkpoint
from baton.engine.memory import MemoryMap, fit_blocks
from baton.engine.models.config import kv_layout, resolve_max_model_len
from baton.engine.parallel.launch import RankLauncher
from baton.engine.parallel.mesh import Axes
from baton.engine.parallel.ranks import Meeting, Ranks
from baton.engine.parallel.spec import ArenaPart, RankSpec
from baton.engine.parallel.wire import (
    Kind,
    decode_maps,
    decode_needs,
    decode_result,
    encode_step,
    new_secret,
)
from baton.engine.plan import GroupPlan, GroupResult, StepPlan, StepResult
from kvpool.arena import BlockArena
from kvpool.layout import KVLayout

START_TIMEOUT_S = 600.0
STEP_TIMEOUT_S = 120.0
COLLECTIVE_TIMEOUT_S = 60.0


class _RankedRunner:
    """What both runners share.

    Args:
        checkpoint: opened here; each rank opens it again.
        config: with more ranks than one, or one that lives elsewhere.
        launcher: starts the ranks; owned: closed with the runner, also if this raises.
        arena: the instance's blocks, those of each dp group after those of the one before; it must
            be a file. Without it ranks allocate their own.
        instance_id: for errors.
        on_lost: called once, from some thread, when a rank is lost, also between steps.
        start_timeout_s: until all ranks have loaded their weights.
        step_timeout_s: for a step; a rank that does not answer by then is lost.
        collective_timeout_s: how far apart ranks may be within a step.

    Returns when all ranks have loaded. Raises ConfigError where the model cannot be cut as the
    settings say, ValueError for an arena that does not fit, RankLost where a rank does not start.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: EngineConfig,
        *,
        launcher: RankLauncher,
        arena: BlockArena | None = None,
        instance_id: str = "the engine",
        on_lost: Callable[[RankLost], None] | None = None,
        start_timeout_s: float = START_TIMEOUT_S,
        step_timeout_s: float = STEP_TIMEOUT_S,
        collective_timeout_s: float = COLLECTIVE_TIMEOUT_S,
    ) -> None:
        self.axes = axes = Axes(config.tp, config.ep, config.dp)
        self._config = config
        self._layout = kv_layout(checkpoint.config, config)
        self._max_len = resolve_max_model_len(checkpoint.config, config)
        try:
            num_blocks = config.num_blocks
            if num_blocks is None:
                raise ConfigError("several ranks need num_blocks to be given", param="num_blocks")
            if arena is not None:
                _check_arena(arena, self._layout, config.dp * num_blocks)
            meeting = Meeting(new_secret())
            specs = [
                RankSpec(
                    instance_id=instance_id,
                    rank=rank,
                    axes=axes,
                    model=str(checkpoint.path.absolute()),
                    engine=config,
                    socket_path=meeting.path,
                    secret=meeting.secret,
                    arena=_arena_part(arena, rank // axes.group_size * config.kv_blocks),
                    collective_timeout_s=collective_timeout_s,
                )
                for rank in range(axes.world_size)
            ]
            self._ranks = Ranks(
                specs,
                meeting,
                launcher,
                on_lost=on_lost,
                start_timeout_s=start_timeout_s,
                step_timeout_s=step_timeout_s,
            )
        except BaseException:
            launcher.close()
            raise

    @property
    def layout(self) -> KVLayout:
        """Shape of the instance's KV blocks."""
        return self._layout

    @property
    def pids(self) -> tuple[int, ...]:
        """Processes of the ranks, in order."""
        return self._ranks.pids

    def warm_up(self) -> None:
        """A few steps on scratch memory, by all ranks together."""
        self._ranks.call(Kind.WARM_UP, [b""] * self.axes.world_size)

    def fit(self) -> EngineConfig:
        """Profile all ranks together (which warms them up); see ``InlineRunner.fit``.

        Raises ConfigError where the memory of one is not enough for the settings.
        """
        answers = self._ranks.call(Kind.PROFILE, [b""] * self.axes.world_size)
        num_blocks = fit_blocks(list(map(decode_needs, answers)), self._config, self._max_len)
        return dataclasses.replace(self._config, num_blocks=num_blocks)

    def memory(self) -> list[MemoryMap]:
        """What memory is used for now: a map of each rank. From any thread, between steps."""
        answers = self._ranks.call(Kind.MEMORY, [b""] * self.axes.world_size)
        return [item for answer in answers for item in decode_maps(answer)]

    def close(self) -> None:
        """End all ranks. Bounded, idempotent."""
        self._ranks.close()

    def _step(self, plans: tuple[StepPlan | None, ...]) -> tuple[StepResult | None, ...]:
        tokens = tuple(0 if plan is None else plan.num_tokens for plan in plans)
        size = self.axes.group_size
        bodies = [body for plan in plans for body in [encode_step(plan, tokens)] * size]
        answers = self._ranks.call(Kind.STEP, bodies)
        return tuple(decode_result(answer) for answer in answers[::size])


class RankedRunner(_RankedRunner):
    """A ``Runner`` of step plans: one dp group. See ``_RankedRunner`` for the arguments."""

    def execute(self, plan: StepPlan) -> StepResult:
        """Have all ranks run the plan. Raises RankLost; then it is broken for good."""
        (result,) = self._step((plan,))
        assert result is not None
        return result


class RankedGroupRunner(_RankedRunner):
    """A ``Runner`` of group plans: several dp groups. See ``_RankedRunner`` for the arguments."""

    def execute(self, plan: GroupPlan) -> GroupResult:
        """Have each group run its plan, or take part idle. Raises as ``RankedRunner`` does."""
        started = time.perf_counter()
        results = self._step(plan.plans)
        return GroupResult(plan.step, results, time.perf_counter() - started)


def make_ranked_runner(
    checkpoint: Checkpoint,
    config: EngineConfig,
    *,
    launcher: RankLauncher,
    arena: BlockArena | None = None,
    instance_id: str = "the engine",
    on_lost: Callable[[RankLost], None] | None = None,
) -> RankedRunner | RankedGroupRunner:
    """The one that fits ``config.dp``. Arguments: see ``_RankedRunner``."""
    make = RankedRunner if config.dp == 1 else RankedGroupRunner
    return make(
        checkpoint,
        config,
        launcher=launcher,
        arena=arena,
        instance_id=instance_id,
        on_lost=on_lost,
    )


def _arena_part(arena: BlockArena | None, first_block: int) -> ArenaPart | None:
    if arena is None:
        return None
    assert arena.path is not None
    return ArenaPart(arena.path, arena.token, first_block)


def _check_arena(arena: BlockArena, layout: KVLayout, num_blocks: int) -> None:
    if arena.path is None:
        raise ValueError("ranks are other processes: they need an arena with a file")
    if (arena.num_blocks, arena.block_bytes) != (num_blocks, layout.block_bytes):
        raise ValueError(
            f"the arena has {arena.num_blocks} blocks of {arena.block_bytes} bytes; the ranks need "
            f"{num_blocks} of {layout.block_bytes}"
        )
