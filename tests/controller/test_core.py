"""The core, scenario by scenario, in virtual time."""

from __future__ import annotations

import dataclasses

import pytest

from baton.core.cluster import Role
from baton.core.config import ControllerConfig
from baton.core.errors import Code
from controller import events
from controller.membership import InstanceState
from controller.state import INCARNATIONS_PER_EPOCH
from tests.controller.controller_helpers import (
    Bench,
    directives,
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


# Registration, epochs, fencing


def test_new_processes_get_unique_incarnations_and_fence_their_elders() -> None:
    bench = Bench(epoch=3)
    first = bench.register(make_info("a"))
    assert isinstance(first, events.Registered)
    assert first.incarnation == 3 * INCARNATIONS_PER_EPOCH + 1
    bench.open("a")
    old_session = bench.sessions["a"]
    second = bench.register(make_info("a"))
    assert isinstance(second, events.Registered)
    assert second.incarnation == first.incarnation + 1
    sent = only(bench.log, events.SendDirective)[-1]
    assert (sent.session_id, sent.body) == (old_session, events.Fence())
    assert only(bench.log, events.CloseSession)[-1].failure.code is Code.FENCED
    assert [r.info.incarnation for r in bench.core.state.recently_dead] == [first.incarnation]
    assert bench.state_of("a") == "joining"


def test_comeback_after_the_controller_restarted() -> None:
    bench = Bench(epoch=5)
    own = 4 * INCARNATIONS_PER_EPOCH + 7
    reply = bench.register(make_info("a", incarnation=own), known_epoch=4)
    assert isinstance(reply, events.Registered)
    assert (reply.incarnation, reply.epoch) == (own, 5)
    bench.open("a")
    assert bench.state_of("a") == "ready"


def test_epoch_rises_above_what_members_present() -> None:
    bench = Bench(epoch=1)
    own = 8 * INCARNATIONS_PER_EPOCH + 7
    reply = bench.register(make_info("a", incarnation=own), known_epoch=9)
    assert isinstance(reply, events.Registered)
    assert reply.epoch == 10
    assert only(bench.log, events.StoreEpoch) == [events.StoreEpoch(10)]
    new = bench.register(make_info("b"))
    assert isinstance(new, events.Registered)
    assert new.incarnation == 10 * INCARNATIONS_PER_EPOCH + 1
    member = events.MemberInfo("gateway", "g")
    bench.feed(events.MemberSeen(bench.next_id(), member, known_epoch=20))
    assert bench.core.state.epoch == 21


def test_an_unknown_incarnation_of_my_own_epoch_is_from_another_controller() -> None:
    bench = Bench(epoch=1)
    own = INCARNATIONS_PER_EPOCH + 1
    bench.register(make_info("a", incarnation=own), known_epoch=1)
    new = bench.register(make_info("a"))
    assert isinstance(new, events.Registered)
    assert new.incarnation == 2 * INCARNATIONS_PER_EPOCH + 1


def test_incarnations_go_on_in_the_next_epoch() -> None:
    bench = Bench(epoch=1)
    bench.core.state._num_incarnations = INCARNATIONS_PER_EPOCH - 1
    reply = bench.register(make_info("a"))
    assert isinstance(reply, events.Registered)
    assert reply.incarnation == 2 * INCARNATIONS_PER_EPOCH + 1
    assert only(bench.log, events.StoreEpoch) == [events.StoreEpoch(2)]


def test_old_incarnations_are_fenced_everywhere() -> None:
    bench = Bench()
    bench.join("a")
    old = bench.incarnations["a"]
    bench.join("a")
    reply = bench.register(make_info("a", incarnation=old))
    assert failed(reply).code is Code.FENCED
    session = bench.next_id()
    commands = bench.feed(events.Heartbeat(session, "a", old, idle_load()))
    assert directives(commands) == [events.Fence()]
    assert only(commands, events.CloseSession)[0].failure.code is Code.FENCED
    assert bench.state_of("a") == "ready"


def test_a_stranger_is_told_to_register() -> None:
    bench = Bench()
    commands = bench.feed(events.Heartbeat(1, "a", 77, idle_load()))
    assert directives(commands) == []
    assert only(commands, events.CloseSession)[0].failure.code is Code.NOT_FOUND


@pytest.mark.parametrize("missing", ["instance_id", "address", "num_blocks", "max_model_len"])
def test_registrations_are_checked(missing: str) -> None:
    info = dataclasses.replace(
        make_info("a"), **{missing: type(getattr(make_info("a"), missing))()}
    )
    failure = failed(Bench().register(info))
    assert (failure.code, failure.param) == (Code.INVALID_REQUEST, missing)


# Sessions


def test_end_of_stream_is_suspect_at_once_and_dead_after_the_grace() -> None:
    bench = pair()
    version = bench.core.state.version
    commands = bench.hang_up("d")
    assert bench.state_of("d") == "suspect"
    assert only(commands, events.PublishView) == [events.PublishView(version + 1)]
    assert bench.place_one("r", budget_s=0.0) is not None
    assert failed(bench.place_one("r", budget_s=0.0)).code is Code.UNAVAILABLE
    assert bench.advance(0.9) == []
    commands = bench.advance(0.2)
    assert only(commands, events.PublishView) == [events.PublishView(version + 2)]
    assert "d" not in bench.core.state.instances
    assert failed(bench.register(make_info("d", incarnation=bench.incarnations["d"])))


def test_back_within_the_grace() -> None:
    bench = pair()
    bench.hang_up("d")
    bench.advance(0.5)
    bench.open("d")
    assert bench.state_of("d") == "ready"
    bench.advance(2.0)
    assert bench.state_of("d") == "ready"
    # And the same through a registration.
    bench.hang_up("d")
    bench.advance(0.5)
    own = bench.incarnations["d"]
    reply = bench.register(make_info("d", "decode", incarnation=own))
    assert isinstance(reply, events.Registered)
    assert reply.incarnation == own
    bench.advance(0.9)
    bench.open("d")
    assert bench.state_of("d") == "ready"


def test_silence_kills() -> None:
    bench = pair()
    for _ in range(6):
        bench.advance(1.0)
        bench.beat("p")
    assert list(bench.core.state.instances) == ["p"]
    sent = only(bench.log, events.SendDirective)[-1]
    assert sent.body == events.Fence()
    assert only(bench.log, events.CloseSession)[-1].session_id == sent.session_id


def test_a_stalled_controller_gives_everyone_time() -> None:
    bench = pair()
    bench.clock.advance(60.0)
    bench.core.on_tick(bench.clock.now())
    assert set(bench.core.state.instances) == {"p", "d"}
    bench.advance(5.0)
    assert not bench.core.state.instances


def test_registered_but_never_opened() -> None:
    bench = Bench()
    bench.register(make_info("a"))
    bench.advance(5.0)
    assert not bench.core.state.instances
    assert bench.core.next_deadline() is None


def test_a_newer_session_replaces_the_older() -> None:
    bench = pair()
    old = bench.sessions["p"]
    commands = bench.open("p")
    assert [c.session_id for c in only(commands, events.CloseSession)] == [old]
    bench.feed(events.SessionClosed(old))
    assert bench.state_of("p") == "ready"


def test_only_32_dead_are_remembered() -> None:
    bench = Bench()
    for _ in range(40):
        bench.join("a")
    assert len(bench.core.state.recently_dead) == 32


# Placements


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
    results = [placed(r) for r in only(bench.place(*queries), events.Placed)[0].results]
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


@pytest.mark.parametrize(("budget_s", "wait_s"), [(None, 4.0), (1.5, 1.5), (100.0, 4.0)])
def test_queue_time_is_bounded(budget_s: float | None, wait_s: float) -> None:
    bench = Bench()
    assert bench.place_one("r", budget_s=budget_s) is None
    assert bench.advance(wait_s - 0.01) == []
    commands = bench.advance(0.02)
    failure = failed(only(commands, events.Placed)[0].results[0])
    assert failure.code is Code.UNAVAILABLE
    assert failure.retry_after_s is not None
    assert "prefill" in failure.message
    assert bench.core.next_deadline() is None


def test_queue_is_bounded() -> None:
    bench = Bench(ControllerConfig(max_queued_placements=3))
    commands = bench.place(*(events.PlaceQuery(f"r{i}") for i in range(5)))
    assert not only(commands, events.Placed), "the batch waits for its queued part"
    assert bench.core.placements.num_queued == 3
    results = only(bench.join("m"), events.Placed)[0].results
    assert [isinstance(r, events.Failure) for r in results] == [False] * 3 + [True] * 2
    assert "too many" in failed(results[4]).message


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
    assert not bench.core.state.open


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


# Drains


def drain(bench: Bench, name: str, **values: object) -> tuple[int, list[events.Command]]:
    call_id = bench.next_id()
    return call_id, bench.feed(events.Drain(call_id, name, **values))  # type: ignore[arg-type]


def test_drain_waits_for_empty() -> None:
    bench = pair()
    bench.join("p2", "prefill")
    bench.beat("p", idle_load(num_running=1, num_held=1))
    call_id, commands = drain(bench, "p", wait=True, timeout_s=10.0)
    assert directives(commands) == [events.SetDraining(True)]
    assert events.StorePut("drain/p", "1") in commands
    assert not only(commands, events.DrainReplied)
    for index in range(10):
        assert placed(bench.place_one(f"r{index}")).prefill.instance_id == "p2"
    assert not only(bench.beat("p", idle_load(num_held=1)), events.DrainReplied)
    assert bench.state_of("p") == "draining"
    commands = bench.beat("p")
    assert only(commands, events.DrainReplied) == [events.DrainReplied(call_id, True, 0, True)]
    assert bench.state_of("p") == "drained"


def test_drain_does_not_believe_a_heartbeat_that_crossed_a_placement() -> None:
    bench = pair()
    bench.place_one("r")
    drain(bench, "p")
    bench.beat("p")
    assert bench.state_of("p") == "draining"
    bench.advance(1.0)
    bench.beat("p")
    assert bench.state_of("p") == "drained"


def test_drain_without_wait_and_with_timeout() -> None:
    bench = pair()
    bench.beat("p", idle_load(num_running=2))
    call_id, commands = drain(bench, "p")
    reply = only(commands, events.DrainReplied)
    assert reply == [events.DrainReplied(call_id, False, 2, False)], "and the cluster is not ready"
    call_id, commands = drain(bench, "p", wait=True, timeout_s=1.0)
    assert not only(commands, events.DrainReplied)
    reply = only(bench.advance(1.1), events.DrainReplied)
    assert reply == [events.DrainReplied(call_id, False, 2, False)]
    call_id, commands = drain(bench, "p", undo=True)
    assert only(commands, events.DrainReplied) == [events.DrainReplied(call_id, False, 2, True)]
    assert directives(commands) == [events.SetDraining(False)]
    assert bench.state_of("p") == "ready"


def test_undo_answers_waiters_and_the_queue() -> None:
    bench = pair()
    bench.beat("p", idle_load(num_running=2))
    call_id, _ = drain(bench, "p", wait=True, timeout_s=10.0)
    assert bench.place_one("r") is None
    _, commands = drain(bench, "p", undo=True)
    assert [c.call_id for c in only(commands, events.CallFailed)] == [call_id]
    assert len(only(commands, events.Placed)) == 1


def test_drained_gets_busy_again() -> None:
    bench = pair()
    drain(bench, "p")
    bench.beat("p")
    assert bench.state_of("p") == "drained"
    bench.beat("p", idle_load(num_running=1))
    assert bench.state_of("p") == "draining"


def test_a_death_answers_who_waits_for_the_drain() -> None:
    bench = pair()
    bench.beat("p", idle_load(num_running=2))
    call_id, _ = drain(bench, "p", wait=True, timeout_s=10.0)
    bench.hang_up("p")
    failure = only(bench.advance(1.5), events.CallFailed)[0]
    assert (failure.call_id, failure.failure.code) == (call_id, Code.INSTANCE_LOST)
    assert bench.core.next_deadline() is not None
    bench.advance(20.0)


def test_a_drain_outlives_processes_and_controllers() -> None:
    bench = pair()
    drain(bench, "p")
    bench.join("p", "prefill")
    assert bench.state_of("p") == "drained"
    restarted = Bench(epoch=2, stored={"drain/p": "1", "role/d": "mixed", "role/x": "nonsense"})
    commands = restarted.join("p", "prefill")
    assert events.SetDraining(True) in directives(commands)
    assert restarted.state_of("p") == "drained"
    assert restarted.core.state.roles == {"d": Role.MIXED}


def test_a_controller_without_memory_hears_of_the_drain() -> None:
    bench = Bench(epoch=2)
    info = make_info("p", "prefill", incarnation=INCARNATIONS_PER_EPOCH + 1)
    bench.register(info, draining=True)
    bench.open("p")
    assert bench.state_of("p") == "drained"


def test_a_drain_undone_while_its_instance_was_away() -> None:
    bench = pair()
    drain(bench, "p")
    bench.hang_up("p")
    drain(bench, "p", undo=True)
    own = bench.incarnations["p"]
    bench.register(make_info("p", "prefill", incarnation=own), draining=True)
    assert events.SetDraining(False) in directives(bench.open("p"))
    assert bench.state_of("p") == "ready"


@pytest.mark.parametrize(
    ("name", "timeout_s", "code", "param"),
    [
        ("nobody", 1.0, Code.NOT_FOUND, "instance_id"),
        ("p", -1.0, Code.INVALID_REQUEST, "timeout_s"),
        ("p", float("nan"), Code.INVALID_REQUEST, "timeout_s"),
        ("p", float("inf"), Code.INVALID_REQUEST, "timeout_s"),
    ],
)
def test_drains_are_checked(name: str, timeout_s: float, code: Code, param: str) -> None:
    _, commands = drain(pair(), name, timeout_s=timeout_s)
    failure = only(commands, events.CallFailed)[0].failure
    assert (failure.code, failure.param) == (code, param)


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
