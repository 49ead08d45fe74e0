"""Role switches in the pure core."""

from __future__ import annotations

import dataclasses

import pytest

from baton.core.cluster import Role
from baton.core.errors import Code
from controller import events, role_events
from controller.events import Command
from controller.roles import SWITCH_TIMEOUT_S
from kvpool.layout import KVLayout
from tests.controller.controller_helpers import (
    Bench,
    directives,
    idle_load,
    make_info,
    only,
    placed,
)


def cluster() -> Bench:
    bench = Bench()
    for name, role in (("p0", "prefill"), ("p1", "prefill"), ("d0", "decode"), ("d1", "decode")):
        bench.join(name, role)
    return bench


def switch(bench: Bench, name: str, role: str, force: bool = False) -> tuple[int, list[Command]]:
    call_id = bench.next_id()
    return call_id, bench.feed(events.SetRole(call_id, name, role, force))


def ack(bench: Bench, name: str, ok: bool = True, reason: str = "") -> list[Command]:
    sent = only(bench.log, events.SendDirective)[-1]
    return bench.beat(name, acks=(events.Ack(sent.directive_id, ok, reason),))


def role_of(bench: Bench, name: str) -> Role:
    return bench.core.state.instances[name].info.role


def test_two_phases() -> None:
    bench = cluster()
    call_id, commands = switch(bench, "p1", "decode")
    assert directives(commands) == [events.PrepareRole(Role.DECODE)]
    assert role_of(bench, "p1") is Role.PREFILL
    commands = ack(bench, "p1")
    assert directives(commands) == [events.CommitRole(Role.DECODE)]
    assert events.StorePut("role/p1", "decode") in commands
    assert only(commands, events.PublishView)
    assert role_of(bench, "p1") is Role.DECODE
    for index in range(20):
        assert placed(bench.place_one(f"r{index}")).prefill.instance_id == "p0"
    commands = ack(bench, "p1")
    assert only(commands, events.RoleSet) == [events.RoleSet(call_id, Role.PREFILL)]
    assert only(commands, role_events.RoleSwitchEnded) == [
        role_events.RoleSwitchEnded(
            "done", Role.PREFILL, Role.DECODE, role_events.Who.OPERATOR, seconds=0.0
        )
    ]
    assert ("role", "p1") not in bench.core.state.deadlines._at


def test_the_choice_outlives_a_restart_of_the_instance() -> None:
    bench = cluster()
    switch(bench, "p1", "decode")
    ack(bench, "p1")
    ack(bench, "p1")
    reply = bench.register(make_info("p1", "prefill"))
    assert isinstance(reply, events.Registered)
    assert reply.role is Role.DECODE
    assert role_of(bench, "p1") is Role.DECODE


def test_the_choice_outlives_a_restart_of_the_controller() -> None:
    bench = Bench(stored={"role/p": "mixed"})
    reply = bench.register(make_info("p", "prefill"))
    assert isinstance(reply, events.Registered)
    assert reply.role is Role.MIXED


def test_same_role_is_done_at_once() -> None:
    bench = cluster()
    call_id, commands = switch(bench, "p1", "prefill")
    assert only(commands, events.RoleSet) == [events.RoleSet(call_id, Role.PREFILL)]
    assert directives(commands) == []


@pytest.mark.parametrize(
    ("name", "role", "code", "param"),
    [
        ("nobody", "decode", Code.NOT_FOUND, "instance_id"),
        ("p0", "boss", Code.INVALID_REQUEST, "role"),
        ("p0", "", Code.INVALID_REQUEST, "role"),
    ],
)
def test_switches_are_checked(name: str, role: str, code: Code, param: str) -> None:
    _, commands = switch(cluster(), name, role)
    failure = only(commands, events.CallFailed)[0].failure
    assert (failure.code, failure.param) == (code, param)


@pytest.mark.parametrize(
    ("roles", "name", "target", "allowed"),
    [
        (("prefill", "decode"), "i0", "decode", False),
        (("prefill", "decode"), "i1", "prefill", False),
        (("prefill", "decode"), "i0", "mixed", True),
        (("mixed",), "i0", "prefill", False),
        (("mixed", "decode"), "i0", "prefill", True),
        (("mixed", "decode"), "i0", "decode", False),
        (("mixed", "mixed"), "i0", "prefill", True),
        (("prefill", "prefill"), "i0", "decode", True),
        (("prefill",), "i0", "decode", False),
        (("prefill",), "i0", "mixed", True),
    ],
)
def test_pools_are_not_emptied(
    roles: tuple[str, ...], name: str, target: str, allowed: bool
) -> None:
    bench = Bench()
    for index, role in enumerate(roles):
        bench.join(f"i{index}", role)
    _, commands = switch(bench, name, target)
    failures = only(commands, events.CallFailed)
    assert not failures if allowed else failures[0].failure.code is Code.REFUSED
    if not allowed:
        assert "would leave no usable" in failures[0].failure.message
        _, commands = switch(bench, name, target, force=True)
        assert directives(commands) == [events.PrepareRole(Role(target))]


def test_a_pair_must_stay_compatible() -> None:
    bench = Bench()
    bench.join("p", "prefill")
    bench.join("d", "decode")
    bench.join("other", "mixed", fingerprint="x")
    bench.join("other2", "mixed", fingerprint="y")
    _, commands = switch(bench, "other", "prefill")
    assert not only(commands, events.CallFailed), "p and d still are a pair"


