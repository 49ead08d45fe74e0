"""Decides what the next step computes, and who owns slots and blocks meanwhile. Pure.

One order rules: rank, i.e. priority, then arrival. A step takes, within
``max_num_batched_tokens`` and ``max_num_seqs`` slots,

1. decodes: running and ready sequences with one token to compute;
2. the next chunks of running prefills;
3. waiting sequences, as far as slots, budget and memory reach.

Memory: a sequence gets the blocks of all its known tokens when it starts, and one more at a time
while it decodes. When none is left, the last in rank gives its blocks back and is computed again
later. What an uncommitted plan writes to is given back only when that plan is committed; until
then the sequence that wanted a block sits a step out.

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
from baton.engine.plan import SequenceStep, SlotBegin, StepPlan
from baton.engine.sequence import RankedQueue, Sequence
from baton.engine.states import (
    HOLDS_BLOCKS,
    HOLDS_SLOT,
    LIVE_STATES,
    SequenceEvent,
    SequenceState,
    next_state,
)

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


class Scheduler:
    """Queues, slots, plans. ``Engine`` decides *what happens* to a sequence, this class *when*."""

    def __init__(self, config: EngineConfig, blocks: BlockManager) -> None:
        self.blocks = blocks
        self.max_plans = 2 if config.async_scheduling else 1
        self._max_num_batched_tokens = config.max_num_batched_tokens
        self._max_num_seqs = config.max_num_seqs
        self._free_slots = list(range(config.max_num_seqs - 1, -1, -1))
        self._watermark = max(1, blocks.num_blocks // 100)
        self._queues: dict[SequenceState, RankedQueue] = {
            state: RankedQueue() for state in LIVE_STATES
        }
        self._ended: set[Sequence] = set()
        """Finished sequences that an uncommitted plan still contains."""
        self._plans: deque[tuple[StepPlan, tuple[PlannedRow, ...]]] = deque()
        self._num_steps = 0
        self.cost_model: CostModel | None = None
        """With it, prompt chunks beside decodes are no larger than their TPOT targets allow."""
        self._smallest_chunk = max(16, blocks.block_size // 2)
        self._num_implied = 0
        """Tokens of the step that ``_draft`` makes no rows for; see ``CompactScheduler``."""
        self._num_short = 0
        """Sequences that sat out the last step for want of a block."""
        self.preempted: list[str] = []
        """Request ids preempted since the engine last told about them."""
        self.num_preemptions = 0

    # Queues.

    def queue(self, state: SequenceState) -> RankedQueue:
        """The sequences in ``state`` (any but FINISHED), by rank; for reading."""
        return self._queues[state]

    def add(self, sequence: Sequence) -> None:
        """A new sequence, in the state it enters with."""
        self._queues[sequence.state].add(sequence)

    def move(self, sequence: Sequence, event: SequenceEvent) -> None:
        """Apply ``event``: state, queue, and slot and blocks that the new state does not hold."""
        state = next_state(sequence.state, event)
        self._queues[sequence.state].remove(sequence)
        sequence.state = state
        if state not in HOLDS_SLOT and sequence.slot is not None:
            self._free_slots.append(sequence.slot)
            sequence.slot = None
        if state is not _S.FINISHED:
            self._queues[state].add(sequence)
        elif sequence.num_plans:
            self._ended.add(sequence)
        self._settle(sequence)

    def _settle(self, sequence: Sequence) -> None:
        """Give the blocks back if it is time."""
        if sequence.num_plans:
            return
        if sequence.state is _S.PREEMPTED:
            self.blocks.release(sequence.take_blocks())
            self.num_preemptions += 1
            self.preempted.append(sequence.request_id)
            self.move(sequence, _E.DRAINED)
        elif sequence.state is _S.FINISHED:
            self._ended.discard(sequence)
            self.blocks.release(sequence.take_blocks())

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
        budget = self._max_num_batched_tokens - self._num_implied
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

    def _running(self) -> list[Sequence]:
        """Running sequences that this step has to look at, by rank."""
        return list(self._queues[_RUNNING])

    def _chunk_limit(self, decodes: list[Draft]) -> int:
        """Prompt tokens that this step may compute beside its decodes."""
        if self.cost_model is None or not decodes:
            return self._max_num_batched_tokens
        targets = [
            tpot_s
            for draft in decodes
            if (tpot_s := draft.sequence.submission.slo.tpot_s) is not None
        ]
        if not targets:
            return self._max_num_batched_tokens
        context = sum(draft.start for draft in decodes)
        return self._chunk_beside(min(targets), len(decodes), context)

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

    # Memory.

    def _give_blocks(self, sequence: Sequence, *, ahead: Sequence | None) -> bool:
        """Blocks for all known tokens of a sequence that has none, the cached ones first.

        ``ahead``: the first of the other queue for memory; if it ranks before, its blocks are
        left for it, so that neither queue starves the other. False, and nothing changed, if the
        blocks do not fit now. Sets ``num_computed`` and ``num_committed`` to what the cache held.
        """
        hits, num_blocks = self._wants(sequence)
        if ahead is not None and ahead.rank < sequence.rank:
            num_blocks += self._wants(ahead)[1]
        if self._queues[_S.RUNNING] or self._queues[_S.READY]:
            num_blocks += self._watermark + self._num_short
        if num_blocks > self.blocks.num_available:
            return False
        self.blocks.acquire(hits)
        total = self.blocks.blocks_for(len(sequence.token_ids))
        sequence.blocks = hits + self.blocks.allocate(total - len(hits))
        sequence.num_registered = len(hits)
        sequence.num_computed = sequence.num_committed = len(hits) * self.blocks.block_size
        if not sequence.has_looked_up:
            sequence.has_looked_up = True
            sequence.num_cached_tokens = min(sequence.num_computed, sequence.num_prompt_tokens)
        return True

    def _wants(self, sequence: Sequence) -> tuple[list[int], int]:
        """Cached blocks to start from, and how many available blocks starting takes in all."""
        blocks = self.blocks
        hits: list[int] = []
        if blocks.enable_prefix_cache and not sequence.owes_prompt_logprobs:
            blocks.extend_keys(sequence.keys, sequence.token_ids, salt=sequence.salt)
            # The last token is always computed: its logits are what is wanted.
            hits = blocks.match(sequence.keys[: (len(sequence.token_ids) - 1) // blocks.block_size])
        num_new = blocks.blocks_for(len(sequence.token_ids)) - len(hits)
        return hits, num_new + blocks.num_idle_among(hits)

    def reserve(self) -> list[Sequence]:
        """Blocks for ``PENDING_BLOCKS`` sequences, in order, as far as memory reaches."""
        reserved: list[Sequence] = []
        waiting = self._queues[_S.WAITING].first
        for sequence in list(self._queues[_S.PENDING_BLOCKS]):
            if not self._give_blocks(sequence, ahead=waiting):
                break
            self.move(sequence, _E.RESERVE)
            reserved.append(sequence)
        return reserved

    def _grow(self, sequence: Sequence) -> bool:
        """Make sure that one more token has a place; preempts from the end of the order."""
        if sequence.num_computed < len(sequence.blocks) * self.blocks.block_size:
            return True
        if not self.blocks.num_available and not self._make_room(sequence):
            return False
        sequence.blocks += self.blocks.allocate(1)
        return True

    def _make_room(self, sequence: Sequence) -> bool:
        """Preempt until a block is free now, or enough will be when plans are committed."""
        self._num_short += 1
        while self._num_promised() < self._num_short:
            victim = self._victim()
            if victim is None:
                return False
            self.move(victim, _E.PREEMPT)
            if victim is sequence:
                self._num_short -= 1
                return False
            if self.blocks.num_available:
                self._num_short -= 1
                return True
        return False

    def _num_promised(self) -> int:
        """Blocks that come free when the uncommitted plans are committed."""
        ending = [
            sequence
            for sequence in self._queues[_S.RUNNING]
            if sequence.draws_last_token and sequence.part is not Part.PREFILL
        ]
        return sum(
            self.blocks.num_references(block) == 1
            for sequence in (*self._queues[_S.PREEMPTED], *self._ended, *ending)
            for block in sequence.blocks
        )

    def _victim(self) -> Sequence | None:
        """The last in rank of those that preemption can help with.

        Not one that is about to be done: its blocks come free, or are held, with the next commit.
        """
        candidates = [
            sequence
            for state in (_S.RUNNING, _S.READY)
            for sequence in self._queues[state]
            if not sequence.draws_last_token
        ]
        return max(candidates, key=lambda item: item.rank, default=None)

    # Accounts.

    def check_integrity(self) -> None:
        """Every block, slot and row is accounted for; raises AssertionError with details."""
        references: dict[int, int] = {}
        slots = list(self._free_slots)
        live = [sequence for queue in self._queues.values() for sequence in queue]
        for sequence in (*live, *self._ended):
            name, state = sequence.request_id, sequence.state
            assert bool(sequence.slot is not None) == (state in HOLDS_SLOT), f"{name}: slot"
            if state is not _S.FINISHED:
                assert bool(sequence.blocks) == (state in HOLDS_BLOCKS), f"{name}: blocks"
                assert sequence in self._queues[state], f"{name}: not in the queue of {state}"
            known = len(sequence.token_ids) + sequence.num_in_flight
            assert sequence.num_committed <= sequence.num_computed <= known, f"{name}: counts"
            assert len(set(sequence.blocks)) == len(sequence.blocks), f"{name}: a block twice"
            for block in sequence.blocks:
                references[block] = references.get(block, 0) + 1
            if sequence.slot is not None:
                slots.append(sequence.slot)
            rows = [row for _, planned in self._plans for row in planned]
            count = sum(row.sequence is sequence for row in rows)
            assert count == sequence.num_plans, f"{name}: {count} plans, {sequence.num_plans} known"
        assert sorted(slots) == list(range(self._max_num_seqs)), f"slots: {sorted(slots)}"
        self.blocks.check_integrity(references)
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
