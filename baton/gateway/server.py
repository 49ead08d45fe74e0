"""One gateway: both doors, the line to the controller, the lines to the instances."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import secrets
import time

import grpc.aio

from baton.core.clock import SystemClock
from baton.core.errors import ConfigError
from baton.gateway.cluster import Cluster, Member
from baton.gateway.grpc_server import GrpcDoor
from baton.gateway.http import HttpDoor
from baton.gateway.links import Links
from baton.gateway.metrics import GatewayMetrics
from baton.gateway.model_info import load_model_info
from baton.gateway.prompt_keys import PromptKeys
from baton.gateway.requests import RequestChecker
from baton.gateway.service import InferenceService
from baton.gateway.settings import GatewaySettings
from baton.gateway.submission import Surroundings
from baton.gateway.tokenizer import GatewayTokenizer
from protos.baton.internal.v1 import controller_pb2
from protos.http import HttpServer
from protos.serving import connectable

STOP_GRACE_S = 3.0


@dataclasses.dataclass(frozen=True, slots=True)
class GatewayAddresses:
    """Where a started gateway listens, as host:port."""

    http: str
    grpc: str


class GatewayServer:
    """A gateway on the running event loop: ``start``, serve, ``stop``.

    Only uses its own event loop and never ends the process.
    """

    def __init__(self, settings: GatewaySettings) -> None:
        """Reads the model's folder. Raises ConfigError."""
        self._settings = settings
        self._clock = SystemClock()
        self._model = load_model_info(
            settings.model,
            max_model_len=settings.max_model_len,
            own_limit=settings.model_bounds_len,
        )
        self._tokenizer = GatewayTokenizer.load(self._model.path)
        self._metrics = GatewayMetrics(settings.service.classes)
        self._keys = PromptKeys()
        self._addresses: GatewayAddresses | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def addresses(self) -> GatewayAddresses:
        """Where it listens. Only after ``start``."""
        assert self._addresses is not None, "not started"
        return self._addresses

    async def start(self) -> GatewayAddresses:
        """Bind both ports and serve. Raises ConfigError that names a port in use."""
        async with contextlib.AsyncExitStack() as undo:
            self._build()
            http_address = await self._http.start()
            undo.push_async_callback(self._http.stop)
            self._grpc = self._grpc_door.server()
            grpc_port = _bind_grpc(self._grpc, self._settings.host, self._settings.grpc_port)
            undo.push_async_callback(self._grpc.stop, None)
            host = connectable(self._settings.host)
            self._addresses = GatewayAddresses(http_address, f"{host}:{grpc_port}")
            await self._grpc_door.set_ready(False)
            await self._grpc.start()
            self._cluster.start(
                Member(
                    gateway_id=self._settings.gateway_id,
                    address=self._addresses.grpc,
                    http_address=self._addresses.http,
                    node_id=self._settings.node_id,
                )
            )
            undo.pop_all()
        return self._addresses

    async def stop(self) -> None:
        """End open requests with a retryable error, report them, release everything; bounded."""
        self._service.close()
        await self._grpc_door.end_watches()
        await asyncio.gather(
            self._grpc.stop(STOP_GRACE_S), self._http.stop(), return_exceptions=True
        )
        await self._cluster.stop()
        await self._links.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def wait_failed(self) -> BaseException:
        """Return why the gateway broke by itself; never returns while it is well."""
        parts = [asyncio.ensure_future(part.wait_failed()) for part in (self._cluster, self._http)]
        try:
            done, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
            return done.pop().result()
        finally:
            for part in parts:
                part.cancel()

    def _build(self) -> None:
        settings = self._settings
        self._cluster = Cluster(settings.controller_address, self._clock, on_view=self._on_view)
        # A gateway that comes back under its name must not get what its former life asked for.
        life_id = f"{settings.gateway_id}-{secrets.token_hex(4)}"
        self._links = Links(life_id, self._clock)
        surroundings = Surroundings(
            cluster=self._cluster,
            links=self._links,
            clock=self._clock,
            limits=settings.limits,
            queue_timeout_s=settings.queue_timeout_s,
            place_timeout_s=settings.place_timeout_s,
            on_replay=self._metrics.replayed,
        )
        self._service = InferenceService(
            surroundings,
            gateway_id=life_id,
            model=settings.served_model_name,
            tokenizer=self._tokenizer,
            eos_token_ids=self._model.eos_token_ids,
            metrics=self._metrics,
            keys=self._keys,
        )
        self._http_door = HttpDoor(
            self._service,
            self._metrics,
            self._clock,
            checker=self._checker,
            why_not_ready=lambda: self._cluster.why_not_ready,
            created_s=int(time.time()),
        )
        self._http = HttpServer(
            self._http_door.app(),
            host=settings.host,
            port=settings.http_port,
            stop_grace_s=STOP_GRACE_S,
        )
        self._grpc_door = GrpcDoor(
            self._service,
            self._metrics,
            self._clock,
            checker=self._checker,
            dtype=settings.dtype,
        )

    def _checker(self) -> RequestChecker:
        # The instances' own limit is known once they have registered.
        lengths = (self._model.max_model_len, self._cluster.max_model_len)
        return RequestChecker(
            served_name=self._settings.served_model_name,
            model=self._model,
            tokenizer=self._tokenizer,
            limits=self._settings.limits,
            max_model_len=min(length for length in lengths if length is not None),
            service=self._settings.service,
        )

    def _on_view(self, view: controller_pb2.ClusterView) -> None:
        self._links.on_view(view)
        self._keys.on_view(view)
        ready = self._cluster.why_not_ready is None
        task = asyncio.create_task(self._grpc_door.set_ready(ready))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _bind_grpc(server: grpc.aio.Server, host: str, port: int) -> int:
    shown = f"[{host}]" if ":" in host else host
    try:
        return server.add_insecure_port(f"{shown}:{port}")
    except RuntimeError as error:
        raise ConfigError(
            f"grpc_port {port} on {host} cannot be used (in use or not allowed); "
            "choose another or stop what uses it",
            param="grpc_port",
        ) from error
