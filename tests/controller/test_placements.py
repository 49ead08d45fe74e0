"""Placements, their queue and their traces, in the pure core."""

from __future__ import annotations

import pytest

from baton.core.config import ControllerConfig
from baton.core.errors import Code
from controller import events
from controller.membership import InstanceState
from tests.controller.controller_helpers import (
    Bench,
    failed,
    idle_load,
    make_info,
    only,
    placed,
)


def pair() -> Bench:
    bench = Bench()
    bench.join("p", "prefill")
    bench.join("d", "decode")
    return bench


def test_place_counts_until_the_end() -> None:
    bench = pair()
    result = placed(bench.place_one("r", num_prompt_tokens=50))
    assert (result.prefill.instance_id, result.decode.instance_id) == ("p", "d")
    assert result.prefill.incarnation == bench.incarnations["p"]
    view = bench.core.state.columns.view
    assert (view.open_prefill.sum(), view.open_decode.sum(), view.fresh_tokens.sum()) == (1, 1, 50)
    bench.beat("p", idle_load(num_waiting_tokens=50, num_waiting=1))
    assert view.fresh_tokens.sum() == 50, "it was placed a moment ago"
    bench.advance(0.5)
    bench.beat("p", idle_load(num_waiting_tokens=50, num_waiting=1))
    assert view.fresh_tokens.sum() == 0
    bench.end("r")
    assert view.open_prefill.sum() == view.open_decode.sum() == 0
    assert not bench.core.state.open


def test_a_new_attempt_replaces_and_a_late_end_of_the_old_one_changes_nothing() -> None:
    bench = pair()
    bench.place_one("r")
    bench.place_one("r", attempt=1)
    view = bench.core.state.columns.view
    assert view.open_prefill.sum() == 1
    bench.end("r", attempt=0)
    assert view.open_prefill.sum() == 1
    bench.end("r", attempt=1)
    assert view.open_prefill.sum() == 0


def test_a_gateway_that_is_gone_has_nothing_open() -> None:
    bench = pair()
    session = bench.next_id()
    bench.feed(events.MemberSeen(session, events.MemberInfo("gateway", "g")))
    bench.place_one("r")
    bench.feed(events.MemberGone(session))
    assert not bench.core.state.open
    assert bench.core.state.columns.view.open_decode.sum() == 0


def test_a_gateway_that_reconnected_keeps_its_requests() -> None:
    bench = pair()
    first, second = bench.next_id(), bench.next_id()
    bench.feed(events.MemberSeen(first, events.MemberInfo("gateway", "g")))
    bench.place_one("r")
    bench.feed(events.MemberSeen(second, events.MemberInfo("gateway", "g")))
    bench.feed(events.MemberGone(first))
    assert set(bench.core.state.open) == {"r"}


def test_batches_spread_over_equals() -> None:
    bench = Bench()
    for name in ("p0", "p1"):
        bench.join(name, "prefill")
    for name in ("d0", "d1"):
        bench.join(name, "decode")
    queries = [events.PlaceQuery(f"r{i}", 0, 50, 10) for i in range(20)]
    results = [placed(r) for r in only(bench.place(*queries), events.Placed)[0].results.values()]
    assert [r.request_id for r in results] == [q.request_id for q in queries]
    assert sum(r.prefill.instance_id == "p0" for r in results) == 10
    assert sum(r.decode.instance_id == "d0" for r in results) == 10


def test_queued_until_an_instance_is_ready() -> None:
    bench = Bench()
    bench.join("p", "prefill")
    assert bench.place_one("r") is None
    assert bench.core.placements.num_queued == 1
    bench.register(make_info("d", "decode"))
    assert bench.core.placements.num_queued == 1
    commands = bench.open("d")
    result = placed(only(commands, events.Placed)[0].results[0])
    assert result.decode.instance_id == "d"
    assert bench.core.placements.num_queued == 0


def test_queue_goes_by_priority_then_arrival() -> None:
    bench = Bench()
    bench.place(*(events.PlaceQuery(f"r{i}", priority=p) for i, p in enumerate((0, 1, 0, 2))))
    bench.place(events.PlaceQuery("last", priority=2))
    bench.join("m")
    assert list(bench.core.state.open) == ["r3", "last", "r1", "r0", "r2"]


@pytest.mark.parametrize(("budget_s", "wait_s"), [(None, 3.0), (1.5, 1.5), (100.0, 3.0)])
def test_queue_time_is_bounded(budget_s: float | None, wait_s: float) -> None:
    bench = Bench()
    assert bench.place_one("r", budget_s=budget_s) is None
    assert bench.advance(wait_s - 0.01) == []
    commands = bench.advance(0.02)
    failure = failed(only(commands, events.Placed)[0].results[0])
    assert failure.code is Code.UNAVAILABLE
    assert failure.retry_after_s is not None
    assert "prefill" in failure.message
    bench.advance(ControllerConfig().roles.interval_s)
    assert bench.core.next_deadline() is None


def test_queue_is_bounded() -> None:
    bench = Bench(ControllerConfig(max_queued_placements=3))
    commands = bench.place(*(events.PlaceQuery(f"r{i}") for i in range(5)))
    refused = only(commands, events.Placed)[0]
    assert set(refused.results) == {3, 4}, "they do not wait for the queued part"
    assert not refused.last
    assert all("too many" in failed(r).message for r in refused.results.values())
    assert bench.core.placements.num_queued == 3
    rest = only(bench.join("m"), events.Placed)[0]
    assert rest.last
    assert [placed(rest.results[i]).request_id for i in range(3)] == ["r0", "r1", "r2"]


