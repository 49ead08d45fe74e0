"""Starts and stops a whole cluster: Ray, controller, pool nodes, instances, gateway."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import logging
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import ray
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.cli.emulation import predicted_costs, real_pool
from baton.cli.ports import answers, check_port, free_port
from baton.cli.processes import RayProcesses, signals_kept
from baton.core.config import ServeConfig
from baton.core.errors import ConfigError, NotFound
from baton.engine.checkpoint import Checkpoint, open_checkpoint
from baton.engine.models.config import kv_layout
from baton.engine.runners import check_ranks
from baton.gateway.actor import gateway_actor_class
from baton.gateway.settings import GatewaySettings
from baton.instance.launcher import NodeInfo, instance_names, launch_instance
from baton.instance.spec import InstanceSpec
from controller.actor import controller_actor_class
from controller.discovery import find_controller
from controller.policies import make_policy
from kvpool.arena import remove_cluster_files
from kvpool.pool_actor import pool_actor_class
from kvpool.tier_spec import HostTierSpec
from protos.serving import channel_options

logger = logging.getLogger(__name__)

_CALL_TIMEOUT_S = 60.0
_LOAD_TIMEOUT_S = 600.0
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
        waiting: made around each wait; may end it with an exception when a signal comes.
        on_dead: told, from a thread, why the cluster cannot go on, if its own Ray ends.
    """

    def __init__(
        self,
        config: ServeConfig,
        *,
        progress: Progress,
        waiting: Callable[[], contextlib.AbstractContextManager[None]],
        on_dead: Callable[[str], None],
    ) -> None:
        self.config = config
        self._progress = progress
        self._waiting = waiting
        self._on_dead = on_dead
        self._controller: list[Any] = []
        self._gateways: list[Any] = []
        self._instances: dict[str, Any] = {}
        self._pools: list[Any] = []
        self._up: set[Any] = set()
        """Actors that have served: the others cannot be asked to stop."""
        self._shm = "/dev/shm"
        self._ray_processes: RayProcesses | None = None

    def check(self) -> Checkpoint:
        """Everything that can be refused before anything is started. Raises ConfigError."""
        config = self.config
        if not Path(config.model).expanduser().is_dir():
            raise ConfigError(
                f"model {config.model} is not a folder; give the folder that holds config.json",
                param="model",
            )
        checkpoint = open_checkpoint(config.model)
        predicted_costs(config)
        make_policy(config.controller.policy)
        for role in dict.fromkeys(role for _, role in instance_names(config)):
            _check_ranks(checkpoint, config, role)
        if config.store == "memory" and config.address is not None:
            logger.info("store memory: the controller's address is found on this machine only")
        for name in ("http_port", "grpc_port"):
            check_port(config.host, getattr(config, name), name)
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
        """Stop all processes, those that call before those that are called. Bounded."""
        if self._ray_processes is not None:
            self._ray_processes.unwatch()
        if not ray.is_initialized():
            return
        for actors, timeout_s in (
            (self._gateways, 5.0),
            (list(self._instances.values()), 5.0),
            (self._controller, 2.0),
            (self._pools, 2.0),
        ):
            self._stop_actors(actors, timeout_s)
        with signals_kept():
            ray.shutdown()

    def kill(self) -> None:
        """End at once what :meth:`stop` has left, and remove what it shared. Bounded."""
        if self._ray_processes is None:
            return
        self._ray_processes.unwatch()
        self._ray_processes.kill()
        remove_cluster_files(self.config.cluster, self._shm)

    def _stop_actors(self, actors: list[Any], timeout_s: float) -> None:
        calls = []
        for actor in actors:
            if actor in self._up:
                with contextlib.suppress(ray.exceptions.RayError):
                    calls.append(actor.stop.remote().future())
        with self._waiting():
            concurrent.futures.wait(calls, timeout=timeout_s)
        for actor in actors:
            with contextlib.suppress(ray.exceptions.RayError, ValueError):
                ray.kill(actor)

    # Steps of the start.

    def _refuse_second_cluster(self) -> None:
        try:
            address = asyncio.run(find_controller(self.config.store, self.config.cluster))
        except NotFound:
            return
        if answers(address):
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
                # Never one that happens to run here.
                "address": "local",
                # One CPU: Ray starts that many idle workers in advance, and ours ask for none.
                "num_cpus": 1,
                "include_dashboard": False,
                "object_store_memory": _OBJECT_STORE_BYTES,
                "_node_ip_address": "127.0.0.1",
            }
        if config.address is None:
            self._ray_processes = RayProcesses()
        try:
            with signals_kept():
                ray.init(**options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ConfigError(f"Ray did not start: {error}", param="address") from error
        with self._waiting():
            pass  # a signal that came in the meantime takes effect here
        if self._ray_processes is not None:
            self._ray_processes.watch(self._on_dead)

    def _start_controller(self) -> str:
        config = self.config
        self._progress("starting the controller")
        host = ray.util.get_node_ip_address() if config.address else config.host
        actor = self._here(controller_actor_class(), "controller").remote(
            cluster=config.cluster,
            host=host,
            port=free_port(host),
            store_url=config.store,
            config=config.controller,
            model=_served_name(config),
            run_id=uuid.uuid4().hex,
            costs=predicted_costs(config),
            weights={name: item.weight for name, item in config.service.classes.items()},
        )
        self._controller.append(actor)
        return str(self._served(actor, actor.address.remote().future()))

    def _start_pools(self, controller: str) -> list[tuple[dict[str, Any], NodeInfo]]:
        config = self.config
        self._progress("starting pool nodes")
        nodes = [node for node in ray.nodes() if node["Alive"]]
        wanted = [node for node in nodes if self._hosts_instances(node)]
        tier = self._host_tier()
        starts = []
        for node in wanted:
            host = node["NodeManagerAddress"] if config.address else config.host
            actor = (
                pool_actor_class()
                .options(
                    name=f"baton-{config.cluster}-pool-{node['NodeID'][:12]}",
                    scheduling_strategy=_affinity(node["NodeID"]),
                )
                .remote(
                    cluster=config.cluster,
                    directory=self._shm,
                    host=host,
                    port=free_port(host) if config.address is None else 0,
                    controller_address=controller,
                    tier=tier,
                )
            )
            self._pools.append(actor)
            starts.append((node, host, actor))
        return [
            (
                node,
                NodeInfo(node["NodeID"], host, str(self._served(a, a.address.remote().future()))),
            )
            for node, host, a in starts
        ]

    def _host_tier(self) -> HostTierSpec | None:
        """What each machine's pool node keeps below the instances' caches, if anything."""
        config = self.config
        if not config.pool.host_bytes:
            return None
        layout = kv_layout(open_checkpoint(config.model).config, config.engine).canonical
        return HostTierSpec(
            layout=layout.text,
            slot_bytes=layout.block_bytes,
            tls=config.handoff.tls,
            pool=real_pool(config, layout.block_bytes),
        )

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
                engine=config.engine_of(role),
                handoff=config.handoff,
                pool=config.pool,
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
                http_port=config.http_port or free_port(config.host),
                grpc_port=config.grpc_port or free_port(config.host),
            ),
            controller_address=controller,
            gateway_id="gateway-0",
            node_id=ray.get_runtime_context().get_node_id(),
        )
        actor = self._here(gateway_actor_class(), settings.gateway_id).remote(settings)
        self._gateways.append(actor)
        found = self._served(actor, actor.addresses.remote().future())
        return Endpoints(http=found.http, grpc=found.grpc, controller=controller)

    def _wait_instances(self) -> None:
        calls = {actor.ready.remote().future(): name for name, actor in self._instances.items()}
        waiting = set(calls)
        deadline = time.monotonic() + _LOAD_TIMEOUT_S
        while waiting:
            with self._waiting():
                done, waiting = concurrent.futures.wait(
                    waiting,
                    timeout=deadline - time.monotonic(),
                    return_when=concurrent.futures.FIRST_COMPLETED,
                )
            if not done:
                names = ", ".join(sorted(calls[call] for call in waiting))
                raise ConfigError(f"{names} did not start in time; see the logs in {ray_logs()}")
            for call in done:
                self._served(self._instances[calls[call]], call)
                self._progress(f"{calls[call]} is ready")

    def _wait_ready(self, address: str) -> None:
        """Wait on the gateway's health stream: SERVING means a usable prefill and decode path."""
        request = health_pb2.HealthCheckRequest(service="")
        with grpc.insecure_channel(address, options=channel_options()) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(request, timeout=_CALL_TIMEOUT_S)
            try:
                with self._waiting():
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

    def _served(self, actor: Any, answer: concurrent.futures.Future[Any]) -> Any:
        """What an actor's first call returned: it is up. Raises ConfigError."""
        try:
            with self._waiting():
                value = answer.result(timeout=_CALL_TIMEOUT_S)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, ConfigError):
                raise error.cause from None
            raise ConfigError(f"a process of the cluster failed to start: {error.cause}") from error
        except (ray.exceptions.RayError, TimeoutError) as error:
            raise ConfigError(
                f"a process of the cluster did not start; see the logs in {ray_logs()}: {error}"
            ) from error
        self._up.add(actor)
        return value


def ray_logs() -> str:
    """Where Ray keeps the logs of this session."""
    try:
        return str(Path(ray._private.worker._global_node.get_logs_dir_path()))
    except AttributeError:
        return "the Ray session's logs folder"


def _check_ranks(checkpoint: Checkpoint, config: ServeConfig, role: str) -> None:
    engine = config.engine_of(role)
    try:
        check_ranks(checkpoint, engine)
    except ConfigError as error:
        if engine == config.engine:
            raise
        raise ConfigError(f"{role}_engine: {error.message}", param=f"{role}_engine") from error


def _model_path(config: ServeConfig) -> str:
    return str(Path(config.model).expanduser().resolve())


def _served_name(config: ServeConfig) -> str:
    return config.served_model_name or Path(config.model).expanduser().resolve().name


def _affinity(node_id: str) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node_id, soft=False)
