"""Role switches, in two phases: prepare (may be refused), then placements follow, then commit.

    wanted ─ checks ─► prepare_role ─ ack ─► placements follow, choice stored ─► commit_role
                 │            │ refused, late, gone                 │ late, gone      │ ack
                 ▼            ▼                                     ▼                 ▼
               refused     nothing changed                   old role again          done

After any failure the instance is told ``commit_role`` with its old role, which ends a preparation.
An operator's switch answers a call and pins the role; the planner's answers nobody.
"""

from __future__ import annotations

from typing import Protocol

from baton.core.cluster import Role
from baton.core.errors import Code
from controller import events, role_events
from controller.events import CallId, Failure
from controller.membership import InstanceState
from controller.state import ClusterState, InstanceRecord, RoleSwitch
from kvpool.layout import canonical_text

SWITCH_TIMEOUT_S = 5.0

_SWITCHABLE = (InstanceState.READY, InstanceState.DRAINING, InstanceState.DRAINED)


class SwitchWatcher(Protocol):
    """Hears of all switches, whoever wanted them, and has a last word on the planner's."""

    def began(self, record: InstanceRecord, now: float) -> None:
        """``record.switch`` was begun: the preparation is on its way."""

    def objection(self, record: InstanceRecord) -> str | None:
        """Why ``record.switch``, which is prepared, must not be committed now.

        Asked for the planner's switches only; an operator may do what the planner may not.
        """

    def ended(self, record: InstanceRecord, result: str, why: str, now: float | None) -> None:
        """``record.switch`` is over. ``now`` is given where it was carried out."""


