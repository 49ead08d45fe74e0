"""The cluster as the controller knows it: instances, members, epoch, and what is placed where.

Only the core and its parts (placements, roles, drains) write here, one event at a time; the edges
and the policies read. Commands that an event causes collect in the outbox.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from baton.core.cluster import InstanceInfo, InstanceLoad, Role, Target
from controller.columns import Columns
from controller.deadlines import Deadlines
from controller.events import (
    CallId,
    Command,
    DirectiveBody,
    MemberInfo,
    SendDirective,
    SessionId,
    StoreDelete,
    StoreEpoch,
    StorePut,
)
from controller.membership import InstanceEvent, InstanceState, next_state
from controller.policies.base import paths
from controller.role_choices import ROLE_KEY_PREFIX, choices_from_store, stored_choice
from controller.role_events import Who

INCARNATIONS_PER_EPOCH = 2**20
MAX_RECENTLY_DEAD = 32
# Between a placement and the moment its instance can report it: the gateway's submission is on
# its way. A heartbeat does not count what was placed so shortly before.
SETTLE_S = 0.25

DeadlineKey = tuple[str, int | str]


def epoch_of(incarnation: int) -> int:
    """The epoch in which an incarnation was given out."""
    return incarnation // INCARNATIONS_PER_EPOCH


@dataclasses.dataclass(slots=True)
class RoleSwitch:
    """A role switch in flight."""

    call_id: CallId | None
    """The operator's call that waits for it; ``None``: the planner wants it."""
    target: Role
    previous: Role
    stored_before: Role | None
    """The earlier choice, to go back to, and whether it was an operator's."""
    pinned_before: bool
    directive_id: int
    force: bool
    began_s: float
    committing: bool = False

    @property
    def who(self) -> Who:
        """Who wants it."""
        return Who.PLANNER if self.call_id is None else Who.OPERATOR


class Fresh(NamedTuple):
    """A placement of a moment ago."""

    placed_at_s: float
    num_tokens: int
    """Of its prompt, where that is computed here."""
    prefill_s: float
    """Predicted for them."""


@dataclasses.dataclass(slots=True)
class InstanceRecord:
    """One incarnation of an instance."""

    info: InstanceInfo
    state: InstanceState
    last_seen_s: float
    row: int | None
    """In the columns; ``None`` once dead."""
    session_id: SessionId | None = None
    load: InstanceLoad = dataclasses.field(default_factory=InstanceLoad)
    drain_wanted: bool = False
    drain_told: bool = False
    """Whether a drain directive was ever sent to (or admitted by) this incarnation."""
    role_unsure: bool = False
    """A switch ended while its session was gone: tell it its role when it is back."""
    switch: RoleSwitch | None = None
    fresh: dict[str, Fresh] = dataclasses.field(default_factory=dict)
    """By submission, oldest first: what no heartbeat can have counted yet."""

    @property
    def target(self) -> Target:
        """What a placement names."""
        return Target(self.info.instance_id, self.info.incarnation, self.info.address)

    @property
    def num_open(self) -> int:
        """Sequences it reports, those it only holds for a handoff included."""
        load = self.load
        return load.num_waiting + load.num_running + load.num_pending_kv + load.num_held

    def may_take(self) -> tuple[bool, bool]:
        """(prefill, decode) that it surely goes on to take, whether or not a switch succeeds."""
        roles = [self.info.role] + ([self.switch.target] if self.switch else [])
        return all(r.takes_prefill for r in roles), all(r.takes_decode for r in roles)


@dataclasses.dataclass(frozen=True, slots=True)
class OpenPlacement:
    """A placement whose end no gateway has reported; counted on both incarnations."""

    gateway_id: str
    attempt: int
    prefill: Target
    decode: Target
    num_prompt_tokens: int
    num_context_tokens: int = 0
    """Prompt, and half of what may come: what a decode reads per step, on average."""
    prefill_s: float = 0.0
    """Predicted; 0 where nothing is."""