def test_a_pair_may_differ_in_the_number_of_shards() -> None:
    whole = KVLayout("bfloat16", block_size=16, num_layers=2, num_kv_heads=6, head_dim=8)
    halves = dataclasses.replace(whole, num_kv_heads=3, num_shards=2)
    bench = Bench()
    bench.join("p", "prefill", layout=whole.text)
    bench.join("d", "decode", layout=halves.text)
    bench.join("other", "mixed", layout="x")
    _, commands = switch(bench, "other", "prefill")
    assert not only(commands, events.CallFailed), "p and d still are a pair"


def test_unready_instances_do_not_count() -> None:
    bench = cluster()
    bench.feed(events.Drain(bench.next_id(), "p0"))
    _, commands = switch(bench, "p1", "decode")
    assert only(commands, events.CallFailed)[0].failure.code is Code.REFUSED


def test_switches_in_flight_count_either_way() -> None:
    bench = cluster()
    switch(bench, "p0", "decode")
    _, commands = switch(bench, "p1", "decode")
    assert only(commands, events.CallFailed)[0].failure.code is Code.REFUSED
    _, commands = switch(bench, "p0", "mixed")
    failure = only(commands, events.CallFailed)[0].failure
    assert "already switching" in failure.message


def test_a_pool_that_emptied_meanwhile_ends_the_switch() -> None:
    bench = cluster()
    call_id, _ = switch(bench, "p1", "decode")
    prepare = only(bench.log, events.SendDirective)[-1]
    bench.hang_up("p0")
    commands = bench.beat("p1", acks=(events.Ack(prepare.directive_id, True),))
    assert only(commands, events.CallFailed)[0].call_id == call_id
    assert directives(commands) == [events.CommitRole(Role.PREFILL)]
    assert role_of(bench, "p1") is Role.PREFILL


def test_refusal() -> None:
    bench = cluster()
    call_id, _ = switch(bench, "p1", "decode")
    commands = ack(bench, "p1", ok=False, reason="no memory")
    failure = only(commands, events.CallFailed)[0]
    assert failure.call_id == call_id
    assert failure.failure.code is Code.REFUSED
    assert "no memory" in failure.failure.message
    assert role_of(bench, "p1") is Role.PREFILL
    assert bench.core.state.roles == {}


@pytest.mark.parametrize("prepared", [False, True])
def test_silence_rolls_back(prepared: bool) -> None:
    bench = cluster()
    call_id, _ = switch(bench, "p1", "decode")
    if prepared:
        ack(bench, "p1")
    start = bench.clock.now()
    commands: list[Command] = []
    while bench.clock.now() < start + SWITCH_TIMEOUT_S + 0.5:
        for name in bench.sessions:
            bench.beat(name)
        commands += bench.advance(0.5)
    failure = only(commands, events.CallFailed)
    assert [f.call_id for f in failure] == [call_id]
    assert failure[0].failure.code is Code.UNAVAILABLE
    assert "keeps the role prefill" in failure[0].failure.message
    assert role_of(bench, "p1") is Role.PREFILL
    assert bench.core.state.roles == {}
    assert directives(commands)[-1] == events.CommitRole(Role.PREFILL)
    assert [c.result for c in only(commands, role_events.RoleSwitchEnded)] == ["timed_out"]
    stored = [c for c in bench.log if isinstance(c, events.StorePut | events.StoreDelete)]
    expected = [events.StorePut("role/p1", "decode"), events.StoreDelete("role/p1")]
    assert stored == (expected if prepared else [])


def test_roll_back_to_an_earlier_choice() -> None:
    bench = cluster()
    switch(bench, "p1", "mixed")
    ack(bench, "p1")
    ack(bench, "p1")
    switch(bench, "p1", "decode")
    ack(bench, "p1")
    ack(bench, "p1", ok=False)
    assert bench.core.state.roles == {"p1": Role.MIXED}
    assert role_of(bench, "p1") is Role.MIXED
    assert only(bench.log, events.StorePut)[-1] == events.StorePut("role/p1", "mixed")


def test_a_session_that_ends_rolls_back_and_settles_later() -> None:
    bench = cluster()
    call_id, _ = switch(bench, "p1", "decode")
    ack(bench, "p1")
    commands = bench.hang_up("p1")
    assert [c.call_id for c in only(commands, events.CallFailed)] == [call_id]
    assert role_of(bench, "p1") is Role.PREFILL
    assert directives(bench.open("p1")) == [events.CommitRole(Role.PREFILL)]
    assert directives(bench.open("p1")) == []


def test_suspects_cannot_switch() -> None:
    bench = cluster()
    bench.hang_up("p1")
    _, commands = switch(bench, "p1", "decode")
    failure = only(commands, events.CallFailed)[0].failure
    assert failure.code is Code.REFUSED
    assert "suspect" in failure.message


def test_a_switch_feeds_the_queue() -> None:
    bench = Bench()
    bench.join("p0", "prefill")
    bench.join("p1", "prefill")
    assert bench.place_one("r") is None
    switch(bench, "p1", "decode")
    results = only(ack(bench, "p1"), events.Placed)[0].results
    assert placed(results[0]).decode.instance_id == "p1"


def test_stray_acks_change_nothing() -> None:
    bench = cluster()
    switch(bench, "p1", "decode")
    assert bench.beat("p1", idle_load(), acks=(events.Ack(999, True),)) == []
    assert bench.beat("p0", idle_load(), acks=(events.Ack(1, True),)) == []
    assert role_of(bench, "p1") is Role.PREFILL


def test_operations_on_the_dead_say_so() -> None:
    bench = cluster()
    bench.hang_up("p1")
    bench.advance(1.5)
    _, commands = switch(bench, "p1", "decode")
    failure = only(commands, events.CallFailed)[0].failure
    assert failure.code is Code.NOT_FOUND
    assert "dead" in failure.message
