"""The seam of elastic roles: a planner says which instance should take which role, and why. Pure.

Around it stands ``controller/elastic.py``, which calls it, refuses what must not be, has switches
carried out and keeps the log. A planner only predicts and proposes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from baton.core.cluster import InstanceInfo, InstanceLoad, Role
from baton.core.policy_config import RolesConfig
from controller.events import PlaceQuery, RequestEnded


@dataclasses.dataclass(frozen=True, slots=True)
class RoleInstance:
    """A live instance, as far as roles are concerned."""

    info: InstanceInfo
    flip_group: int
    """Instances of equal numbers have equal shape: they can stand in for each other."""
    ready: bool
    """Whether work may be placed on it."""
    pinned: bool
    """An operator chose its role: a proposal for it is refused."""
    switching: bool
    """A switch is in flight; ``info.role`` is its old role until placements follow the new one."""
    load: InstanceLoad
    since_s: float
    """When it took its role, as far as this controller knows."""

    @property
    def instance_id(self) -> str:
        """Its name."""
        return self.info.instance_id

    @property
    def role(self) -> Role:
        """What it is now."""
        return self.info.role


@dataclasses.dataclass(frozen=True, slots=True)
class RoleView:
    """What a planner decides on."""

    instances: tuple[RoleInstance, ...]
    """In order of their names; those that are not ready too."""
    num_queued: int
    """Requests that nothing can take yet."""
    config: RolesConfig
    busy_groups: frozenset[int] = frozenset()
    """Flip groups with a switch in flight: a proposal for them is not followed."""
    ready_at_s: Mapping[int, float] = dataclasses.field(default_factory=dict)
    """By flip group: when its cooldown is over, if it was not. An urgent proposal waits for half of
    ``config.cooldown_s`` only."""

    def group(self, flip_group: int) -> tuple[RoleInstance, ...]:
        """The instances of one flip group."""
        return tuple(item for item in self.instances if item.flip_group == flip_group)


@dataclasses.dataclass(frozen=True, slots=True)
class FlipProposal:
    """One instance should take another role."""

    instance_id: str
    role: Role
    reason: str
    """One sentence, for ``baton roles log``."""
    inputs: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """The numbers that led to it, for the log."""
    predicted_before: float | None = None
    """Attainment to be expected without the switch; ``None`` where nothing is predicted."""
    predicted_after: float | None = None
    urgent: bool = False
    """Targets are missed by far: half the cooldown is enough."""
    desired_instances: int | None = None
    """How many instances would do, when this was proposed."""


@dataclasses.dataclass(frozen=True, slots=True)
class RoleAdvice:
    """What a planner would like if it could have it; for an autoscaler and for people."""

    desired: Mapping[Role, int] = dataclasses.field(default_factory=dict)
    """The split of the instances that are there; empty: no opinion."""
    desired_instances: int | None = None
    """How many there should be; ``None``: no opinion."""


class RolePlanner(Protocol):
    """Decides when which instance takes which role.

    Called by one controller, with times of one clock that never go back. Must give the same answers
    to the same calls: no chance, no clock of its own. Not called at all in mode ``off``.
    """

    def placed(self, query: PlaceQuery, now: float) -> None:
        """A submission asked for a place, whether it got one, waits, or is refused.

        Replays (``attempt`` above 0) and late bindings of the decode side (``bind_to``) come too.
        """

    def ended(self, outcome: RequestEnded, now: float) -> None:
        """A client's request ended."""

    def plan(self, view: RoleView, now: float) -> FlipProposal | None:
        """What should change now; called every ``interval_s`` while requests are open.

        A proposal is carried out, only logged (mode ``advise``, or paused), held back (cooldown, or
        a switch in flight in its flip group), or refused (pins, minimum pools, the instance). The
        planner is not told; it sees it in the next view and proposes again what it still wants.
        """

    def advice(self) -> RoleAdvice:
        """As of the last :meth:`plan`."""


class NullPlanner:
    """Leaves all roles as they are."""

    def placed(self, query: PlaceQuery, now: float) -> None:
        """See :class:`RolePlanner`."""

    def ended(self, outcome: RequestEnded, now: float) -> None:
        """See :class:`RolePlanner`."""

    def plan(self, view: RoleView, now: float) -> FlipProposal | None:
        """See :class:`RolePlanner`."""
        return None

    def advice(self) -> RoleAdvice:
        """See :class:`RolePlanner`."""
        return RoleAdvice()


Script = Callable[[RoleView, float], FlipProposal | None]


class ScriptedPlanner:
    """Proposes what it was given, one a call, whatever it sees; then nothing. For tests.

    ``script`` is a sequence of proposals, or a function that is asked each time.
    """

    def __init__(self, script: Iterable[FlipProposal | None] | Script = ()) -> None:
        self._ask: Script
        if callable(script):
            self._ask = script
        else:
            proposals = iter(script)
            self._ask = lambda view, now: next(proposals, None)
        self.says = RoleAdvice()
        """The advice from now on."""
        self.views: list[RoleView] = []
        self.queries: list[PlaceQuery] = []
        self.outcomes: list[RequestEnded] = []

    def placed(self, query: PlaceQuery, now: float) -> None:
        """See :class:`RolePlanner`."""
        self.queries.append(query)

    def ended(self, outcome: RequestEnded, now: float) -> None:
        """See :class:`RolePlanner`."""
        self.outcomes.append(outcome)

    def plan(self, view: RoleView, now: float) -> FlipProposal | None:
        """See :class:`RolePlanner`."""
        self.views.append(view)
        return self._ask(view, now)

    def advice(self) -> RoleAdvice:
        """See :class:`RolePlanner`."""
        return self.says


def shape(info: InstanceInfo) -> tuple[object, ...]:
    """Equal for instances that can stand in for each other: one flip group.

    Not the number of blocks: where memory is measured at the start, it differs by a few.
    """
    return (
        info.model_fingerprint,
        info.kv_layout,
        info.block_size,
        info.max_model_len,
        info.max_num_seqs,
        info.max_num_batched_tokens,
    )
