"""What each part of a submission goes through: prefill, handoff, decode, prefixes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from baton.core.request import FinishReason, Part, SamplingParams
from baton.engine.events import PrefillProgress, TokensReady
from baton.engine.states import SequenceState
from tests.engine.engine_bench import CONFIG, Bench, reserve, submission, tokens
from tests.engine.simulated_runner import generate


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
    assert bench.engine.schedule(0.0) is None
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


def test_cached_blocks_of_a_reservation_are_never_written_again() -> None:
    bench = Bench()
    bench.engine.submit(submission(), Part.WHOLE, 0.0)
    expected = tokens(bench.run())
    bench.engine.submit(submission("b"), Part.DECODE, 0.0)
    assert reserve(bench).num_cached_tokens == 8
    assert bench.engine.kv_failed("b", 0, None)
    plan = bench.plan()
    assert plan.rows[0].start == 8
    bench.engine.check_integrity()
    events = bench.finish(plan) + bench.run()
    assert tokens(events, "b") == expected
    assert isinstance(events[0], TokensReady)
    assert events[0].num_cached_tokens == 8


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


@pytest.mark.parametrize("known", [True, False])
def test_decode_owes_the_prompt_logprobs_only_if_prefill_has_not_told_them(known: bool) -> None:
    sampling = SamplingParams(temperature=0.0, max_tokens=3, prompt_logprobs=0)
    bench, wanted = Bench(), submission(sampling=sampling)
    expected, _, logprobs = generate(wanted, 100)
    bench.engine.submit(wanted, Part.DECODE, 0.0)
    event = reserve(bench)
    for position in range(8):
        bench.runner.write(event.blocks, position, wanted.prompt_ids[position])
    assert bench.engine.kv_failed("a", 8, expected[0] if known else None)
    plan = bench.plan()
    assert plan.rows[0].start == (8 if known else 0)
    ready = [e for e in bench.finish(plan) + bench.run() if isinstance(e, TokensReady)]
    assert list(ready[0].prompt_logprobs) == ([] if known else logprobs)
