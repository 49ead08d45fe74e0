"""Several dp groups of ranks as one engine: which group takes a sequence, one plan for all.

Each group is an ``Engine`` with sequences, scheduler and KV blocks of its own, and a sequence
stays in the group that took it. All groups step together, because with data-parallel attention
their tokens meet in the experts; one that has nothing to compute takes part idle.

The instance's arena holds the blocks of all groups, one group after the other: block b of group d
is block ``d * num_blocks + b`` of the arena. Plans speak of a group's own blocks, because each
rank maps only these; events speak of the arena's, because whoever copies blocks maps all of it.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, deque
from collections.abc import Iterable
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from baton.core.blocks import BlockKey
from baton.core.cluster import InstanceLoad
from baton.core.config import EngineConfig
from baton.core.cost_model import CostModel
from baton.core.request import Part, Submission
from baton.engine.block_manager import BlockStatistics
from baton.engine.engine import Engine
from baton.engine.events import Event, PrefillProgress, PrefixComplete, Reserved
from baton.engine.interface import StepEngine, check_result
from baton.engine.plan import GroupPlan, GroupResult
from baton.engine.states import SequenceState

_Counts = TypeVar("_Counts", InstanceLoad, BlockStatistics)


def make_engine(
    config: EngineConfig,
    *,
    max_model_len: int,
    salt: bytes,
    generations: npt.NDArray[np.uint64] | None = None,
    track_cache: bool = False,
) -> StepEngine[Any, Any]:
    """An ``Engine`` where ``config.dp`` is 1, else an ``EngineGroup``. Arguments: see there."""
    make = Engine if config.dp == 1 else EngineGroup
    return make(
        config,
        max_model_len=max_model_len,
        salt=salt,
        generations=generations,
        track_cache=track_cache,
    )


class EngineGroup:
    """``config.dp`` engines behind the surface of one: see ``Engine`` for what each call does.

    ``config.num_blocks``, ``max_num_seqs`` and ``max_num_batched_tokens`` are of each group.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        max_model_len: int,
        salt: bytes,
        generations: npt.NDArray[np.uint64] | None = None,
        track_cache: bool = False,
    ) -> None:
        """``salt``: root of all block keys, at most 64 bytes. ``track_cache``: see ``Engine``.

        ``generations``: [dp * num_blocks], uint64; each group raises entries of its own slice.
        """
        total = config.dp * config.kv_blocks
        if generations is None:
            generations = np.zeros(total, dtype=np.uint64)
        if generations.shape != (total,):
            raise ValueError(f"generations must be of shape ({total},), not {generations.shape}")
        self.config = config
        self._engines = tuple(
            Engine(
                config,
                max_model_len=max_model_len,
                salt=salt,
                generations=own,
                track_cache=track_cache,
            )
            for own in np.split(generations, config.dp)
        )
        self.max_model_len = self._engines[0].max_model_len
        self._plans: deque[GroupPlan] = deque()
        """Uncommitted ones."""
        self._max_plans = 2 if config.async_scheduling else 1
        self._num_planned = 0
        self._num_steps = 0

    def set_cost_model(self, model: CostModel | None) -> None:
        """See ``Engine``."""
        for engine in self._engines:
            engine.set_cost_model(model)

    # Submissions.

    def submit(
        self,
        submission: Submission,
        part: Part,
        now: float,
        *,
        keys: Iterable[BlockKey] = (),
        fetch: bool = False,
    ) -> None:
        """Take a submission on, in the group that has least left to do with it.

        Of several, in the one with the least tokens to compute and to attend to; of several still,
        in the first. Raises Refused and InvalidRequest as ``Engine.submit`` does.
        """
        holder = self._holder(submission.request_id)
        if holder is not None or submission.num_tokens >= self.max_model_len:
            # Refused there, before its prompt is hashed for nothing.
            (holder or self._engines[0]).submit(submission, part, now)
            return
        found = list(keys) or self.prefix_keys(submission)
        self._choose(found).submit(submission, part, now, keys=found, fetch=fetch)

    def prefix_keys(self, submission: Submission) -> list[BlockKey]:
        """Keys of the leading blocks that a lookup for ``submission`` may find."""
        return self._engines[0].prefix_keys(submission)

    def num_cached_blocks(self, keys: list[BlockKey]) -> int:
        """Length of the longest cached prefix in the group that would take these."""
        return self._choose(keys).num_cached_blocks(keys)

    def cached_keys(self) -> list[BlockKey]:
        """Keys of what any group has cached, a parent before its children."""
        return list(dict.fromkeys(key for engine in self._engines for key in engine.cached_keys()))

    def _choose(self, keys: list[BlockKey]) -> Engine:
        """Where the least is left to do: what is open there, less what this one finds cached.

        Not the longest prefix alone: that would send everybody with one system prompt to one
        group. ``min`` takes the first of equals.
        """
        size = self.config.block_size
        return min(
            self._engines,
            key=lambda engine: engine.num_open_tokens() - engine.num_cached_blocks(keys) * size,
        )

    def _holder(self, request_id: str) -> Engine | None:
        """The engine that has the sequence. It is asked of them: so nothing here can be stale."""
        for engine in self._engines:
            if engine.state_of(request_id) is not None:
                return engine
        return None

    def group_of(self, request_id: str) -> int | None:
        """The dp group of a sequence; None for one that is not here, or has ended."""
        holder = self._holder(request_id)
        return None if holder is None else self._engines.index(holder)

    def abort(self, request_id: str) -> bool:
        """End a sequence in any state, without an event. False if it is not here."""
        holder = self._holder(request_id)
        return holder is not None and holder.abort(request_id)

    def release(self, request_id: str) -> bool:
        """Let go of a held prefill. False if the sequence is not held here."""
        holder = self._holder(request_id)
        return holder is not None and holder.release(request_id)

    def admit(self, now: float) -> list[Event]:
        """Reserve blocks for decode parts, in each group in order of priority and arrival."""
        return [
            event
            for group, engine in enumerate(self._engines)
            for event in self._in_arena(group, engine.admit(now))
        ]

    def kv_arrived(self, request_id: str, first_token: int) -> bool:
        """All KV of the submission's tokens is in the reserved blocks, and verified."""
        holder = self._holder(request_id)
        return holder is not None and holder.kv_arrived(request_id, first_token)

    def kv_failed(self, request_id: str, num_valid_tokens: int, first_token: int | None) -> bool:
        """The KV will not come (any more): compute in the group that has the sequence."""
        holder = self._holder(request_id)
        return holder is not None and holder.kv_failed(request_id, num_valid_tokens, first_token)

    def fetched(self, request_id: str, num_valid_tokens: int) -> bool:
        """The fetch of a prefix is over: compute the rest."""
        holder = self._holder(request_id)
        return holder is not None and holder.fetched(request_id, num_valid_tokens)

    # Steps.

    def schedule(self, now: float) -> GroupPlan | None:
        """The next plan of all groups, with None for those that have nothing to run now.

        None where no group has, or where as many plans are uncommitted as may be (two with
        ``async_scheduling``, else one). ``step`` counts group plans; the plans in it keep the
        numbers that their engines gave them.
        """
        if len(self._plans) >= self._max_plans:
            return None
        plans = tuple(engine.schedule(now) for engine in self._engines)
        if all(plan is None for plan in plans):
            return None
        plan = GroupPlan(step=self._num_planned, plans=plans)
        self._num_planned += 1
        self._plans.append(plan)
        return plan

    def commit(self, plan: GroupPlan, result: GroupResult, now: float) -> list[Event]:
        """Take in what the runner computed for the oldest uncommitted plan.

        Raises ValueError, and changes nothing, for another plan or a result that does not belong
        to it.
        """
        if result.step != plan.step or len(result.results) != len(plan.plans):
            raise ValueError(
                f"the result of step {result.step} for {len(result.results)} groups is not of "
                f"step {plan.step} for {len(plan.plans)} groups"
            )
        for own, outcome in zip(plan.plans, result.results, strict=True):
            if (own is None) is not (outcome is None):
                raise ValueError(f"step {plan.step}: a group has a plan or a result, but not both")
            if own is not None and outcome is not None:
                check_result(own, outcome)
        self._retire(plan)
        self._num_steps += 1
        events: list[Event] = []
        for group, engine in enumerate(self._engines):
            own, outcome = plan.plans[group], result.results[group]
            if own is not None and outcome is not None:
                events += self._in_arena(group, engine.commit(own, outcome, now))
        return events

    def fail_plan(self, plan: GroupPlan) -> list[str]:
        """The runner raised on the oldest uncommitted plan: drop all of its sequences.

        The groups step together, so all groups lose theirs. Returns their request ids, without
        those that had ended before. Raises ValueError for another plan.
        """
        self._retire(plan)
        return [
            request_id
            for engine, own in zip(self._engines, plan.plans, strict=True)
            if own is not None
            for request_id in engine.fail_plan(own)
        ]

    def _retire(self, plan: GroupPlan) -> None:
        if not self._plans or self._plans[0] is not plan:
            raise ValueError(f"step {plan.step} is not the oldest uncommitted plan")
        self._plans.popleft()

    def _in_arena(self, group: int, events: list[Event]) -> list[Event]:
        """The events of a group with the arena's block numbers."""
        first = group * self.config.kv_blocks
        if first == 0:
            return events
        return [
            dataclasses.replace(event, blocks=tuple(first + block for block in event.blocks))
            if isinstance(event, Reserved | PrefillProgress | PrefixComplete)
            else event
            for event in events
        ]

    # Accounts.

    def load(self) -> InstanceLoad:
        """A snapshot: sums over the groups, and the steps that they took together."""
        total = _sum([engine.load() for engine in self._engines])
        return dataclasses.replace(total, num_steps=self._num_steps)

    def block_statistics(self) -> BlockStatistics:
        """An account of every block of all groups, for metrics."""
        return _sum([engine.block_statistics() for engine in self._engines])

    def check_integrity(self) -> None:
        """Account for every block, slot and sequence; raises AssertionError with details."""
        for engine in self._engines:
            engine.check_integrity()
        names = Counter(self.request_ids())
        assert all(count == 1 for count in names.values()), f"in two groups: {names}"
        for group, engine in enumerate(self._engines):
            own = [plan.plans[group] for plan in self._plans if plan.plans[group] is not None]
            assert engine.num_plans == len(own), f"group {group} has plans of no step"

    def request_ids(self) -> list[str]:
        """Of all sequences that have not ended, by group."""
        return [request_id for engine in self._engines for request_id in engine.request_ids()]

    def state_of(self, request_id: str) -> SequenceState | None:
        """None for a sequence that is not here, or has ended."""
        holder = self._holder(request_id)
        return None if holder is None else holder.state_of(request_id)


def _sum(parts: list[_Counts]) -> _Counts:
    """Field by field; samples of steps are the whole instance's, and not theirs to add up."""
    names = [field.name for field in dataclasses.fields(parts[0]) if field.name != "samples"]
    return type(parts[0])(**{name: sum(getattr(part, name) for part in parts) for name in names})
