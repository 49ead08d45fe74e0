"""The engine without rows: the same decisions, at the cost of what changes in a step. Pure.

The simulator drives the product's scheduler and block manager. What a decode step does to a running
sequence is always the same (one token more, a block now and then), so here it is not done step by
step: a *steady* sequence remembers the step at which it became so, and a heap knows the next step
at which something happens to it: its blocks are full, or it draws its last token. Everything else
(who starts, chunks, preemption, prefix cache) is ``Engine`` and ``Scheduler`` as they are; when
memory is short, all that was put off is made up for, and they do the whole step.

One uncommitted plan at a time.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections import Counter

from baton.core.config import EngineConfig
from baton.core.cost_model import StepShape
from baton.core.request import Part, Submission
from baton.engine.block_manager import BlockManager
from baton.engine.engine import Engine
from baton.engine.events import Event
from baton.engine.holders import Tally
from baton.engine.limits import Limits
from baton.engine.plan import RowResult, SequenceStep, SlotBegin, StepPlan, shape_of
from baton.engine.prefixes import register_blocks
from baton.engine.scheduler import Draft, PlannedRow, Scheduler
from baton.engine.sequence import DummyTokens, Sequence
from baton.engine.states import SequenceEvent, SequenceState

_S, _E = SequenceState, SequenceEvent
_DRAWN, _NOT_DRAWN = RowResult(0), RowResult(None)


@dataclasses.dataclass(slots=True)
class _Batch:
    """Steady sequences: how many, and the tightest of their targets."""

    num: int = 0
    base: int = 0
    """Sum of the tokens that they had computed when they became steady, less that step."""
    targets: Counter[float] = dataclasses.field(default_factory=Counter)
    """Of their TPOT, in seconds."""

    def context(self, step: int) -> int:
        """Tokens in the cache of those, after so many steps."""
        return self.base + self.num * step

    def count(self, sequence: Sequence, sign: int, step: int) -> None:
        """One joins, or leaves."""
        self.num += sign
        self.base += sign * (sequence.num_computed - step)
        tpot_s = sequence.submission.slo.tpot_s
        if tpot_s is not None:
            self.targets[tpot_s] += sign
            if not self.targets[tpot_s]:
                del self.targets[tpot_s]


class CompactScheduler(Scheduler):
    """See the module's docstring."""

    def __init__(self, config: EngineConfig, blocks: BlockManager) -> None:
        super().__init__(config, blocks)
        self.step = 0
        """Committed steps."""
        self.in_step = False
        """Whether one is planned that is not committed."""
        self._steady: dict[Sequence, int] = {}
        """And the step from which on each computes one token a step."""
        self._online, self._offline = _Batch(), _Batch()
        self._due: list[tuple[int, int, int, Sequence]] = []
        """(steps after which something happens, when it became steady, arrival, sequence)."""
        self._full: dict[Sequence, None] = {}
        """Steady ones that need a block for the next step."""
        self._busy: dict[Sequence, None] = {}
        """Running ones that are not steady."""
        self._late_rows: list[PlannedRow] = []
        """Of the step under way: sequences that were steady when it was planned."""

    @property
    def num_steady(self) -> int:
        """Sequences that get one token a step."""
        return len(self._steady)

    @property
    def context(self) -> int:
        """Tokens in the cache of those."""
        return self._online.context(self.step) + self._offline.context(self.step)

    def move(self, sequence: Sequence, event: SequenceEvent) -> None:
        """See ``Scheduler``."""
        if sequence in self._steady:
            self._unsettle(sequence)
        super().move(sequence, event)
        if sequence.state is _S.RUNNING:
            self._busy[sequence] = None
        else:
            self._busy.pop(sequence, None)

    # Steady sequences.

    def settle_down(self) -> None:
        """Running sequences that decode do so from the next step on without being looked at."""
        for sequence in list(self._busy):
            if sequence.num_uncomputed != 1 or sequence.part is Part.PREFILL:
                continue
            if len(sequence.token_ids) == sequence.num_prompt_tokens:
                continue  # the last token of its prompt
            del self._busy[sequence]
            self._steady[sequence] = self.step
            self._batch_of(sequence).count(sequence, 1, self.step)
            if sequence.num_computed < len(sequence.blocks) * self.blocks.block_size:
                self._expect(sequence)
            else:
                self._full[sequence] = None

    def _batch_of(self, sequence: Sequence) -> _Batch:
        return self._offline if sequence.is_offline else self._online

    def _expect(self, sequence: Sequence) -> None:
        """Note when something happens next to a steady sequence."""
        room = len(sequence.blocks) * self.blocks.block_size - sequence.num_computed
        left = sequence.max_num_tokens - len(sequence.token_ids)
        entry = (self.step + min(room, left), self.step, sequence.rank[1], sequence)
        heapq.heappush(self._due, entry)

    def _unsettle(self, sequence: Sequence) -> None:
        """Write down what a steady sequence has done: it is an ordinary running one again, with a
        row in the step under way."""
        self._write_down(sequence)
        joined = self._steady.pop(sequence)
        self._full.pop(sequence, None)
        self._batch_of(sequence).count(sequence, -1, joined)
        self._busy[sequence] = None
        if self.in_step:
            assert sequence.slot is not None
            step = SequenceStep(sequence.slot, sequence.num_computed, None, (), True, 0.0, False)
            self._late_rows.append(PlannedRow(sequence, step, sequence.lineage))
            sequence.num_computed += 1
            sequence.num_in_flight += 1
            sequence.num_plans += 1

    def _write_down(self, sequence: Sequence) -> None:
        num = self.step - self._steady[sequence]
        assert isinstance(sequence.token_ids, DummyTokens)
        sequence.token_ids.grow(num)
        sequence.num_computed += num
        sequence.num_committed = sequence.num_computed
        self._steady[sequence] = self.step
        if sequence.num_committed // self.blocks.block_size > sequence.num_registered:
            register_blocks(sequence, self.blocks)
            self.registered(sequence)

    # Plans.

    def retire_step(self, plan: StepPlan | None) -> list[PlannedRow]:
        """Rows to be committed of the step under way, in the order in which they would be with all
        decodes in it; ``plan``: what ``schedule`` returned for it."""
        full: list[Sequence] = []
        while self._due and self._due[0][0] <= self.step + 1:
            at, joined, _, sequence = heapq.heappop(self._due)
            if self._steady.get(sequence) != joined:
                continue  # it has not been steady all the time since
            known = len(sequence.token_ids) + at - joined
            if known < sequence.max_num_tokens:
                full.append(sequence)
            else:
                self._unsettle(sequence)
        rows: list[PlannedRow] = []
        late, self._late_rows = self._late_rows, []
        for row in late:
            row.sequence.num_plans -= 1
        if plan is not None:
            rows += self.retire(plan)
        if late:
            decodes = sorted(late + rows[: self._num_decodes], key=lambda row: row.sequence.rank)
            rows = decodes + rows[self._num_decodes :]
        self.step += 1
        self.in_step = False
        for sequence in full:
            self._write_down(sequence)
            self._full[sequence] = None
        return rows

    def steps_alike(self) -> int:
        """How many steps from now on are all decode and change nothing else."""
        others = (_S.WAITING, _S.PENDING_BLOCKS, _S.READY, _S.PREEMPTED)
        if self.in_step or self._busy or self._full or any(self._queues[state] for state in others):
            return 0
        while self._due:
            at, joined, _, sequence = self._due[0]
            if self._steady.get(sequence) == joined:
                count = at - 1 - self.step
                while count and not self._bears_offline(later=count):
                    count //= 2
                return count
            heapq.heappop(self._due)
        return 0

    def _draft(self, begins: list[SlotBegin]) -> list[Draft]:
        most = len(self._full) + len(self._busy) + len(self._queues[_S.READY])
        if most > self.blocks.num_available or self._queues[_S.PREEMPTED]:
            # Memory may be short: who gives way is for the whole batch to say.
            for sequence in list(self._steady):
                self._unsettle(sequence)
        elif not self._bears_offline():
            for sequence in [item for item in self._steady if item.is_offline]:
                self._unsettle(sequence)
        if self._full:
            blocks = self.blocks.allocate(len(self._full))
            for sequence, block in zip(self._full, blocks, strict=True):
                sequence.blocks.append(block)
                self._expect(sequence)
            self._full.clear()
        if not (self._busy or self._queues[_S.READY] or self._queues[_S.WAITING]):
            self._num_decodes = self._num_short = self._num_taken = 0
            return []
        return super()._draft(begins)

    def _running(self) -> list[Sequence]:
        return sorted(self._busy, key=lambda item: item.rank)

    def _num_growing(self) -> int:
        return super()._num_growing() + len(self._full)

    def _num_implied(self) -> int:
        return len(self._steady)

    def _limits(self) -> Limits:
        limits = super()._limits()
        limits.add(self.num_steady, self.context, min(self._online.targets, default=None))
        return limits

    def _bears_offline(self, *, later: int = 0) -> bool:
        """Whether no decode has to give way; or, if only steady ones remain, so much later."""
        if self.cost_model is None or not self._offline.num:
            return True
        limits = self._limits()
        limits.add(0, later * self.num_steady, None)
        for sequence in (*self._busy, *self._queues[_S.READY]):
            waits = sequence.state is _S.READY and sequence.is_offline
            if sequence.num_uncomputed == 1 and not waits:
                limits.count(sequence, sequence.num_computed)
        return limits.bears_all()

    def _raise(self, sequence: Sequence) -> None:
        if sequence in self._steady:
            self._unsettle(sequence)
        super()._raise(sequence)

    def _draws_last(self, sequence: Sequence) -> bool:
        joined = self._steady.get(sequence)
        if joined is None:
            return super()._draws_last(sequence)
        known = len(sequence.token_ids) + self.step - joined + self.in_step
        return known >= sequence.max_num_tokens

    # Accounts.

    def tally(self) -> Tally:
        """See ``Scheduler``."""
        tally = super().tally()
        step = self.step + self.in_step  # what is planned counts as computed
        tally.decoding += self.num_steady
        tally.offline_decoding += self._offline.num
        tally.context += self._online.context(step) + self._offline.context(step)
        tally.offline_context += self._offline.context(step)
        return tally

    def _planned(self) -> list[Sequence]:
        return super()._planned() + [row.sequence for row in self._late_rows]


