"""A prefix that comes from the pool, and what the engine tells of its cache."""

from __future__ import annotations

import pytest

from baton.core.request import Part
from baton.engine.engine import Engine
from baton.engine.events import CacheChanged, PrefillProgress, PrefixComplete, TokensReady
from baton.engine.states import SequenceState
from tests.engine.engine_bench import CONFIG, Bench, reserve, submission, tokens
from tests.engine.simulated_runner import generate


def tracking() -> Bench:
    bench = Bench()
    bench.engine = Engine(CONFIG, max_model_len=100, salt=b"salt", track_cache=True)
    return bench


@pytest.mark.parametrize("part", [Part.WHOLE, Part.PREFILL])
@pytest.mark.parametrize("num_valid", [0, 3, 4, 8, 10])
def test_what_was_fetched_is_not_computed_again(part: Part, num_valid: int) -> None:
    bench, wanted = Bench(), submission()
    bench.engine.submit(wanted, part, 0.0, fetch=True)
    assert bench.engine.schedule(0.0) is None
    event = reserve(bench)
    assert len(event.blocks) == 3
    for position in range(num_valid):
        bench.runner.write(event.blocks, position, wanted.prompt_ids[position])
    assert bench.engine.fetched("a", num_valid)
    assert not bench.engine.fetched("a", num_valid)
    plan = bench.plan()
    assert plan.rows[0].start == num_valid // 4 * 4
    events = bench.finish(plan) + bench.run()
    expected = generate(wanted, 100)[0]
    assert tokens(events) == (expected if part is Part.WHOLE else expected[:1])
    first = next(e for e in events if isinstance(e, TokensReady))
    assert first.num_cached_tokens == num_valid // 4 * 4
    if part is Part.PREFILL:
        assert bench.engine.state_of("a") is SequenceState.HELD
        assert any(isinstance(e, PrefillProgress) and e.final for e in events)


def test_a_fetch_that_finds_nothing_before_blocks_are_reserved() -> None:
    bench, wanted = Bench(), submission()
    bench.engine.submit(wanted, Part.WHOLE, 0.0, fetch=True)
    assert bench.engine.fetched("a", 0)
    assert bench.engine.state_of("a") is SequenceState.WAITING
    assert tokens(bench.run()) == generate(wanted, 100)[0]


def test_a_fetched_prefix_serves_the_next_one_too() -> None:
    bench, wanted = Bench(), submission()
    bench.engine.submit(wanted, Part.WHOLE, 0.0, fetch=True)
    event = reserve(bench)
    for position in range(8):
        bench.runner.write(event.blocks, position, wanted.prompt_ids[position])
    assert bench.engine.fetched("a", 8)
    bench.engine.submit(submission("b"), Part.WHOLE, 0.0)
    events = bench.run()
    assert tokens(events, "a") == tokens(events, "b") == generate(wanted, 100)[0]
    ready = [e for e in events if isinstance(e, TokensReady) and e.request_id == "b"]
    assert ready[0].num_cached_tokens == 8


def test_an_abort_ends_a_fetch() -> None:
    bench = Bench()
    bench.engine.submit(submission(), Part.WHOLE, 0.0, fetch=True)
    reserve(bench)
    assert bench.engine.abort("a")
    assert not bench.engine.fetched("a", 8)
    assert bench.num_held() == 0


@pytest.mark.parametrize("part", [Part.WHOLE, Part.PREFILL])
def test_complete_prefixes_are_told_with_their_keys(part: Part) -> None:
    bench, wanted = tracking(), submission(priority=-3)
    bench.engine.submit(wanted, part, 0.0)
    events = bench.run()
    (told,) = [e for e in events if isinstance(e, PrefixComplete)]
    # A whole request: prompt and all outputs but the last, whose KV was never computed.
    num_full = (10 + (4 if part is Part.WHOLE else 0)) // 4
    assert len(told.blocks) == len(told.keys) == num_full
    assert told.keys[:2] == tuple(bench.engine.prefix_keys(wanted))
    assert told.priority == -3
    assert told.generations == (1,) * num_full
    changes = [c for e in events if isinstance(e, CacheChanged) for c in e.changes]
    late = bench.engine.admit(0.0)
    changes += [c for e in late if isinstance(e, CacheChanged) for c in e.changes]
    assert changes == [(True, key) for key in told.keys]


def test_evictions_are_told() -> None:
    bench = tracking()
    known: set[bytes] = set()
    for number in range(12):
        prompt = range(100 * number, 100 * number + 40)
        bench.engine.submit(submission(f"r{number}", prompt), Part.WHOLE, 0.0)
        events = bench.run() + bench.engine.admit(0.0)
        for event in events:
            if isinstance(event, CacheChanged):
                for entered, key in event.changes:
                    assert (key in known) is not entered
                    (known.add if entered else known.remove)(key)
    assert bench.engine.block_statistics().num_evictions > 0
    assert len(known) == bench.engine.block_statistics().num_cached
