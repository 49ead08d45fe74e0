"""What the controller core is told (events) and what it wants done (commands): frozen values.

A *call* is one RPC that waits for an answer; the shell numbers calls and sessions. A *session*
is one open stream of an instance or member. The core never sees a socket.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

from baton.core.cluster import InstanceInfo, InstanceLoad, Placement, Role
from baton.core.errors import BatonError, Code, Stage, error_from_code
from baton.core.slo import NO_TARGETS, Slo
from controller.role_events import RoleCommand, RoleEvent

CallId = int
SessionId = int


@dataclasses.dataclass(frozen=True, slots=True)
class Failure:
    """An error as a value: comparable, unlike an exception."""

    code: Code
    message: str
    stage: Stage = Stage.CONTROL
    param: str | None = None
    retry_after_s: float | None = None

    def to_error(self) -> BatonError:
        """The exception to raise at an edge."""
        error = error_from_code(self.code, self.message, stage=self.stage, param=self.param)
        error.retry_after_s = self.retry_after_s
        return error


# Events ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class RegisterInstance:
    """An instance joins (incarnation 0) or comes back with its own incarnation."""

    call_id: CallId
    info: InstanceInfo
    known_epoch: int = 0
    draining: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Ack:
    """An instance's answer to a directive."""

    directive_id: int
    ok: bool
    reason: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Heartbeat:
    """From an instance's session; the first one of a session opens it."""

    session_id: SessionId
    instance_id: str
    incarnation: int
    load: InstanceLoad
    acks: tuple[Ack, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class SessionClosed:
    """An instance's stream ended, for whatever reason."""

    session_id: SessionId


@dataclasses.dataclass(frozen=True, slots=True)
class MemberInfo:
    """A gateway or a pool node."""

    kind: str
    member_id: str
    address: str = ""
    http_address: str = ""
    node_id: str = ""
    pid: int = 0
    rss_bytes: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class MemberSeen:
    """A heartbeat of a member; the first one of a session announces it."""

    session_id: SessionId
    member: MemberInfo
    known_epoch: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class MemberGone:
    """A member's stream ended."""

    session_id: SessionId


class PrefixMatch(NamedTuple):
    """A holder of KV blocks that has the first ``num_tokens`` tokens of a prompt.

    A tuple, because dozens are made for each placement.
    """

    holder: str
    """Instance (``tier`` device) or pool node."""
    tier: str
    num_tokens: int


@dataclasses.dataclass(frozen=True, slots=True)
class PlaceQuery:
    """One submission that needs a pair of instances."""

    request_id: str
    attempt: int = 0
    num_prompt_tokens: int = 1
    """What prefill must compute: the prompt, and the outputs so far for a replay."""
    max_new_tokens: int = 1
    """Still to come."""
    priority: int = 0
    budget_s: float | None = None
    """How long it may wait; ``None``: as long as the controller lets it."""
    exclude: tuple[str, ...] = ()
    choice: int = 0
    parent_request_id: str = ""
    service_class: str = ""
    slo: Slo = NO_TARGETS
    deadline_s: float | None = None
    """Offline work: time left to finish it; ``None``: none given."""
    tenant: str = ""
    waited_s: float = 0.0
    """Since the request arrived at its gateway: what of ``slo.ttft_s`` is gone already."""
    prefix: tuple[PrefixMatch, ...] = ()
    """Who has how much of the prompt's beginning, as the index says; longest first."""
    bind_to: str | None = None
    """Prefill is done, or about to be, on this instance (id): only the decode side is asked for."""
    expected_new_tokens: float | None = None
    """What the controller makes of ``max_new_tokens``; callers leave it out."""

    @property
    def num_expected_tokens(self) -> float:
        """Output tokens to count with."""
        known = self.expected_new_tokens
        return self.max_new_tokens / 2 if known is None else known

    @property
    def num_total_tokens(self) -> int:
        """The longest the sequence can become."""
        return self.num_prompt_tokens + self.max_new_tokens

    @property
    def client_request_id(self) -> str:
        """What the client calls it."""
        return self.parent_request_id or self.request_id


@dataclasses.dataclass(frozen=True, slots=True)
class PlaceRequests:
    """A gateway's batch: decided in one go, answered when each of it is decided."""

    call_id: CallId
    gateway_id: str
    queries: tuple[PlaceQuery, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class CallGone:
    """The caller hung up before its answer."""

    call_id: CallId


@dataclasses.dataclass(frozen=True, slots=True)
class StageAt:
    """When something happened to a request; ``wall_s`` is Unix seconds."""

    stage: str
    where: str
    wall_s: float


@dataclasses.dataclass(frozen=True, slots=True)
class AttemptEnded:
    """One submission's attempt is over."""

    request_id: str
    attempt: int
    choice: int = 0
    stages: tuple[StageAt, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class RequestEnded:
    """How a client's request ended."""

    request_id: str
    outcome: str
    error: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    cached_by_tier: Mapping[str, int] = dataclasses.field(default_factory=dict)
    ttft_s: float = 0.0
    tpot_s: float = 0.0
    attempts: tuple[AttemptEnded, ...] = ()
    service_class: str = ""
    met: bool | None = None
    """Whether it finished within its targets; ``None`` where it had none, or its client left."""


@dataclasses.dataclass(frozen=True, slots=True)
class OutcomesReported:
    """A gateway tells which requests ended."""

    gateway_id: str
    outcomes: tuple[RequestEnded, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class SetRole:
    """An operator wants an instance to change its role; ``role`` is not validated yet."""

    call_id: CallId
    instance_id: str
    role: str
    force: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Drain:
    """An operator wants an instance empty (or, with ``undo``, back in service)."""

    call_id: CallId
    instance_id: str
    wait: bool = False
    timeout_s: float = 0.0
    undo: bool = False


Event = (
    RegisterInstance
    | Heartbeat
    | SessionClosed
    | MemberSeen
    | MemberGone
    | PlaceRequests
    | CallGone
    | OutcomesReported
    | SetRole
    | Drain
    | RoleEvent
)

# Commands -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Registered:
    """Answer a registration."""

    call_id: CallId
    incarnation: int
    epoch: int
    role: Role


@dataclasses.dataclass(frozen=True, slots=True)
class Placed:
    """Answer those of a batch's queries that are decided now."""

    call_id: CallId
    results: Mapping[int, Placement | Failure]
    """By the query's index in the batch."""
    last: bool
    """Whether the whole batch is answered with these."""


@dataclasses.dataclass(frozen=True, slots=True)
class RoleSet:
    """Answer a role switch that was carried out."""

    call_id: CallId
    previous: Role


@dataclasses.dataclass(frozen=True, slots=True)
class DrainReplied:
    """Answer a drain."""

    call_id: CallId
    drained: bool
    num_open: int
    ready: bool


@dataclasses.dataclass(frozen=True, slots=True)
class CallFailed:
    """Answer a call with an error."""

    call_id: CallId
    failure: Failure


@dataclasses.dataclass(frozen=True, slots=True)
class PrepareRole:
    """Directive: check and prepare everything for the role; change nothing."""

    role: Role


@dataclasses.dataclass(frozen=True, slots=True)
class CommitRole:
    """Directive: take the role. With the role it has: forget what was prepared."""

    role: Role


@dataclasses.dataclass(frozen=True, slots=True)
class SetDraining:
    """Directive: admit nothing new, or admit again."""

    draining: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Fence:
    """Directive: this incarnation is over."""


DirectiveBody = PrepareRole | CommitRole | SetDraining | Fence


@dataclasses.dataclass(frozen=True, slots=True)
class SendDirective:
    """Tell an instance something through its session."""

    session_id: SessionId
    directive_id: int
    body: DirectiveBody


@dataclasses.dataclass(frozen=True, slots=True)
class CloseSession:
    """End a stream with an error, after what was sent on it."""

    session_id: SessionId
    failure: Failure


@dataclasses.dataclass(frozen=True, slots=True)
class PublishView:
    """Membership or readiness changed: tell every watcher."""

    version: int


@dataclasses.dataclass(frozen=True, slots=True)
class StorePut:
    """Remember a value across restarts of the controller."""

    key: str
    value: str


@dataclasses.dataclass(frozen=True, slots=True)
class StoreDelete:
    """Forget a stored value."""

    key: str


@dataclasses.dataclass(frozen=True, slots=True)
class StoreEpoch:
    """The epoch is now at least this."""

    epoch: int


Command = (
    Registered
    | Placed
    | RoleSet
    | DrainReplied
    | CallFailed
    | SendDirective
    | CloseSession
    | PublishView
    | StorePut
    | StoreDelete
    | StoreEpoch
    | RoleCommand
)
