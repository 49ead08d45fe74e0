"""The two gRPC services of the controller: handlers that turn messages into events and back."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Callable
from typing import Any, cast

import grpc.aio
import psutil

from baton.core.errors import BatonError, Code, InvalidRequest, NotFound, Stage
from controller import events, role_events, wire, wire_roles
from controller.events import Event
from controller.shell import ControllerShell, Session, Watcher
from protos.baton.internal.v1 import controller_pb2, controller_pb2_grpc
from protos.baton.v1 import cluster_pb2, cluster_pb2_grpc
from protos.status import abort_with

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]


async def _ask(shell: ControllerShell, context: Context, make: Callable[[int], Event]) -> Any:
    """A call to the core; its errors become statuses here and nowhere else."""
    try:
        return await shell.call(make)
    except BatonError as error:
        await abort_with(context, error)


class ControllerServicer(controller_pb2_grpc.ControllerServicer):
    """``baton.internal.v1.Controller``: members of the cluster."""

    def __init__(self, shell: ControllerShell, heartbeat_s: float) -> None:
        self._shell = shell
        self._heartbeat_s = heartbeat_s

    async def RegisterInstance(  # noqa: D102
        self, request: controller_pb2.RegisterInstanceRequest, context: Context
    ) -> controller_pb2.RegisterReply:
        def make(call_id: int) -> Event:
            try:
                return wire.registration(call_id, request)
            except ValueError as error:
                raise InvalidRequest(str(error), stage=Stage.CONTROL, param="role") from error

        reply: events.Registered = await _ask(self._shell, context, make)
        return controller_pb2.RegisterReply(
            incarnation=reply.incarnation,
            epoch=reply.epoch,
            role=reply.role,
            heartbeat_s=self._heartbeat_s,
        )

    async def InstanceSession(  # noqa: D102
        self,
        request_iterator: AsyncIterator[controller_pb2.InstanceHeartbeat],
        context: Context,
    ) -> AsyncIterator[controller_pb2.Directive]:
        session = self._shell.open_session()
        # An instance may wait for this before it speaks.
        await context.send_initial_metadata(())
        reader = asyncio.create_task(self._read_instance(session, request_iterator))
        try:
            while (item := await session.items.get()) is not None:
                if isinstance(item, events.CloseSession):
                    await abort_with(context, item.failure.to_error())
                yield wire.directive(item)
        finally:
            self._shell.end_session(session)
            await _cancel(reader)

    async def _read_instance(
        self,
        session: Session,
        heartbeats: AsyncIterator[controller_pb2.InstanceHeartbeat],
    ) -> None:
        try:
            async for message in heartbeats:
                if session.closed:
                    return
                self._shell.feed(wire.heartbeat(session.session_id, message))
        except Exception:
            # Reading a stream that this side has ended fails, as it should.
            if session.closed:
                return
            # A bug, or a message that no instance of ours sends: the stream ends, so the instance
            # comes back with a new one.
            log.exception("the session %d failed", session.session_id)
        finally:
            session.items.put_nowait(None)

    async def MemberSession(  # noqa: D102
        self,
        request_iterator: AsyncIterator[controller_pb2.MemberHeartbeat],
        context: Context,
    ) -> AsyncIterator[controller_pb2.ClusterView]:
        watcher = self._shell.open_watcher()
        await context.send_initial_metadata(())
        reader = asyncio.create_task(self._read_member(watcher, request_iterator))
        reader.add_done_callback(lambda _: watcher.changed.set())
        try:
            while not self._shell.stopping and not reader.done():
                await watcher.changed.wait()
                watcher.changed.clear()
                if not self._shell.stopping and not reader.done():
                    yield self._shell.view()
            if reader.done() and not reader.cancelled() and (error := reader.exception()):
                if isinstance(error, BatonError):
                    await abort_with(context, error)
                raise error
        finally:
            self._shell.end_watcher(watcher)
            await _cancel(reader)

    async def _read_member(
        self, watcher: Watcher, heartbeats: AsyncIterator[controller_pb2.MemberHeartbeat]
    ) -> None:
        first = True
        async for message in heartbeats:
            if message.kind not in ("gateway", "pool") or not message.member_id:
                text = f"kind must be gateway or pool and member_id set, got {message.kind!r}"
                raise InvalidRequest(text, stage=Stage.CONTROL, param="kind")
            self._shell.feed(wire.member_seen(watcher.session_id, message))
            if first:
                first = False
                watcher.changed.set()

    async def Place(  # noqa: D102
        self, request: controller_pb2.PlaceBatch, context: Context
    ) -> AsyncIterator[controller_pb2.PlaceBatchReply]:
        prefixes = self._shell.prefix_lookup()
        batch = self._shell.place(lambda call_id: wire.place_requests(call_id, request, prefixes))
        try:
            async with contextlib.aclosing(batch):
                async for placed in batch:
                    replies = [
                        wire.place_reply(request.requests[index], result)
                        for index, result in placed.results.items()
                    ]
                    yield controller_pb2.PlaceBatchReply(replies=replies)
        except BatonError as error:
            await abort_with(context, error)

    async def ReportOutcomes(  # noqa: D102
        self, request: controller_pb2.OutcomeBatch, context: Context
    ) -> controller_pb2.OutcomeReply:
        self._shell.feed(wire.outcomes(request))
        return controller_pb2.OutcomeReply()

    async def ReportBlocks(  # noqa: D102
        self, request: controller_pb2.BlockReport, context: Context
    ) -> controller_pb2.BlockReportReply:
        try:
            return self._shell.report_blocks(request)
        except BatonError as error:
            await abort_with(context, error)

    async def LocateBlocks(  # noqa: D102
        self, request: controller_pb2.LocateBlocksRequest, context: Context
    ) -> controller_pb2.LocateBlocksReply:
        shell = self._shell
        return shell.blocks.locate(list(request.keys), shell.pool_address, shell.num_pool_nodes)


class ClusterServicer(cluster_pb2_grpc.ClusterServicer):
    """``baton.v1.Cluster``: operators. ``constants`` fills what never changes of a status."""

    def __init__(self, shell: ControllerShell, constants: cluster_pb2.ClusterStatus) -> None:
        self._shell = shell
        self._constants = constants

    async def GetStatus(  # noqa: D102
        self, request: cluster_pb2.GetStatusRequest, context: Context
    ) -> cluster_pb2.ClusterStatus:
        core = self._shell.core
        status = cluster_pb2.ClusterStatus(
            epoch=core.state.epoch,
            version=core.state.version,
            ready=core.state.ready,
            instances=wire.instance_statuses(core.state, self._shell.clock.now()),
            members=wire.member_statuses(core.state.members.values()),
            num_queued_placements=core.placements.num_queued,
            num_placements=core.state.num_placements,
            controller_pid=os.getpid(),
            controller_rss_bytes=psutil.Process().memory_info().rss,
        )
        status.MergeFrom(self._constants)
        return status

    async def SetRole(  # noqa: D102
        self, request: cluster_pb2.SetRoleRequest, context: Context
    ) -> cluster_pb2.SetRoleResponse:
        def make(call_id: int) -> Event:
            return events.SetRole(call_id, request.instance_id, request.role, request.force)

        reply: events.RoleSet = await _ask(self._shell, context, make)
        return cluster_pb2.SetRoleResponse(previous_role=reply.previous)

    async def Drain(  # noqa: D102
        self, request: cluster_pb2.DrainRequest, context: Context
    ) -> cluster_pb2.DrainResponse:
        def make(call_id: int) -> Event:
            return events.Drain(
                call_id, request.instance_id, request.wait, request.timeout_s, request.undo
            )

        reply: events.DrainReplied = await _ask(self._shell, context, make)
        return cluster_pb2.DrainResponse(
            drained=reply.drained, num_open=reply.num_open, ready=reply.ready
        )

    async def Explain(  # noqa: D102
        self, request: cluster_pb2.ExplainRequest, context: Context
    ) -> cluster_pb2.ExplainResponse:
        trace = self._shell.core.explain(request.request_id)
        if trace is None:
            text = f"no request {request.request_id!r} is known; only the latest are remembered"
            error = NotFound(text, stage=Stage.CONTROL, param="request_id", code=Code.NOT_FOUND)
            await abort_with(context, error)
        return wire.explanation(trace)

    async def GetRoles(  # noqa: D102
        self, request: cluster_pb2.GetRolesRequest, context: Context
    ) -> cluster_pb2.RolesStatus:
        limit = request.log_limit if request.HasField("log_limit") else None
        core, clock = self._shell.core, self._shell.clock
        return wire_roles.roles_status(core.automation, core.state, clock, limit)

    async def PinRole(  # noqa: D102
        self, request: cluster_pb2.PinRoleRequest, context: Context
    ) -> cluster_pb2.PinRoleResponse:
        def make(call_id: int) -> Event:
            return role_events.PinRole(call_id, request.instance_id, request.pinned)

        reply: role_events.RolePinned = await _ask(self._shell, context, make)
        return cluster_pb2.PinRoleResponse(role=reply.role or "")

    async def PauseRoles(  # noqa: D102
        self, request: cluster_pb2.PauseRolesRequest, context: Context
    ) -> cluster_pb2.PauseRolesResponse:
        def make(call_id: int) -> Event:
            duration_s = request.duration_s if request.HasField("duration_s") else None
            return role_events.PauseRoles(call_id, request.paused, duration_s)

        await _ask(self._shell, context, make)
        return cluster_pb2.PauseRolesResponse()


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError, Exception):
        await task


def add_servicers(
    server: grpc.aio.Server, controller: ControllerServicer, cluster: ClusterServicer
) -> None:
    """Register both on a server."""
    # The generated base class describes a synchronous server's handlers as well.
    controller_pb2_grpc.add_ControllerServicer_to_server(cast(Any, controller), server)
    cluster_pb2_grpc.add_ClusterServicer_to_server(cast(Any, cluster), server)
