"""What goes into a plan, and in which order memory and slots are given."""

from __future__ import annotations

import dataclasses

import pytest

from baton.core.config import EngineConfig
from baton.core.philox import uniforms
from baton.core.request import Part, SamplingParams, Submission
from baton.engine.block_manager import BlockManager
from baton.engine.plan import StepPlan
from baton.engine.scheduler import Scheduler
from baton.engine.sequence import RankedQueue, Sequence
from baton.engine.states import SequenceEvent, SequenceState

CONFIG = EngineConfig(
    block_size=4,
    num_blocks=100,
    max_num_seqs=3,
    max_num_batched_tokens=8,
    async_scheduling=False,
    enable_prefix_cache=False,
)


class Bench:
    def __init__(self, **changes: object) -> None:
        config = dataclasses.replace(CONFIG, **changes)  # type: ignore[arg-type]
        self.blocks = BlockManager(
            config.kv_blocks,
            config.block_size,
            salt=b"s",
            enable_prefix_cache=config.enable_prefix_cache,
        )
        self.scheduler = Scheduler(config, self.blocks)
        self.count = 0

    def add(
        self, num_tokens: int, *, priority: int = 0, decode: bool = False, temperature: float = 0.0
    ) -> Sequence:
        self.count += 1
        submission = Submission(
            request_id=f"r{self.count}",
            attempt=0,
            prompt_ids=tuple(range(num_tokens)),
            sampling=SamplingParams(max_tokens=90, temperature=temperature, seed=self.count),
            choice=self.count,
        )
        sequence = Sequence(
            submission=submission,
            part=Part.DECODE if decode else Part.WHOLE,
            rank=(-priority, self.count),
            salt=b"s",
            max_num_tokens=num_tokens + 90,
            state=SequenceState.PENDING_BLOCKS if decode else SequenceState.WAITING,
            token_ids=list(submission.prompt_ids),
            stop_token_ids=frozenset(),
            owes_prompt_logprobs=False,
        )
        self.scheduler.add(sequence)
        return sequence

    def plan(self) -> StepPlan:
        plan = self.scheduler.schedule()
        assert plan is not None
        self.scheduler.check_integrity()
        return plan

    def commit(self, plan: StepPlan) -> None:
        """As the engine does it, without events."""
        for row in self.scheduler.retire(plan):
            sequence = row.sequence
            sequence.num_committed = row.step.start + row.step.num_tokens
            if row.step.sample:
                sequence.num_in_flight -= 1
                sequence.token_ids.append(7)
            self.scheduler.row_done(row)
        self.scheduler.check_integrity()

    def step(self) -> list[tuple[str, int]]:
        """(request id, tokens) of each row."""
        plan = self.plan()
        running = self.scheduler.queue(SequenceState.RUNNING)
        names = {sequence.slot: sequence.request_id for sequence in running}
        rows = [(names[row.slot], row.num_tokens) for row in plan.rows]
        self.commit(plan)
        return rows


def test_prompts_are_cut_into_chunks_of_the_budget() -> None:
    bench = Bench()
    bench.add(20)
    plans = []
    for _ in range(3):
        plans.append(bench.plan())
        bench.commit(plans[-1])
    assert [(row.start, row.num_tokens, row.sample) for p in plans for row in p.rows] == [
        (0, 8, False),
        (8, 8, False),
        (16, 4, True),
    ]
    assert [len(plan.begins) for plan in plans] == [1, 0, 0]


def test_decodes_come_before_prefills_and_share_the_budget() -> None:
    bench = Bench()
    bench.add(4)
    assert bench.step() == [("r1", 4)]
    bench.add(20)
    assert bench.step() == [("r1", 1), ("r2", 7)]
    bench.add(3)
    assert bench.step() == [("r1", 1), ("r2", 7)]
    assert bench.step() == [("r1", 1), ("r2", 6), ("r3", 1)]
    assert bench.step() == [("r1", 1), ("r2", 1), ("r3", 2)]


