"""The facade: ends, aborts, plans in flight, failures."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from baton.core.config import EngineConfig
from baton.core.errors import Code, InvalidRequest, Refused
from baton.core.request import FinishReason, Part, SamplingParams
from baton.engine.engine import Engine
from baton.engine.events import Preempted, TokensReady
from baton.engine.plan import StepResult
from baton.engine.states import SequenceState
from tests.engine.engine_bench import ASYNC, CONFIG, Bench, reserve, submission, tokens
from tests.engine.simulated_runner import generate


@pytest.mark.parametrize("config", [CONFIG, ASYNC])
def test_a_whole_sequence_is_generated_and_leaves_nothing(config: EngineConfig) -> None:
    bench, wanted = Bench(config), submission()
    bench.engine.submit(wanted, Part.WHOLE, 0.0)
    events = bench.run()
    assert tokens(events) == generate(wanted, 100)[0]
    assert isinstance(events[-1], TokensReady)
    assert events[-1].finish_reason is FinishReason.LENGTH
    assert bench.engine.request_ids() == []
    assert bench.num_held() == 0
    load = bench.engine.load()
    assert load.num_finished == 1
    assert load.num_free_blocks + load.num_cached_blocks == 32


def test_sampling_draws_from_seed_choice_and_output_index() -> None:
    sampling = SamplingParams(seed=2**64 - 1, max_tokens=6)
    wanted = submission(sampling=sampling, choice=3, output_ids=(1, 2))
    bench = Bench()
    bench.engine.submit(wanted, Part.WHOLE, 0.0)
    events = bench.run()
    assert tokens(events) == generate(wanted, 100)[0][2:]
    first = events[0]
    assert isinstance(first, TokensReady)
    assert first.index == 2


def test_a_stop_token_ends_it_and_is_told() -> None:
    plain = generate(submission(), 100)[0]
    stop = plain[2]
    sampling = SamplingParams(temperature=0.0, max_tokens=5, stop_token_ids=(stop,))
    bench = Bench()
    bench.engine.submit(submission(sampling=sampling), Part.WHOLE, 0.0)
    last = bench.run()[-1]
    assert isinstance(last, TokensReady)
    assert (last.finish_reason, last.stop_token_id) == (FinishReason.STOP, stop)
    assert last.token_ids == (stop,)
    assert last.index == plain.index(stop)


def test_the_context_ends_it() -> None:
    bench = Bench(max_model_len=12)
    bench.engine.submit(submission(), Part.WHOLE, 0.0)
    events = bench.run()
    assert len(tokens(events)) == 2
    assert isinstance(events[-1], TokensReady)
    assert events[-1].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("part", list(Part))
@pytest.mark.parametrize(("num_blocks", "max_model_len"), [(32, 10), (2, 100)])
def test_what_can_never_fit_is_refused(part: Part, num_blocks: int, max_model_len: int) -> None:
    config = dataclasses.replace(CONFIG, num_blocks=num_blocks)
    bench = Bench(config, max_model_len=max_model_len)
    with pytest.raises(InvalidRequest, match="at most") as caught:
        bench.engine.submit(submission(), part, 0.0)
    assert caught.value.code is Code.CONTEXT_LENGTH_EXCEEDED
    assert caught.value.param == "prompt"
    assert bench.engine.request_ids() == []


def test_a_request_id_is_taken_once_at_a_time() -> None:
    bench = Bench()
    bench.engine.submit(submission(), Part.WHOLE, 0.0)
    with pytest.raises(Refused, match="already here"):
        bench.engine.submit(submission(attempt=1), Part.WHOLE, 0.0)
    assert bench.engine.abort("a")
    bench.engine.submit(submission(attempt=1), Part.WHOLE, 0.0)
    assert bench.engine.state_of("a") is SequenceState.WAITING


def test_the_next_plan_is_made_while_one_runs() -> None:
    bench, wanted = Bench(ASYNC), submission(prompt=range(4))
    bench.engine.submit(wanted, Part.WHOLE, 0.0)
    first = bench.plan()
    second = bench.plan()
    assert second.rows[0].token_ids is None
    assert second.rows[0].start == 4
    assert bench.engine.schedule(0.0) is None, "two plans are uncommitted"
    with pytest.raises(ValueError, match="not the oldest"):
        bench.engine.fail_plan(second)
    events = bench.finish(first)
    third = bench.plan()
    assert third.rows[0].token_ids is None
    events += bench.finish(second) + bench.finish(third)
    assert tokens(events) == generate(wanted, 100)[0][:3]


def test_the_row_after_the_end_is_dropped_and_blocks_stay_until_then() -> None:
    stop = generate(submission(prompt=range(4)), 100)[0][0]
    sampling = SamplingParams(temperature=0.0, max_tokens=5, stop_token_ids=(stop,))
    bench = Bench(ASYNC)
    bench.engine.submit(submission(prompt=range(4), sampling=sampling), Part.WHOLE, 0.0)
    first, second = bench.plan(), bench.plan()
    (ready,) = bench.finish(first)
    assert isinstance(ready, TokensReady)
    assert ready.finish_reason is FinishReason.STOP
    assert bench.engine.state_of("a") is None
    assert bench.num_held() == 2, "the second plan still writes"
    assert bench.finish(second) == []
    assert bench.num_held() == 0


def test_no_row_is_planned_after_the_certainly_last_token() -> None:
    bench = Bench(ASYNC)
    once = SamplingParams(temperature=0.0, max_tokens=1)
    bench.engine.submit(submission(prompt=range(4), sampling=once), Part.WHOLE, 0.0)
    plan = bench.plan()
    assert bench.engine.schedule(0.0) is None
    bench.finish(plan)
    assert bench.engine.request_ids() == []


def test_abort_of_a_running_sequence_waits_for_its_plans() -> None:
    bench = Bench(ASYNC)
    bench.engine.submit(submission(), Part.WHOLE, 0.0)
    first, second = bench.plan(), bench.plan()
    assert bench.engine.abort("a")
    assert not bench.engine.abort("a")
    bench.engine.submit(submission(attempt=1), Part.WHOLE, 0.0)
    assert bench.num_held() == 3
    assert bench.finish(first) == []
    third = bench.plan()
    assert not {row.block_table for row in third.rows} & {row.block_table for row in second.rows}
    assert bench.finish(second) == []
    assert tokens(bench.finish(third) + bench.run()) == generate(submission(), 100)[0]


@pytest.mark.parametrize(
    ("part", "num_acts", "state"),
    [
        (Part.WHOLE, 0, SequenceState.WAITING),
        (Part.WHOLE, 2, SequenceState.RUNNING),
        (Part.PREFILL, 2, SequenceState.RUNNING),
        (Part.PREFILL, 3, SequenceState.HELD),
        (Part.DECODE, 0, SequenceState.PENDING_BLOCKS),
        (Part.DECODE, 1, SequenceState.PENDING_KV),
    ],
)
def test_abort_frees_in_every_state(part: Part, num_acts: int, state: SequenceState) -> None:
    bench = Bench()
    bench.engine.submit(submission(), part, 0.0)
    acts = [lambda: bench.engine.admit(0.0), bench.step, bench.step]
    for act in acts[:num_acts]:
        act()
    assert bench.engine.state_of("a") is state
    assert bench.engine.abort("a")
    assert bench.num_held() == 0
    assert bench.engine.schedule(0.0) is None
    bench.engine.check_integrity()


def test_abort_of_a_ready_sequence_frees_it() -> None:
    bench = Bench()
    bench.engine.submit(submission(), Part.DECODE, 0.0)
    reserve(bench)
    assert bench.engine.kv_arrived("a", 1)
    assert bench.engine.state_of("a") is SequenceState.READY
    assert bench.engine.abort("a")
    assert bench.num_held() == 0


def test_a_failed_plan_drops_its_sequences_only() -> None:
    config = dataclasses.replace(CONFIG, max_num_batched_tokens=10)
    bench = Bench(config)
    bench.engine.submit(submission(), Part.WHOLE, 0.0)
    bench.engine.submit(submission("b"), Part.WHOLE, 0.0)
    assert bench.engine.fail_plan(bench.plan()) == ["a"]
    assert bench.num_held() == 0
    assert bench.engine.request_ids() == ["b"]
    bench.runner.next_step = 1
    assert tokens(bench.run(), "b") == generate(submission("b"), 100)[0]


def test_a_failed_plan_voids_what_builds_on_it() -> None:
    bench = Bench(ASYNC)
    bench.engine.submit(submission(prompt=range(4)), Part.WHOLE, 0.0)
    first, second = bench.plan(), bench.plan()
    assert bench.engine.fail_plan(first) == ["a"]
    assert bench.num_held() == 2
    assert bench.engine.fail_plan(second) == []
    assert bench.num_held() == 0
    bench.engine.check_integrity()


def test_a_step_may_draw_nothing() -> None:
    bench, wanted = Bench(ASYNC), submission(prompt=range(4))
    bench.engine.submit(wanted, Part.WHOLE, 0.0)
    bench.runner.declines = lambda: True
    first, second = bench.plan(), bench.plan()
    assert bench.finish(first) == []
    bench.runner.declines = lambda: False
    third = bench.plan()
    assert third.rows[0].token_ids == (3,)
    assert bench.finish(second) == [], "it built on a token that did not come"
    assert tokens(bench.finish(third) + bench.run()) == generate(wanted, 100)[0]


def test_preemption_recomputes_the_last_in_rank() -> None:
    config = dataclasses.replace(CONFIG, num_blocks=5, enable_prefix_cache=False)
    bench = Bench(config, max_model_len=20)
    sampling = SamplingParams(temperature=0.0, max_tokens=8)
    low = submission("low", range(7), sampling=sampling)
    high = submission("high", range(1, 8), sampling=sampling, priority=1)
    bench.engine.submit(low, Part.WHOLE, 0.0)
    events = bench.step()
    bench.engine.submit(high, Part.WHOLE, 0.0)
    events += bench.run()
    assert Preempted("low") in events
    assert Preempted("high") not in events
    assert tokens(events, "low") == generate(low, 20)[0]
    assert tokens(events, "high") == generate(high, 20)[0]
    assert bench.engine.load().num_preemptions == events.count(Preempted("low"))


def test_a_result_of_another_step_is_refused() -> None:
    bench = Bench()
    bench.engine.submit(submission(), Part.WHOLE, 0.0)
    plan = bench.plan()
    with pytest.raises(ValueError, match="is not of"):
        bench.engine.commit(plan, StepResult(plan.step, (), 0.0), 0.0)
    with pytest.raises(ValueError, match="not the oldest"):
        bench.engine.fail_plan(dataclasses.replace(plan))
    assert bench.finish(plan) == []


def test_unknown_requests_are_no_news() -> None:
    engine = Bench().engine
    assert not engine.abort("x")
    assert not engine.release("x")
    assert not engine.kv_arrived("x", 0)
    assert not engine.kv_failed("x", 0, None)
    assert engine.state_of("x") is None


def test_generations_live_where_the_caller_says() -> None:
    generations = np.zeros(CONFIG.kv_blocks, dtype=np.uint64)
    engine = Engine(CONFIG, max_model_len=100, salt=b"s", generations=generations)
    engine.submit(submission(), Part.WHOLE, 0.0)
    assert engine.schedule(0.0) is not None
    assert generations.sum() == 3


def test_waiting_for_memory_ends_with_a_release() -> None:
    config = dataclasses.replace(CONFIG, num_blocks=4)
    bench = Bench(config)
    bench.engine.submit(submission(), Part.PREFILL, 0.0)
    bench.run()
    bench.engine.submit(submission("b", range(20, 30)), Part.WHOLE, 0.0)
    assert bench.engine.schedule(0.0) is None, "only a release can help now"
    assert bench.engine.release("a")
    assert tokens(bench.run(), "b") == generate(submission("b", range(20, 30)), 16)[0]
