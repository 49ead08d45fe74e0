"""The thin asyncio shell around the core: carries commands out and keeps the one timer.

Everything here runs on one event loop. A core call is synchronous and short; nothing is awaited
between an event and the start of all its commands.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from typing import Any

from baton.core.clock import Clock
from baton.core.errors import BatonError, Code, Stage, Unavailable
from controller import events, role_events, wire
from controller.block_directory import BlockDirectory, PrefixLookup
from controller.core import ControllerCore
from controller.events import Command, Event
from controller.membership import InstanceState
from controller.metrics import ControllerMetrics
from controller.store_writer import StoreWriter
from protos.baton.internal.v1 import controller_pb2

log = logging.getLogger(__name__)

# The event loop's clock may be a millisecond coarser than the core's.
_MIN_DELAY_S = 0.001

SessionItem = events.SendDirective | events.CloseSession | None
"""What an instance's stream has to do next; ``None``: end."""


class Session:
    """An instance's open stream: what still has to be sent on it."""

    def __init__(self, session_id: int) -> None:
        self.session_id = session_id
        self.items: asyncio.Queue[SessionItem] = asyncio.Queue()
        self.closed = False
        """Nothing that the instance says on it counts any more."""


class Watcher:
    """A member's open stream: wakes when there is a new view, however many there were."""

    def __init__(self, session_id: int) -> None:
        self.session_id = session_id
        self.changed = asyncio.Event()