def test_higher_priority_goes_first_then_arrival() -> None:
    bench = Bench()
    for priority in (0, 1, 0, 1):
        bench.add(3, priority=priority)
    assert bench.step() == [("r2", 3), ("r4", 3), ("r1", 2)]


def test_slots_bound_the_rows_and_are_taken_again() -> None:
    bench = Bench()
    sequences = [bench.add(1) for _ in range(4)]
    assert [name for name, _ in bench.step()] == ["r1", "r2", "r3"]
    slot = sequences[1].slot
    bench.scheduler.move(sequences[1], SequenceEvent.FINISH)
    plan = bench.plan()
    assert [begin.slot for begin in plan.begins] == [slot]
    assert sorted(row.slot for row in plan.rows) == [0, 1, 2]


def test_one_plan_at_a_time_without_async() -> None:
    bench = Bench()
    bench.add(4)
    plan = bench.plan()
    assert bench.scheduler.schedule() is None
    bench.commit(plan)
    assert bench.scheduler.schedule() is not None


def test_two_plans_at_a_time_with_async() -> None:
    bench = Bench(async_scheduling=True)
    sequence = bench.add(10)
    chunk, last = bench.plan(), bench.plan()
    assert [row.start for row in (*chunk.rows, *last.rows)] == [0, 8]
    assert bench.scheduler.schedule() is None
    bench.commit(chunk)
    decode = bench.plan()
    assert decode.rows[0].token_ids is None
    assert sequence.num_in_flight == 2
    with pytest.raises(ValueError, match="not the oldest"):
        bench.scheduler.retire(decode)


def test_uniforms_belong_to_seed_choice_and_output_index() -> None:
    bench = Bench()
    bench.add(2, temperature=1.0)
    bench.add(2)
    bench.add(2, temperature=1.0)
    bench.step()
    plan = bench.plan()
    expected = uniforms([1, 3], [1, 3], [1, 1])
    assert [row.uniform for row in plan.rows] == [expected[0], 0.0, expected[1]]


def test_a_block_table_covers_exactly_what_is_computed() -> None:
    bench = Bench()
    bench.add(20)
    lengths = []
    for _ in range(8):
        plan = bench.plan()
        (row,) = plan.rows
        lengths.append((row.start + row.num_tokens, len(row.block_table)))
        bench.commit(plan)
    assert lengths == [(8, 2), (16, 4), (20, 5), (21, 6), (22, 6), (23, 6), (24, 6), (25, 7)]


def test_a_table_is_copied_only_when_it_changes() -> None:
    bench = Bench()
    bench.add(5)
    bench.step()
    plans = []
    for _ in range(2):
        plans.append(bench.plan())
        bench.commit(plans[-1])
    assert plans[0].rows[0].block_table is plans[1].rows[0].block_table


def test_a_few_blocks_stay_free_for_those_that_run() -> None:
    bench = Bench(num_blocks=4)
    bench.add(4)
    bench.step()
    late = bench.add(9)
    bench.step()
    assert late.state is SequenceState.WAITING, "three blocks are free, one is kept back"
    assert bench.blocks.num_available >= 2


def test_all_blocks_may_go_to_the_only_one() -> None:
    bench = Bench(num_blocks=4)
    bench.add(16)
    assert bench.step() == [("r1", 8)]
    assert bench.blocks.num_available == 0


def test_nobody_overtakes_a_waiting_sequence_that_does_not_fit() -> None:
    bench = Bench(num_blocks=6)
    bench.add(8)
    bench.step()
    big, small = bench.add(16), bench.add(1)
    bench.step()
    assert (big.state, small.state) == (SequenceState.WAITING, SequenceState.WAITING)
    reservation = bench.add(1, decode=True)
    assert bench.scheduler.reserve() == []
    urgent = bench.add(1, decode=True, priority=1)
    assert bench.scheduler.reserve() == [urgent]
    assert reservation.state is SequenceState.PENDING_BLOCKS


