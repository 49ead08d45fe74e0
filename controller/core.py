"""The controller's brain: events in, commands out. No I/O, no clock, no randomness.

``on_event(event, now)`` and ``on_tick(now)`` return the commands that the event causes; the same
events at the same times give the same commands. ``next_deadline()`` says when ``on_tick`` is due;
when nothing is pending there is no deadline and nothing to do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from baton.core.cluster import InstanceInfo, Role
from baton.core.config import ControllerConfig
from baton.core.cost_model import CostModel
from baton.core.errors import Code
from controller import events, role_events
from controller.drains import DRAIN_KEY_PREFIX, DrainDesk
from controller.elastic import RoleAutomation
from controller.events import Command, Event, Failure
from controller.membership import InstanceEvent, InstanceState
from controller.placements import PlacementDesk
from controller.planner import RolePlanner
from controller.policies import make_policy
from controller.policies.base import PlacementPolicy
from controller.predictions import Predictions
from controller.roles import RoleDesk
from controller.slo_planner import SloPlanner
from controller.state import ClusterState, InstanceRecord, epoch_of
from controller.traces import RequestTrace, TraceBook

GRACE_S = 1.0
"""From the end of an instance's session to its death, unless it comes back."""

_STALL_S = 1.0
_MAX_FENCED_IDS = 4096


