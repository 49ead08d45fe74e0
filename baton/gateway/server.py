"""One gateway: both doors, the line to the controller, the lines to the instances."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import socket
import time
from collections.abc import Generator

import grpc.aio
import uvicorn

from baton.core.clock import SystemClock
from baton.core.errors import ConfigError
from baton.gateway.cluster import Cluster, Member
from baton.gateway.grpc_server import GrpcDoor
from baton.gateway.http import HttpDoor
from baton.gateway.links import Links
from baton.gateway.metrics import GatewayMetrics
from baton.gateway.model_info import load_model_info
from baton.gateway.requests import RequestChecker
from baton.gateway.service import InferenceService
from baton.gateway.settings import GatewaySettings
from baton.gateway.submission import Surroundings
from baton.gateway.tokenizer import GatewayTokenizer
from protos.baton.internal.v1 import controller_pb2

STOP_GRACE_S = 3.0
_START_TIMEOUT_S = 20.0


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
        self._model = load_model_info(settings.model, max_model_len=settings.max_model_len)
        self._tokenizer = GatewayTokenizer.load(self._model.path)
        self._metrics = GatewayMetrics()
        self._addresses: GatewayAddresses | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._http_task: asyncio.Task[None] | None = None

    @property
    def addresses(self) -> GatewayAddresses:
        """Where it listens. Only after ``start``."""
        assert self._addresses is not None, "not started"
        return self._addresses

    async def start(self) -> GatewayAddresses:
        """Bind both ports and serve. Raises ConfigError that names a port in use."""
        settings = self._settings
        http_socket = _bind(settings.host, settings.http_port)
        try:
            self._build()
            self._grpc = self._grpc_door.server()
            grpc_port = _bind_grpc(self._grpc, settings.host, settings.grpc_port)
        except BaseException:
            http_socket.close()
            raise
        http_port = http_socket.getsockname()[1]
        host = _connectable(settings.host)
        self._addresses = GatewayAddresses(f"{host}:{http_port}", f"{host}:{grpc_port}")
        try:
            await self._serve(http_socket)
        except BaseException:
            http_socket.close()
            await self._close_doors(grace_s=0.0)
            await self._cluster.stop()
            raise
        return self._addresses

    async def _serve(self, http_socket: socket.socket) -> None:
        await self._grpc_door.set_ready(False)
        await self._grpc.start()
        self._http = _QuietServer(
            uvicorn.Config(
                self._http_door.app(),
                http="httptools",
                ws="none",
                loop="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                date_header=False,
                timeout_graceful_shutdown=int(STOP_GRACE_S),
            )
        )
        self._http_task = asyncio.create_task(self._http.serve(sockets=[http_socket]))
        await self._http.wait_started(self._http_task, timeout_s=_START_TIMEOUT_S)
        await self._cluster.start(
            Member(
                gateway_id=self._settings.gateway_id,
                address=self.addresses.grpc,
                http_address=self.addresses.http,
                node_id=self._settings.node_id,
            )
        )

    async def stop(self) -> None:
        """End open requests with a retryable error, report them, release everything; bounded."""
        self._service.close()
        await self._grpc_door.set_ready(False)
        await self._close_doors(grace_s=STOP_GRACE_S)
        await self._cluster.stop()
        await self._links.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _close_doors(self, *, grace_s: float) -> None:
        closing = [asyncio.ensure_future(self._grpc.stop(grace_s))]
        if self._http_task is not None:
            self._http.stop()
            closing.append(self._http_task)
        await asyncio.gather(*closing, return_exceptions=True)

    async def wait_failed(self) -> BaseException:
        """Return why the gateway broke by itself; never returns while it is well."""
        assert self._http_task is not None, "not started"
        cluster = asyncio.ensure_future(self._cluster.wait_failed())
        try:
            await asyncio.wait({cluster, self._http_task}, return_when=asyncio.FIRST_COMPLETED)
            if cluster.done():
                return cluster.result()
            error = None if self._http_task.cancelled() else self._http_task.exception()
            return error or RuntimeError("the HTTP server ended")
        finally:
            cluster.cancel()

    def _build(self) -> None:
        settings = self._settings
        self._cluster = Cluster(settings.controller_address, self._clock, on_view=self._on_view)
        self._links = Links(settings.gateway_id, self._clock)
        surroundings = Surroundings(
            cluster=self._cluster,
            links=self._links,
            clock=self._clock,
            limits=settings.limits,
            place_timeout_s=settings.place_timeout_s,
            on_replay=self._metrics.replayed,
        )
        self._service = InferenceService(
            surroundings,
            gateway_id=settings.gateway_id,
            model=settings.served_model_name,
            tokenizer=self._tokenizer,
            eos_token_ids=self._model.eos_token_ids,
            metrics=self._metrics,
        )
        self._http_door = HttpDoor(
            self._service,
            self._metrics,
            self._clock,
            checker=self._checker,
            why_not_ready=lambda: self._cluster.why_not_ready,
            created_s=int(time.time()),
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
        )

    def _on_view(self, view: controller_pb2.ClusterView) -> None:
        self._links.on_view(view)
        ready = self._cluster.why_not_ready is None
        task = asyncio.create_task(self._grpc_door.set_ready(ready))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _QuietServer(uvicorn.Server):
    """uvicorn without its signal handlers and its ten wake-ups a second.

    Its main loop only watches a flag and renews a date header, which is off here.
    """

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._up = asyncio.Event()
        self._stopping = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Signals belong to the process, not to one of its servers."""
        yield

    async def main_loop(self) -> None:
        """Serve until told to stop."""
        self._up.set()
        await self._stopping.wait()

    async def wait_started(self, task: asyncio.Task[None], *, timeout_s: float) -> None:
        """Return once requests are accepted. Raises what ended ``task`` instead."""
        up = asyncio.ensure_future(self._up.wait())
        try:
            await asyncio.wait({up, task}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            up.cancel()
        if task.done():
            task.result()
        if not self._up.is_set():
            raise TimeoutError(f"the HTTP server did not start within {timeout_s:g} s")

    def stop(self) -> None:
        """Close the listening socket, then finish what is open within the grace."""
        self.should_exit = True
        self._stopping.set()


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        # Lets a restarted gateway have its port back; two live servers still cannot share it.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
        # Listening makes the second of two binders fail here and not later.
        bound.listen(2048)
        bound.setblocking(False)
    except OSError as error:
        bound.close()
        raise _port_error("http_port", host, port, error) from error
    return bound


def _bind_grpc(server: grpc.aio.Server, host: str, port: int) -> int:
    shown = f"[{host}]" if ":" in host else host
    try:
        return server.add_insecure_port(f"{shown}:{port}")
    except RuntimeError as error:
        raise _port_error("grpc_port", host, port, None) from error


def _port_error(name: str, host: str, port: int, error: OSError | None) -> ConfigError:
    if error is None or error.errno == errno.EADDRINUSE:
        why = "is in use or not allowed" if error is None else "is in use"
    else:
        why = f"cannot be bound: {error.strerror}"
    return ConfigError(f"port {port} on {host} {why}; choose another {name}", param=name)


def _connectable(host: str) -> str:
    """An address that others can dial: not the wildcard."""
    if host in ("0.0.0.0", "::"):
        return socket.gethostname()
    return f"[{host}]" if ":" in host else host
