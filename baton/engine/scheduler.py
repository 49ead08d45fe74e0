"""Decides what the next step computes. Pure; see ``holders`` for slots and blocks.

One order rules: rank, i.e. priority, then arrival. A step takes, within
``max_num_batched_tokens`` and ``max_num_seqs`` slots,

1. decodes: running and ready sequences with one token to compute;
2. the next chunks of running prefills;
3. waiting sequences, as far as slots, budget and memory reach.

Several plans: a sequence counts the tokens that uncommitted plans will draw as if it had them
(``num_in_flight``), so the next step can be planned while one runs.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from baton.core.config import EngineConfig
from baton.core.cost_model import CostModel
from baton.core.philox import uniforms
from baton.engine.block_manager import BlockManager
from baton.engine.holders import Holders
from baton.engine.plan import SequenceStep, SlotBegin, StepPlan
from baton.engine.sequence import Sequence
from baton.engine.states import SequenceEvent, SequenceState

_S, _E = SequenceState, SequenceEvent
_RUNNING, _READY = _S.RUNNING, _S.READY
"""A member looked up in its class takes as long as all the rest of a comparison."""


TPOT_SHARE = 0.8
"""Of a TPOT target that a step with prompts in it may take: the way from prefill to decode, and the
step that it finds running there, take some of it too."""
_TYPICAL_START = 1024
"""Tokens before a chunk, where its attention is estimated."""


class PlannedRow(NamedTuple):
    """Which sequence a row of an uncommitted plan belongs to, whatever its state is by now."""

    sequence: Sequence
    step: SequenceStep
    lineage: int


class Draft(NamedTuple):
    """A row before its uniform is drawn. Fields in the order of ``SequenceStep``."""

    sequence: Sequence
    slot: int
    start: int
    token_ids: tuple[int, ...] | None
    block_table: tuple[int, ...]
    sample: bool
    output_index: int


class Scheduler(Holders):
    """Queues, slots, plans. ``Engine`` decides *what happens* to a sequence, this class *when*."""

    def __init__(self, config: EngineConfig, blocks: BlockManager) -> None:
        super().__init__(config, blocks)
        self.max_plans = 2 if config.async_scheduling else 1
        self._max_num_batched_tokens = config.max_num_batched_tokens
        self._plans: deque[tuple[StepPlan, tuple[PlannedRow, ...]]] = deque()
        self._num_steps = 0
        self.cost_model: CostModel | None = None
        """With it, prompt chunks beside decodes are no larger than their TPOT targets allow."""
        self._smallest_chunk = max(16, blocks.block_size // 2)
        self._num_decodes = 0
        """Leading rows of the last plan: those of one token that ``_grow`` made room for."""

    # Plans.

    @property
    def num_plans(self) -> int:
        """Uncommitted plans."""
        return len(self._plans)

    def retire(self, plan: StepPlan) -> tuple[PlannedRow, ...]:
        """Take out the oldest uncommitted plan. Raises ValueError if ``plan`` is another one.

        The caller handles each row, then calls :meth:`row_done` for it.
        """
        if not self._plans or self._plans[0][0] is not plan:
            raise ValueError(f"step {plan.step} is not the oldest uncommitted plan")
        planned = self._plans.popleft()[1]
        for row in planned:
            row.sequence.num_plans -= 1
        return planned

    def row_done(self, row: PlannedRow) -> None:
        """The row has been handled: its sequence gives back what only this plan needed."""
        self._settle(row.sequence)

    def schedule(self) -> StepPlan | None:
        """The next plan; None where nothing can run now, or ``max_plans`` are uncommitted."""
        if len(self._plans) >= self.max_plans:
            return None
        while True:
            num_preemptions = self.num_preemptions
            begins: list[SlotBegin] = []
            drafts = self._draft(begins)
            # Blocks that came free at once may let somebody else start.
            if drafts or self._plans or num_preemptions == self.num_preemptions:
                break
        if not drafts:
            return None
        rows = _with_uniforms(drafts)
        plan = StepPlan(step=self._num_steps, begins=tuple(begins), rows=rows)
        self._num_steps += 1
        planned = tuple(
            PlannedRow(draft.sequence, row, draft.sequence.lineage)
            for draft, row in zip(drafts, rows, strict=True)
        )
        self._plans.append((plan, planned))
        return plan

    def _draft(self, begins: list[SlotBegin]) -> list[Draft]:
        self._num_short = 0
        ready = self._queues[_S.READY]
        num_victims = len(self._queues[_S.PREEMPTED]) + self.num_preemptions
        order: Iterable[Sequence] = self._running()
        if ready:
            order = heapq.merge(order, list(ready), key=lambda item: item.rank)
        budget = self._max_num_batched_tokens - self._implied()[0]
        drafts: list[Draft] = []
        prefills: list[Sequence] = []
        for sequence in order:
            state = sequence.state
            if (state is not _RUNNING and state is not _READY) or sequence.draws_last_token:
                continue
            if sequence.num_uncomputed > 1:
                prefills.append(sequence)
            elif (sequence.slot is not None or self._free_slots) and self._grow(sequence):
                drafts.append(self._row(sequence, 1, begins))
                budget -= 1
        self._num_decodes = len(drafts)
        budget = min(budget, self._chunk_limit(drafts))
        for sequence in prefills:
            if budget <= 0:
                return drafts
            if sequence.state not in (_RUNNING, _READY):
                continue
            if sequence.slot is None and not self._free_slots:
                continue
            room = len(sequence.blocks) * self.blocks.block_size - sequence.num_computed
            chunk = min(sequence.num_uncomputed, budget, room)
            drafts.append(self._row(sequence, chunk, begins))
            budget -= chunk
        if self._num_short or num_victims != (
            len(self._queues[_S.PREEMPTED]) + self.num_preemptions
        ):
            return drafts  # memory is short: nobody new
        pending = self._queues[_S.PENDING_BLOCKS].first
        for sequence in list(self._queues[_S.WAITING]):
            if budget <= 0 or not self._free_slots:
                break
            if not self._give_blocks(sequence, ahead=pending):
                break
            chunk = min(sequence.num_uncomputed, budget)
            drafts.append(self._row(sequence, chunk, begins))
            budget -= chunk
        return drafts

    def _implied(self) -> tuple[int, int, float | None]:
        """Decodes of the step that no rows are made for, their context, their tightest target for
        TPOT; see ``CompactScheduler``."""
        return 0, 0, None

    def _chunk_limit(self, decodes: list[Draft]) -> int:
        """Prompt tokens that this step may compute beside its decodes."""
        if self.cost_model is None:
            return self._max_num_batched_tokens
        num, context, tightest = self._implied()
        for draft in decodes:
            tpot_s = draft.sequence.submission.slo.tpot_s
            if tpot_s is not None and (tightest is None or tpot_s < tightest):
                tightest = tpot_s
        if tightest is None:
            return self._max_num_batched_tokens
        context += sum(draft.start for draft in decodes)
        return self._chunk_beside(tightest, num + len(decodes), context)

    def _chunk_beside(self, tpot_s: float, num_decodes: int, context: int) -> int:
        """So much that the decodes still meet ``tpot_s``; never 0, or prompts would starve."""
        assert self.cost_model is not None
        limit_s = tpot_s * TPOT_SHARE
        chunk = self.cost_model.chunk_for(limit_s, num_decodes, context, _TYPICAL_START)
        return max(chunk, self._smallest_chunk)

    def _row(self, sequence: Sequence, num_tokens: int, begins: list[SlotBegin]) -> Draft:
        """Plan ``num_tokens`` tokens of a sequence, which starts if it does not run yet."""
        slot = sequence.slot
        if slot is None:
            slot = self._free_slots.pop()
            self.move(sequence, _E.START)
            sequence.slot = slot
            submission = sequence.submission
            outputs = tuple(sequence.token_ids[sequence.num_prompt_tokens :])
            begins.append(SlotBegin(slot, submission.sampling, submission.prompt_ids, outputs))
        start = sequence.num_computed
        end = start + num_tokens
        known = len(sequence.token_ids)
        sample = end >= known
        draft = Draft(
            sequence,
            slot,
            start,
            tuple(sequence.token_ids[start:end]) if start < known else None,
            sequence.block_table(-(-end // self.blocks.block_size)),
            sample,
            known + sequence.num_in_flight - sequence.num_prompt_tokens,
        )
        sequence.num_computed = end
        sequence.num_in_flight += sample
        sequence.num_plans += 1
        return draft

    # Accounts.

    def _planned(self) -> list[Sequence]:
        return [row.sequence for _, planned in self._plans for row in planned]

    def check_integrity(self) -> None:
        """Every block, slot and row is accounted for; raises AssertionError with details."""
        super().check_integrity()
        for plan, planned in self._plans:
            assert len({row.slot for row in plan.rows}) == len(plan.rows), "a slot twice in a plan"
            for item in planned:
                row, size = item.step, self.blocks.block_size
                table = item.sequence.blocks[: len(row.block_table)]
                assert tuple(table) == row.block_table, f"step {plan.step}: a block table changed"
                for block in table[row.start // size :]:
                    count = self.blocks.num_references(block)
                    shared = count != 1 or self.blocks.is_cached(block)
                    assert not shared, f"step {plan.step} writes to shared block {block}"


def _with_uniforms(drafts: list[Draft]) -> tuple[SequenceStep, ...]:
    """Finish the rows: one vectorised draw for all that sample and are not greedy."""
    drawing = [
        (draft.sequence.submission, draft.output_index)
        for draft in drafts
        if draft.sample and not draft.sequence.is_greedy
    ]
    draws: list[float] = []
    if drawing:
        draws = uniforms(
            [submission.sampling.seed for submission, _ in drawing],
            [submission.choice for submission, _ in drawing],
            [index for _, index in drawing],
        ).tolist()
    remaining = iter(draws)
    return tuple(
        [
            SequenceStep(
                slot,
                start,
                token_ids,
                block_table,
                sample,
                next(remaining) if sample and not sequence.is_greedy else 0.0,
                sequence.owes_prompt_logprobs and start + 1 < sequence.num_prompt_tokens,
            )
            for sequence, slot, start, token_ids, block_table, sample, _ in drafts
        ]
    )