class ControllerCore:
    """See the module docstring. ``stored`` is what the metadata store holds at the start."""

    def __init__(
        self,
        config: ControllerConfig,
        *,
        epoch: int,
        stored: Mapping[str, str] | None = None,
        policy: PlacementPolicy | None = None,
        costs: CostModel | None = None,
        weights: Mapping[str, float] | None = None,
        planner: RolePlanner | None = None,
        run_id: str = "",
        wall_offset_s: float = 0.0,
    ) -> None:
        """``policy``: instead of the one that ``config`` names. ``costs``: what predictions start
        from, of every instance. ``weights``: of service classes, for their tenants' shares of the
        queue. ``planner``: who switches roles beside operators; default: by service levels.
        ``run_id`` is equal for all controllers of one run of the cluster; what a planner chose in
        another is forgotten. ``now + wall_offset_s`` is Unix time."""
        self.predictions = Predictions(costs)
        self._config = config
        stored = stored or {}
        drained = {
            key.removeprefix(DRAIN_KEY_PREFIX) for key in stored if key.startswith(DRAIN_KEY_PREFIX)
        }
        self.state = ClusterState(epoch, stored, drained, run_id)
        self.traces = TraceBook(config.trace_capacity)
        self.placements = PlacementDesk(
            self.state, config, self.traces, policy or make_policy(config.policy), weights
        )
        self._roles = RoleDesk(self.state)
        self.automation = RoleAutomation(
            self.state,
            self._roles,
            planner or SloPlanner(self.predictions.model),
            config.roles,
            num_queued=lambda: self.placements.num_queued,
            stored=stored,
            wall_offset_s=wall_offset_s,
        )
        self._drains = DrainDesk(self.state)
        self._fenced: dict[str, int] = {}
        """Highest dead incarnation by instance id: nothing up to it ever serves again."""

    def on_event(self, event: Event, now: float) -> list[Command]:
        """Take in one event."""
        match event:
            case events.Heartbeat():
                self._heartbeat(event, now)
            case events.PlaceRequests():
                self.placements.place(event, now)
                self.automation.placed(event.queries, now)
            case events.OutcomesReported():
                self._outcomes(event, now)
            case events.RegisterInstance():
                self._register(event, now)
            case events.SessionClosed():
                self._session_closed(event, now)
            case events.MemberSeen():
                self._member_seen(event)
            case events.MemberGone():
                self._member_gone(event)
            case events.SetRole():
                self._roles.request(event, now)
            case role_events.PinRole():
                self.automation.pin(event)
            case role_events.PauseRoles():
                self.automation.pause(event, now)
            case events.Drain():
                self._drains.request(event, now)
            case events.CallGone():
                self.placements.call_gone(event.call_id)
                self._drains.call_gone(event.call_id)
        return self._finish(now)

    def on_tick(self, now: float) -> list[Command]:
        """Do what is due. May be called at any time; early calls do nothing."""
        due_at = self.state.deadlines.next()
        # A controller that was stopped itself finds everyone silent; what they said meanwhile
        # still waits in its sockets.
        stalled = due_at is not None and now - due_at > _STALL_S
        for kind, key in self.state.deadlines.pop_due(now):
            match kind, key:
                case "instance", str():
                    self._instance_due(self.state.instances[key], stalled, now)
                case "queue", int():
                    self.placements.expire(key, now)
                case "role", str():
                    # An instance that died a moment ago took its switch along.
                    if (record := self.state.instances.get(key)) and record.switch:
                        self._roles.expired(key)
                case "drain", int():
                    self._drains.expired(key)
                case "roles", str():
                    self.automation.due(key, stalled, now)
        return self._finish(now)

    def next_deadline(self) -> float | None:
        """When :meth:`on_tick` is due (same clock as ``now``); ``None``: not before an event."""
        return self.state.deadlines.next()

    def shut(self, now: float) -> list[Command]:
        """Refuse what still waits: the controller is about to stop."""
        self.placements.shut()
        return self._finish(now)

    def explain(self, request_id: str) -> RequestTrace | None:
        """Where a request was placed and how it ended; ``None`` if unknown or forgotten."""
        return self.traces.get(request_id)

    # Instances

    def _register(self, event: events.RegisterInstance, now: float) -> None:
        state, info = self.state, event.info
        failure = _info_problem(info) or self._fencing(info)
        if failure is not None:
            state.emit(events.CallFailed(event.call_id, failure))
            return
        known = state.by_incarnation(info.instance_id, info.incarnation)
        # Given out by an earlier controller of which nothing is left here.
        foreign = bool(info.incarnation) and known is None
        self._see_epoch(event.known_epoch)
        if foreign:
            self._raise_epoch(epoch_of(info.incarnation) + 1)
        if known is not None:
            record = known
            self._roles.session_lost(record)
            self._drop_session(record)
            state.apply(record, InstanceEvent.REGISTERED)
        else:
            old = state.instances.get(info.instance_id)
            if old is not None:
                self._die(old, InstanceEvent.SUPERSEDED)
            incarnation = info.incarnation or state.next_incarnation()
            record = InstanceRecord(
                info=_with(info, incarnation, info.role),
                state=InstanceState.JOINING,
                last_seen_s=now,
                row=state.columns.add(info),
            )
            state.instances[info.instance_id] = record
        record.drain_told |= event.draining
        if event.draining and foreign and info.instance_id not in state.drained_ids:
            state.drained_ids.add(info.instance_id)
            state.emit(events.StorePut(DRAIN_KEY_PREFIX + info.instance_id, "1"))
        if foreign:
            # An operator may have chosen it while another controller ran whose memory is gone; the
            # instance's own next life must not fall back to what it was configured to be.
            state.roles.setdefault(info.instance_id, info.role)
        record.drain_wanted = info.instance_id in state.drained_ids
        # The operator's choice, else what this controller believed before, else what it says.
        role = state.roles.get(info.instance_id, known.info.role if known else info.role)
        record.info = _with(info, record.info.incarnation, role)
        assert record.row is not None
        state.columns.set_info(record.row, record.info)
        self.predictions.join(record.info)
        self._set_costs(record)
        record.role_unsure = False
        self.automation.registered(record, now)
        state.changed = True
        state.deadlines.set(("instance", info.instance_id), now + self._config.dead_after_s)
        state.emit(
            events.Registered(event.call_id, record.info.incarnation, state.epoch, record.info.role)
        )

    def _fencing(self, info: InstanceInfo) -> Failure | None:
        """Why this incarnation is over, if it is."""
        if not info.incarnation:
            return None
        live = self.state.instances.get(info.instance_id)
        newest = live.info.incarnation if live else 0
        if info.incarnation >= newest and info.incarnation > self._fenced.get(info.instance_id, 0):
            return None
        text = f"incarnation {info.incarnation} of {info.instance_id} is over"
        return Failure(Code.FENCED, text)

    def _heartbeat(self, event: events.Heartbeat, now: float) -> None:
        state = self.state
        record = state.by_incarnation(event.instance_id, event.incarnation)
        if record is None:
            self._refuse_session(event)
            return
        if record.session_id != event.session_id:
            self._session_opened(record, event)
        record.last_seen_s = now
        record.load = event.load
        state.deadlines.set(("instance", event.instance_id), now + self._config.dead_after_s)
        assert record.row is not None
        state.columns.set_load(record.row, event.load)
        if self.predictions.observe(event.instance_id, record.info.role, event.load):
            self._set_costs(record)
        state.settle(record, now)
        for ack in event.acks:
            self._roles.acked(record, ack, now)
        self._drains.loaded(record)

    def _set_costs(self, record: InstanceRecord) -> None:
        """Let placement go by what is predicted of an instance now."""
        model = self.predictions.model(record.info.instance_id)
        if model is not None and record.row is not None:
            self.state.columns.set_costs(record.row, model)

    def _session_opened(self, record: InstanceRecord, event: events.Heartbeat) -> None:
        state = self.state
        self._roles.session_lost(record)
        self._drop_session(record)
        record.session_id = event.session_id
        state.sessions[event.session_id] = (event.instance_id, event.incarnation)
        state.apply(record, InstanceEvent.SESSION_OPENED)
        self._roles.session_opened(record)
        self._drains.session_opened(record)

    def _refuse_session(self, event: events.Heartbeat) -> None:
        """Somebody speaks for an incarnation that is not live."""
        state = self.state
        known = state.instances.get(event.instance_id)
        newest = max(self._fenced.get(event.instance_id, 0), known.info.incarnation if known else 0)
        state.sessions.pop(event.session_id, None)
        if event.incarnation and event.incarnation <= newest:
            text = f"incarnation {event.incarnation} of {event.instance_id} is over"
            state.emit(events.SendDirective(event.session_id, 0, events.Fence()))
            state.emit(events.CloseSession(event.session_id, Failure(Code.FENCED, text)))
        else:
            text = f"{event.instance_id} is not registered here: register first"
            state.emit(events.CloseSession(event.session_id, Failure(Code.NOT_FOUND, text)))

    def _session_closed(self, event: events.SessionClosed, now: float) -> None:
        identity = self.state.sessions.pop(event.session_id, None)
        record = self.state.by_incarnation(*identity) if identity else None
        # A session that another one replaced ends without a word.
        if record is None or record.session_id != event.session_id:
            return
        record.session_id = None
        self._roles.session_lost(record)
        self.state.apply(record, InstanceEvent.SESSION_CLOSED)
        self.state.deadlines.set(("instance", record.info.instance_id), now + GRACE_S)

    def _drop_session(self, record: InstanceRecord) -> None:
        if record.session_id is not None:
            self.state.sessions.pop(record.session_id, None)
            text = f"a newer session of {record.info.instance_id} took over"
            self.state.emit(events.CloseSession(record.session_id, Failure(Code.ABORTED, text)))
            record.session_id = None

    def _instance_due(self, record: InstanceRecord, stalled: bool, now: float) -> None:
        if stalled:
            again_s = self._config.dead_after_s
            self.state.deadlines.set(("instance", record.info.instance_id), now + again_s)
            return
        self._die(record, InstanceEvent.LOST)

    def _die(self, record: InstanceRecord, event: InstanceEvent) -> None:
        state, name = self.state, record.info.instance_id
        self._roles.session_lost(record)
        state.apply(record, event)
        if record.session_id is not None:
            state.tell(record, events.Fence())
            state.sessions.pop(record.session_id, None)
            text = f"incarnation {record.info.incarnation} of {name} is over"
            state.emit(events.CloseSession(record.session_id, Failure(Code.FENCED, text)))
            record.session_id = None
        assert record.row is not None
        state.columns.remove(record.row)
        record.row = None
        record.fresh.clear()
        self.predictions.forget(name)
        del state.instances[name]
        state.deadlines.clear(("instance", name))
        state.recently_dead.append(record)
        self._fenced.pop(name, None)
        self._fenced[name] = record.info.incarnation
        if len(self._fenced) > _MAX_FENCED_IDS:
            del self._fenced[next(iter(self._fenced))]
        self._drains.lost(record)

    # Members and requests

    def _member_seen(self, event: events.MemberSeen) -> None:
        if event.session_id not in self.state.members:
            self._see_epoch(event.known_epoch)
        known = self.state.members.get(event.session_id)
        self.state.members[event.session_id] = event.member
        if event.member.kind == "pool" and known is None:
            self._pool_nodes_changed()

    def _member_gone(self, event: events.MemberGone) -> None:
        member = self.state.members.pop(event.session_id, None)
        if member is not None and member.kind == "pool":
            self._pool_nodes_changed()
        if member is None or member.kind != "gateway":
            return
        others = self.state.members.values()
        if not any((m.kind, m.member_id) == ("gateway", member.member_id) for m in others):
            self.placements.gateway_gone(member.member_id)

    def _pool_nodes_changed(self) -> None:
        """Placement knows which host tiers are on the machines of its instances."""
        pool = [m for m in self.state.members.values() if m.kind == "pool"]
        self.state.columns.set_pool_nodes({m.member_id: m.node_id for m in pool})

    def _outcomes(self, event: events.OutcomesReported, now: float) -> None:
        for outcome in event.outcomes:
            self.traces.ended(outcome)
            self.predictions.ended(self.traces.get(outcome.request_id))
            self.automation.reported(outcome, now)
            self.placements.lengths.ended(outcome)
            self.placements.reported(outcome, now)
            for attempt in outcome.attempts:
                self.placements.ended(attempt.request_id, attempt.attempt)

    def _see_epoch(self, known_epoch: int) -> None:
        """A member comes from a later epoch than mine: go above it."""
        if known_epoch > self.state.epoch:
            self._raise_epoch(known_epoch + 1)

    def _raise_epoch(self, epoch: int) -> None:
        if epoch > self.state.epoch:
            self.state.raise_epoch(epoch)
            self.state.emit(events.StoreEpoch(epoch))

    def _finish(self, now: float) -> list[Command]:
        state = self.state
        if state.more_usable:
            state.more_usable = False
            self.placements.retry(now)
        if state.changed:
            state.changed = False
            state.version += 1
            state.emit(events.PublishView(state.version))
        return state.take_commands()


def _with(info: InstanceInfo, incarnation: int, role: Role) -> InstanceInfo:
    return dataclasses.replace(info, incarnation=incarnation, role=role)


def _info_problem(info: InstanceInfo) -> Failure | None:
    for name in ("instance_id", "address", "block_size", "num_blocks", "max_model_len"):
        if not getattr(info, name):
            text = f"{name} is missing from a registration"
            return Failure(Code.INVALID_REQUEST, text, param=name)
    return None
