"""Elastic roles: asks the planner, holds back or refuses, has the rest carried out. Pure.

    every interval_s, while requests are open
    planner.plan ─► switch in flight, or cooldown? ─ yes ─► held back; the planner may ask again
                        │ no
                        ▼
                    pinned, not ready, a pool too small? ─ yes ─► refused
                        │ no
                        ▼
                    mode advise, or paused? ─ yes ─► advised
                        │ no
                        ▼
                    RoleDesk: two phases, checked again before the commit ─► done, refused, failed

Each end but the first is a line of the flip log; so is each switch that an operator asks for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

from baton.core.cluster import InstanceInfo, Role
from baton.core.errors import Code
from baton.core.policy_config import RolesConfig
from controller import events, role_events
from controller.events import Failure, PlaceQuery, RequestEnded
from controller.flip_log import FlipEntry, FlipLog, FlipState
from controller.planner import (
    FlipProposal,
    RoleAdvice,
    RoleInstance,
    RolePlanner,
    RoleView,
    shape,
)
from controller.role_events import Who
from controller.roles import RoleDesk, unknown_instance
from controller.state import ClusterState, InstanceRecord

PAUSE_KEY_PREFIX = "pause/"
_PAUSE_KEY = PAUSE_KEY_PREFIX + "roles"

_PLAN = ("roles", "plan")
_RESUME = ("roles", "resume")
_URGENT_SHARE = 0.5
"""Of the cooldown, which an urgent switch waits for."""


class RoleAutomation:
    """See the module docstring. It is the watcher of ``roles``: it hears of every switch.

    ``now + wall_offset_s`` is Unix time: the end of a pause is stored in it.
    """

    def __init__(
        self,
        state: ClusterState,
        roles: RoleDesk,
        planner: RolePlanner,
        config: RolesConfig,
        *,
        num_queued: Callable[[], int],
        stored: Mapping[str, str],
        wall_offset_s: float = 0.0,
    ) -> None:
        self.config = config
        self.log = FlipLog(config.cooldown_s)
        self.advice = RoleAdvice()
        self.paused = False
        self.paused_until_s: float | None = None
        """While paused; ``None``: until an operator says otherwise."""
        self._state = state
        self._roles = roles
        self._planner = planner
        self._num_queued = num_queued
        self._wall_offset_s = wall_offset_s
        self._armed = False
        self._first_s: float | None = None
        """When the first request came."""
        self._groups: dict[tuple[object, ...], int] = {}
        self._switched_s: dict[int, float] = {}
        """By flip group: when something last switched, or was to."""
        self._since: dict[str, tuple[int, Role, float]] = {}
        """By instance, the dead too until the next view: (incarnation, role, when it took it)."""
        self._proposed: FlipProposal | None = None
        self._in_flight: dict[str, FlipEntry] = {}
        self._refusals: dict[tuple[str, Role, str], float] = {}
        roles.watcher = self
        if (until := stored.get(_PAUSE_KEY)) is not None:
            self._restore_pause(until)

    # What happens to instances and requests

    def registered(self, record: InstanceRecord, now: float) -> None:
        """An instance joined, or came back."""
        info = record.info
        known = self._since.get(info.instance_id)
        if known is None or known[:2] != (info.incarnation, info.role):
            self._since[info.instance_id] = (info.incarnation, info.role, now)

    def placed(self, queries: Iterable[PlaceQuery], now: float) -> None:
        """Requests asked for places, and were placed, queued or refused."""
        if self.config.mode == "off":
            return
        if self._first_s is None:
            self._first_s = now
        for query in queries:
            self._planner.placed(query, now)
        if not self._armed and self._busy:
            self._arm(now)

    def reported(self, outcome: RequestEnded, now: float) -> None:
        """A request ended."""
        if outcome.met is not None:
            self.log.ended(outcome.met, now)
        if self.config.mode != "off":
            self._planner.ended(outcome, now)

    # Operators

    def pin(self, event: role_events.PinRole) -> None:
        """Keep an instance's role, or give it back to the planner."""
        state, name = self._state, event.instance_id
        record = state.instances.get(name)
        if record is None and (event.pinned or name not in state.pinned):
            state.emit(events.CallFailed(event.call_id, unknown_instance(state, name)))
            return
        if record is not None and record.switch is not None:
            # What its role goes back to if the switch fails.
            record.switch.stored_before = record.switch.previous
            record.switch.pinned_before = event.pinned
        if event.pinned:
            assert record is not None
            state.choose_role(name, record.info.role, pinned=True)
        elif name in state.pinned:
            state.choose_role(name, state.roles[name], pinned=False)
        role = record.info.role if record else None
        state.emit(role_events.RolePinned(event.call_id, role))

    def pause(self, event: role_events.PauseRoles, now: float) -> None:
        """Switch nothing for a while, or go on."""
        duration_s = event.duration_s
        if duration_s is not None and not (duration_s > 0 and math.isfinite(duration_s)):
            text = f"duration_s must be positive and finite, got {duration_s}"
            failure = Failure(Code.INVALID_REQUEST, text, param="duration_s")
            self._state.emit(events.CallFailed(event.call_id, failure))
            return
        self._resume()
        if event.paused:
            self.paused = True
            value = ""
            if duration_s is not None:
                self.paused_until_s = now + duration_s
                value = repr(self.paused_until_s + self._wall_offset_s)
                self._state.deadlines.set(_RESUME, self.paused_until_s)
            self._state.emit(events.StorePut(_PAUSE_KEY, value))
        self._state.emit(role_events.RoleAdviceChanged())
        self._state.emit(role_events.RolesPaused(event.call_id))

    # Time

    def due(self, what: str, stalled: bool, now: float) -> None:
        """A deadline of kind ``roles``. ``stalled``: all that instances said is old."""
        if what == _RESUME[1]:
            self._resume()
            self._state.emit(role_events.RoleAdviceChanged())
            return
        self._armed = False
        if not self._busy:
            return
        self._arm(now)
        if stalled:
            return
        proposal = self._planner.plan(self.view(now), now)
        advice = self._planner.advice()
        if advice != self.advice:
            self.advice = advice
            self._state.emit(role_events.RoleAdviceChanged())
        if proposal is not None:
            self._judge(proposal, now)

    def view(self, now: float) -> RoleView:
        """What the planner gets to see."""
        records = sorted(self._state.instances.items())
        self._since = {name: self._since[name] for name, _ in records}
        instances = tuple(
            RoleInstance(
                info=record.info,
                flip_group=self._group(record.info),
                ready=record.state.placeable,
                pinned=name in self._state.pinned,
                switching=record.switch is not None,
                load=record.load,
                since_s=self._since[name][2],
            )
            for name, record in records
        )
        groups = {item.flip_group for item in instances}
        ready_at_s = {group: self._ready_at_s(group, urgent=False) for group in sorted(groups)}
        return RoleView(
            instances=instances,
            num_queued=self._num_queued(),
            config=self.config,
            busy_groups=frozenset(item.flip_group for item in instances if item.switching),
            ready_at_s={group: at_s for group, at_s in ready_at_s.items() if at_s > now},
        )

    # The watcher of switches

    def began(self, record: InstanceRecord, now: float) -> None:
        """See :class:`controller.roles.SwitchWatcher`."""
        assert record.switch is not None
        self._switched_s[self._group(record.info)] = now
        entry = self._entry(record, record.switch.target, FlipState.SWITCHING, now)
        self._in_flight[record.info.instance_id] = entry

    def objection(self, record: InstanceRecord) -> str | None:
        """See :class:`controller.roles.SwitchWatcher`."""
        assert record.switch is not None
        if self.paused:
            return "switches were paused meanwhile"
        return self._refusal(record, record.switch.target)

    def ended(self, record: InstanceRecord, result: str, why: str, now: float | None) -> None:
        """See :class:`controller.roles.SwitchWatcher`."""
        entry = self._in_flight.pop(record.info.instance_id)
        if now is not None:
            self._switched_s[self._group(record.info)] = now
            info = record.info
            self._since[info.instance_id] = (info.incarnation, info.role, now)
            self.log.done(entry, now)
        else:
            entry.state = FlipState.REFUSED if result == "refused" else FlipState.FAILED
            entry.detail = why

    # A proposal

    def _judge(self, proposal: FlipProposal, now: float) -> None:
        record = self._state.instances.get(proposal.instance_id)
        # Both are gone in a moment: an instance that died, and a switch that an operator made.
        if record is None or proposal.role is record.info.role:
            return
        group = self._group(record.info)
        peers = [r for r in self._state.instances.values() if self._group(r.info) == group]
        if any(peer.switch is not None for peer in peers):
            return
        if now < self._ready_at_s(group, urgent=proposal.urgent):
            return
        self._proposed = proposal
        refusal = self._refusal(record, proposal.role)
        if refusal is not None:
            self._refuse(record, proposal.role, refusal, now)
        elif self.config.mode == "advise" or self.paused:
            self._switched_s[group] = now
            self._entry(record, proposal.role, FlipState.ADVISED, now)
            self._told("advised", record, proposal.role)
        else:
            failure = self._roles.propose(proposal.instance_id, proposal.role, now)
            if failure is not None:
                self._refuse(record, proposal.role, failure.message, now)
        self._proposed = None

    def _refusal(self, record: InstanceRecord, target: Role) -> str | None:
        """Why the planner may not have this switch now, whatever it would be good for."""
        name = record.info.instance_id
        if name in self._state.pinned:
            return f"an operator pinned {name} to {record.info.role}"
        if not record.state.placeable:
            return f"{name} is {record.state}"
        if target is Role.MIXED and not self.config.allow_mixed:
            return "roles.allow_mixed is false"
        return self._too_few(record, target)

    def _too_few(self, record: InstanceRecord, target: Role) -> str | None:
        """Which pool of its flip group a switch would make smaller than it may be."""
        group = self._group(record.info)
        others = [
            other.may_take()
            for other in self._state.instances.values()
            if other is not record and other.state.placeable and self._group(other.info) == group
        ]
        role, config = record.info.role, self.config
        for what, least, num_others, takes, will_take in (
            (
                "prefill",
                config.min_prefill,
                sum(prefill for prefill, _ in others),
                role.takes_prefill,
                target.takes_prefill,
            ),
            (
                "decode",
                config.min_decode,
                sum(decode for _, decode in others),
                role.takes_decode,
                target.takes_decode,
            ),
        ):
            if takes and not will_take and num_others < least:
                return (
                    f"{num_others} ready instances would take {what}, roles.min_{what} is {least}"
                )
        return None

    def _refuse(self, record: InstanceRecord, target: Role, why: str, now: float) -> None:
        """Log it, but not again each time the planner looks."""
        key = (record.info.instance_id, target, why)
        old_s = now - self.config.cooldown_s
        self._refusals = {k: at_s for k, at_s in self._refusals.items() if at_s > old_s}
        if key in self._refusals:
            return
        self._refusals[key] = now
        self._entry(record, target, FlipState.REFUSED, now).detail = why
        self._told("refused", record, target)

    def _entry(
        self, record: InstanceRecord, target: Role, state: FlipState, now: float
    ) -> FlipEntry:
        """A new line of the log, for the proposal at hand or an operator's switch."""
        switch = record.switch
        who = switch.who if switch else Who.PLANNER
        entry = FlipEntry(
            number=0,
            at_s=now,
            instance_id=record.info.instance_id,
            source=record.info.role,
            target=target,
            who=who,
            reason="an operator asked for it",
            state=state,
        )
        proposal = self._proposed
        if who is Who.PLANNER and proposal is not None:
            entry.reason = proposal.reason
            entry.inputs = proposal.inputs
            entry.predicted_before = proposal.predicted_before
            entry.predicted_after = proposal.predicted_after
            entry.urgent = proposal.urgent
            entry.desired_instances = proposal.desired_instances
        return self.log.add(entry)

    def _told(self, result: str, record: InstanceRecord, target: Role) -> None:
        ended = role_events.RoleSwitchEnded(result, record.info.role, target, Who.PLANNER)
        self._state.emit(ended)

    # Groups and times

    def _group(self, info: InstanceInfo) -> int:
        return self._groups.setdefault(shape(info), len(self._groups))

    def _ready_at_s(self, group: int, *, urgent: bool) -> float:
        """When a flip group may switch again."""
        part_s = _URGENT_SHARE * self.config.cooldown_s
        # Instances of a new controller, or of a new cluster, are still on their way at first.
        first_s = -math.inf if self._first_s is None else self._first_s + part_s
        switched_s = self._switched_s.get(group, -math.inf)
        return max(first_s, switched_s + (part_s if urgent else self.config.cooldown_s))

    @property
    def _busy(self) -> bool:
        return bool(self._state.open) or self._num_queued() > 0

    def _arm(self, now: float) -> None:
        self._armed = True
        self._state.deadlines.set(_PLAN, now + self.config.interval_s)

    # The pause

    def _resume(self) -> None:
        if self.paused:
            self.paused, self.paused_until_s = False, None
            self._state.deadlines.clear(_RESUME)
            self._state.emit(events.StoreDelete(_PAUSE_KEY))

    def _restore_pause(self, until: str) -> None:
        """As stored: empty, or in Unix seconds. What cannot be read must not stop a controller."""
        self.paused = True
        try:
            until_s = float(until) - self._wall_offset_s
        except ValueError:
            return
        if math.isfinite(until_s):
            self.paused_until_s = until_s
            self._state.deadlines.set(_RESUME, until_s)
