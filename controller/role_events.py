"""Events and commands about roles: part of ``events.Event`` and ``events.Command``.

``SetRole`` and its answer are in ``controller/events.py``; the directives to instances too.
"""

from __future__ import annotations

import dataclasses
import enum

from baton.core.cluster import Role


class Who(enum.StrEnum):
    """Who wanted an instance to take another role."""

    PLANNER = "planner"
    OPERATOR = "operator"


# Events ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class PinRole:
    """An operator wants an instance to keep its role, or gives it back to the planner."""

    call_id: int
    instance_id: str
    pinned: bool


@dataclasses.dataclass(frozen=True, slots=True)
class PauseRoles:
    """An operator wants the planner to switch nothing for a while, or to go on."""

    call_id: int
    paused: bool
    duration_s: float | None = None
    """``None``: until an operator says otherwise."""


RoleEvent = PinRole | PauseRoles

# Commands -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class RolePinned:
    """Answer a pin or its end."""

    call_id: int
    role: Role | None
    """What the instance has; ``None`` for one that is away."""


@dataclasses.dataclass(frozen=True, slots=True)
class RolesPaused:
    """Answer a pause or its end."""

    call_id: int


@dataclasses.dataclass(frozen=True, slots=True)
class RoleSwitchEnded:
    """For the metrics."""

    result: str
    """done, refused, timed_out, lost; or advised, where nothing was to be switched."""
    previous: Role
    target: Role
    who: Who
    seconds: float | None = None
    """From the preparation to the end; only where it was carried out."""


@dataclasses.dataclass(frozen=True, slots=True)
class RoleAdviceChanged:
    """For the metrics: whether the planner is paused, or what it would like, is another."""


RoleCommand = RolePinned | RolesPaused | RoleSwitchEnded | RoleAdviceChanged
