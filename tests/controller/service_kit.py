"""A running controller, and clients that speak the protos."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from baton.core.config import ControllerConfig
from baton.core.errors import BatonError
from controller.service import ControllerService
from controller.store_memory import MemoryStore
from protos.baton.internal.v1 import controller_pb2 as pb
from protos.baton.internal.v1 import controller_pb2_grpc
from protos.baton.v1 import cluster_pb2, cluster_pb2_grpc
from protos.convert import instance_to_record
from protos.serving import channel_options
from protos.status import error_from_rpc
from tests.controller.controller_helpers import NUM_BLOCKS, make_info

WAIT_S = 10.0
CONFIG = ControllerConfig(heartbeat_s=0.2, dead_after_s=60.0, queue_timeout_s=0.5)


async def within(awaitable: Awaitable[Any]) -> Any:
    return await asyncio.wait_for(awaitable, WAIT_S)


class FakeInstance:
    """Speaks an instance's side of the protos. ``answer`` decides about directives."""

    def __init__(self, stub: Any, name: str, role: str) -> None:
        self.stub = stub
        self.info = make_info(name, role)
        self.name = name
        self.role = role
        self.answer: Callable[[pb.Directive], pb.DirectiveAck | None] = self.accept
        self.load = pb.LoadReport(num_free_blocks=NUM_BLOCKS)
        self.directives: asyncio.Queue[pb.Directive] = asyncio.Queue()
        self.error: BatonError | None = None
        self.incarnation = 0
        self.call: Any = None
        self.task: asyncio.Task[None] | None = None

    @staticmethod
    def accept(directive: pb.Directive) -> pb.DirectiveAck | None:
        return pb.DirectiveAck(directive_id=directive.directive_id, ok=True)

    async def register(self, incarnation: int = 0, known_epoch: int = 0) -> pb.RegisterReply:
        record = instance_to_record(self.info)
        record.incarnation = incarnation
        request = pb.RegisterInstanceRequest(instance=record, known_epoch=known_epoch)
        reply = await within(self.stub.RegisterInstance(request))
        self.incarnation = reply.incarnation
        self.role = reply.role
        assert isinstance(reply, pb.RegisterReply)
        return reply

    async def open(self) -> None:
        self.call = self.stub.InstanceSession()
        await self.beat()
        self.task = asyncio.create_task(self.read(self.call))

    async def join(self) -> FakeInstance:
        await self.register()
        await self.open()
        return self

    async def beat(self, ack: pb.DirectiveAck | None = None) -> None:
        message = pb.InstanceHeartbeat(
            instance_id=self.name,
            incarnation=self.incarnation,
            load=self.load,
            acks=[ack] if ack else [],
        )
        await within(self.call.write(message))

    async def read(self, call: Any) -> None:
        try:
            async for directive in call:
                self.directives.put_nowait(directive)
                if directive.WhichOneof("what") == "commit_role":
                    self.role = directive.commit_role.role
                if directive.WhichOneof("what") == "fenced":
                    # Its stream is about to be ended: there is nobody to answer.
                    continue
                ack = self.answer(directive)
                if ack is not None:
                    await self.beat(ack)
        except grpc.RpcError as error:
            self.error = error_from_rpc(error)

    async def close(self) -> None:
        if self.call is not None:
            self.call.cancel()
        if self.task is not None:
            with contextlib.suppress(asyncio.CancelledError):
                await within(self.task)
            self.task = None


class Cluster:
    """A running controller with its clients."""

    def __init__(self, service: ControllerService) -> None:
        self.service = service
        self.channel = grpc.aio.insecure_channel(service.address, options=channel_options())
        self.control: Any = controller_pb2_grpc.ControllerStub(self.channel)
        self.operate: Any = cluster_pb2_grpc.ClusterStub(self.channel)
        self.instances: list[FakeInstance] = []
        self.watches: list[Any] = []

    async def join(self, name: str, role: str) -> FakeInstance:
        instance = FakeInstance(self.control, name, role)
        self.instances.append(instance)
        await instance.join()
        await self.state(name, "ready")
        return instance

    async def watch(self, name: str = "g") -> Any:
        call = self.control.MemberSession()
        self.watches.append(call)
        await within(call.write(pb.MemberHeartbeat(kind="gateway", member_id=name, rss_bytes=5)))
        return call

    async def until(self, call: Any, good: Callable[[pb.ClusterView], bool]) -> pb.ClusterView:
        while True:
            view = await within(call.read())
            assert isinstance(view, pb.ClusterView), "the stream ended"
            if good(view):
                return view

    async def state(self, name: str, state: str) -> None:
        call = await self.watch(f"waits for {name}")
        await self.until(call, lambda view: states(view).get(name) == state)
        call.cancel()

    async def place(self, *names: str, budget_s: float | None = None, **values: Any) -> Any:
        values = {"num_prompt_tokens": 10, "max_new_tokens": 5, **values}
        requests = [pb.PlaceRequest(request_id=n, budget_s=budget_s, **values) for n in names]
        batch = pb.PlaceBatch(gateway_id="g", requests=requests)

        async def answers() -> list[pb.PlaceReply]:
            return [r async for reply in self.control.Place(batch) for r in reply.replies]

        found = {reply.request_id: reply for reply in await within(answers())}
        return [found[name] for name in names]

    async def status(self) -> cluster_pb2.ClusterStatus:
        status = await within(self.operate.GetStatus(cluster_pb2.GetStatusRequest()))
        assert isinstance(status, cluster_pb2.ClusterStatus)
        return status

    async def queued(self, count: int) -> None:
        for _ in range(1000):
            if (await self.status()).num_queued_placements == count:
                return
            await asyncio.sleep(0.01)
        raise AssertionError(f"there never were {count} queued placements")

    async def close(self) -> None:
        for watch in self.watches:
            watch.cancel()
        for instance in self.instances:
            await instance.close()
        await self.channel.close(None)


def states(view: pb.ClusterView) -> dict[str, str]:
    """The newest life of each instance."""
    ordered = sorted(view.instances, key=lambda i: i.record.incarnation)
    return {instance.record.instance_id: instance.state for instance in ordered}


def make_service(path: Path, config: ControllerConfig = CONFIG, **values: Any) -> ControllerService:
    options: dict[str, Any] = {
        "cluster": "c",
        "host": "127.0.0.1",
        "port": 0,
        "store_url": "memory",
        "config": config,
        "model": "m",
        "store": MemoryStore("c", directory=path / "run"),
        **values,
    }
    return ControllerService(**options)


@contextlib.asynccontextmanager
async def running(service: ControllerService) -> AsyncIterator[Cluster]:
    await within(service.start())
    cluster = Cluster(service)
    try:
        yield cluster
    finally:
        await cluster.close()
        await within(service.stop())


async def failing(awaitable: Awaitable[Any]) -> BatonError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await within(awaitable)
    return error_from_rpc(caught.value)
