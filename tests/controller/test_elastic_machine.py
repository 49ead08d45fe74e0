"""Elastic roles under arbitrary histories: what must hold whatever a planner wants."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from baton.core.cluster import Role
from baton.core.policy_config import RolesConfig
from controller import events
from controller.events import Command, Event
from controller.flip_log import FlipEntry, FlipState
from controller.planner import FlipProposal, RoleView
from controller.role_events import Who
from controller.state import InstanceRecord
from tests.controller.fleet import Fleet, proposal

NAMES = ["a", "b", "c", "d", "e", "f"]
ANY_NAME = st.sampled_from(NAMES)
ROLES = st.sampled_from(["prefill", "decode", "mixed"])
CONFIG = RolesConfig(interval_s=1.0, cooldown_s=4.0)


def group_of(name: str) -> str:
    return "f" if name in "abcd" else "g"


class Watched(Fleet):
    """A fleet that looks at the pools before and after each event."""

    def feed(self, event: Event) -> list[Command]:
        instances = self.core.state.instances
        before = {name: record.info.role for name, record in instances.items()}
        switching = [e for e in self.flips() if e.state is FlipState.SWITCHING]
        lives = {name: record.info.incarnation for name, record in instances.items()}
        pools = {group: self.sides(group) for group in ("f", "g")}
        # Not the answers to what follows: each of them comes back here by itself.
        commands = self.core.on_event(event, self.clock.now())
        self.log += commands
        for entry in switching:
            record = instances.get(entry.instance_id)
            if record is None or record.info.incarnation != lives[entry.instance_id]:
                continue
            if entry.state in (FlipState.REFUSED, FlipState.FAILED):
                assert record.info.role is entry.source, "it is as it was"
            elif entry.state is FlipState.DONE:
                assert record.info.role is entry.target
        for name, record in instances.items():
            switch = record.switch
            committed = switch is not None and switch.committing and switch.who is Who.PLANNER
            if committed and before.get(name) is not record.info.role:
                self.committed(record, pools)
        return commands + self.take(commands)

    def committed(self, record: InstanceRecord, pools: dict[str, tuple[int, int]]) -> None:
        """The planner's switch took effect just now."""
        group = record.info.model_fingerprint
        least = (CONFIG.min_prefill, CONFIG.min_decode)
        for had, has, enough in zip(pools[group], self.sides(group), least, strict=True):
            assert has >= had or has >= enough, "no pool is emptied"
        assert self.sides(group) != pools[group], "a switch changes the pools in the columns"
        assert not self.core.automation.paused

    def sides(self, fingerprint: str) -> tuple[int, int]:
        """(prefill, decode) sides of a flip group that placements can choose from."""
        view = self.core.state.columns.view
        rows = [
            record.row
            for record in self.core.state.instances.values()
            if record.row is not None
            and record.state.placeable
            and record.info.model_fingerprint == fingerprint
        ]
        return int(view.takes_prefill[rows].sum()), int(view.takes_decode[rows].sum())


