"""What stands around a planner of roles: its proposals are carried out, held back or refused."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest

from baton.core.cluster import Role
from baton.core.errors import Code
from baton.core.policy_config import RolesConfig
from controller import events, role_events
from controller.planner import RoleAdvice
from controller.role_events import Who
from controller.roles import SWITCH_TIMEOUT_S
from tests.controller.controller_helpers import only
from tests.controller.fleet import ROLES, Fleet, proposal, results

START_S = ROLES.cooldown_s / 2
"""From the first request on nothing is switched for so long."""


def eager(name: str, role: str, **more: object) -> Fleet:
    """A planner that always wants this one switch."""
    return Fleet.of(lambda view, now: proposal(name, role, **more))


def test_a_proposal_is_carried_out() -> None:
    fleet = eager("p1", "decode", reason="decode is short", inputs={"queue": 3.0})
    assert fleet.pools() == (2, 2)
    commands = fleet.run(START_S + 2)
    assert fleet.roles() == {"d0": "decode", "d1": "decode", "p0": "prefill", "p1": "decode"}
    assert fleet.pools() == (1, 3), "placements follow"
    assert not only(commands, events.RoleSet), "nobody called"
    assert only(commands, role_events.RoleSwitchEnded) == [
        role_events.RoleSwitchEnded("done", Role.PREFILL, Role.DECODE, Who.PLANNER, 0.0)
    ]
    (entry,) = fleet.flips()
    assert (entry.number, entry.instance_id, entry.source, entry.target) == (
        1,
        "p1",
        Role.PREFILL,
        Role.DECODE,
    )
    assert (entry.who, entry.state, entry.seconds) == (Who.PLANNER, "done", 0.0)
    assert (entry.reason, entry.inputs) == ("decode is short", {"queue": 3.0})
    assert fleet.stored == {"role/p1": "decode auto run"}


def test_the_planner_looks_only_while_requests_are_open() -> None:
    fleet = Fleet()
    fleet.join("m", "mixed")
    fleet.run(5)
    assert not fleet.planner.views
    fleet.place_one("r")
    fleet.run(5)
    assert len(fleet.planner.views) == 5
    assert [query.request_id for query in fleet.planner.queries] == ["r"]
    fleet.end("r")
    assert [outcome.request_id for outcome in fleet.planner.outcomes] == ["r"]
    fleet.run(5)
    assert len(fleet.planner.views) == 5
    fleet.hang_up("m")
    fleet.advance(2.0)
    assert fleet.core.next_deadline() is None


def test_requests_in_the_queue_keep_it_looking() -> None:
    fleet = Fleet()
    fleet.join("p", "prefill")
    fleet.place_one("r")
    fleet.run(2)
    assert [view.num_queued for view in fleet.planner.views] == [1, 1]


def test_what_the_planner_sees() -> None:
    fleet = Fleet.of(pairs=1)
    fleet.join("other", "mixed", max_model_len=500)
    fleet.pin("d0")
    fleet.run(1)
    view = fleet.planner.views[-1]
    assert [item.instance_id for item in view.instances] == ["d0", "other", "p0"]
    groups = {item.instance_id: item.flip_group for item in view.instances}
    assert groups["p0"] == groups["d0"] != groups["other"], "equal shape"
    assert [item.pinned for item in view.instances] == [True, False, False]
    assert {item.since_s for item in view.instances} == {100.0}
    assert set(view.ready_at_s.values()) == {100.0 + START_S}
    fleet.mute.add("p0")
    fleet.set_role("p0", "mixed")
    fleet.run(1)
    view = fleet.planner.views[-1]
    assert view.busy_groups == {groups["p0"]}
    assert [item.switching for item in view.instances] == [False, False, True]


def test_advise_only_says_it() -> None:
    config = dataclasses.replace(ROLES, mode="advise")
    fleet = Fleet.of(lambda view, now: proposal("p1", "decode"), config)
    commands = fleet.run(START_S + ROLES.cooldown_s + 2)
    assert fleet.pools() == (2, 2)
    assert not fleet.prepared
    assert fleet.states() == ["advised", "advised"], "once per cooldown"
    assert results(commands) == ["advised", "advised"]


def test_off_asks_nobody() -> None:
    config = dataclasses.replace(ROLES, mode="off")
    fleet = Fleet.of(lambda view, now: proposal("p1", "decode"), config)
    fleet.run(START_S + 5)
    assert not fleet.planner.views
    assert not fleet.planner.queries
    fleet.set_role("p1", "decode")
    assert [(e.who, e.state) for e in fleet.flips()] == [(Who.OPERATOR, "done")]


@pytest.mark.parametrize(("urgent", "gap_s"), [(False, 10.0), (True, 5.0)])
def test_cooldown(urgent: bool, gap_s: float) -> None:
    other = {Role.PREFILL: "decode", Role.DECODE: "prefill"}
    fleet = Fleet.of(
        lambda view, now: proposal("p1", other[view.instances[-1].role], urgent=urgent)
    )
    fleet.run(40)
    times = [at_s for at_s, _ in fleet.prepared]
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert times[0] >= 100 + START_S, "a cluster that comes together is left alone"
    assert min(gaps) >= gap_s
    assert max(gaps) <= gap_s + 1, "and then it is ready again"


def test_an_operators_switch_starts_the_cooldown_too() -> None:
    fleet = eager("p1", "decode")
    fleet.run(START_S - 1)
    fleet.set_role("d1", "mixed")
    fleet.run(ROLES.cooldown_s - 1)
    assert fleet.role("p1") == "prefill"
    fleet.run(3)
    assert fleet.role("p1") == "decode"


def test_flip_groups_do_not_wait_for_each_other() -> None:
    names = itertools.cycle(["p0", "p1", "q0"])
    fleet = Fleet(lambda view, now: proposal(next(names), "mixed"))
    for name in ("p0", "p1"):
        fleet.join(name, "prefill")
    fleet.join("q0", "prefill", max_model_len=500)
    fleet.join("d0", "decode")
    fleet.mute |= {"p0", "p1"}
    fleet.place_one("open")
    fleet.run(START_S + 4)
    first, _ = sorted(name for _, name in fleet.prepared)
    assert fleet.role("q0") == "mixed"
    fleet.speak(first)
    other = {"p0": "p1", "p1": "p0"}[first]
    assert (fleet.role(first), fleet.role(other)) == ("mixed", "prefill")


@pytest.mark.parametrize(
    ("roles", "name", "target", "config", "word"),
    [
        (("prefill", "decode"), "i0", "decode", {}, "min_prefill"),
        (("prefill", "decode"), "i1", "prefill", {}, "min_decode"),
        (("mixed", "decode"), "i0", "decode", {}, "min_prefill"),
        (("prefill", "prefill", "decode"), "i0", "decode", {"min_prefill": 2}, "min_prefill"),
        (("prefill", "decode", "decode"), "i1", "prefill", {"min_decode": 2}, "min_decode"),
        (("prefill", "prefill", "decode"), "i0", "mixed", {"allow_mixed": False}, "allow_mixed"),
        (("prefill", "prefill", "decode"), "i0", "decode", {}, ""),
        (("prefill", "decode"), "i0", "mixed", {"min_prefill": 5}, ""),
    ],
)
def test_minimum_pools(
    roles: tuple[str, ...], name: str, target: str, config: dict[str, Any], word: str
) -> None:
    fleet = Fleet(lambda view, now: proposal(name, target), RolesConfig(**config))
    for index, role in enumerate(roles):
        fleet.join(f"i{index}", role)
    fleet.place_one("open")
    fleet.run(START_S + 4)
    (entry,) = fleet.flips()
    assert entry.state == ("refused" if word else "done")
    assert word in entry.detail
    assert fleet.role(name) == (roles[int(name[1])] if word else target)


def test_only_ready_instances_count() -> None:
    fleet = eager("p1", "decode")
    fleet.feed(events.Drain(fleet.next_id(), "p0"))
    fleet.run(START_S + 2)
    assert fleet.states() == ["refused"]
    fleet.feed(events.Drain(fleet.next_id(), "p0", undo=True))
    fleet.run(2)
    assert fleet.states() == ["refused", "done"]


def test_a_refusal_is_logged_once_per_cooldown() -> None:
    fleet = eager("p1", "decode")
    fleet.pin("p1")
    commands = fleet.run(START_S + 9)
    assert fleet.states() == ["refused"]
    assert "pinned p1 to prefill" in fleet.flips()[0].detail
    assert results(commands) == ["refused"]
    fleet.run(ROLES.cooldown_s)
    assert fleet.states() == ["refused", "refused"]
    assert not fleet.prepared


@pytest.mark.parametrize(
    ("name", "role"), [("nobody", "decode"), ("p1", "prefill")], ids=["gone", "has it"]
)
def test_what_is_moot_is_not_logged(name: str, role: str) -> None:
    fleet = eager(name, role)
    fleet.run(START_S + 3)
    assert not fleet.flips()


def test_an_instance_may_refuse() -> None:
    fleet = eager("p1", "decode")
    fleet.refusing.add("p1")
    commands = fleet.run(START_S + 5)
    assert not only(commands, events.CallFailed)
    assert fleet.pools() == (2, 2)
    assert fleet.stored == {}
    (entry,) = fleet.flips()
    assert (entry.state, entry.seconds) == ("refused", None)
    assert "it does not want to" in entry.detail


def test_silence_and_death_leave_roles_as_they_were() -> None:
    fleet = eager("p1", "decode")
    fleet.mute.add("p1")
    fleet.run(START_S + SWITCH_TIMEOUT_S + 2)
    assert fleet.states() == ["failed"]
    assert "keeps the role prefill" in fleet.flips()[0].detail
    fleet.run(ROLES.cooldown_s / 2)
    assert fleet.states() == ["failed", "switching"]
    fleet.hang_up("p1")
    assert fleet.states() == ["failed", "failed"]
    assert fleet.role("p1") == "prefill"
    assert fleet.stored == {}


def prepare(fleet: Fleet) -> None:
    """Up to a preparation that ``p1`` has not answered."""
    fleet.mute.add("p1")
    fleet.run(START_S + 1.5)
    assert fleet.states() == ["switching"]


@pytest.mark.parametrize("what", ["pin", "pause", "drain"])
def test_it_is_asked_once_more_before_the_commit(what: str) -> None:
    fleet = eager("p1", "decode")
    prepare(fleet)
    if what == "drain":
        fleet.feed(events.Drain(fleet.next_id(), "p0"))
    else:
        (fleet.pin if what == "pin" else lambda _: fleet.pause())("p1")
    fleet.speak("p1")
    assert fleet.states() == ["refused"]
    assert fleet.role("p1") == "prefill"


def test_a_pin_during_the_commit_holds_if_it_fails() -> None:
    fleet = eager("p1", "decode")
    prepare(fleet)
    number = fleet.unanswered.pop("p1")[0]
    fleet.acknowledge("p1", number)
    assert fleet.role("p1") == "decode"
    fleet.pin("p1")
    assert fleet.stored == {"role/p1": "decode"}
    fleet.hang_up("p1")
    assert fleet.role("p1") == "prefill"
    assert fleet.stored == {"role/p1": "prefill"}


def test_an_operators_switch_pins() -> None:
    fleet = eager("p1", "prefill")
    fleet.set_role("p1", "decode")
    assert fleet.stored == {"role/p1": "decode"}
    fleet.run(ROLES.cooldown_s + 2)
    assert fleet.role("p1") == "decode"
    commands = fleet.pin("p1", False)
    assert [c.role for c in only(commands, role_events.RolePinned)] == [Role.DECODE]
    assert fleet.stored == {"role/p1": "decode auto run"}
    fleet.run(2)
    assert fleet.role("p1") == "prefill"
    assert [(e.who, e.state) for e in fleet.flips()] == [
        (Who.OPERATOR, "done"),
        (Who.PLANNER, "refused"),
        (Who.PLANNER, "done"),
    ]


def test_pins_name_instances() -> None:
    fleet = Fleet.of()
    for pinned in (True, False):
        failure = only(fleet.pin("nobody", pinned), events.CallFailed)[0].failure
        assert (failure.code, failure.param) == (Code.NOT_FOUND, "instance_id")
    fleet.pin("p1")
    fleet.hang_up("p1")
    fleet.advance(1.5)
    commands = fleet.pin("p1", False)
    assert [c.role for c in only(commands, role_events.RolePinned)] == [None]
    assert fleet.stored == {"role/p1": "prefill auto run"}


def test_a_pause_ends_by_itself() -> None:
    fleet = eager("p1", "decode")
    commands = fleet.pause(duration_s=START_S + ROLES.cooldown_s)
    assert only(commands, role_events.RoleAdviceChanged), "for the metrics"
    fleet.run(START_S + 3)
    assert fleet.states() == ["advised"], "it still says what it would do"
    commands = fleet.run(ROLES.cooldown_s - 3)
    assert only(commands, role_events.RoleAdviceChanged)
    assert not fleet.paused()
    assert "pause/roles" not in fleet.stored
    fleet.run(ROLES.cooldown_s)
    assert fleet.states() == ["advised", "done"]


def test_resume() -> None:
    fleet = Fleet.of()
    fleet.pause(duration_s=5.0)
    fleet.pause()
    assert fleet.paused()
    assert fleet.core.automation.paused_until_s is None
    fleet.run(10)
    assert fleet.paused()
    fleet.pause(False)
    assert not fleet.paused()
    assert fleet.stored == {}


@pytest.mark.parametrize("duration_s", [0.0, -1.0, float("nan"), float("inf")])
def test_wrong_durations_are_named(duration_s: float) -> None:
    failure = only(Fleet().pause(duration_s=duration_s), events.CallFailed)[0].failure
    assert (failure.code, failure.param) == (Code.INVALID_REQUEST, "duration_s")


def test_all_of_it_outlives_the_controller() -> None:
    fleet = eager("p1", "decode")
    fleet.run(START_S + 2)
    fleet.pin("d1")
    fleet.pause(duration_s=100.0)
    assert fleet.stored["pause/roles"] == repr(fleet.clock.now() + 100.0)
    again = Fleet.of(stored=fleet.stored)
    assert again.roles() == {"d0": "decode", "d1": "decode", "p0": "prefill", "p1": "decode"}
    assert again.core.state.pinned == {"d1"}
    assert again.core.automation.paused_until_s == fleet.core.automation.paused_until_s
    forever = Fleet.of(stored={"pause/roles": ""})
    forever.run(200)
    assert forever.paused()


def test_another_run_of_the_cluster_begins_with_its_own_split() -> None:
    fleet = eager("p1", "decode")
    fleet.run(START_S + 2)
    fleet.pin("d1")
    again = Fleet.of(stored=fleet.stored, run_id="next run")
    assert again.roles() == {"d0": "decode", "d1": "decode", "p0": "prefill", "p1": "prefill"}
    assert again.core.state.pinned == {"d1"}


@pytest.mark.parametrize("value", ["boss", "", "decode auto", "decode auto other", "nan"])
def test_what_a_store_says_wrongly_is_left_out(value: str) -> None:
    fleet = Fleet.of(stored={"role/p1": value, "pause/roles": value})
    assert fleet.role("p1") == "prefill"
    assert fleet.paused()
    assert fleet.core.automation.paused_until_s is None


def test_an_instance_that_restarts_keeps_what_the_planner_chose() -> None:
    fleet = eager("p1", "decode")
    fleet.run(START_S + 2)
    fleet.join("p1", "prefill")
    assert fleet.role("p1") == "decode"


def test_the_effect_is_counted_around_the_switch() -> None:
    fleet = eager("p1", "decode")
    for index in range(10):
        fleet.end_with(f"before{index}", met=index < 4)
    fleet.end_with("without targets", met=None)
    fleet.run(START_S + 1.5)
    (entry,) = fleet.flips()
    log = fleet.core.automation.log
    assert (entry.before.num_met, entry.before.num_ended) == (4, 10)
    assert entry.after.num_ended == 0
    for index in range(10):
        fleet.end_with(f"after{index}", met=index < 9)
    assert entry.after.attainment == 0.9
    assert not log.settled(entry, fleet.clock.now())
    fleet.run(ROLES.cooldown_s)
    fleet.end_with("late", met=False)
    assert entry.after.attainment == 0.9
    assert log.settled(entry, fleet.clock.now())


def test_advice_is_told_when_it_changes() -> None:
    fleet = Fleet.of()
    fleet.planner.says = RoleAdvice({Role.PREFILL: 3, Role.DECODE: 1}, 4)
    assert len(only(fleet.run(3), role_events.RoleAdviceChanged)) == 1
    assert fleet.core.automation.advice.desired_instances == 4


def test_a_controller_that_was_stopped_does_not_decide_on_old_news() -> None:
    fleet = Fleet.of()
    fleet.run(1)
    assert len(fleet.planner.views) == 1
    fleet.clock.advance(3.0)
    fleet.core.on_tick(fleet.clock.now())
    assert len(fleet.planner.views) == 1
    fleet.run(1)
    assert len(fleet.planner.views) == 2