def test_a_reservation_leaves_room_for_a_waiting_sequence_before_it() -> None:
    bench = Bench(num_blocks=6)
    waiting = bench.add(16)
    large, small = bench.add(12, decode=True), bench.add(8, decode=True, priority=1)
    assert bench.scheduler.reserve() == [small], "it ranks before the waiting one"
    assert bench.scheduler.reserve() == []
    bench.step()
    assert waiting.state is SequenceState.RUNNING
    assert large.state is SequenceState.PENDING_BLOCKS


def test_waiting_ones_do_not_overtake_a_reservation_that_does_not_fit() -> None:
    bench = Bench(num_blocks=6)
    bench.add(8)
    bench.step()
    big = bench.add(16, decode=True)
    small = bench.add(1)
    assert bench.scheduler.reserve() == []
    bench.step()
    assert big.state is SequenceState.PENDING_BLOCKS
    assert small.state is SequenceState.WAITING


def test_the_last_in_rank_is_preempted_and_nobody_new_starts_meanwhile() -> None:
    bench = Bench(num_blocks=3)
    first, second = bench.add(4), bench.add(4)
    bench.add(4)
    assert bench.step() == [("r1", 4), ("r2", 4)]
    assert bench.step() == [("r1", 1)], "the only free block went to the first"
    assert second.state is SequenceState.WAITING
    assert second.token_ids[-1] == 7
    assert bench.scheduler.preempted == ["r2"]
    assert first.state is SequenceState.RUNNING


def test_a_victim_in_flight_gives_its_blocks_back_at_the_commit() -> None:
    bench = Bench(num_blocks=4, max_num_batched_tokens=16, async_scheduling=True)
    first, second = bench.add(7), bench.add(4)
    prefill, decode = bench.plan(), bench.plan()
    assert bench.blocks.num_available == 0
    bench.commit(prefill)
    # The first needs a third block. The second must give way, but a plan still writes to its own.
    assert bench.scheduler.schedule() is None
    assert (first.state, second.state) == (SequenceState.RUNNING, SequenceState.PREEMPTED)
    assert second.slot is None
    assert len(second.blocks) == 2
    assert bench.scheduler.preempted == []
    bench.commit(decode)
    assert second.state is SequenceState.WAITING
    assert second.blocks == []
    assert len(second.token_ids) == 6, "what was drawn meanwhile is kept"
    assert bench.scheduler.preempted == ["r2"]
    assert [row.start for row in bench.plan().rows] == [8]
    assert len(first.blocks) == 3


def test_blocks_of_a_sequence_about_to_end_are_waited_for() -> None:
    bench = Bench(num_blocks=4, max_num_batched_tokens=16, async_scheduling=True)
    first, second = bench.add(7), bench.add(4)
    second.max_num_tokens = 6
    prefill, _ = bench.plan(), bench.plan()
    bench.commit(prefill)
    assert bench.scheduler.schedule() is None
    assert (first.state, second.state) == (SequenceState.RUNNING, SequenceState.RUNNING)


def test_without_its_blocks_a_sequence_starts_afresh_but_for_its_tokens() -> None:
    bench = Bench()
    sequence = bench.add(9)
    bench.step()
    sequence.num_registered, sequence.may_register = 1, False
    table = sequence.block_table(3)
    assert sequence.take_blocks() == list(table)
    assert (sequence.num_computed, sequence.num_committed, sequence.num_registered) == (0, 0, 0)
    assert sequence.may_register
    assert sequence.block_table(3) == ()
    assert len(sequence.token_ids) == 9
    assert sequence.num_uncomputed == 9


def test_a_queue_is_ordered_by_rank() -> None:
    bench = Bench()
    items = [bench.add(1, priority=priority) for priority in (0, 2, 1, 2)]
    queue = RankedQueue()
    for item in items:
        queue.add(item)
    assert [item.request_id for item in queue] == ["r2", "r4", "r3", "r1"]
    assert queue.first is items[1]
    queue.remove(items[1])
    assert items[1] not in queue
    assert items[3] in queue
    assert len(queue) == 3
    with pytest.raises(AssertionError, match="not in its queue"):
        queue.remove(items[1])
