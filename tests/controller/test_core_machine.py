"""The core under arbitrary histories: what must hold after every event, and at the end."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from baton.core.clock import VirtualClock
from baton.core.cluster import Placement
from baton.core.config import ControllerConfig
from baton.core.policy_config import AdmissionConfig
from controller import events
from controller.core import ControllerCore
from controller.events import Command, Event
from controller.membership import InstanceState
from tests.controller.controller_helpers import idle_load, make_info, only

CONFIG = ControllerConfig(
    max_queued_placements=5, trace_capacity=10, admission=AdmissionConfig(offline_wait_s=5.0)
)
LIMITED = dataclasses.replace(
    CONFIG, admission=AdmissionConfig(max_open_per_instance=2, offline_wait_s=5.0)
)
NAMES = st.sampled_from(["a", "b", "c", "d"])
ROLES = st.sampled_from(["prefill", "decode", "mixed"])


class ControllerMachine(RuleBasedStateMachine):
    """Members come, go, die, switch roles and drain; requests are placed and end."""

    config = CONFIG

    def __init__(self) -> None:
        super().__init__()
        self.clock = VirtualClock()
        self.core = ControllerCore(self.config, epoch=1)
        self.history: list[tuple[float, Event | None]] = []
        self.commands: list[Command] = []
        self.ids = 0
        self.incarnations: dict[str, int] = {}
        self.issued: list[int] = []
        self.sessions: dict[str, int] = {}
        self.directives: dict[str, list[int]] = {}
        self.placed: dict[str, int] = {}
        self.calls: set[int] = set()
        self.answered: set[int] = set()
        self.batches: dict[int, set[int]] = {}
        """Indices of queries that are not answered, by call."""
        self.gone: set[int] = set()
        self.forced = False

    # Plumbing

    def feed(self, event: Event) -> list[Command]:
        had = self.core.state.paths()
        now = self.clock.now()
        self.history.append((now, event))
        commands = self.core.on_event(event, now)
        self.take(commands)
        # Only an operator's force, a drain, or an instance's own ways take a path away.
        if isinstance(event, events.SetRole):
            assert self.core.state.paths() == had
        return commands

    def take(self, commands: list[Command]) -> None:
        self.commands += commands
        owner = {session: name for name, session in self.sessions.items()}
        for command in commands:
            match command:
                case events.SendDirective(session, number):
                    if session in owner:
                        self.directives.setdefault(owner[session], []).append(number)
                case events.CloseSession(session):
                    if session in owner:
                        del self.sessions[owner[session]]
                case events.Placed(call_id, results, last):
                    self.check_placed(call_id, results)
                    assert last is not bool(self.batches[call_id]), "last when none is left"
                    if last:
                        self.answer(call_id)
                case (
                    events.Registered(call_id)
                    | events.RoleSet(call_id)
                    | events.DrainReplied(call_id)
                    | events.CallFailed(call_id)
                ):
                    self.answer(call_id)
                case _:
                    pass

    def answer(self, call_id: int) -> None:
        assert call_id in self.calls, "answers only calls"
        assert call_id not in self.answered, "answers once"
        self.answered.add(call_id)

    def check_placed(self, call_id: int, results: Mapping[int, object]) -> None:
        assert call_id not in self.gone
        for index, result in results.items():
            # Raises KeyError for an answer given twice.
            self.batches[call_id].remove(index)
            if isinstance(result, Placement):
                self.placed[result.request_id] = result.attempt

    def call(self) -> int:
        self.ids += 1
        self.calls.add(self.ids)
        return self.ids

    def batch(self, *queries: events.PlaceQuery) -> events.PlaceRequests:
        call_id = self.call()
        self.batches[call_id] = set(range(len(queries)))
        return events.PlaceRequests(call_id, "g", queries)

    # Members

    @rule(name=NAMES, role=ROLES)
    def start(self, name: str, role: str) -> None:
        reply = only(
            self.feed(events.RegisterInstance(self.call(), make_info(name, role))),
            events.Registered,
        )[0]
        assert reply.incarnation > max(self.issued, default=0), "unique and rising"
        self.issued.append(reply.incarnation)
        self.incarnations[name] = reply.incarnation
        self.directives.pop(name, None)

    @rule(name=NAMES, role=ROLES)
    def join(self, name: str, role: str) -> None:
        self.start(name, role)
        self.open(name)

    @initialize(roles=st.tuples(ROLES, ROLES, ROLES))
    def join_some(self, roles: tuple[str, str, str]) -> None:
        for name, role in zip("abc", roles, strict=True):
            self.join(name, role)

    @rule(name=NAMES, role=ROLES)
    def come_back(self, name: str, role: str) -> None:
        if name not in self.incarnations:
            return
        info = make_info(name, role, incarnation=self.incarnations[name])
        self.feed(events.RegisterInstance(self.call(), info))

    @rule(name=NAMES)
    def open(self, name: str) -> None:
        if name in self.incarnations:
            self.ids += 1
            self.sessions[name] = self.ids
            self.beat(name, 0, True)

    @rule(name=NAMES, num_running=st.integers(0, 2), ok=st.booleans())
    def beat(self, name: str, num_running: int, ok: bool) -> None:
        if name not in self.sessions:
            return
        acks = tuple(events.Ack(n, ok, "no") for n in self.directives.pop(name, []))
        load = idle_load(num_running=num_running)
        session = self.sessions[name]
        had = self.core.state.paths()
        self.feed(events.Heartbeat(session, name, self.incarnations[name], load, acks))
        if not self.forced:
            has = self.core.state.paths()
            assert all(h or not b for b, h in zip(had, has, strict=True)), "no pool was emptied"

    @rule(name=NAMES)
    def hang_up(self, name: str) -> None:
        if name in self.sessions:
            self.feed(events.SessionClosed(self.sessions.pop(name)))

    @rule(seconds=st.sampled_from([0.1, 0.6, 1.5, 5.0]), keep=st.booleans())
    def wait(self, seconds: float, keep: bool) -> None:
        end = self.clock.now() + seconds
        while (at := self.core.next_deadline()) is not None and at <= end:
            self.clock.advance(max(0.0, at - self.clock.now()))
            self.history.append((self.clock.now(), None))
            self.take(self.core.on_tick(self.clock.now()))
        self.clock.advance(end - self.clock.now())
        if keep:
            for name in list(self.sessions):
                self.beat(name, 0, True)

    # Operators

    @rule(name=NAMES, role=ROLES, force=st.booleans())
    def set_role(self, name: str, role: str, force: bool) -> None:
        self.forced |= force
        self.feed(events.SetRole(self.call(), name, role, force))

    @rule(name=NAMES, wait=st.booleans(), undo=st.booleans())
    def drain(self, name: str, wait: bool, undo: bool) -> None:
        self.feed(events.Drain(self.call(), name, wait, 3.0, undo))

    # Requests

    @rule(
        count=st.integers(1, 3),
        max_new=st.sampled_from([1, 10]),
        priority=st.integers(-1, 1),
        tenant=st.sampled_from(["", "t"]),
        deadline_s=st.sampled_from([None, 2.0]),
    )
    def place(
        self, count: int, max_new: int, priority: int, tenant: str, deadline_s: float | None
    ) -> None:
        queries = []
        for _ in range(count):
            self.ids += 1
            name = f"r{self.ids}"
            query = events.PlaceQuery(
                name, 0, 10, max_new, priority, tenant=tenant, deadline_s=deadline_s
            )
            queries.append(query)
        before = {n: r.state for n, r in self.core.state.instances.items()}
        commands = self.feed(self.batch(*queries))
        for reply in only(commands, events.Placed):
            for result in reply.results.values():
                if isinstance(result, Placement):
                    for target in (result.prefill, result.decode):
                        assert before[target.instance_id] is InstanceState.READY

    @rule(data=st.data())
    @precondition(lambda self: self.placed)
    def end(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.placed)))
        attempts = (events.AttemptEnded(name, self.placed.pop(name)),)
        ended = events.RequestEnded(name, "stop", attempts=attempts)
        self.feed(events.OutcomesReported("g", (ended,)))

    @rule(data=st.data())
    @precondition(lambda self: self.placed)
    def replay(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.placed)))
        query = events.PlaceQuery(name, self.placed[name] + 1, 10, 5, budget_s=0.0, exclude=("a",))
        self.feed(self.batch(query))

    @rule(data=st.data())
    @precondition(lambda self: self.placed)
    def bind(self, data: st.DataObject) -> None:
        """Ask for the decode side once more."""
        name = data.draw(st.sampled_from(sorted(self.placed)))
        known = self.core.state.open.get(name)
        if known is None:
            return
        prefill = known.prefill
        query = events.PlaceQuery(name, known.attempt, 10, 5, bind_to=prefill.instance_id)
        results = only(self.feed(self.batch(query)), events.Placed)[0].results
        if isinstance(results[0], Placement):
            assert results[0].prefill.instance_id == prefill.instance_id
            assert self.core.state.open[name].decode == results[0].decode
        else:
            assert self.core.state.open[name] == known

    @rule(data=st.data())
    @precondition(lambda self: self.calls - self.answered - self.gone)
    def give_up(self, data: st.DataObject) -> None:
        call_id = data.draw(st.sampled_from(sorted(self.calls - self.answered - self.gone)))
        self.gone.add(call_id)
        self.feed(events.CallGone(call_id))

    # What must hold

    @invariant()
    def placements_name_live_or_dead_never_other(self) -> None:
        state = self.core.state
        for name, record in state.instances.items():
            assert record.info.instance_id == name
            assert record.state is not InstanceState.DEAD
            assert record.row is not None
            view = state.columns.view
            assert view.placeable[record.row] == (record.state is InstanceState.READY)
            assert view.takes_prefill[record.row] == record.info.role.takes_prefill
            assert view.takes_decode[record.row] == record.info.role.takes_decode
            assert (record.session_id is None) == (
                record.state in (InstanceState.JOINING, InstanceState.SUSPECT)
            )
            assert ("instance", name) in state.deadlines._at
            assert (record.switch is not None) == (("role", name) in state.deadlines._at)

    @invariant()
    def counts_are_those_of_the_open_placements(self) -> None:
        state = self.core.state
        view = state.columns.view
        for record in state.instances.values():
            me, row = record.target, record.row
            opened = state.open.values()
            assert view.open_prefill[row] == sum(p.prefill == me for p in opened)
            assert view.open_decode[row] == sum(p.decode == me for p in opened)
            assert set(record.fresh) <= set(state.open)
            assert view.open_context[row] == sum(
                p.num_context_tokens for p in opened if p.decode == me
            )
            assert view.fresh_tokens[row] == sum(f.num_tokens for f in record.fresh.values())

    @invariant()
    def the_queue_is_bounded_and_has_deadlines(self) -> None:
        placements = self.core.placements
        assert placements.num_queued <= self.config.max_queued_placements
        for number in placements._queue:
            assert ("queue", number) in self.core.state.deadlines._at
        entries = [placements._entries[number] for number in placements._queue]
        assert len(entries) == len(placements._entries) == placements.num_queued
        priorities = [0 if e.risen else e.query.priority for e in entries]
        assert priorities == sorted(priorities, reverse=True)

    def teardown(self) -> None:
        while self.placed:  # what ends makes room for what waits
            name, attempt = self.placed.popitem()
            attempts = (events.AttemptEnded(name, attempt),)
            ended = events.RequestEnded(name, "stop", attempts=attempts)
            self.feed(events.OutcomesReported("g", (ended,)))
        for name in list(self.sessions):
            self.hang_up(name)
        self.wait(30.0, keep=False)
        state = self.core.state
        assert not state.instances, "everyone is dead"
        assert self.core.next_deadline() is None, "nothing is pending"
        assert self.calls == self.answered | self.gone, "everyone was answered"
        view = state.columns.view
        assert not view.open_prefill.any()
        assert not view.open_decode.any()
        assert not view.fresh_tokens.any()
        self.replayed()

    def replayed(self) -> None:
        """The same events at the same times give the same commands."""
        core = ControllerCore(self.config, epoch=1)
        commands: list[Command] = []
        for now, event in self.history:
            commands += core.on_tick(now) if event is None else core.on_event(event, now)
        assert commands == self.commands


ControllerMachine.TestCase.settings = settings(
    max_examples=80, stateful_step_count=50, deadline=None
)
TestControllerMachine = ControllerMachine.TestCase


class LimitedMachine(ControllerMachine):
    """The same with room for two requests per instance."""

    config = LIMITED


LimitedMachine.TestCase.settings = ControllerMachine.TestCase.settings
TestLimitedMachine = LimitedMachine.TestCase
