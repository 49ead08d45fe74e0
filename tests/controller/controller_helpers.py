"""Small builders that the controller's tests share."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from baton.core.clock import VirtualClock
from baton.core.cluster import InstanceInfo, InstanceLoad, Placement, Role
from baton.core.config import ControllerConfig
from controller import events
from controller.core import ControllerCore
from controller.events import Command, Event, Failure

C = TypeVar("C")

NUM_BLOCKS = 100


def make_info(
    name: str,
    role: Role | str = Role.MIXED,
    *,
    incarnation: int = 0,
    max_model_len: int = 1000,
    fingerprint: str = "f",
    layout: str = "l",
) -> InstanceInfo:
    return InstanceInfo(
        instance_id=name,
        incarnation=incarnation,
        role=Role(role),
        address=f"{name}:1",
        metrics_address=f"{name}:2",
        node_id="n",
        pid=1,
        model="m",
        model_fingerprint=fingerprint,
        kv_layout=layout,
        block_size=16,
        num_blocks=NUM_BLOCKS,
        max_model_len=max_model_len,
        max_num_seqs=10,
        max_num_batched_tokens=100,
    )


def idle_load(**changes: Any) -> InstanceLoad:
    return dataclasses.replace(InstanceLoad(num_free_blocks=NUM_BLOCKS), **changes)


class Bench:
    """A core with a clock, and the calls and sessions of its tests."""

    def __init__(
        self,
        config: ControllerConfig | None = None,
        epoch: int = 1,
        stored: dict[str, str] | None = None,
        **core: Any,
    ) -> None:
        self.clock = VirtualClock(100.0)
        self.core = ControllerCore(config or ControllerConfig(), epoch=epoch, stored=stored, **core)
        self.ids = 0
        self.sessions: dict[str, int] = {}
        self.incarnations: dict[str, int] = {}
        self.log: list[Command] = []

    def next_id(self) -> int:
        self.ids += 1
        return self.ids

    def feed(self, event: Event) -> list[Command]:
        commands = self.core.on_event(event, self.clock.now())
        self.log += commands
        return commands

    def advance(self, seconds: float) -> list[Command]:
        """Move time on, with a tick at each deadline on the way."""
        end = self.clock.now() + seconds
        commands: list[Command] = []
        while (at := self.core.next_deadline()) is not None and at <= end:
            self.clock.advance(max(0.0, at - self.clock.now()))
            commands += self.core.on_tick(self.clock.now())
        self.clock.advance(end - self.clock.now())
        self.log += commands
        return commands

    def register(
        self, info: InstanceInfo, *, known_epoch: int = 0, draining: bool = False
    ) -> events.Registered | Failure:
        call_id = self.next_id()
        commands = self.feed(events.RegisterInstance(call_id, info, known_epoch, draining))
        # An earlier life's calls may end too.
        failed = [c for c in only(commands, events.CallFailed) if c.call_id == call_id]
        if failed:
            return failed[0].failure
        reply = only(commands, events.Registered)[0]
        self.incarnations[info.instance_id] = reply.incarnation
        return reply

    def beat(
        self,
        name: str,
        load: InstanceLoad | None = None,
        acks: tuple[events.Ack, ...] = (),
        incarnation: int | None = None,
    ) -> list[Command]:
        session_id = self.sessions[name]
        incarnation = incarnation or self.incarnations[name]
        return self.feed(events.Heartbeat(session_id, name, incarnation, load or idle_load(), acks))

    def open(self, name: str) -> list[Command]:
        self.sessions[name] = self.next_id()
        return self.beat(name)

    def join(self, name: str, role: Role | str = Role.MIXED, **info: object) -> list[Command]:
        reply = self.register(make_info(name, role, **info))  # type: ignore[arg-type]
        assert isinstance(reply, events.Registered)
        return self.open(name)

    def hang_up(self, name: str) -> list[Command]:
        return self.feed(events.SessionClosed(self.sessions.pop(name)))

    def place(self, *queries: events.PlaceQuery, gateway: str = "g") -> list[Command]:
        return self.feed(events.PlaceRequests(self.next_id(), gateway, queries))

    def place_one(self, request_id: str, **query: object) -> Placement | Failure | None:
        values = {"num_prompt_tokens": 10, "max_new_tokens": 10, **query}
        commands = self.place(events.PlaceQuery(request_id, **values))  # type: ignore[arg-type]
        placed = only(commands, events.Placed)
        return placed[0].results[0] if placed else None

    def end(self, request_id: str, attempt: int = 0) -> list[Command]:
        outcome = events.RequestEnded(
            request_id, "stop", attempts=(events.AttemptEnded(request_id, attempt),)
        )
        return self.feed(events.OutcomesReported("g", (outcome,)))

    def state_of(self, name: str) -> str:
        return str(self.core.state.instances[name].state)


def only(commands: list[Command], kind: type[C]) -> list[C]:
    return [command for command in commands if isinstance(command, kind)]


def directives(commands: list[Command]) -> list[object]:
    return [command.body for command in only(commands, events.SendDirective)]


def placed(result: Placement | Failure | None) -> Placement:
    assert isinstance(result, Placement), result
    return result


def failed(result: object) -> Failure:
    assert isinstance(result, Failure), result
    return result