class ClusterState:
    """See the module docstring."""

    def __init__(
        self, epoch: int, stored: Mapping[str, str], drained_ids: set[str], run_id: str = ""
    ) -> None:
        self.epoch = epoch
        self._run_id = run_id
        self.version = 0
        self.changed = False
        """Membership or readiness changed during this event."""
        self.more_usable = False
        """Something can take placements now that could not before."""
        self.instances: dict[str, InstanceRecord] = {}
        """Live ones (any state but dead), by instance id."""
        self.recently_dead: collections.deque[InstanceRecord] = collections.deque(
            maxlen=MAX_RECENTLY_DEAD
        )
        self.members: dict[SessionId, MemberInfo] = {}
        self.sessions: dict[SessionId, tuple[str, int]] = {}
        """Open sessions of instances: instance id and incarnation."""
        self.roles, self.pinned = choices_from_store(stored, run_id)
        """Roles that somebody chose, by instance id, and where that was an operator; they outlive
        restarts."""
        self.drained_ids = drained_ids
        self.columns = Columns()
        self.deadlines: Deadlines[DeadlineKey] = Deadlines()
        self.open: dict[str, OpenPlacement] = {}
        """By submission; a newer attempt replaces the older one."""
        self.num_placements = 0
        self._outbox: list[Command] = []
        self._num_incarnations = 0
        self._num_directives = 0

    # Commands

    def emit(self, command: Command) -> None:
        """Have something done once this event is over."""
        self._outbox.append(command)

    def take_commands(self) -> list[Command]:
        """Everything emitted since the last call."""
        commands, self._outbox = self._outbox, []
        return commands

    def tell(self, record: InstanceRecord, body: DirectiveBody) -> int:
        """Send a directive; its id. Without a session nothing is sent."""
        self._num_directives += 1
        if record.session_id is not None:
            self.emit(SendDirective(record.session_id, self._num_directives, body))
        return self._num_directives

    # Instances

    def next_incarnation(self) -> int:
        """A number that no instance of this cluster ever had."""
        self._num_incarnations += 1
        if self._num_incarnations >= INCARNATIONS_PER_EPOCH:
            self.raise_epoch(self.epoch + 1)
            self.emit(StoreEpoch(self.epoch))
            self._num_incarnations = 1
        return self.epoch * INCARNATIONS_PER_EPOCH + self._num_incarnations

    def raise_epoch(self, epoch: int) -> None:
        """Go up to ``epoch``; never down."""
        if epoch > self.epoch:
            self.epoch = epoch
            self._num_incarnations = 0
            self.changed = True

    def by_incarnation(self, instance_id: str, incarnation: int) -> InstanceRecord | None:
        """The live record, if this is its incarnation."""
        record = self.instances.get(instance_id)
        return record if record and record.info.incarnation == incarnation else None

    def apply(self, record: InstanceRecord, event: InstanceEvent) -> bool:
        """Move a record along the membership table; whether its state changed."""
        before = record.state
        record.state = next_state(before, event)
        if record.state is before:
            return False
        if record.row is not None:
            self.columns.set_placeable(record.row, record.state.placeable)
        self.changed = True
        self.more_usable |= record.state.placeable
        return True

    def set_role(self, record: InstanceRecord, role: Role) -> None:
        """Let placements follow a new role."""
        record.info = dataclasses.replace(record.info, role=role)
        if record.row is not None:
            self.columns.set_role(record.row, role)
        self.changed = self.more_usable = True

    def choose_role(self, instance_id: str, role: Role, *, pinned: bool) -> None:
        """Remember a choice across restarts; ``pinned``: an operator's."""
        if self.roles.get(instance_id) is role and pinned == (instance_id in self.pinned):
            return
        self.roles[instance_id] = role
        (self.pinned.add if pinned else self.pinned.discard)(instance_id)
        value = stored_choice(role, pinned=pinned, run_id=self._run_id)
        self.emit(StorePut(ROLE_KEY_PREFIX + instance_id, value))

    def forget_role(self, instance_id: str) -> None:
        """Nobody chose it after all."""
        if self.roles.pop(instance_id, None) is not None:
            self.pinned.discard(instance_id)
            self.emit(StoreDelete(ROLE_KEY_PREFIX + instance_id))

    def paths(self) -> tuple[bool, bool, bool]:
        """Whether anything ready takes prefill, decode, and both in one compatible pair."""
        return paths(self.columns.view)

    @property
    def ready(self) -> bool:
        """At least one usable prefill and decode path."""
        return self.paths()[2]

    def all_records(self) -> Iterator[InstanceRecord]:
        """Live ones, then the recently dead."""
        yield from self.instances.values()
        yield from self.recently_dead

    # Placements

    def count_open(self, key: str, placement: OpenPlacement, now: float) -> None:
        """Count a placement on both of its instances until :meth:`forget_open`."""
        assert key not in self.open
        self.open[key] = placement
        self.num_placements += 1
        tokens = placement.num_prompt_tokens
        prefill = self.by_incarnation(placement.prefill.instance_id, placement.prefill.incarnation)
        decode = self.by_incarnation(placement.decode.instance_id, placement.decode.incarnation)
        assert prefill is not None
        assert prefill.row is not None
        assert decode is not None
        assert decode.row is not None
        prefill.fresh[key] = Fresh(now, tokens, placement.prefill_s)
        self.columns.count(prefill.row, prefill=1, tokens=tokens)
        self.columns.extend_prefill(prefill.row, now, placement.prefill_s)
        if decode is not prefill:
            decode.fresh[key] = Fresh(now, 0, 0.0)
        self.columns.count(decode.row, decode=1, context=placement.num_context_tokens)

    def rebind(self, key: str, decode: Target, now: float) -> None:
        """An open placement's decode side is another one now, or the same for certain."""
        placement = self.open[key]
        for target, sign in ((placement.decode, -1), (decode, 1)):
            record = self.by_incarnation(target.instance_id, target.incarnation)
            if record is None or record.row is None:
                continue
            context = sign * placement.num_context_tokens
            self.columns.count(record.row, decode=sign, context=context)
            if sign < 0 and target != placement.prefill:
                record.fresh.pop(key, None)
            elif sign > 0 and target != placement.prefill:
                record.fresh[key] = Fresh(now, 0, 0.0)
        self.open[key] = dataclasses.replace(placement, decode=decode)

    def forget_open(self, key: str) -> None:
        """Stop counting a submission's placement. The dead have no counts to fix."""
        placement = self.open.pop(key, None)
        if placement is None:
            return
        for target, prefill, decode in ((placement.prefill, 1, 0), (placement.decode, 0, 1)):
            record = self.by_incarnation(target.instance_id, target.incarnation)
            if record is None or record.row is None:
                continue
            fresh = record.fresh.pop(key, None)
            self.columns.count(
                record.row,
                prefill=-prefill,
                decode=-decode,
                tokens=-fresh.num_tokens if fresh else 0,
                context=-decode * placement.num_context_tokens,
            )

    def settle(self, record: InstanceRecord, now: float) -> None:
        """Drop the corrections that a heartbeat received ``now`` accounts for."""
        for key, fresh in list(record.fresh.items()):
            if fresh.placed_at_s > now - SETTLE_S:
                break
            del record.fresh[key]
            if fresh.num_tokens and record.row is not None:
                self.columns.count(record.row, tokens=-fresh.num_tokens)
        if record.row is not None:
            fresh_s = sum(fresh.prefill_s for fresh in record.fresh.values())
            self.columns.correct_prefill(record.row, record.load, fresh_s, now)