class ElasticMachine(RuleBasedStateMachine):
    """Instances of two shapes come, go, refuse and fall silent; operators meddle."""

    def __init__(self) -> None:
        super().__init__()
        self.wishes: list[FlipProposal] = []
        self.fleet = Watched(self.wish, CONFIG)
        self.fleet.place_one("open")
        self.num_seen = 0
        self.last_s: dict[str, float] = {}
        """By flip group: when the last switch of the log began."""

    def wish(self, view: RoleView, now: float) -> FlipProposal | None:
        return self.wishes.pop() if self.wishes else None

    @initialize(roles=st.lists(ROLES, min_size=6, max_size=6))
    def everyone(self, roles: list[str]) -> None:
        for name, role in zip(NAMES, roles, strict=True):
            self.join(name, role)

    @rule(name=ANY_NAME, role=ROLES)
    def join(self, name: str, role: str) -> None:
        self.fleet.join(name, role, fingerprint=group_of(name))

    @rule(name=ANY_NAME)
    def hang_up(self, name: str) -> None:
        if name in self.fleet.sessions:
            self.fleet.hang_up(name)

    @rule(wishes=st.lists(st.tuples(ANY_NAME, ROLES, st.booleans()), min_size=4, max_size=9))
    def propose(self, wishes: list[tuple[str, str, bool]]) -> None:
        self.wishes[:] = [proposal(name, role, urgent=urgent) for name, role, urgent in wishes]
        self.fleet.run(len(wishes) * CONFIG.interval_s)

    @rule(seconds=st.sampled_from([0.5, 2.0, 5.0]))
    def wait(self, seconds: float) -> None:
        self.fleet.run(seconds)

    @rule(name=ANY_NAME, how=st.sampled_from(["willing", "refusing", "mute"]))
    def behave(self, name: str, how: str) -> None:
        fleet = self.fleet
        fleet.refusing.discard(name)
        if how == "mute":
            fleet.mute.add(name)
        elif name in fleet.sessions:
            if how == "refusing":
                fleet.refusing.add(name)
            fleet.speak(name)

    @rule(wishes=st.lists(st.tuples(ANY_NAME, ROLES, st.booleans()), min_size=4, max_size=9))
    def propose_in_peace(self, wishes: list[tuple[str, str, bool]]) -> None:
        self.fleet.pause(False)
        for name in NAMES:
            self.fleet.pin(name, False)
        self.propose(wishes)

    @rule(name=ANY_NAME, what=st.sampled_from(["pin", "unpin", "drain", "undrain"]))
    def meddle(self, name: str, what: str) -> None:
        if what.endswith("pin"):
            self.fleet.pin(name, what == "pin")
        else:
            undo = what == "undrain"
            self.fleet.feed(events.Drain(self.fleet.next_id(), name, undo=undo))

    @rule(paused=st.booleans(), duration_s=st.sampled_from([None, 3.0]))
    def pause(self, paused: bool, duration_s: float | None) -> None:
        self.fleet.pause(paused, duration_s)

    @rule(name=st.sampled_from(["a", "e"]), role=ROLES, force=st.booleans())
    def operate(self, name: str, role: str, force: bool) -> None:
        self.fleet.set_role(name, role, force=force)

    # What must hold

    @invariant()
    def one_switch_per_group_is_the_planners(self) -> None:
        switching: dict[str, list[Who]] = {}
        for record in self.fleet.core.state.instances.values():
            if record.switch is not None:
                switching.setdefault(record.info.model_fingerprint, []).append(record.switch.who)
        for whose in switching.values():
            assert whose.count(Who.PLANNER) <= 1

    @invariant()
    def the_log_keeps_the_cooldown(self) -> None:
        for entry in self.fleet.flips():
            if entry.number <= self.num_seen:
                continue
            self.num_seen = entry.number
            if entry.state is FlipState.REFUSED and not self.was_begun(entry):
                continue
            group = group_of(entry.instance_id)
            if entry.who is Who.PLANNER:
                share = 0.5 if entry.urgent else 1.0
                waited_s = entry.at_s - self.last_s.get(group, float("-inf"))
                assert waited_s >= share * CONFIG.cooldown_s
            self.last_s[group] = entry.at_s

    def was_begun(self, entry: FlipEntry) -> bool:
        return (entry.at_s, entry.instance_id) in self.fleet.prepared

    @invariant()
    def pinned_ones_are_left_alone(self) -> None:
        state = self.fleet.core.state
        for name in state.pinned:
            record = state.instances.get(name)
            if record is not None and record.switch is None:
                assert record.info.role is state.roles[name]

    @invariant()
    def the_columns_and_the_store_agree(self) -> None:
        state = self.fleet.core.state
        for name, record in state.instances.items():
            view = state.columns.view
            assert view.takes_prefill[record.row] == record.info.role.takes_prefill
            assert view.takes_decode[record.row] == record.info.role.takes_decode
            if name in state.roles and record.switch is None:
                assert record.info.role is state.roles[name]
        stored = {f"role/{name}" for name in state.roles}
        assert stored == {key for key in self.fleet.stored if key.startswith("role/")}
        pinned = {k for k, v in self.fleet.stored.items() if v in set(Role)}
        assert pinned == {f"role/{name}" for name in state.pinned}

    @invariant()
    def lines_in_flight_are_switches(self) -> None:
        open_ = [e.instance_id for e in self.fleet.flips() if e.state is FlipState.SWITCHING]
        switching = [
            name for name, record in self.fleet.core.state.instances.items() if record.switch
        ]
        assert sorted(open_) == sorted(switching)


ElasticMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestElasticMachine = ElasticMachine.TestCase
