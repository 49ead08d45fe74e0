"""The core, scenario by scenario, in virtual time."""

from __future__ import annotations

import dataclasses

import pytest

from baton.core.cluster import Role
from baton.core.errors import Code
from controller import events
from controller.state import INCARNATIONS_PER_EPOCH
from tests.controller.controller_helpers import (
    Bench,
    directives,
    failed,
    idle_load,
    make_info,
    only,
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


def test_role_from_before_the_controller_outlives_the_instance() -> None:
    """An operator's switch, a new controller without memory, then a new life of the instance."""
    bench = Bench(epoch=3)
    own = 2 * 2**20 + 5
    back = bench.register(make_info("a", Role.DECODE, incarnation=own), known_epoch=2)
    assert isinstance(back, events.Registered)
    assert back.role is Role.DECODE
    reborn = bench.register(make_info("a", Role.PREFILL))
    assert isinstance(reborn, events.Registered)
    assert reborn.role is Role.DECODE


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
