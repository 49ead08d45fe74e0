"""An instance's standing with the controller: register, heartbeat, obey, come back.

The instance serves on while the controller is away: what is placed goes on streaming, and the
session reconnects with a bounded back-off and presents the incarnation it has.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import grpc
import grpc.aio

from baton.core.cluster import InstanceInfo, InstanceLoad, Role
from baton.core.errors import BatonError, Code
from baton.instance.roles import RoleSwitch
from protos.baton.internal.v1 import controller_pb2, controller_pb2_grpc
from protos.convert import instance_to_record, load_to_report
from protos.serving import channel_options
from protos.status import error_from_rpc

logger = logging.getLogger(__name__)

_SessionCall = grpc.aio.StreamStreamCall[controller_pb2.InstanceHeartbeat, controller_pb2.Directive]

_CALL_TIMEOUT_S = 5.0
_BACKOFF_S = (0.05, 0.1, 0.2, 0.5, 1.0)


class ControllerSession:
    """Keeps one instance registered.

    Args:
        describe: who we are (asked again at each registration: the role may have changed).
        load: a snapshot for the next heartbeat.
        role: what directives act on.
        on_registered: told the incarnation that the controller gave us.
        on_fenced: this life is over; the process must restart.
    """

    def __init__(
        self,
        controller_address: str,
        *,
        describe: Callable[[], InstanceInfo],
        load: Callable[[], InstanceLoad],
        role: RoleSwitch,
        on_registered: Callable[[int], None],
        on_fenced: Callable[[str], None],
    ) -> None:
        self._address = controller_address
        self._describe = describe
        self._load = load
        self._role = role
        self._on_registered = on_registered
        self._on_fenced = on_fenced
        self._epoch = 0
        self._heartbeat_s = 1.0
        self._kick = asyncio.Event()
        self._acks: list[controller_pb2.DirectiveAck] = []
        self.registered = asyncio.Event()

    def heartbeat_now(self) -> None:
        """Do not wait for the next beat: something changed that others wait for."""
        self._kick.set()

    async def run(self) -> None:
        """Register and stay registered until cancelled."""
        failures = 0
        while True:
            try:
                async with grpc.aio.insecure_channel(
                    self._address, options=channel_options()
                ) as channel:
                    stub: controller_pb2_grpc.ControllerAsyncStub
                    stub = controller_pb2_grpc.ControllerStub(channel)
                    await self._register(stub)
                    failures = 0
                    await self._converse(stub)
                    logger.warning("the controller closed the session")
            except grpc.RpcError as error:
                reason = error_from_rpc(error)
                if reason.code is Code.FENCED:
                    self._on_fenced(reason.message)
                    return
                logger.warning("no session with the controller: %s", reason.message)
            await asyncio.sleep(_BACKOFF_S[min(failures, len(_BACKOFF_S) - 1)])
            failures += 1

    async def _register(self, stub: controller_pb2_grpc.ControllerAsyncStub) -> None:
        reply = await stub.RegisterInstance(
            controller_pb2.RegisterInstanceRequest(
                instance=instance_to_record(self._describe()),
                known_epoch=self._epoch,
                draining=self._role.duty.draining,
            ),
            timeout=_CALL_TIMEOUT_S,
            wait_for_ready=True,
        )
        self._epoch = max(self._epoch, reply.epoch)
        self._heartbeat_s = reply.heartbeat_s or 1.0
        self._role.commit(Role(reply.role))
        self._on_registered(reply.incarnation)
        self.registered.set()

    async def _converse(self, stub: controller_pb2_grpc.ControllerAsyncStub) -> None:
        """One stream, until it ends. Both halves end with it; what either raised is raised."""
        self._acks.clear()  # a controller that was restarted may use their numbers again
        call = stub.InstanceSession(None)
        reader = asyncio.ensure_future(self._listen(call))
        writer = asyncio.ensure_future(self._beat(call))
        try:
            await asyncio.wait({reader, writer}, return_when=asyncio.FIRST_COMPLETED)
            if not reader.done() and writer.exception() is None:
                # The stream broke under a write; why is what the reader is about to hear.
                await asyncio.wait({reader}, timeout=_CALL_TIMEOUT_S)
        finally:
            for half in (reader, writer):
                half.cancel()
            results = await asyncio.gather(reader, writer, return_exceptions=True)
            call.cancel()
        for result in results:
            if isinstance(result, Exception):
                raise result

    async def _listen(self, call: _SessionCall) -> None:
        async for directive in call:
            self._obey(directive)

    async def _beat(self, call: _SessionCall) -> None:
        while True:
            # Before the snapshot: what changes after it makes the next one follow at once.
            self._kick.clear()
            acks, self._acks = self._acks, []
            info = self._describe()
            heartbeat = controller_pb2.InstanceHeartbeat(
                instance_id=info.instance_id,
                incarnation=info.incarnation,
                load=load_to_report(self._load()),
                acks=acks,
            )
            try:
                await call.write(heartbeat)
            except (grpc.RpcError, asyncio.InvalidStateError):
                return
            try:
                async with asyncio.timeout(self._heartbeat_s):
                    await self._kick.wait()
            except TimeoutError:
                pass

    def _obey(self, directive: controller_pb2.Directive) -> None:
        ok, reason = True, ""
        kind = directive.WhichOneof("what")
        try:
            if kind is None:
                raise ValueError("this instance does not know that directive")
            if kind == "prepare_role":
                self._role.prepare(Role(directive.prepare_role.role))
            elif kind == "commit_role":
                self._role.commit(Role(directive.commit_role.role))
            elif kind == "drain":
                self._role.drain(directive.drain)
            elif kind == "fenced":
                self._on_fenced("the controller says this incarnation is over")
                return
        except (BatonError, ValueError) as error:
            ok, reason = False, str(error)
        self._acks.append(
            controller_pb2.DirectiveAck(directive_id=directive.directive_id, ok=ok, reason=reason)
        )
        self.heartbeat_now()
