"""Drains: an operator wants an instance empty; it finishes what it has and gets nothing new."""

from __future__ import annotations

import dataclasses
import math

from baton.core.errors import Code
from controller import events
from controller.events import CallId, Failure
from controller.membership import InstanceEvent, InstanceState
from controller.roles import unknown_instance
from controller.state import ClusterState, InstanceRecord

DRAIN_KEY_PREFIX = "drain/"


@dataclasses.dataclass(frozen=True, slots=True)
class _Waiter:
    call_id: CallId
    instance_id: str
    incarnation: int


class DrainDesk:
    """Starts and undoes drains, and answers those who wait for one."""

    def __init__(self, state: ClusterState) -> None:
        self._state = state
        self._waiters: dict[CallId, _Waiter] = {}

    def request(self, event: events.Drain, now: float) -> None:
        """An operator asks; answered at once, or when the instance is empty (``wait``)."""
        record = self._state.instances.get(event.instance_id)
        failure = None
        if not (math.isfinite(event.timeout_s) and event.timeout_s >= 0):
            text = f"timeout_s must be a number of seconds of at least 0, got {event.timeout_s}"
            failure = Failure(Code.INVALID_REQUEST, text, param="timeout_s")
        elif record is None:
            failure = unknown_instance(self._state, event.instance_id)
        if failure is not None or record is None:
            assert failure is not None
            self._state.emit(events.CallFailed(event.call_id, failure))
            return
        self._want(record, not event.undo)
        if event.undo:
            text = f"the drain of {event.instance_id} was undone"
            self._fail_waiters(record, Failure(Code.REFUSED, text))
        elif event.wait and record.state is not InstanceState.DRAINED and event.timeout_s > 0:
            waiter = _Waiter(event.call_id, event.instance_id, record.info.incarnation)
            self._waiters[event.call_id] = waiter
            self._state.deadlines.set(("drain", event.call_id), now + event.timeout_s)
            return
        self._reply(event.call_id, record)

    def session_opened(self, record: InstanceRecord) -> None:
        """A new process, or one that is back: tell it what it missed."""
        if record.drain_wanted or record.drain_told:
            self._tell(record)
        if record.drain_wanted:
            self._state.apply(record, InstanceEvent.DRAIN)

    def loaded(self, record: InstanceRecord) -> None:
        """A heartbeat of an open session was taken over."""
        busy = record.num_open > 0 or bool(record.fresh)
        self._state.apply(record, InstanceEvent.BUSY if busy else InstanceEvent.EMPTIED)
        if record.state is InstanceState.DRAINED:
            for waiter in self._waiters_of(record):
                self._drop(waiter.call_id)
                self._reply(waiter.call_id, record)

    def lost(self, record: InstanceRecord) -> None:
        """The instance died."""
        text = f"{record.info.instance_id} died while it drained"
        self._fail_waiters(record, Failure(Code.INSTANCE_LOST, text))

    def expired(self, call_id: CallId) -> None:
        """A caller waited as long as it wanted to."""
        waiter = self._waiters.pop(call_id, None)
        # Its instance may have died in the same tick.
        if waiter is None:
            return
        record = self._state.by_incarnation(waiter.instance_id, waiter.incarnation)
        assert record is not None
        self._reply(call_id, record)

    def call_gone(self, call_id: CallId) -> None:
        """The caller hung up; the drain goes on."""
        self._drop(call_id)

    def _want(self, record: InstanceRecord, wanted: bool) -> None:
        name = record.info.instance_id
        event = InstanceEvent.DRAIN if wanted else InstanceEvent.UNDRAIN
        if wanted and name not in self._state.drained_ids:
            self._state.drained_ids.add(name)
            self._state.emit(events.StorePut(DRAIN_KEY_PREFIX + name, "1"))
        elif not wanted and name in self._state.drained_ids:
            self._state.drained_ids.discard(name)
            self._state.emit(events.StoreDelete(DRAIN_KEY_PREFIX + name))
        if record.drain_wanted is not wanted:
            record.drain_wanted = wanted
            self._tell(record)
        self._state.apply(record, event)

    def _tell(self, record: InstanceRecord) -> None:
        record.drain_told = True
        self._state.tell(record, events.SetDraining(record.drain_wanted))

    def _reply(self, call_id: CallId, record: InstanceRecord) -> None:
        drained = record.state is InstanceState.DRAINED
        num_open = max(record.num_open, len(record.fresh))
        ready = self._state.ready
        self._state.emit(events.DrainReplied(call_id, drained, num_open, ready))

    def _waiters_of(self, record: InstanceRecord) -> list[_Waiter]:
        life = (record.info.instance_id, record.info.incarnation)
        return [w for w in self._waiters.values() if (w.instance_id, w.incarnation) == life]

    def _fail_waiters(self, record: InstanceRecord, failure: Failure) -> None:
        for waiter in self._waiters_of(record):
            self._drop(waiter.call_id)
            self._state.emit(events.CallFailed(waiter.call_id, failure))

    def _drop(self, call_id: CallId) -> None:
        if self._waiters.pop(call_id, None) is not None:
            self._state.deadlines.clear(("drain", call_id))
