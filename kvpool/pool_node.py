"""The pool node of a machine: makes the instances' arenas, and removes what the dead leave behind.

Instances come and go, and may be killed at any moment; a file in shared memory outlives them and
holds its pages until it is unlinked. So one process per machine owns the files.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform

import grpc
import psutil
from prometheus_client import CollectorRegistry, ProcessCollector, make_asgi_app

from baton.core.clock import SystemClock
from baton.core.errors import ConfigError
from kvpool.arena_owners import ArenaKey, ArenaOwners
from kvpool.block_reporter import BlockReporter
from kvpool.external_tier import mooncake_tier
from kvpool.host_arena import remove_host_arena
from kvpool.host_tier import HostTier
from kvpool.pool_link import tier_owner
from kvpool.pool_metrics import PoolCollector
from kvpool.pool_service import PoolServicer
from kvpool.presence import HEARTBEAT_S, Presence
from kvpool.remote import RemotePools
from kvpool.tier_spec import HostTierSpec
from kvpool.transport import Endpoint
from kvpool.transports.tcp import TcpTransport
from protos.baton.internal.v1 import controller_pb2, pool_pb2_grpc
from protos.http import HttpServer
from protos.serving import server_options

_STOP_GRACE_S = 1.0


class PoolNode:
    """One machine's pool node: a :class:`protos.serving.Service`.

    ``host`` is bound and told to others; ``port`` and ``metrics_port`` 0 pick free ones.
    Without ``controller_address`` it serves, but nobody is told of it.
    """

    def __init__(
        self,
        cluster: str,
        directory: str = "/dev/shm",
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        metrics_port: int = 0,
        controller_address: str | None = None,
        member_id: str | None = None,
        node_id: str | None = None,
        heartbeat_s: float = HEARTBEAT_S,
        tier: HostTierSpec | None = None,
    ) -> None:
        self._host = host
        self._port = port
        self._metrics_port = metrics_port
        self._node_id = node_id or platform.node()
        self._member_id = member_id or f"pool-{self._node_id}"
        self._cluster = cluster
        self._directory = directory
        self._controller_address = controller_address
        self._spec = tier
        self._tier: HostTier | None = None
        self._owners = ArenaOwners(cluster, directory, self._owner_gone)
        self._presence = (
            None
            if controller_address is None
            else Presence(controller_address, self._heartbeat, heartbeat_s=heartbeat_s)
        )
        self._address = ""
        self._http_address = ""
        self._process = psutil.Process()
        self._serves = False
        self._stack = contextlib.AsyncExitStack()
        self._failed: asyncio.Future[BaseException] | None = None

    @property
    def address(self) -> str:
        """Where gRPC is served; empty before ``start``."""
        return self._address

    @property
    def http_address(self) -> str:
        """Where metrics are served; empty before ``start``."""
        return self._http_address

    async def start(self) -> str:
        """Adopt what is there, then serve. Returns the address.

        Raises ConfigError if a port cannot be bound.
        """
        self._failed = asyncio.get_running_loop().create_future()
        async with contextlib.AsyncExitStack() as stack:
            await self._start_metrics(stack)
            stack.push_async_callback(self._leave_arenas)
            self._owners.adopt()
            endpoints = await self._start_tier(stack)
            await self._start_server(stack, endpoints)
            if self._presence is not None:
                self._keep(stack, asyncio.create_task(self._presence.run(), name="presence"))
            self._serves = True
            self._stack = stack.pop_all()
        return self._address

    async def stop(self) -> None:
        """Stop serving and unlink everything. Idempotent."""
        await self._stack.aclose()

    async def wait_failed(self) -> BaseException:
        """Return why serving broke by itself; only after ``start``."""
        assert self._failed is not None
        return await asyncio.shield(self._failed)

    async def _leave_arenas(self) -> None:
        """A stop takes the files with it; a failed start leaves them for the next one."""
        if self._serves:
            await self._owners.close()
        else:
            self._owners.detach()

    def _owner_gone(self, key: ArenaKey) -> None:
        if self._tier is not None:
            self._tier.release_owner(tier_owner(*key))

    async def _start_tier(self, stack: contextlib.AsyncExitStack) -> list[Endpoint]:
        """The host tier and those below it; from where other machines pull its slots."""
        if self._spec is None:
            remove_host_arena(self._directory, self._cluster, self._member_id)
            return []
        reporter: list[BlockReporter] = []
        tier = self._tier = HostTier.open(
            self._spec,
            directory=self._directory,
            cluster=self._cluster,
            holder=self._member_id,
            on_changed=lambda: _tell(reporter),
        )
        # A stop takes the file with it; a failed start leaves it for the next one.
        stack.push_async_callback(lambda: tier.stop(keep=not self._serves))
        transport = TcpTransport(self._host, tls=self._spec.tls)
        stack.push_async_callback(asyncio.to_thread, transport.close)
        endpoint = transport.export(tier.arena.blocks)
        if self._controller_address is not None:
            made = BlockReporter(self._controller_address, tier.events, tier.snapshot)
            reporter.append(made)
            self._keep(stack, asyncio.create_task(made.run(), name="block reporter"))
            tier.promotion.remote = RemotePools(
                self._controller_address,
                self._member_id,
                self._host,
                SystemClock(),
                self._spec.tls,
            )
            made.restart()
        if self._spec.pool.external.enabled:
            tier.external = mooncake_tier(tier, self._host)
        await tier.start()
        return [endpoint]

    async def _start_metrics(self, stack: contextlib.AsyncExitStack) -> None:
        registry = CollectorRegistry()
        registry.register(PoolCollector(self._owners, lambda: self._tier))
        ProcessCollector(registry=registry)
        http = HttpServer(
            make_asgi_app(registry),
            host=self._host,
            port=self._metrics_port,
            setting="metrics_port",
            stop_grace_s=_STOP_GRACE_S,
        )
        self._http_address = await http.start()
        stack.push_async_callback(http.stop)

    async def _start_server(
        self, stack: contextlib.AsyncExitStack, endpoints: list[Endpoint]
    ) -> None:
        server = grpc.aio.server(options=server_options())
        pool_pb2_grpc.add_PoolNodeServicer_to_server(
            PoolServicer(self._owners, self._tier, endpoints), server
        )
        try:
            port = server.add_insecure_port(f"{self._host}:{self._port}")
        except RuntimeError as error:
            raise ConfigError(
                f"the pool node cannot serve on {self._host}:{self._port}: {error}", param="port"
            ) from error
        stack.push_async_callback(server.stop, _STOP_GRACE_S)
        await server.start()
        self._address = f"{self._host}:{port}"
        self._keep(stack, asyncio.create_task(self._wait_terminated(server), name="pool server"))

    async def _wait_terminated(self, server: grpc.aio.Server) -> None:
        # Shielded: cancelling this wait would cancel the server's own end, which stop awaits.
        await asyncio.shield(server.wait_for_termination())
        raise RuntimeError("the gRPC server ended by itself")

    def _keep(self, stack: contextlib.AsyncExitStack, task: asyncio.Task[None]) -> None:
        """Cancel the task at the stop; before that its end is a failure of the service."""

        def ended(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and self._failed is not None and not self._failed.done():
                self._failed.set_result(task.exception() or RuntimeError(f"{task} ended"))

        async def cancel() -> None:
            task.cancel()
            await asyncio.wait([task])

        task.add_done_callback(ended)
        stack.push_async_callback(cancel)

    def _heartbeat(self) -> controller_pb2.MemberHeartbeat:
        return controller_pb2.MemberHeartbeat(
            kind="pool",
            member_id=self._member_id,
            address=self._address,
            http_address=self._http_address,
            node_id=self._node_id,
            pid=os.getpid(),
            rss_bytes=self._process.memory_info().rss,
        )


def _tell(reporters: list[BlockReporter]) -> None:
    for reporter in reporters:
        reporter.changed()
