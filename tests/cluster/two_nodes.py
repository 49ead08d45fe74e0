"""A cluster over two machines: a Ray node on each, and a Redis that both reach."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from protos.baton.v1 import cluster_pb2
from tests.cluster.harness import (
    DEMO_MODEL,
    RUN_ID,
    Cluster,
    processes_of,
    serving,
    wait_until,
)
from tests.cluster.machines import OUTSIDE, Machine, two_machines
from tests.redis_kit import Redis, redis_server

RAY_PORT = "6391"
NO_TOKEN = {"RAY_AUTH_MODE": "disabled"}
"""Ray makes a token per machine; a real deployment hands one to all of its nodes."""
ON_A, ON_B = {"node_a": 0.01}, {"node_b": 0.01}
"""Resources that an instance needs to be on one of the machines."""


@dataclasses.dataclass(frozen=True, slots=True)
class TwoNodes:
    """Controller and gateway are on ``a``."""

    cluster: Cluster
    a: Machine
    b: Machine
    redis: Redis

    def instances_on(self, machine: Machine) -> list[cluster_pb2.InstanceStatus]:
        """Those that live."""
        found = self.cluster.live_instances()
        return [item for item in found if item.address.rpartition(":")[0] == machine.address]


@contextlib.contextmanager
def cluster_over_two_machines(
    *shape: str, settings: Mapping[str, Any], model: Path = DEMO_MODEL
) -> Iterator[TwoNodes]:
    """``shape``: flags that say how many instances; where: ``resources`` in ``settings``."""
    with contextlib.ExitStack() as stack:
        a, b = stack.enter_context(two_machines())
        redis = stack.enter_context(redis_server(OUTSIDE))
        head = ("--head", f"--port={RAY_PORT}", "--include-dashboard=false")
        stack.enter_context(_ray_node(a, *head, '--resources={"node_a": 1}'))
        address = f"{a.address}:{RAY_PORT}"
        stack.enter_context(_ray_node(b, f"--address={address}", '--resources={"node_b": 1}'))
        cluster = stack.enter_context(
            serving(
                *shape,
                *("--host", a.address, "--address", address, "--store", redis.url),
                *("--served-model-name", DEMO_MODEL.name),
                model=model,
                settings=settings,
                command=a.command([sys.executable, "-m", "baton.cli.main"]),
                extra_env=NO_TOKEN,
            )
        )
        yield TwoNodes(cluster, a, b, redis)


@contextlib.contextmanager
def _ray_node(machine: Machine, *args: str) -> Iterator[None]:
    """``ray start --block`` on a machine, until the block ends."""
    run_id = uuid.uuid4().hex
    ray = str(Path(sys.executable).with_name("ray"))
    line = [ray, "start", "--block", f"--node-ip-address={machine.address}", "--num-cpus=1"]
    line += ["--object-store-memory=80000000", "--disable-usage-stats", *args]
    with tempfile.NamedTemporaryFile() as log:
        process = subprocess.Popen(
            machine.command(line),
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **NO_TOKEN, RUN_ID: run_id},
        )
        try:
            wait_until(
                lambda: b"Ray runtime started" in Path(log.name).read_bytes(),
                timeout_s=60.0,
                what=f"Ray on {machine.name}",
            )
            yield
        except BaseException:
            log.seek(0)
            sys.stderr.write(log.read().decode(errors="replace")[-2000:])
            raise
        finally:
            process.terminate()
            process.wait(30)
            for straggler in processes_of(run_id):
                straggler.kill()
