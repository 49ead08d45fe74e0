"""The engine without rows: the same decisions, at the cost of what changes in a step. Pure.

The simulator drives the product's scheduler and block manager. What a decode step does to a running
sequence is always the same (one token more, a block now and then), so here it is not done step by
step: a *steady* sequence remembers the step at which it became so, and a heap knows the two kinds
of steps at which something happens to it: it needs a block, or it draws its last token. Everything
else (who starts, chunks, preemption, prefix cache) is ``Engine`` and ``Scheduler`` as they are;
when memory is short, all that was put off is made up for, and they do the whole step.

One uncommitted plan at a time. Tokens are zeros.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections import Counter

from baton.core.cluster import InstanceLoad
from baton.core.config import EngineConfig
from baton.core.cost_model import StepShape, chunk_context
from baton.core.request import FinishReason
from baton.engine.block_manager import BlockManager
from baton.engine.engine import Engine
from baton.engine.events import Event, TokensReady
from baton.engine.plan import RowResult, SlotBegin, StepPlan, StepResult
from baton.engine.prefixes import completed_prefix, register_blocks
from baton.engine.scheduler import Draft, Scheduler
from baton.engine.sequence import Rank, Sequence
from baton.engine.states import SequenceEvent, SequenceState

_S, _E = SequenceState, SequenceEvent
_GROW, _LAST = 0, 1
_DRAWN, _NOT_DRAWN = RowResult(0), RowResult(None)


class CompactScheduler(Scheduler):
    """See the module's docstring."""

    def __init__(self, config: EngineConfig, blocks: BlockManager) -> None:
        super().__init__(config, blocks)
        self.step = 0
        """Committed steps."""
        self._steady: dict[Sequence, int] = {}
        """And the step from which on each computes one token a step."""
        self._base = 0
        """Sum of what they had computed then, less that step: see ``context``."""
        self._due: list[tuple[int, int, Rank, int, Sequence]] = []
        """(step, kind, rank, when it became steady, sequence)."""
        self._busy: dict[Sequence, None] = {}
        """Running ones that are not steady."""
        self._targets: Counter[float] = Counter()
        """Of the steady ones' TPOT."""

    @property
    def num_steady(self) -> int:
        """Sequences that get one token a step."""
        return len(self._steady)

    @property
    def context(self) -> int:
        """Tokens in the cache of those."""
        return self._base + len(self._steady) * self.step

    def move(self, sequence: Sequence, event: SequenceEvent) -> None:
        """See ``Scheduler``."""
        if sequence in self._steady:
            self.unsettle(sequence)
        super().move(sequence, event)
        if sequence.state is _S.RUNNING:
            self._busy[sequence] = None
        else:
            self._busy.pop(sequence, None)

    # Steady sequences.

    def settle_down(self) -> None:
        """Running sequences that decode do so from the next step on without being looked at."""
        for sequence in list(self._busy):
            if sequence.num_uncomputed != 1 or sequence.num_plans or sequence.draws_last_token:
                continue
            if len(sequence.token_ids) == sequence.num_prompt_tokens:
                continue  # the last token of its prompt
            del self._busy[sequence]
            step = self._steady[sequence] = self.step
            self._base += sequence.num_computed - step
            tpot_s = sequence.submission.slo.tpot_s
            if tpot_s is not None:
                self._targets[tpot_s] += 1
            room = len(sequence.blocks) * self.blocks.block_size - sequence.num_computed
            self._expect(step + room, _GROW, sequence)
            left = sequence.max_num_tokens - len(sequence.token_ids)
            self._expect(step + left - 1, _LAST, sequence)

    def unsettle(self, sequence: Sequence) -> None:
        """Write down what a steady sequence has done: it is an ordinary running one again."""
        joined = self._steady.pop(sequence)
        self._base -= sequence.num_computed - joined
        self._busy[sequence] = None
        tpot_s = sequence.submission.slo.tpot_s
        if tpot_s is not None:
            self._targets[tpot_s] -= 1
            if not self._targets[tpot_s]:
                del self._targets[tpot_s]
        num = self.step - joined
        sequence.token_ids.extend((0,) * num)
        sequence.num_computed += num
        sequence.num_committed = sequence.num_computed
        register_blocks(sequence, self.blocks)

    def _expect(self, at: int, kind: int, sequence: Sequence) -> None:
        entry = (at, kind, sequence.rank, self._steady[sequence], sequence)
        heapq.heappush(self._due, entry)

    def _take_due(self, at: int, kind: int) -> list[Sequence]:
        """Steady sequences to which this happens at step ``at`` or did before."""
        found: dict[Sequence, None] = {}  # who was steady twice in one step has two equal entries
        others = []
        while self._due and self._due[0][0] <= at:
            entry = heapq.heappop(self._due)
            if self._steady.get(entry[4]) != entry[3]:
                continue  # it has not been steady all the time since
            if entry[1] == kind:
                found[entry[4]] = None
            else:
                others.append(entry)
        for entry in others:
            heapq.heappush(self._due, entry)
        return list(found)

    def take_last(self) -> list[Sequence]:
        """Steady sequences that drew their last token in the step just committed, by rank; no
        longer steady."""
        found = self._take_due(self.step - 1, _LAST)
        for sequence in found:
            self.unsettle(sequence)
        return found

    # Plans.

    def _draft(self, begins: list[SlotBegin]) -> list[Draft]:
        growing = self._take_due(self.step, _GROW)
        most = len(growing) + len(self._busy) + len(self._queues[_S.READY])
        if most > self.blocks.num_available or self._queues[_S.PREEMPTED]:
            # Memory may be short: who gives way is for the whole batch to say.
            for sequence in list(self._steady):
                self.unsettle(sequence)
            return super()._draft(begins)
        size = self.blocks.block_size
        for sequence in growing:
            sequence.blocks += self.blocks.allocate(1)
            if self.blocks.enable_prefix_cache:
                joined = self._steady[sequence]
                num = self.step - joined
                # Its full blocks can be found from now on.
                sequence.token_ids.extend((0,) * num)
                sequence.num_computed += num
                sequence.num_committed = sequence.num_computed
                self._steady[sequence] = self.step
                register_blocks(sequence, self.blocks)
                left = sequence.max_num_tokens - len(sequence.token_ids)
                self._expect(self.step + left - 1, _LAST, sequence)
            self._expect(self.step + size, _GROW, sequence)
        return super()._draft(begins)

    def _running(self) -> list[Sequence]:
        self._num_implied = len(self._steady)
        return sorted(self._busy, key=lambda item: item.rank)

    def _chunk_limit(self, decodes: list[Draft]) -> int:
        limit = super()._chunk_limit(decodes)
        if self.cost_model is None or not self._targets:
            return limit
        # Rows of this step count too, whatever their targets.
        tpot_s = min(self._targets)
        for draft in decodes:
            own = draft.sequence.submission.slo.tpot_s
            tpot_s = tpot_s if own is None else min(tpot_s, own)
        num = len(self._steady) + len(decodes)
        context = self.context + sum(draft.start for draft in decodes)
        return min(limit, self._chunk_beside(tpot_s, num, context))


