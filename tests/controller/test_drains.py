"""Drains in the pure core."""

from __future__ import annotations

import pytest

from baton.core.cluster import Role
from baton.core.errors import Code
from controller import events
from controller.state import INCARNATIONS_PER_EPOCH
from tests.controller.controller_helpers import (
    Bench,
    directives,
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
