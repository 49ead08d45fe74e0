"""The controller as a service: store, core, shell and one gRPC port, started and stopped."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

import grpc.aio
from prometheus_client import make_asgi_app

from baton.core.clock import Clock, SystemClock
from baton.core.config import ControllerConfig
from baton.core.cost_model import CostModel
from baton.core.errors import ConfigError
from controller.core import ControllerCore
from controller.discovery import open_store
from controller.drains import DRAIN_KEY_PREFIX
from controller.elastic import PAUSE_KEY_PREFIX
from controller.event_log_file import CoreStart, EventLog, LoggedCore
from controller.metrics import ControllerMetrics
from controller.planner import RolePlanner
from controller.prediction_metrics import PredictionCollector
from controller.role_choices import ROLE_KEY_PREFIX
from controller.servicers import ClusterServicer, ControllerServicer, add_servicers
from controller.shell import ControllerShell
from controller.store import MetadataStore
from controller.store_writer import StoreWriter
from protos.baton.v1 import cluster_pb2
from protos.http import HttpServer
from protos.serving import server_options

_STOP_GRACE_S = 1.0
_FLUSH_S = 1.0


class ControllerService:
    """Runs on one event loop; see :class:`protos.serving.Service` for the order of calls.

    ``host`` is bound and announced; port 0 takes a free one (see :attr:`address`). ``run_id``,
    ``planner``, ``costs`` and ``weights`` are those of :class:`ControllerCore`.
    """

    def __init__(
        self,
        *,
        cluster: str,
        host: str,
        port: int,
        store_url: str,
        config: ControllerConfig,
        model: str,
        clock: Clock | None = None,
        store: MetadataStore | None = None,
        planner: RolePlanner | None = None,
        costs: CostModel | None = None,
        weights: Mapping[str, float] | None = None,
        run_id: str = "",
    ) -> None:
        self._cluster = cluster
        self._host = host
        self._port = port
        self._config = config
        self._model = model
        self._clock = clock or SystemClock()
        self._store = store or open_store(store_url, cluster)
        self._planner = planner
        self._costs = costs
        self._weights = weights
        self._run_id = run_id
        self._metrics = ControllerMetrics()
        self._http = HttpServer(
            make_asgi_app(self._metrics.registry),
            host=host,
            setting="metrics port",
            stop_grace_s=_STOP_GRACE_S,
        )
        self._server: grpc.aio.Server | None = None
        self._shell: ControllerShell | None = None
        self._writer: StoreWriter | None = None
        self.address = ""
        """host:port, once started."""
        self.metrics_address = ""

    @property
    def shell(self) -> ControllerShell:
        """What serves; only after :meth:`start`."""
        assert self._shell is not None
        return self._shell

    async def start(self) -> None:
        """Bind, take the next epoch, serve, announce the address.

        ConfigError for a port in use, or a cluster of this name that already runs; Unavailable if
        the store does not answer, which another start may find mended. All is released then.
        """
        try:
            await self._start()
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Answer open calls, end streams, withdraw the address, release everything."""
        if self._shell is not None:
            self._shell.stop()
        if self._server is not None:
            await self._server.stop(_STOP_GRACE_S)
            self._server = None
        if self._writer is not None:
            await self._writer.stop(_FLUSH_S)
            self._writer = None
        await self._store.close()
        await self._http.stop()

    async def wait_failed(self) -> BaseException:
        """The controller does not break by itself: errors end calls, not the service."""
        never: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        return await never

    async def _start(self) -> None:
        server = grpc.aio.server(options=server_options())
        self._server = server
        try:
            self._port = server.add_insecure_port(f"{self._host}:{self._port}")
        except RuntimeError as error:
            raise ConfigError(
                f"the controller cannot listen on {self._host}:{self._port}: the port is in use "
                "or the host is not one of this machine",
                param="port",
            ) from error
        self.address = f"{self._host}:{self._port}"
        epoch = await self._store.next_epoch(1)
        stored = {
            **await self._store.scan(ROLE_KEY_PREFIX),
            **await self._store.scan(DRAIN_KEY_PREFIX),
            **await self._store.scan(PAUSE_KEY_PREFIX),
        }
        await self._store.announce(self.address)
        self._writer = StoreWriter(self._store, address=self.address, epoch=epoch, values=stored)
        self._writer.start()
        self.metrics_address = await self._http.start()
        core = self._make_core(epoch, stored)
        self._metrics.registry.register(PredictionCollector(core.predictions.errors))
        self._shell = ControllerShell(core, self._clock, self._writer, self._metrics)
        constants = cluster_pb2.ClusterStatus(
            cluster=self._cluster,
            model=self._model,
            controller_address=self.address,
            controller_metrics_address=self.metrics_address,
        )
        add_servicers(
            server,
            ControllerServicer(self._shell, self._config.heartbeat_s),
            ClusterServicer(self._shell, constants),
        )
        await server.start()

    def _make_core(self, epoch: int, stored: Mapping[str, str]) -> ControllerCore:
        start = CoreStart(
            self._config,
            epoch,
            stored,
            self._costs,
            self._weights,
            self._run_id,
            self._clock.wall() - self._clock.now(),
        )
        if self._config.event_log is None:
            return start.make(self._planner)
        if self._planner is not None:
            raise ConfigError(
                "an event log cannot be kept of a planner of one's own", param="event_log"
            )
        return LoggedCore(start, EventLog(Path(self._config.event_log)))