def test_each_of_a_batch_waits_for_itself() -> None:
    bench = Bench()
    queries = [events.PlaceQuery(f"r{i}", budget_s=b) for i, b in enumerate((2.0, 1.0))]
    assert not only(bench.place(*queries), events.Placed)
    first = only(bench.advance(1.01), events.Placed)[0]
    assert failed(first.results[1]).code is Code.UNAVAILABLE
    assert (set(first.results), first.last) == ({1}, False)
    rest = only(bench.join("m"), events.Placed)[0]
    assert placed(rest.results[0]).request_id == "r0"
    assert rest.last


def test_an_empty_batch_is_answered() -> None:
    reply = only(Bench().place(), events.Placed)[0]
    assert (dict(reply.results), reply.last) == ({}, True)


def test_callers_that_hang_up_leave_the_queue() -> None:
    bench = Bench()
    bench.join("p", "prefill")
    call_id = bench.next_id()
    queries = (events.PlaceQuery("one", max_new_tokens=1), events.PlaceQuery("r", 0, 5, 5))
    bench.feed(events.PlaceRequests(call_id, "g", queries))
    assert bench.core.placements.num_queued == 1
    assert set(bench.core.state.open) == {"one"}
    bench.feed(events.CallGone(call_id))
    assert bench.core.placements.num_queued == 0
    assert set(bench.core.state.open) == {"one"}, "it was answered: its end will be reported"
    bench.end("one")
    assert not bench.core.state.open


def test_what_ended_while_it_waited_is_never_placed() -> None:
    bench = Bench()
    bench.place(*(events.PlaceQuery(name, attempt=1) for name in ("gone", "waits")))
    bench.end("gone", attempt=0)
    assert bench.core.placements.num_queued == 2, "an older attempt ended, not this one"
    gone = only(bench.end("gone", attempt=1), events.Placed)[0]
    assert failed(gone.results[0]).code is Code.ABORTED
    assert not gone.last, "the other one of the batch still waits"
    assert bench.core.placements.num_queued == 1
    results = only(bench.join("m"), events.Placed)[0].results
    assert placed(results[1]).attempt == 1
    assert set(bench.core.state.open) == {"waits"}


def test_too_long_for_any_instance_is_refused_at_once() -> None:
    bench = pair()
    failure = failed(bench.place_one("r", num_prompt_tokens=5000))
    assert failure.code is Code.CONTEXT_LENGTH_EXCEEDED


@pytest.mark.parametrize("name", ["request_id", "num_prompt_tokens", "max_new_tokens"])
def test_queries_are_checked(name: str) -> None:
    bench = pair()
    values = {"request_id": "r", name: "" if name == "request_id" else 0}
    failure = failed(bench.place_one(**values))  # type: ignore[arg-type]
    assert (failure.code, failure.param) == (Code.INVALID_REQUEST, name)


def test_no_counts_survive_a_death() -> None:
    bench = pair()
    bench.place_one("r")
    bench.hang_up("d")
    bench.advance(1.1)
    bench.join("d", "decode")
    view = bench.core.state.columns.view
    assert view.open_decode.sum() == 0
    bench.end("r")
    assert view.open_prefill.sum() == view.open_decode.sum() == 0


def test_shut_answers_everyone() -> None:
    bench = Bench()
    bench.place_one("r")
    commands = bench.core.shut(bench.clock.now())
    assert failed(only(commands, events.Placed)[0].results[0]).code is Code.UNAVAILABLE


# Explain


def test_explain() -> None:
    bench = pair()
    bench.place_one("r-0", parent_request_id="r", choice=0)
    bench.place_one("r-1", parent_request_id="r", choice=1)
    bench.place_one("r-1", parent_request_id="r", choice=1, attempt=1)
    trace = bench.core.explain("r")
    assert trace is not None
    assert trace.ended is None
    assert [(a.choice, a.attempt) for a in trace.attempts.values()] == [(0, 0), (1, 0), (1, 1)]
    entry = trace.attempts["r-0", 0]
    assert entry.placement is not None
    assert entry.num_candidates == 1
    assert "least loaded" in entry.reason
    stage = events.StageAt("submitted", "g", 1.0)
    ended = events.RequestEnded("r", "stop", attempts=(events.AttemptEnded("r-0", 0, 0, (stage,)),))
    bench.feed(events.OutcomesReported("g", (ended,)))
    after = bench.core.explain("r")
    assert after is not None
    assert after.ended == ended
    assert entry.stages == (stage,)
    # The same id again is another request.
    bench.place_one("r-0", parent_request_id="r")
    again = bench.core.explain("r")
    assert again is not None
    assert again.ended is None
    assert len(again.attempts) == 1
    assert bench.core.explain("unknown") is None


def test_traces_are_bounded() -> None:
    bench = Bench(ControllerConfig(trace_capacity=3))
    bench.join("m")
    for index in range(5):
        bench.place_one(f"r{index}")
    assert len(bench.core.traces) == 3
    assert bench.core.explain("r1") is None
    assert bench.core.explain("r4") is not None


def test_refusals_are_explained() -> None:
    bench = Bench()
    bench.place_one("r", budget_s=0.0)
    trace = bench.core.explain("r")
    assert trace is not None
    assert "no ready instance" in trace.attempts["r", 0].reason
    assert trace.attempts["r", 0].placement is None


def test_states_are_what_the_view_needs() -> None:
    bench = pair()
    bench.hang_up("p")
    bench.advance(1.5)
    states = {r.info.instance_id: r.state for r in bench.core.state.all_records()}
    assert states == {"d": InstanceState.READY, "p": InstanceState.DEAD}
    assert not bench.core.state.ready
