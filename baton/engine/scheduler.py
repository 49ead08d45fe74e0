"""Decides what the next step computes. Pure; see ``holders`` for slots and blocks.

One order rules: rank, i.e. priority, then arrival. A step takes, within
``max_num_batched_tokens`` and ``max_num_seqs`` slots,

1. decodes: running and ready sequences with one token to compute;
2. the next chunks of running prefills, and waiting sequences as far as slots, budget and memory
   reach.

Offline work (priority below 0) comes last in this order and takes what online work leaves: it gives
up slots and blocks before the step where online work wants them, and sits out, or ends for now,
where a step would else take longer than a target of online work allows.

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
from baton.core.request import Part
from baton.engine.block_manager import BlockManager
from baton.engine.holders import Holders
from baton.engine.limits import Limits
from baton.engine.plan import SequenceStep, SlotBegin, StepPlan
from baton.engine.sequence import Sequence
from baton.engine.states import SequenceEvent, SequenceState

_S, _E = SequenceState, SequenceEvent
_RUNNING, _READY = _S.RUNNING, _S.READY
"""A member looked up in its class takes as long as all the rest of a comparison."""


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
        """With it, prompt chunks and offline work are as large as the targets of online work allow;
        see ``limits``."""
        self._kept_slots = 0
        """Free slots that online sequences will take in this step."""
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
            self._yield_to_online()
            begins: list[SlotBegin] = []
            drafts = self._draft(begins)
            # Blocks that came free at once may let somebody else start.
            if (
                drafts
                or self._num_implied()
                or self._plans
                or num_preemptions == self.num_preemptions
            ):
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
        self._num_short = self._num_taken = 0
        ready = self._queues[_S.READY]
        order: Iterable[Sequence] = self._running()
        if ready:
            order = heapq.merge(order, list(ready), key=lambda item: item.rank)
        limits, is_limited = self._limits(), self.cost_model is not None
        drafts: list[Draft] = []
        prefills: list[Sequence] = []
        later: list[Sequence] = []
        for sequence in order:
            state = sequence.state
            if (state is not _RUNNING and state is not _READY) or sequence.draws_last_token:
                continue
            if sequence.num_uncomputed > 1:
                prefills.append(sequence)
            elif sequence.rank[0] > 0 and state is _READY:
                later.append(sequence)
            elif sequence.rank[0] > 0 and not limits.bears(sequence):
                self.move(sequence, _E.PREEMPT)
            elif (sequence.slot is not None or self._free_slots) and self._grow(sequence):
                drafts.append(self._row(sequence, 1, begins))
                if is_limited:
                    limits.count(sequence, drafts[-1].start)
        self._num_decodes = len(drafts)
        for sequence in later:  # offline work that would begin to decode
            free = len(self._free_slots) > self._kept_slots
            if free and limits.may_start(sequence) and self._grow(sequence):
                drafts.append(self._row(sequence, 1, begins))
                if is_limited:
                    limits.count(sequence, drafts[-1].start)
        self._draft_prefills(prefills, limits, drafts, begins)
        return drafts

    def _draft_prefills(
        self,
        prefills: list[Sequence],
        limits: Limits,
        drafts: list[Draft],
        begins: list[SlotBegin],
    ) -> None:
        """Chunks of running prefills and of waiting sequences, by rank."""
        budget = self._max_num_batched_tokens - len(drafts) - self._num_implied()
        budget = limits.online_chunk(budget)
        waiting = self._queues[_S.WAITING]
        # Where memory is short, nobody new.
        first = None if self._num_short or self._num_taken else waiting.first
        pending = self._queues[_S.PENDING_BLOCKS].first
        for sequence in prefills:
            if sequence.part is not Part.PREFILL:
                limits.expect(sequence)
        yields = False
        at = 0
        while budget > 0 and (at < len(prefills) or first is not None):
            if first is None or (at < len(prefills) and prefills[at].rank < first.rank):
                sequence = prefills[at]
            else:
                sequence = first
            if sequence.rank[0] > 0 and not yields:
                yields = True  # all that follow are offline too
                budget = limits.offline_chunk(budget)
                continue
            if sequence is first:
                starts = self._may_start(sequence, limits)
                if not starts or not self._give_blocks(sequence, ahead=pending):
                    first = None
                    continue
            else:
                at += 1
                if sequence.state not in (_RUNNING, _READY):
                    continue
                if sequence.slot is None and not self._free_slots:
                    continue
            room = len(sequence.blocks) * self.blocks.block_size - sequence.num_computed
            chunk = min(sequence.num_uncomputed, budget, room)
            limits.chunk(chunk)
            drafts.append(self._row(sequence, chunk, begins))
            budget -= chunk
            if sequence is first:
                first = waiting.first
                if sequence.part is not Part.PREFILL:
                    limits.expect(sequence)

    def _may_start(self, sequence: Sequence, limits: Limits) -> bool:
        """Whether a waiting sequence may have a slot."""
        if not self._free_slots:
            return False
        decodes = sequence.part is not Part.PREFILL
        return not decodes or sequence.rank[0] <= 0 or limits.may_start(sequence)

    def _limits(self) -> Limits:
        """Of the step that is being planned."""
        return Limits(self.cost_model, self._smallest_chunk, self.tightest_ttft_s)

    def _num_growing(self) -> int:
        """Blocks that decodes want in this step."""
        size = self.blocks.block_size
        return sum(
            sequence.num_computed >= len(sequence.blocks) * size for sequence in self._running()
        )

    def _num_implied(self) -> int:
        """Decodes of the step that no rows are made for; see ``CompactScheduler``."""
        return 0

    def _yield_to_online(self) -> None:
        """Offline sequences give way where online ones could begin now if they did."""
        self._kept_slots = num_slots = num_blocks = 0
        if not self.num_offline:
            return
        for sequence in self._queues[_S.READY]:
            if sequence.is_offline:
                break
            if not self._make_way([], 0, num_slots + 1):
                break
            num_slots += 1
        pending = self._queues[_S.PENDING_BLOCKS].first
        budget = self._max_num_batched_tokens
        first = self._queues[_S.WAITING].first
        if first is None or first.is_offline:
            return
        num_blocks = self._num_growing()
        kept: list[int] = []
        for sequence in self._queues[_S.WAITING]:
            if sequence.is_offline or budget <= 0:
                break
            num_slots += 1
            hits, num = self._needs(sequence, pending)
            kept += hits
            if not self._make_way(kept, num_blocks + num, num_slots):
                break
            self._kept_slots += 1
            num_blocks += self._wants(sequence)[1]
            budget -= sequence.num_uncomputed

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