class RoleDesk:
    """Checks, drives and undoes role switches; one in flight per instance."""

    def __init__(self, state: ClusterState) -> None:
        self._state = state
        self.watcher: SwitchWatcher | None = None

    def request(self, event: events.SetRole, now: float) -> None:
        """An operator asks for a switch."""
        failure = self._check(event.instance_id, event.role, event.force)
        if failure is not None:
            self._state.emit(events.CallFailed(event.call_id, failure))
            return
        record = self._state.instances[event.instance_id]
        target = Role(event.role)
        if target is record.info.role:
            self._state.choose_role(event.instance_id, target, pinned=True)
            self._state.emit(events.RoleSet(event.call_id, target))
            return
        self._begin(record, target, event.call_id, event.force, now)

    def propose(self, instance_id: str, target: Role, now: float) -> Failure | None:
        """The planner wants a switch: begun, or why not. The watcher hears how it ends."""
        failure = self._check(instance_id, target, force=False)
        if failure is None:
            self._begin(self._state.instances[instance_id], target, None, False, now)
        return failure

    def acked(self, record: InstanceRecord, ack: events.Ack, now: float) -> None:
        """The instance answered a directive; maybe this switch's."""
        switch = record.switch
        if switch is None or switch.directive_id != ack.directive_id:
            return
        name = record.info.instance_id
        if not ack.ok:
            why = ack.reason or "it gave no reason"
            text = f"{name} refused to become {switch.target}: {why}"
            self._fail(record, Failure(Code.REFUSED, text), "refused")
        elif not switch.committing:
            objection = self._objection(record, switch)
            if objection is not None:
                self._fail(record, Failure(Code.REFUSED, objection), "refused")
                return
            switch.committing = True
            self._state.set_role(record, switch.target)
            self._state.choose_role(name, switch.target, pinned=switch.call_id is not None)
            switch.directive_id = self._state.tell(record, events.CommitRole(switch.target))
            self._state.deadlines.set(("role", name), now + SWITCH_TIMEOUT_S)
        else:
            self._end(record, "done", "", now)
            if switch.call_id is not None:
                self._state.emit(events.RoleSet(switch.call_id, switch.previous))

    def expired(self, instance_id: str) -> None:
        """The instance did not answer in time."""
        record = self._state.instances[instance_id]
        assert record.switch is not None
        phase = "the commit" if record.switch.committing else "the preparation"
        text = (
            f"{instance_id} did not acknowledge {phase} of the switch to {record.switch.target} "
            f"within {SWITCH_TIMEOUT_S:g} s; it keeps the role {record.switch.previous}"
        )
        self._fail(record, Failure(Code.UNAVAILABLE, text), "timed_out")

    def session_lost(self, record: InstanceRecord) -> None:
        """The instance's session ended or its incarnation is over."""
        if record.switch is None:
            return
        text = (
            f"{record.info.instance_id} went away while it switched to {record.switch.target}; "
            f"its role stays {record.switch.previous}"
        )
        record.role_unsure = True
        self._fail(record, Failure(Code.UNAVAILABLE, text), "lost")

    def session_opened(self, record: InstanceRecord) -> None:
        """It is back: settle a role that was left open."""
        if record.role_unsure:
            record.role_unsure = False
            self._state.tell(record, events.CommitRole(record.info.role))

    def _check(self, instance_id: str, role: str, force: bool) -> Failure | None:
        """Why the switch must not begin."""
        if role not in Role._value2member_map_:
            known = ", ".join(Role)
            text = f"role must be one of {known}, got {role!r}"
            return Failure(Code.INVALID_REQUEST, text, param="role")
        record = self._state.instances.get(instance_id)
        if record is None:
            return unknown_instance(self._state, instance_id)
        if record.switch is not None:
            text = f"{instance_id} is already switching to {record.switch.target}"
            return Failure(Code.REFUSED, text)
        target = Role(role)
        if target is record.info.role:
            return None
        if record.state not in _SWITCHABLE:
            text = f"{instance_id} is {record.state}: it cannot switch its role now"
            return Failure(Code.REFUSED, text)
        emptied = None if force else self._emptied_by(record, target)
        return Failure(Code.REFUSED, emptied) if emptied else None

    def _begin(
        self, record: InstanceRecord, target: Role, call_id: CallId | None, force: bool, now: float
    ) -> None:
        name = record.info.instance_id
        record.switch = RoleSwitch(
            call_id=call_id,
            target=target,
            previous=record.info.role,
            stored_before=self._state.roles.get(name),
            pinned_before=name in self._state.pinned,
            directive_id=self._state.tell(record, events.PrepareRole(target)),
            force=force,
            began_s=now,
        )
        self._state.deadlines.set(("role", name), now + SWITCH_TIMEOUT_S)
        if self.watcher is not None:
            self.watcher.began(record, now)

    def _objection(self, record: InstanceRecord, switch: RoleSwitch) -> str | None:
        """Why a prepared switch must end after all: much may have happened since it began."""
        emptied = None if switch.force else self._emptied_by(record, switch.target)
        if emptied is None and switch.call_id is None and self.watcher is not None:
            return self.watcher.objection(record)
        return emptied

    def _emptied_by(self, switching: InstanceRecord, target: Role) -> str | None:
        """What a switch would leave the cluster without; other switches may go either way."""
        before: list[tuple[tuple[str, str], bool, bool]] = []
        after: list[tuple[tuple[str, str], bool, bool]] = []
        for record in self._state.instances.values():
            if not record.state.placeable:
                continue
            info = record.info
            group = (info.model_fingerprint, canonical_text(info.kv_layout))
            if record is switching:
                role = record.info.role
                before.append((group, role.takes_prefill, role.takes_decode))
                after.append((group, target.takes_prefill, target.takes_decode))
            else:
                entry = (group, *record.may_take())
                before.append(entry)
                after.append(entry)
        had, has = _paths(before), _paths(after)
        missing = ("prefill instance", "decode instance", "pair of prefill and decode instances")
        for index, what in enumerate(missing):
            if had[index] and not has[index]:
                return (
                    f"switching {switching.info.instance_id} to {target} would leave no usable "
                    f"{what} (force overrides this)"
                )
        return None

    def _fail(self, record: InstanceRecord, failure: Failure, result: str) -> None:
        switch, state = record.switch, self._state
        assert switch is not None
        name = record.info.instance_id
        if switch.committing:
            state.set_role(record, switch.previous)
            if switch.call_id is None and name in state.pinned:
                # An operator pinned it meanwhile: it keeps what it has.
                state.choose_role(name, switch.previous, pinned=True)
            elif switch.stored_before is None:
                state.forget_role(name)
            else:
                state.choose_role(name, switch.stored_before, pinned=switch.pinned_before)
        self._end(record, result, failure.message, None)
        state.tell(record, events.CommitRole(switch.previous))
        if switch.call_id is not None:
            state.emit(events.CallFailed(switch.call_id, failure))

    def _end(self, record: InstanceRecord, result: str, why: str, now: float | None) -> None:
        switch = record.switch
        assert switch is not None
        if self.watcher is not None:
            self.watcher.ended(record, result, why, now)
        record.switch = None
        self._state.deadlines.clear(("role", record.info.instance_id))
        seconds = None if now is None else now - switch.began_s
        self._state.emit(
            role_events.RoleSwitchEnded(result, switch.previous, switch.target, switch.who, seconds)
        )


def unknown_instance(state: ClusterState, instance_id: str) -> Failure:
    """For an operator's call that names an instance that is not there."""
    if any(record.info.instance_id == instance_id for record in state.recently_dead):
        return Failure(Code.NOT_FOUND, f"instance {instance_id} is dead", param="instance_id")
    known = ", ".join(sorted(state.instances)) or "none"
    text = f"no instance is called {instance_id!r}; there are: {known}"
    return Failure(Code.NOT_FOUND, text, param="instance_id")


def _paths(entries: list[tuple[tuple[str, str], bool, bool]]) -> tuple[bool, bool, bool]:
    prefill = {group for group, takes_prefill, _ in entries if takes_prefill}
    decode = {group for group, _, takes_decode in entries if takes_decode}
    return bool(prefill), bool(decode), bool(prefill & decode)
