"""A core with a scripted planner, and instances that answer directives (or not)."""

from __future__ import annotations

from collections.abc import Iterable

from baton.core.cluster import Role
from baton.core.config import ControllerConfig
from baton.core.policy_config import RolesConfig
from controller import events, role_events
from controller.events import Command, Event
from controller.flip_log import FlipEntry
from controller.planner import FlipProposal, ScriptedPlanner
from controller.planner import Script as PlannerScript
from tests.controller.controller_helpers import Bench, only

STEP_S = 0.25
ROLES = RolesConfig(interval_s=1.0, cooldown_s=10.0)


def proposal(name: str, role: str, **more: object) -> FlipProposal:
    return FlipProposal(name, Role(role), **{"reason": "test", **more})  # type: ignore[arg-type]


class Fleet(Bench):
    """Everyone's directives are acknowledged at once, unless they refuse or are mute."""

    def __init__(
        self,
        script: Iterable[FlipProposal | None] | PlannerScript = (),
        roles: RolesConfig = ROLES,
        *,
        stored: dict[str, str] | None = None,
        run_id: str = "run",
    ) -> None:
        self.planner = ScriptedPlanner(script)
        config = ControllerConfig(roles=roles)
        super().__init__(config, stored=stored, planner=self.planner, run_id=run_id)
        self.refusing: set[str] = set()
        self.mute: set[str] = set()
        self.unanswered: dict[str, list[int]] = {}
        self.prepared: list[tuple[float, str]] = []
        """Times and names of all preparations that were sent."""
        self.stored = dict(stored or {})
        """What a store would hold now."""

    @classmethod
    def of(cls, *args: object, pairs: int = 2, **more: object) -> Fleet:
        """With ``pairs`` of prefill and decode, and an open request, so that the planner looks."""
        fleet = cls(*args, **more)  # type: ignore[arg-type]
        for index in range(pairs):
            fleet.join(f"p{index}", "prefill")
            fleet.join(f"d{index}", "decode")
        fleet.place_one("open")
        return fleet

    def feed(self, event: Event) -> list[Command]:
        commands = super().feed(event)
        return commands + self.take(commands)

    def advance(self, seconds: float) -> list[Command]:
        commands = super().advance(seconds)
        return commands + self.take(commands)

    def run(self, seconds: float) -> list[Command]:
        """Pass time with everyone's heartbeats."""
        commands: list[Command] = []
        end_s = self.clock.now() + seconds
        while self.clock.now() < end_s - 1e-9:
            for name in list(self.sessions):
                commands += self.beat(name)
            commands += self.advance(STEP_S)
        return commands

    def take(self, commands: list[Command]) -> list[Command]:
        """Keep what is to be stored, and answer directives."""
        more: list[Command] = []
        for command in commands:
            match command:
                case events.StorePut(key, value):
                    self.stored[key] = value
                case events.StoreDelete(key):
                    self.stored.pop(key, None)
                case events.SendDirective(session_id, number, body):
                    owner = {session: name for name, session in self.sessions.items()}
                    name = owner.get(session_id)
                    if name is None or isinstance(body, events.Fence):
                        continue
                    if isinstance(body, events.PrepareRole):
                        self.prepared.append((self.clock.now(), name))
                    if name in self.mute:
                        self.unanswered.setdefault(name, []).append(number)
                    else:
                        more += self.acknowledge(name, number)
        return more

    def acknowledge(self, name: str, number: int) -> list[Command]:
        ack = events.Ack(number, name not in self.refusing, "it does not want to")
        return self.beat(name, acks=(ack,))

    def speak(self, name: str) -> list[Command]:
        """A mute instance answers what it was asked."""
        self.mute.discard(name)
        commands: list[Command] = []
        for number in self.unanswered.pop(name, []):
            commands += self.acknowledge(name, number)
        return commands

    # Operators

    def set_role(self, name: str, role: str, *, force: bool = False) -> list[Command]:
        return self.feed(events.SetRole(self.next_id(), name, role, force))

    def pin(self, name: str, pinned: bool = True) -> list[Command]:
        return self.feed(role_events.PinRole(self.next_id(), name, pinned))

    def pause(self, paused: bool = True, duration_s: float | None = None) -> list[Command]:
        return self.feed(role_events.PauseRoles(self.next_id(), paused, duration_s))

    # Looks

    def role(self, name: str) -> str:
        return str(self.core.state.instances[name].info.role)

    def roles(self) -> dict[str, str]:
        return {name: self.role(name) for name in sorted(self.core.state.instances)}

    def pools(self) -> tuple[int, int]:
        """(prefill, decode) sides that placements can choose from."""
        view = self.core.state.columns.view
        usable = view.live & view.placeable
        return int((usable & view.takes_prefill).sum()), int((usable & view.takes_decode).sum())

    def flips(self) -> list[FlipEntry]:
        return list(self.core.automation.log)

    def states(self) -> list[str]:
        return [str(entry.state) for entry in self.flips()]

    def paused(self) -> bool:
        return self.core.automation.paused

    def end_with(self, request_id: str, met: bool | None) -> None:
        ended = events.RequestEnded(request_id, "stop", met=met)
        self.feed(events.OutcomesReported("g", (ended,)))


def results(commands: list[Command]) -> list[str]:
    return [command.result for command in only(commands, role_events.RoleSwitchEnded)]