class CompactEngine(Engine):
    """``Engine`` for the simulator: shapes instead of plans, and only the events that matter.

    ``step_shape`` and ``finish_step`` in place of ``schedule`` and ``commit``. A sequence that
    decodes is silent until its last token. Outputs are as long as ``max_tokens`` says. Of prompts
    only the length counts: who is to find cached blocks is submitted with the keys of all full
    blocks of its prompt.
    """

    _scheduler: CompactScheduler
    _plan: StepPlan | None = None

    def _make_scheduler(self) -> CompactScheduler:
        if self.config.async_scheduling:
            raise ValueError("the compact engine plans one step at a time")
        return CompactScheduler(self.config, self._blocks)

    def _tokens_of(self, submission: Submission) -> DummyTokens:
        return DummyTokens(submission.num_tokens, self._num_submitted)

    def step_shape(self, now: float) -> StepShape | None:
        """Plan the next step; what it computes. ``None`` where nothing can run now."""
        scheduler = self._scheduler
        assert not scheduler.in_step, "one step at a time"
        scheduler.rise(now)
        self._plan = scheduler.schedule()
        num_decodes, context = scheduler.num_steady, scheduler.context
        if self._plan is None:
            if not num_decodes:
                return None
            scheduler.in_step = True
            return StepShape(0, 0, num_decodes, context)
        scheduler.in_step = True
        shape = shape_of(self._plan)
        return StepShape(
            shape.num_prefill_tokens,
            shape.prefill_context,
            shape.num_decodes + num_decodes,
            shape.decode_context + context,
        )

    def finish_step(self, now: float) -> list[Event]:
        """The step that was planned last is computed."""
        scheduler = self._scheduler
        rows = scheduler.retire_step(self._plan)
        self._plan = None
        self._num_steps += 1
        events = self._take_late_events()
        for row in rows:
            sequence = row.sequence
            if sequence.state is not _S.FINISHED and row.lineage == sequence.lineage:
                self._commit_row(row, _DRAWN if row.step.sample else _NOT_DRAWN, events)
            if not sequence.num_plans:
                scheduler.row_done(row)
        if rows:
            scheduler.settle_down()
        events += self._take_late_events()
        return events

    def can_leap(self) -> int:
        """How many steps from now on have nothing to tell and differ in their context only, which
        grows by the number of decodes with each."""
        return self._scheduler.steps_alike()

    def leap(self, num_steps: int, now: float) -> None:
        """So many of them are computed; at most :meth:`can_leap`."""
        assert num_steps <= self.can_leap(), "something happens before that"
        if num_steps:
            self._scheduler.step += num_steps
            self._num_steps += num_steps
            self._scheduler.rise(now)