class CompactEngine(Engine):
    """``Engine`` for the simulator: shapes instead of plans, and only the events that matter.

    ``step_shape`` and ``finish_step`` in place of ``schedule`` and ``commit``. Of a sequence that
    decodes only the end is told. Outputs are as long as ``max_tokens`` says.
    """

    _scheduler: CompactScheduler

    def _make_scheduler(self) -> CompactScheduler:
        if self.config.async_scheduling:
            raise ValueError("the compact engine plans one step at a time")
        return CompactScheduler(self.config, self._blocks)

    def step_shape(self, now: float) -> StepShape | None:
        """Plan the next step; what it computes. ``None`` where nothing can run now."""
        scheduler = self._scheduler
        self._plan = scheduler.schedule()
        num_decodes, decode_context = scheduler.num_steady, scheduler.context
        if self._plan is None and not num_decodes:
            return None
        num_prefill = context = 0
        for row in self._plan.rows if self._plan is not None else ():
            if row.num_tokens == 1 and row.sample and row.start:
                num_decodes += 1
                decode_context += row.start
            else:
                num_prefill += row.num_tokens
                context += chunk_context(row.start, row.num_tokens)
        return StepShape(num_prefill, context, num_decodes, decode_context)

    def finish_step(self, now: float) -> list[Event]:
        """The step that was planned last is computed."""
        scheduler, plan = self._scheduler, self._plan
        self._plan = None
        scheduler.step += 1
        events: list[Event] = []
        for sequence in scheduler.take_last():
            index = len(sequence.token_ids) - 1 - sequence.num_prompt_tokens
            cached, sequence.num_cached_tokens = sequence.num_cached_tokens, None
            events.append(
                TokensReady(
                    sequence.request_id, index, (0,), (), FinishReason.LENGTH, None, cached, ()
                )
            )
            if self._track_cache and sequence.num_registered:
                events.append(completed_prefix(sequence, self._blocks))
            self._end(sequence, _E.FINISH)
            self._num_finished += 1
        if plan is None:
            self._num_steps += 1
            events += self._take_late_events()
        else:
            rows = tuple(_DRAWN if row.sample else _NOT_DRAWN for row in plan.rows)
            events += self.commit(plan, StepResult(plan.step, rows, 0.0), now)
        scheduler.settle_down()
        return events

    _plan: StepPlan | None = None

    def load(self) -> InstanceLoad:
        """See ``Engine``."""
        load = super().load()
        scheduler = self._scheduler
        return dataclasses.replace(
            load,
            num_decoding=scheduler.num_steady,
            num_context_tokens=scheduler.context,
        )
