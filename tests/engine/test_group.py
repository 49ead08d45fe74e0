"""Several dp groups behind the surface of one engine: routing, plans, numbers, accounts."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from baton.core.config import EngineConfig
from baton.core.errors import Code, InvalidRequest, Refused
from baton.core.request import Part, SamplingParams, Submission
from baton.engine.engine import Engine
from baton.engine.events import Event, PrefillProgress, Reserved
from baton.engine.group import EngineGroup, make_engine
from baton.engine.plan import GroupPlan, GroupResult
from baton.engine.states import SequenceState
from tests.engine.engine_bench import submission, tokens
from tests.engine.simulated_runner import SimulatedGroupRunner, generate

CONFIG = EngineConfig(
    block_size=4,
    num_blocks=16,
    max_num_seqs=4,
    max_num_batched_tokens=8,
    async_scheduling=False,
    dp=2,
)
ASYNC = dataclasses.replace(CONFIG, async_scheduling=True)
MAX_MODEL_LEN = 40


class Bench:
    def __init__(self, config: EngineConfig = CONFIG) -> None:
        self.generations = np.zeros(config.dp * config.kv_blocks, dtype=np.uint64)
        self.engine = EngineGroup(
            config, max_model_len=MAX_MODEL_LEN, salt=b"salt", generations=self.generations
        )
        self.runner = SimulatedGroupRunner(config.dp, config.kv_blocks, config.block_size)

    def submit(self, one: Submission, part: Part = Part.WHOLE) -> int:
        self.engine.submit(one, part, 0.0)
        group = self.engine.group_of(one.request_id)
        assert group is not None
        return group

    def plan(self) -> GroupPlan:
        plan = self.engine.schedule(0.0)
        assert plan is not None
        return plan

    def finish(self, plan: GroupPlan) -> list[Event]:
        events = self.engine.commit(plan, self.runner.execute(plan), 0.0)
        self.engine.check_integrity()
        return events

    def run(self) -> list[Event]:
        events: list[Event] = []
        while (plan := self.engine.schedule(0.0)) is not None:
            events += self.finish(plan)
        return events


def busy(plan: GroupPlan) -> list[int]:
    return [group for group, own in enumerate(plan.plans) if own is not None]


# Routing.


def test_the_least_loaded_group_takes_a_sequence_and_the_first_of_equals() -> None:
    bench = Bench(dataclasses.replace(CONFIG, dp=3, enable_prefix_cache=False))
    assert bench.submit(submission("a", range(10))) == 0
    assert bench.submit(submission("b", range(5))) == 1
    assert bench.submit(submission("c", range(7))) == 2
    assert bench.submit(submission("d", range(4))) == 1
    assert bench.submit(submission("e", range(1))) == 2
    bench.engine.abort("a")
    assert bench.submit(submission("f", range(10))) == 0


def test_tokens_of_running_sequences_are_load() -> None:
    bench = Bench()
    sampling = SamplingParams(temperature=0.0, max_tokens=20)
    assert bench.submit(submission("long", range(8), sampling=sampling)) == 0
    for _ in range(4):
        bench.finish(bench.plan())
    assert bench.engine.state_of("long") is SequenceState.RUNNING
    assert bench.submit(submission("b", range(20, 30))) == 1
    # 12 tokens are in the first group, 10 in the second.
    assert bench.submit(submission("c", range(30, 31))) == 1


def test_a_held_prefill_is_no_load() -> None:
    bench = Bench()
    assert bench.submit(submission("held", range(8)), Part.PREFILL) == 0
    bench.run()
    assert bench.engine.state_of("held") is SequenceState.HELD
    assert bench.submit(submission("b", range(20, 30))) == 0


def test_cached_tokens_are_work_that_is_not_left() -> None:
    bench = Bench()
    assert bench.submit(submission("a", range(12))) == 0
    assert bench.submit(submission("b", (*range(4), *range(20, 29)))) == 1
    bench.run()
    before = bench.engine.block_statistics()
    # Eight tokens are cached in the first group, four in the second.
    assert bench.submit(submission("c", (*range(8), *range(50, 60)))) == 0
    # The same again: eighteen open tokens less eight are more than none less four.
    assert bench.submit(submission("d", (*range(8), *range(60, 70)))) == 1
    # Eighteen open tokens in both, and eight of these cached in the second.
    assert bench.submit(submission("e", (*range(4), *range(20, 25)))) == 1
    assert bench.engine.block_statistics() == before, "a query changes nothing"


def test_a_prefix_of_another_tenant_does_not_count() -> None:
    bench = Bench()
    assert bench.submit(submission("a", range(12))) == 0
    bench.run()
    assert bench.submit(submission("load", range(70, 72))) == 0
    assert bench.submit(submission("b", range(12), tenant="other")) == 1
    assert bench.submit(submission("c", range(12))) == 0


def test_the_last_prompt_token_is_no_hit() -> None:
    """A whole prompt that is cached still computes its last block: there the prefix is shorter."""
    bench = Bench()
    assert bench.submit(submission("a", range(4))) == 0
    bench.run()
    assert bench.submit(submission("load", range(70, 72))) == 0
    assert bench.submit(submission("b", range(4))) == 1


def test_refusals_leave_nothing() -> None:
    bench = Bench()
    bench.submit(submission("a", range(10)))
    with pytest.raises(Refused):
        bench.engine.submit(submission("a", range(3)), Part.WHOLE, 0.0)
    with pytest.raises(InvalidRequest) as caught:
        bench.engine.submit(submission("b", range(MAX_MODEL_LEN)), Part.WHOLE, 0.0)
    assert caught.value.code is Code.CONTEXT_LENGTH_EXCEEDED
    assert bench.engine.request_ids() == ["a"]


def test_an_id_that_is_not_here() -> None:
    engine = Bench().engine
    assert not engine.abort("x")
    assert not engine.release("x")
    assert not engine.kv_arrived("x", 1)
    assert not engine.kv_failed("x", 0, None)
    assert engine.state_of("x") is None
    assert engine.group_of("x") is None


# Steps.


def test_one_plan_for_all_groups_and_none_for_an_idle_one() -> None:
    bench = Bench()
    assert bench.engine.schedule(0.0) is None
    one = submission("a", range(3), sampling=SamplingParams(max_tokens=6, seed=1))
    two = submission("b", range(20, 24), sampling=SamplingParams(max_tokens=2, seed=2))
    bench.submit(one)
    first = bench.plan()
    assert (first.step, busy(first), first.num_tokens) == (0, [0], 3)
    events = bench.finish(first)
    bench.submit(two)
    second = bench.plan()
    # The group's own count of steps; each engine keeps its own.
    assert [own.step for own in second.plans if own is not None] == [1, 0]
    assert (second.step, second.num_tokens) == (1, 5)
    events += bench.finish(second) + bench.run()
    for each in (one, two):
        assert tokens(events, each.request_id) == generate(each, MAX_MODEL_LEN)[0]
    assert bench.engine.load().num_steps == bench.runner.next_step == 6
    assert bench.runner.runners[1].next_step == 2
    assert bench.engine.schedule(0.0) is None


def test_at_most_two_plans_are_uncommitted() -> None:
    bench = Bench(ASYNC)
    bench.submit(submission("a", range(30)))
    plans = [bench.plan(), bench.plan()]
    bench.submit(submission("b", range(50, 60)))
    assert bench.engine.schedule(0.0) is None, "the second group waits for the step's turn too"
    events = bench.finish(plans[0])
    third = bench.plan()
    assert busy(third) == [0, 1]
    events += bench.finish(plans[1]) + bench.finish(third) + bench.run()
    assert len(tokens(events, "a")) == len(tokens(events, "b")) == 5


def test_commit_refuses_what_does_not_belong_to_the_oldest_plan() -> None:
    bench = Bench(ASYNC)
    bench.submit(submission("a", range(30)))
    first, second = bench.plan(), bench.plan()
    result = bench.runner.execute(first)
    later = bench.runner.execute(second)
    wrong: list[tuple[GroupPlan, GroupResult]] = [
        (second, later),
        (first, later),
        (first, dataclasses.replace(result, results=result.results[:1])),
        (first, dataclasses.replace(result, results=result.results[::-1])),
        (first, dataclasses.replace(later, step=first.step)),
    ]
    for plan, given in wrong:
        with pytest.raises(ValueError):
            bench.engine.commit(plan, given, 0.0)
        bench.engine.check_integrity()
    with pytest.raises(ValueError, match="oldest"):
        bench.engine.fail_plan(second)
    bench.engine.commit(first, result, 0.0)
    bench.engine.commit(second, later, 0.0)
    assert tokens(bench.run()) == generate(submission("a", range(30)), MAX_MODEL_LEN)[0]


def test_a_result_that_is_wrong_for_one_group_changes_no_group() -> None:
    bench = Bench()
    bench.submit(submission("a", range(3)))
    bench.submit(submission("b", range(20, 23)))
    plan = bench.plan()
    result = bench.runner.execute(plan)
    second = result.results[1]
    assert second is not None
    short = dataclasses.replace(second, rows=())
    with pytest.raises(ValueError):
        bench.engine.commit(
            plan, dataclasses.replace(result, results=(result.results[0], short)), 0
        )
    events = bench.engine.commit(plan, result, 0.0)
    assert len(tokens(events, "a")) == len(tokens(events, "b")) == 1


def test_a_failed_step_takes_the_sequences_of_its_groups_only() -> None:
    bench = Bench(ASYNC)
    bench.submit(submission("a", range(30)))
    first, second = bench.plan(), bench.plan()
    bench.submit(submission("b", range(50, 60)))
    assert bench.engine.fail_plan(first) == ["a"]
    bench.engine.check_integrity()
    third = bench.plan()
    assert busy(third) == [1]
    assert bench.engine.fail_plan(second) == []
    bench.runner.next_step = third.step
    events = bench.finish(third) + bench.run()
    assert tokens(events, "b") == generate(submission("b", range(50, 60)), MAX_MODEL_LEN)[0]
    assert not tokens(events, "a")
    assert bench.engine.block_statistics().num_referenced == 0


def test_a_failed_step_of_both_groups() -> None:
    bench = Bench()
    bench.submit(submission("a", range(3)))
    bench.submit(submission("b", range(20, 23)))
    assert sorted(bench.engine.fail_plan(bench.plan())) == ["a", "b"]
    assert bench.engine.request_ids() == []
    assert bench.engine.block_statistics().num_referenced == 0


# Numbers.


def test_events_name_blocks_of_the_arena() -> None:
    bench = Bench()
    bench.submit(submission("load", range(40, 45)))
    assert bench.submit(submission("p", range(10)), Part.PREFILL) == 1
    progress = [e for e in bench.run() if isinstance(e, PrefillProgress)]
    assert progress[-1].final
    for event in progress:
        assert set(event.blocks) <= set(range(16, 32))
        assert list(event.generations) == bench.generations[list(event.blocks)].tolist()
        history = bench.runner.read(event.blocks, event.num_computed_tokens)
        assert history == list(range(10))[: event.num_computed_tokens]
    assert bench.engine.release("p")

    bench.submit(submission("more", range(60, 65)))
    sub = submission("d", range(70, 80))
    assert bench.submit(sub, Part.DECODE) == 1
    (reserved,) = bench.engine.admit(0.0)
    assert isinstance(reserved, Reserved)
    assert set(reserved.blocks) <= set(range(16, 32))
    for position, token in enumerate(sub.prompt_ids):
        bench.runner.write(reserved.blocks, position, token)
    expected = generate(sub, MAX_MODEL_LEN)[0]
    assert bench.engine.kv_arrived("d", expected[0])
    assert tokens(bench.run(), "d") == expected[1:]


def test_plans_name_the_groups_own_blocks() -> None:
    bench = Bench()
    for name, first in (("a", 0), ("b", 50)):
        bench.submit(submission(name, range(first, first + 8)))
    for own in bench.plan().plans:
        assert own is not None
        assert {block for row in own.rows for block in row.block_table} <= set(range(16))
        assert {row.slot for row in own.rows} <= set(range(4))


def test_a_group_raises_generations_in_its_slice_only() -> None:
    bench = Bench()
    bench.submit(submission("a", range(8)))
    bench.plan()
    assert bench.generations[:16].sum() == 2
    assert not bench.generations[16:].any()


def test_totals_are_sums() -> None:
    bench = Bench()
    bench.submit(submission("a", range(8)))
    bench.submit(submission("b", range(20, 32)))
    load, blocks = bench.engine.load(), bench.engine.block_statistics()
    assert (load.num_waiting, load.num_waiting_tokens, load.num_steps) == (2, 20, 0)
    assert (blocks.num_blocks, blocks.num_free, load.num_free_blocks) == (32, 32, 32)
    bench.finish(bench.plan())
    load, blocks = bench.engine.load(), bench.engine.block_statistics()
    assert (load.num_running, load.num_steps) == (2, 1)
    assert blocks.num_referenced == 2 + 3
    assert blocks.num_free + blocks.num_idle + blocks.num_referenced == 32


def test_generations_must_fit() -> None:
    with pytest.raises(ValueError, match=r"\(32,\)"):
        EngineGroup(CONFIG, max_model_len=9, salt=b"", generations=np.zeros(16, dtype=np.uint64))


@pytest.mark.parametrize(("dp", "kind"), [(1, Engine), (2, EngineGroup)])
def test_make_engine(dp: int, kind: type[Any]) -> None:
    engine = make_engine(dataclasses.replace(CONFIG, dp=dp), max_model_len=1000, salt=b"")
    assert type(engine) is kind
    assert engine.max_model_len == 64, "a sequence lies in one group's blocks"
    assert engine.block_statistics().num_blocks == 16 * dp
