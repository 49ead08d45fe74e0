"""Role switches, in two phases: prepare (may be refused), then placements follow, then commit.

    set_role ─ checks ─► prepare_role ─ ack ─► placements follow, choice stored ─► commit_role
                 │            │ refused, late, gone                 │ late, gone      │ ack
                 ▼            ▼                                     ▼                 ▼
               refused     nothing changed                   old role again          done

After any failure the instance is told ``commit_role`` with its old role, which ends a preparation.
"""

from __future__ import annotations

from baton.core.cluster import Role
from baton.core.errors import Code
from controller import events
from controller.events import Failure
from controller.membership import InstanceState
from controller.state import ClusterState, InstanceRecord, RoleSwitch
from kvpool.layout import canonical_text

SWITCH_TIMEOUT_S = 5.0
ROLE_KEY_PREFIX = "role/"

_SWITCHABLE = (InstanceState.READY, InstanceState.DRAINING, InstanceState.DRAINED)


class RoleDesk:
    """Checks, drives and undoes role switches; one in flight per instance."""

    def __init__(self, state: ClusterState) -> None:
        self._state = state

    def request(self, event: events.SetRole, now: float) -> None:
        """An operator asks for a switch."""
        failure = self._check(event)
        if failure is not None:
            self._state.emit(events.CallFailed(event.call_id, failure))
            return
        record = self._state.instances[event.instance_id]
        target = Role(event.role)
        if target is record.info.role:
            self._remember(record.info.instance_id, target)
            self._state.emit(events.RoleSet(event.call_id, target))
            return
        directive_id = self._state.tell(record, events.PrepareRole(target))
        stored_before = self._state.roles.get(event.instance_id)
        record.switch = RoleSwitch(
            event.call_id, target, record.info.role, stored_before, directive_id, event.force
        )
        self._state.deadlines.set(("role", event.instance_id), now + SWITCH_TIMEOUT_S)

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
            emptied = None if switch.force else self._emptied_by(record, switch.target)
            if emptied is not None:
                self._fail(record, Failure(Code.REFUSED, emptied), "refused")
                return
            switch.committing = True
            self._state.set_role(record, switch.target)
            self._remember(name, switch.target)
            switch.directive_id = self._state.tell(record, events.CommitRole(switch.target))
            self._state.deadlines.set(("role", name), now + SWITCH_TIMEOUT_S)
        else:
            self._end(record, "done")
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

    def _check(self, event: events.SetRole) -> Failure | None:
        """Why the switch must not begin."""
        if event.role not in Role._value2member_map_:
            known = ", ".join(Role)
            text = f"role must be one of {known}, got {event.role!r}"
            return Failure(Code.INVALID_REQUEST, text, param="role")
        record = self._state.instances.get(event.instance_id)
        if record is None:
            return unknown_instance(self._state, event.instance_id)
        if record.switch is not None:
            text = f"{event.instance_id} is already switching to {record.switch.target}"
            return Failure(Code.REFUSED, text)
        target = Role(event.role)
        if target is record.info.role:
            return None
        if record.state not in _SWITCHABLE:
            text = f"{event.instance_id} is {record.state}: it cannot switch its role now"
            return Failure(Code.REFUSED, text)
        emptied = None if event.force else self._emptied_by(record, target)
        return Failure(Code.REFUSED, emptied) if emptied else None

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
        switch = record.switch
        assert switch is not None
        name = record.info.instance_id
        if switch.committing:
            self._state.set_role(record, switch.previous)
            if switch.stored_before is None:
                del self._state.roles[name]
                self._state.emit(events.StoreDelete(ROLE_KEY_PREFIX + name))
            else:
                self._remember(name, switch.stored_before)
        self._end(record, result)
        self._state.tell(record, events.CommitRole(switch.previous))
        self._state.emit(events.CallFailed(switch.call_id, failure))

    def _end(self, record: InstanceRecord, result: str) -> None:
        record.switch = None
        self._state.deadlines.clear(("role", record.info.instance_id))
        self._state.emit(events.RoleSwitchEnded(result))

    def _remember(self, instance_id: str, role: Role) -> None:
        if self._state.roles.get(instance_id) is not role:
            self._state.roles[instance_id] = role
            self._state.emit(events.StorePut(ROLE_KEY_PREFIX + instance_id, role))


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