class ControllerShell:
    """Feeds events to the core and carries out what it commands."""

    def __init__(
        self, core: ControllerCore, clock: Clock, writer: StoreWriter, metrics: ControllerMetrics
    ) -> None:
        self.core = core
        self.clock = clock
        self._writer = writer
        self._metrics = metrics
        self.blocks = BlockDirectory()
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._batches: dict[int, asyncio.Queue[events.Placed | BatonError]] = {}
        self._sessions: dict[int, Session] = {}
        self._watchers: dict[int, Watcher] = {}
        self._num_ids = 0
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at_s = 0.0
        self._view: controller_pb2.ClusterView | None = None
        self.stopping = False
        metrics.observe_membership(core.state)
        self._observe_roles()

    # Events

    def feed(self, event: Event) -> None:
        """Tell the core something and carry out what follows."""
        self._carry_out(self.core.on_event(event, self.clock.now()))

    async def call(self, make_event: Callable[[int], Event]) -> Any:
        """Tell the core something that it answers; the answering command.

        Raises the error it answers with. If the caller is cancelled, the core is told.
        """
        if self.stopping:
            raise _stopping()
        call_id = self._next_id()
        event = make_event(call_id)
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._calls[call_id] = future
        try:
            self.feed(event)
            return await future
        except asyncio.CancelledError:
            if call_id in self._calls:
                self.feed(events.CallGone(call_id))
            raise
        finally:
            self._calls.pop(call_id, None)

    async def place(
        self, make_event: Callable[[int], events.PlaceRequests]
    ) -> AsyncGenerator[events.Placed, None]:
        """Have a batch placed; answers as they are decided. Close it: the core is told then."""
        if self.stopping:
            raise _stopping()
        call_id = self._next_id()
        answers: asyncio.Queue[events.Placed | BatonError] = asyncio.Queue()
        self._batches[call_id] = answers
        done = False
        try:
            with self._metrics.decision_s.time():
                self.feed(make_event(call_id))
            while not done:
                answer = await answers.get()
                if isinstance(answer, BatonError):
                    raise answer
                done = answer.last
                yield answer
        finally:
            del self._batches[call_id]
            if not done:
                self.feed(events.CallGone(call_id))

    # Streams

    def open_session(self) -> Session:
        """For an instance's new stream; :meth:`end_session` must follow."""
        session = Session(self._next_id())
        self._sessions[session.session_id] = session
        if self.stopping:
            self._close(session, None)
        return session

    def end_session(self, session: Session) -> None:
        """The stream is over."""
        session.closed = True
        del self._sessions[session.session_id]
        self.feed(events.SessionClosed(session.session_id))

    def open_watcher(self) -> Watcher:
        """For a member's new stream; :meth:`end_watcher` must follow."""
        watcher = Watcher(self._next_id())
        self._watchers[watcher.session_id] = watcher
        if self.stopping:
            watcher.changed.set()
        return watcher

    def end_watcher(self, watcher: Watcher) -> None:
        """The stream is over."""
        del self._watchers[watcher.session_id]
        self.feed(events.MemberGone(watcher.session_id))
        self.blocks.keep_only(self._holders())

    def view(self) -> controller_pb2.ClusterView:
        """The cluster as watchers see it; one object per version."""
        if self._view is None:
            self._view = wire.cluster_view(self.core.state)
        return self._view

    def _holders(self) -> set[str]:
        """Who may have KV blocks: instances that are not dead, and pool nodes."""
        state = self.core.state
        alive = {
            name
            for name, record in state.instances.items()
            if record.state is not InstanceState.DEAD
        }
        return alive | {m.member_id for m in state.members.values() if m.kind == "pool"}

    def report_blocks(self, report: controller_pb2.BlockReport) -> controller_pb2.BlockReportReply:
        """A holder of KV blocks says what it has. Raises InvalidRequest."""
        reply = self.blocks.report(report)
        self._metrics.observe_blocks(self.blocks.index.num_blocks, self.blocks.index.num_holders)
        return reply

    def prefix_lookup(self) -> PrefixLookup:
        """Who has the beginnings of prompts; for one batch, while nothing else is done."""
        records = self.core.state.instances.values()
        # All have the same: one model, one setting.
        block_size = next((record.info.block_size for record in records), 0)
        return self.blocks.prefix_lookup(block_size)

    @property
    def num_pool_nodes(self) -> int:
        """Pool nodes that are here."""
        return len({m.member_id for m in self.core.state.members.values() if m.kind == "pool"})

    def pool_address(self, holder: str) -> str:
        """Where a pool node is reached; empty for any other holder."""
        for member in self.core.state.members.values():
            if member.kind == "pool" and member.member_id == holder:
                return member.address
        return ""

    def stop(self) -> None:
        """Answer every call and end every stream; no new ones are taken."""
        self.stopping = True
        self._carry_out(self.core.shut(self.clock.now()))
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for future in self._calls.values():
            if not future.done():
                future.set_exception(_stopping())
        for answers in self._batches.values():
            answers.put_nowait(_stopping())
        for session in self._sessions.values():
            self._close(session, None)
        for watcher in self._watchers.values():
            watcher.changed.set()

    # Commands

    def _carry_out(self, commands: list[Command]) -> None:
        for command in commands:
            self._carry_out_one(command)
        self._metrics.queued.set(self.core.placements.num_queued)
        self._metrics.open.set(len(self.core.state.open))
        self._arm()

    def _carry_out_one(self, command: Command) -> None:
        match command:
            case events.CallFailed(call_id, failure):
                future = self._calls.get(call_id)
                if future is not None and not future.done():
                    future.set_exception(failure.to_error())
            case events.SendDirective(session_id):
                session = self._sessions.get(session_id)
                if session is not None and not session.closed:
                    session.items.put_nowait(command)
            case events.CloseSession(session_id):
                session = self._sessions.get(session_id)
                if session is not None and not session.closed:
                    self._close(session, command)
            case events.PublishView():
                self._view = None
                self._metrics.observe_membership(self.core.state)
                self.blocks.keep_only(self._holders())
                for watcher in self._watchers.values():
                    watcher.changed.set()
            case events.StorePut(key, value):
                self._writer.put(key, value)
            case events.StoreDelete(key):
                self._writer.delete(key)
            case events.StoreEpoch(epoch):
                self._writer.raise_epoch(epoch)
            case role_events.RoleSwitchEnded():
                self._metrics.role_metrics.observe_switch(command)
            case role_events.RoleAdviceChanged():
                self._observe_roles()
            case events.Placed(call_id):
                self._metrics.observe_placed(command)
                answers = self._batches.get(call_id)
                if answers is not None:
                    answers.put_nowait(command)
            case _:
                future = self._calls.get(command.call_id)
                if future is not None and not future.done():
                    future.set_result(command)

    def _observe_roles(self) -> None:
        roles = self.core.automation
        self._metrics.role_metrics.observe_advice(roles.advice, paused=roles.paused)

    def _close(self, session: Session, item: SessionItem) -> None:
        session.closed = True
        session.items.put_nowait(item)

    # The timer

    def _arm(self) -> None:
        """Have the timer fire no later than the core's next deadline.

        One that fires too early (heartbeats move deadlines away all the time) finds nothing due
        and is armed again: cheaper than to move it with each heartbeat.
        """
        at_s = self.core.next_deadline()
        if at_s is None or self.stopping:
            return
        if self._timer is not None:
            if self._timer_at_s <= at_s:
                return
            self._timer.cancel()
        self._timer_at_s = at_s
        delay_s = max(_MIN_DELAY_S, at_s - self.clock.now())
        self._timer = asyncio.get_running_loop().call_later(delay_s, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        try:
            commands = self.core.on_tick(self.clock.now())
        except Exception:
            # A bug; the others must still be served, and what is due was taken off the list.
            log.exception("a tick failed")
            commands = []
        self._carry_out(commands)

    def _next_id(self) -> int:
        self._num_ids += 1
        return self._num_ids


def _stopping() -> Unavailable:
    return Unavailable(
        "the controller stops", stage=Stage.CONTROL, code=Code.UNAVAILABLE, retry_after_s=1.0
    )
