"""The facade: what each part of a submission goes through, one scenario a test."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from baton.core.config import EngineConfig
from baton.core.errors import Code, InvalidRequest, Refused
from baton.core.request import FinishReason, Part, SamplingParams, Submission
from baton.engine.engine import Engine
from baton.engine.events import Event, Preempted, PrefillProgress, Reserved, TokensReady
from baton.engine.plan import StepPlan, StepResult
from baton.engine.states import SequenceState
from tests.engine.simulated_runner import SimulatedRunner, generate

CONFIG = EngineConfig(
    block_size=4, num_blocks=32, max_num_seqs=4, max_num_batched_tokens=8, async_scheduling=False
)
ASYNC = dataclasses.replace(CONFIG, async_scheduling=True)


class Bench:
    """An engine with its simulated runner."""

    def __init__(self, config: EngineConfig = CONFIG, *, max_model_len: int = 100) -> None:
        self.engine = Engine(config, max_model_len=max_model_len, salt=b"salt")
        self.runner = SimulatedRunner(config.block_size)

    def plan(self) -> StepPlan:
        plan = self.engine.schedule(0.0)
        assert plan is not None
        return plan

    def finish(self, plan: StepPlan) -> list[Event]:
        events = self.engine.commit(plan, self.runner.execute(plan), 0.0)
        self.engine.check_integrity()
        return events

    def step(self) -> list[Event]:
        return self.finish(self.plan())

    def run(self) -> list[Event]:
        """Until nothing is left to do."""
        events: list[Event] = []
        while (plan := self.engine.schedule(0.0)) is not None:
            events += self.finish(plan)
        assert not self.engine.has_work()
        return events

    def num_held(self) -> int:
        return self.engine.block_statistics().num_referenced


def submission(
    name: str = "a", prompt: range | tuple[int, ...] = range(10), **changes: Any
) -> Submission:
    sampling = SamplingParams(temperature=0.0, max_tokens=5)
    values = {"attempt": 0, "sampling": sampling, **changes}
    return Submission(request_id=name, prompt_ids=tuple(prompt), **values)


def tokens(events: list[Event], name: str = "a") -> list[int]:
    ready = [e for e in events if isinstance(e, TokensReady) and e.request_id == name]
    return [token for event in ready for token in event.token_ids]


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


def test_prefill_publishes_chunks_then_holds_until_released() -> None:
    bench, wanted = Bench(), submission()
    bench.engine.submit(wanted, Part.PREFILL, 0.0)
    (first,) = bench.step()
    assert isinstance(first, PrefillProgress)
    assert (first.num_computed_tokens, len(first.blocks), first.final) == (8, 2, False)
    final, ready = bench.step()
    assert isinstance(final, PrefillProgress)
    assert isinstance(ready, TokensReady)
    assert (final.num_computed_tokens, len(final.blocks), final.final) == (10, 3, True)
    assert final.blocks[:2] == first.blocks
    assert final.generations == (1, 1, 1)
    assert ready.token_ids == tuple(generate(wanted, 100)[0][:1])
    assert ready.finish_reason is None
    assert bench.engine.state_of("a") is SequenceState.HELD
    assert bench.engine.load().num_held == 1
    assert not bench.engine.has_work()
    assert bench.num_held() == 3
    assert bench.engine.release("a")
    assert not bench.engine.release("a")
    assert bench.num_held() == 0


def test_a_partial_block_is_not_published_before_the_end() -> None:
    config = dataclasses.replace(CONFIG, max_num_batched_tokens=6)
    bench = Bench(config)
    bench.engine.submit(submission(), Part.PREFILL, 0.0)
    (event,) = bench.step()
    assert isinstance(event, PrefillProgress)
    assert (event.num_computed_tokens, len(event.blocks)) == (4, 1)


def test_a_prefill_that_ends_at_its_first_token_is_not_held() -> None:
    bench = Bench()
    once = SamplingParams(temperature=0.0, max_tokens=1)
    bench.engine.submit(submission(sampling=once), Part.PREFILL, 0.0)
    bench.step()
    (ready,) = bench.step()
    assert isinstance(ready, TokensReady)
    assert ready.finish_reason is FinishReason.LENGTH
    assert bench.engine.state_of("a") is None
    assert bench.num_held() == 0


def reserve(bench: Bench) -> Reserved:
    (event,) = bench.engine.admit(0.0)
    assert isinstance(event, Reserved)
    return event


def test_decode_goes_on_after_the_handoff() -> None:
    bench, wanted = Bench(), submission()
    expected = generate(wanted, 100)[0]
    bench.engine.submit(wanted, Part.DECODE, 0.0)
    assert bench.engine.state_of("a") is SequenceState.PENDING_BLOCKS
    assert bench.engine.schedule(0.0) is None
    assert not bench.engine.kv_arrived("a", expected[0])
    event = reserve(bench)
    assert (len(event.blocks), event.num_cached_tokens) == (3, 0)
    assert bench.engine.load().num_pending_kv == 1
    for position, token in enumerate(wanted.prompt_ids):
        bench.runner.write(event.blocks, position, token)
    assert bench.engine.kv_arrived("a", expected[0])
    plan = bench.plan()
    assert plan.begins[0].output_ids == (expected[0],)
    assert plan.rows[0].token_ids == (expected[0],)
    events = bench.finish(plan) + bench.run()
    assert tokens(events) == expected[1:]
    assert isinstance(events[0], TokensReady)
    assert (events[0].index, events[0].num_cached_tokens) == (1, 0)


def test_arrived_blocks_are_reused_by_the_next_reservation() -> None:
    bench, wanted = Bench(), submission()
    bench.engine.submit(wanted, Part.DECODE, 0.0)
    event = reserve(bench)
    bench.engine.submit(submission("b"), Part.DECODE, 0.0)
    assert reserve(bench).num_cached_tokens == 0, "bytes on their way are not shared"
    for position, token in enumerate(wanted.prompt_ids):
        bench.runner.write(event.blocks, position, token)
    assert bench.engine.kv_arrived("a", 1)
    bench.engine.submit(submission("c"), Part.DECODE, 0.0)
    second = reserve(bench)
    assert second.num_cached_tokens == 8
    assert second.blocks[:2] == event.blocks[:2]
    bench.engine.check_integrity()


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("num_valid", [0, 3, 4, 7, 10])
def test_decode_computes_itself_what_did_not_come(known: bool, num_valid: int) -> None:
    bench, wanted = Bench(), submission()
    expected = generate(wanted, 100)[0]
    bench.engine.submit(wanted, Part.DECODE, 0.0)
    event = reserve(bench)
    for position in range(num_valid):
        bench.runner.write(event.blocks, position, wanted.prompt_ids[position])
    assert bench.engine.kv_failed("a", num_valid, expected[0] if known else None)
    plan = bench.plan()
    assert plan.rows[0].start == num_valid // 4 * 4
    events = bench.finish(plan) + bench.run()
    assert tokens(events) == expected[known:]
    assert not bench.engine.kv_failed("a", 0, None)


def test_decode_that_never_got_blocks_computes_everything() -> None:
    bench, wanted = Bench(), submission()
    bench.engine.submit(wanted, Part.DECODE, 0.0)
    assert bench.engine.kv_failed("a", 0, None)
    assert bench.engine.state_of("a") is SequenceState.WAITING
    assert tokens(bench.run()) == generate(wanted, 100)[0]


def test_a_first_token_that_ends_the_request_here_is_told() -> None:
    bench = Bench(max_model_len=11)
    bench.engine.submit(submission(), Part.DECODE, 0.0)
    reserve(bench)
    assert bench.engine.kv_arrived("a", 1)
    (event,) = bench.engine.admit(0.0)
    assert isinstance(event, TokensReady)
    assert (event.index, event.token_ids) == (1, ())
    assert event.finish_reason is FinishReason.LENGTH
    assert bench.num_held() == 0


def test_a_cached_prefix_is_reused_but_for_the_last_token() -> None:
    bench = Bench()
    prompt = range(12)
    wanted = submission(prompt=prompt)
    bench.engine.submit(wanted, Part.WHOLE, 0.0)
    first = bench.run()
    bench.engine.submit(submission("b", prompt), Part.WHOLE, 0.0)
    plan = bench.plan()
    assert plan.rows[0].start == 8, "the whole prompt is cached, and its last token is computed"
    second = bench.finish(plan) + bench.run()
    assert tokens(second, "b") == tokens(first)
    cached = [e.num_cached_tokens for e in second if isinstance(e, TokensReady)]
    assert cached == [8, None, None, None, None]


@pytest.mark.parametrize("changes", [{"tenant": "t"}, {"adapter": "x"}])
def test_tenants_and_adapters_share_nothing(changes: dict[str, Any]) -> None:
    bench = Bench()
    bench.engine.submit(submission(), Part.WHOLE, 0.0)
    bench.run()
    bench.engine.submit(submission("b", **changes), Part.WHOLE, 0.0)
    assert bench.plan().rows[0].start == 0


def test_prompt_logprobs_reuse_nothing_and_come_with_the_first_token() -> None:
    bench = Bench()
    bench.engine.submit(submission(), Part.WHOLE, 0.0)
    bench.run()
    sampling = SamplingParams(temperature=0.0, max_tokens=2, prompt_logprobs=0)
    wanted = submission("b", sampling=sampling)
    bench.engine.submit(wanted, Part.WHOLE, 0.0)
    plan = bench.plan()
    assert plan.rows[0].start == 0
    assert plan.rows[0].prompt_logprobs
    events = bench.finish(plan) + bench.run()
    ready = [event for event in events if isinstance(event, TokensReady)]
    assert list(ready[0].prompt_logprobs) == generate(wanted, 100)[2]
    assert len(ready[0].prompt_logprobs) == 9
    assert ready[1].prompt_logprobs == ()


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
    assert bench.engine.has_work()
    bench.finish(plan)
    assert not bench.engine.has_work()


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
    assert not bench.engine.has_work()
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
    generations = np.zeros(CONFIG.num_blocks, dtype=np.uint64)
    engine = Engine(CONFIG, max_model_len=100, salt=b"s", generations=generations)
    engine.submit(submission(), Part.WHOLE, 0.0)
    assert engine.schedule(0.0) is not None
    assert generations.sum() == 3


def test_waiting_for_memory_is_not_work() -> None:
    config = dataclasses.replace(CONFIG, num_blocks=4)
    bench = Bench(config)
    bench.engine.submit(submission(), Part.PREFILL, 0.0)
    bench.run()
    bench.engine.submit(submission("b", range(20, 30)), Part.WHOLE, 0.0)
    assert bench.engine.has_work()
    assert bench.engine.schedule(0.0) is None
    assert not bench.engine.has_work(), "only a release can help now"
    assert bench.engine.release("a")
    assert bench.engine.has_work()
    assert tokens(bench.run(), "b") == generate(submission("b", range(20, 30)), 16)[0]
