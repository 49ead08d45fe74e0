"""Starts and stops a whole cluster: Ray, controller, pool nodes, instances, gateway."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import ray
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.core.config import ServeConfig
from baton.core.errors import BatonError, ConfigError
from baton.engine.checkpoint import Checkpoint, open_checkpoint
from baton.gateway.actor import gateway_actor_class
from baton.gateway.settings import GatewaySettings
from baton.instance.launcher import NodeInfo, instance_names, launch_instance
from baton.instance.spec import InstanceSpec
from controller.actor import controller_actor_class
from controller.discovery import find_controller
from kvpool.arena import remove_cluster_files
from kvpool.pool_actor import pool_actor_class
from protos.serving import channel_options

logger = logging.getLogger(__name__)

_CALL_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 10.0
_OBJECT_STORE_BYTES = 80 * 1024 * 1024
"""The least Ray takes: no token, plan or KV byte travels through its object store."""

Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True, slots=True)
class Endpoints:
    """Where a running cluster answers."""

    http: str
    grpc: str
    controller: str


class ClusterRun:
    """One cluster, owned by this process: it ends when :meth:`stop` is called.

    Args:
        config: what to run.
        progress: told each step, for people.
        after_ray: called when Ray runs; it has replaced the process's signal handlers by then.
    """

    def __init__(
        self, config: ServeConfig, *, progress: Progress, after_ray: Callable[[], None]
    ) -> None:
        self.config = config
        self._progress = progress
        self._after_ray = after_ray
        self._actors: list[Any] = []
        self._instances: dict[str, Any] = {}
        self._pools: list[Any] = []
        self._shm = "/dev/shm"
        self._started_ray = False

    def check(self) -> Checkpoint:
        """Everything that can be refused before anything is started. Raises ConfigError."""
        config = self.config
        if not Path(config.model).expanduser().is_dir():
            raise ConfigError(
                f"model {config.model} is not a folder; give the folder that holds config.json",
                param="model",
            )
        checkpoint = open_checkpoint(config.model)
        if config.store == "memory" and config.address is not None:
            logger.info("store memory: the controller's address is found on this machine only")
        for name in ("http_port", "grpc_port"):
            _check_port(config.host, getattr(config, name), name)
        return checkpoint

    def start(self) -> Endpoints:
        """Bring everything up and wait until a request can be served. Raises ConfigError."""
        self.check()
        self._refuse_second_cluster()
        self._start_ray()
        controller = self._start_controller()
        nodes = self._start_pools(controller)
        self._launch_instances(controller, nodes)
        endpoints = self._start_gateway(controller)
        self._progress("loading the model")
        self._wait_instances()
        self._wait_ready(endpoints.grpc)
        return endpoints

    def stop(self) -> None:
        """Stop all processes and remove what they shared. Bounded; never raises."""
        actors = [*self._instances.values(), *reversed(self._actors), *self._pools]
        if ray.is_initialized():
            calls = []
            for actor in actors:
                with contextlib.suppress(Exception):
                    calls.append(actor.stop.remote())
            with contextlib.suppress(Exception):
                ray.wait(calls, num_returns=len(calls), timeout=_STOP_TIMEOUT_S)
            for actor in actors:
                with contextlib.suppress(Exception):
                    ray.kill(actor)
            with contextlib.suppress(Exception):
                ray.shutdown()
        if self._started_ray:
            remove_cluster_files(self.config.cluster, self._shm)

    def dead_reason(self) -> str | None:
        """Why the cluster cannot go on, if Ray itself is gone; ``None`` while it lives."""
        return None if ray.is_initialized() else "Ray is not running any more"

    # Steps of the start.

    def _refuse_second_cluster(self) -> None:
        try:
            address = asyncio.run(find_controller(self.config.store, self.config.cluster))
        except BatonError:
            return
        if _answers(address):
            raise ConfigError(
                f"cluster {self.config.cluster} already runs (controller at {address}); "
                "stop it or choose another --cluster name",
                param="cluster",
            )

    def _start_ray(self) -> None:
        config = self.config
        self._progress("starting Ray" if config.address is None else "connecting to Ray")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        options: dict[str, Any] = {
            "log_to_driver": False,
            "logging_level": logging.ERROR,
            "namespace": f"baton-{config.cluster}",
        }
        if config.address is not None:
            options["address"] = config.address
        else:
            options |= {
                # One CPU: Ray starts that many idle workers in advance, and ours ask for none.
                "num_cpus": 1,
                "include_dashboard": False,
                "object_store_memory": _OBJECT_STORE_BYTES,
                "_node_ip_address": "127.0.0.1",
            }
        try:
            ray.init(**options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ConfigError(f"Ray did not start: {error}", param="address") from error
        self._started_ray = config.address is None
        self._after_ray()

    def _start_controller(self) -> str:
        config = self.config
        self._progress("starting the controller")
        host = ray.util.get_node_ip_address() if config.address else config.host
        actor = self._here(controller_actor_class(), "controller").remote(
            cluster=config.cluster,
            host=host,
            port=_free_port(host),
            store_url=config.store,
            config=config.controller,
            model=_served_name(config),
        )
        self._actors.append(actor)
        return str(self._get(actor.address.remote()))

    def _start_pools(self, controller: str) -> list[tuple[dict[str, Any], NodeInfo]]:
        config = self.config
        self._progress("starting pool nodes")
        nodes = [node for node in ray.nodes() if node["Alive"]]
        wanted = [node for node in nodes if self._hosts_instances(node)]
        starts = []
        for node in wanted:
            host = node["NodeManagerAddress"] if config.address else config.host
            actor = (
                pool_actor_class()
                .options(
                    name=f"baton-{config.cluster}-pool-{host}",
                    scheduling_strategy=_affinity(node["NodeID"]),
                )
                .remote(
                    cluster=config.cluster,
                    directory=self._shm,
                    host=host,
                    port=_free_port(host) if config.address is None else 0,
                    controller_address=controller,
                )
            )
            self._pools.append(actor)
            starts.append((node, host, actor.address.remote()))
        return [
            (node, NodeInfo(node["NodeID"], host, str(self._get(a)))) for node, host, a in starts
        ]

    def _hosts_instances(self, node: dict[str, Any]) -> bool:
        return any(self._fits(node, role) for _, role in instance_names(self.config))

    def _fits(self, node: dict[str, Any], role: str) -> bool:
        needs = self.config.resources.get(role, {})
        return all(node["Resources"].get(name, 0.0) >= amount for name, amount in needs.items())

    def _launch_instances(
        self, controller: str, nodes: list[tuple[dict[str, Any], NodeInfo]]
    ) -> None:
        config = self.config
        used: dict[str, int] = {}
        for instance_id, role in instance_names(config):
            fitting = [info for node, info in nodes if self._fits(node, role)]
            if not fitting:
                raise ConfigError(
                    f"no Ray node has the resources {config.resources.get(role)} for {instance_id}",
                    param=f"resources.{role}",
                )
            info = min(fitting, key=lambda node: used.get(node.node_id, 0))
            used[info.node_id] = used.get(info.node_id, 0) + 1
            spec = InstanceSpec(
                instance_id=instance_id,
                role=role,
                model=_model_path(config),
                model_name=_served_name(config),
                cluster=config.cluster,
                node_id=info.node_id,
                host=info.host,
                controller_address=controller,
                pool_address=info.pool_address,
                engine=config.engine,
                handoff=config.handoff,
            )
            self._instances[instance_id] = launch_instance(
                spec,
                resources=config.resources.get(role, {}),
                ray_node_id=info.node_id,
            )

    def _start_gateway(self, controller: str) -> Endpoints:
        config = self.config
        self._progress("starting the gateway")
        settings = GatewaySettings.from_config(
            dataclasses.replace(
                config,
                model=_model_path(config),
                # Chosen here, so that a restarted gateway comes back at the same ports.
                http_port=config.http_port or _free_port(config.host),
                grpc_port=config.grpc_port or _free_port(config.host),
            ),
            controller_address=controller,
            gateway_id="gateway-0",
            node_id=ray.get_runtime_context().get_node_id(),
        )
        actor = self._here(gateway_actor_class(), settings.gateway_id).remote(settings)
        self._actors.append(actor)
        found = self._get(actor.addresses.remote())
        return Endpoints(http=found.http, grpc=found.grpc, controller=controller)

    def _wait_instances(self) -> None:
        ready = {actor.ready.remote(): name for name, actor in self._instances.items()}
        waiting = list(ready)
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=1, timeout=_CALL_TIMEOUT_S * 10)
            if not done:
                names = ", ".join(ready[ref] for ref in waiting)
                raise ConfigError(f"{names} did not start in time; see the logs in {ray_logs()}")
            self._get(done[0])
            self._progress(f"{ready[done[0]]} is ready")

    def _wait_ready(self, address: str) -> None:
        """Wait on the gateway's health stream: SERVING means a usable prefill and decode path."""
        request = health_pb2.HealthCheckRequest(service="")
        with grpc.insecure_channel(address, options=channel_options()) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(request, timeout=_CALL_TIMEOUT_S)
            try:
                for reply in watch:
                    if reply.status == health_pb2.HealthCheckResponse.SERVING:
                        return
            except grpc.RpcError as error:
                raise ConfigError(
                    "the instances are up, but no prefill and decode path is usable; "
                    "see `baton status`"
                ) from error

    def _here(self, actor_class: Any, name: str) -> Any:
        """On this process's node: ports are promised for this machine."""
        return actor_class.options(
            name=f"baton-{self.config.cluster}-{name}",
            scheduling_strategy=_affinity(ray.get_runtime_context().get_node_id()),
        )

    def _get(self, reference: Any) -> Any:
        try:
            return ray.get(reference, timeout=_CALL_TIMEOUT_S)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, ConfigError):
                raise error.cause from None
            raise ConfigError(f"a process of the cluster failed to start: {error.cause}") from error
        except ray.exceptions.RayError as error:
            raise ConfigError(
                f"a process of the cluster did not start; see the logs in {ray_logs()}: {error}"
            ) from error


def ray_logs() -> str:
    """Where Ray keeps the logs of this session."""
    try:
        return str(Path(ray._private.worker._global_node.get_logs_dir_path()))
    except AttributeError:
        return "the Ray session's logs folder"


def _model_path(config: ServeConfig) -> str:
    return str(Path(config.model).expanduser().resolve())


def _served_name(config: ServeConfig) -> str:
    return config.served_model_name or Path(config.model).expanduser().resolve().name


def _affinity(node_id: str) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node_id, soft=False)


def _check_port(host: str, port: int, name: str) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"{name} {port} on {host} cannot be used ({error.strerror}); "
                f"stop what uses it or choose another with --{name.replace('_', '-')}",
                param=name,
            ) from error


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=1.0).close()
    except OSError:
        return False
    return True
