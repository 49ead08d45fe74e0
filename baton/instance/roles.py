"""Role is data: which new work an instance takes on. Everything else survives a switch.

A switch is two-phase. ``prepare`` does all that can fail and changes nothing; ``commit`` swaps one
reference. Work that is already here goes on under either role: a prefill finishes and is handed
off, a decode runs to its end. Weights, blocks, prefix cache and scheduler stay as they are.
"""

from __future__ import annotations

import dataclasses

from baton.core.cluster import Role
from baton.core.errors import Refused, Stage
from baton.core.request import Part


@dataclasses.dataclass(frozen=True, slots=True)
class Duty:
    """What an instance admits now."""

    role: Role
    draining: bool = False

    def check(self, part: Part, instance_id: str) -> None:
        """Raise Refused if new work of this kind must go elsewhere."""
        if self.draining:
            raise Refused(f"{instance_id} is draining", stage=Stage.PLACEMENT)
        takes = self.role.takes_decode if part is Part.DECODE else self.role.takes_prefill
        if not takes:
            raise Refused(
                f"{instance_id} has role {self.role} and takes no {part} work",
                stage=Stage.PLACEMENT,
            )


class RoleSwitch:
    """Holds the current duty and a prepared one."""

    def __init__(self, role: Role) -> None:
        self.duty = Duty(role)
        self._prepared: Role | None = None

    def prepare(self, role: Role) -> None:
        """First phase. Raises Refused where the switch cannot be made now."""
        if self._prepared is not None and self._prepared is not role:
            raise Refused(f"a switch to {self._prepared} is under way", stage=Stage.CONTROL)
        self._prepared = role

    def commit(self, role: Role) -> None:
        """Second phase: cannot fail; a commit without its prepare is a repeated message."""
        self._prepared = None
        self.duty = dataclasses.replace(self.duty, role=role)

    def drain(self, on: bool) -> None:
        """Stop or resume admitting."""
        self.duty = dataclasses.replace(self.duty, draining=on)
