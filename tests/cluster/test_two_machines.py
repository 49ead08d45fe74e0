"""Prefill on one machine, decode on another: KV crosses TCP, the tokens are the same."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from baton.client.admin import AdminClient
from tests.cluster import oracle, tokens
from tests.cluster.harness import (
    RUN_ID,
    Cluster,
    metrics,
    processes_of,
    serving,
    wait_until,
)
from tests.cluster.machines import OUTSIDE, Machine, two_machines

RAY_PORT = "6391"
NO_TOKEN = {"RAY_AUTH_MODE": "disabled"}
"""Ray makes a token per machine; a real deployment hands one to all of its nodes."""


@contextlib.contextmanager
def ray_node(machine: Machine, *args: str) -> Iterator[None]:
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


@contextlib.contextmanager
def redis_server(host: str) -> Iterator[str]:
    port = "6392"
    process = subprocess.Popen(
        ["redis-server", "--bind", host, "--port", port, "--save", "", "--protected-mode", "no"],
        stdout=subprocess.DEVNULL,
    )
    try:
        yield f"redis://{host}:{port}/0"
    finally:
        process.terminate()
        process.wait(10)


@contextlib.contextmanager
def cluster_over_two_machines() -> Iterator[Cluster]:
    with contextlib.ExitStack() as stack:
        a, b = stack.enter_context(two_machines())
        store = stack.enter_context(redis_server(OUTSIDE))
        head = ("--head", f"--port={RAY_PORT}", "--include-dashboard=false")
        stack.enter_context(ray_node(a, *head, '--resources={"node_a": 1}'))
        address = f"{a.address}:{RAY_PORT}"
        stack.enter_context(ray_node(b, f"--address={address}", '--resources={"node_b": 1}'))
        where = {"prefill": {"node_a": 0.01}, "decode": {"node_b": 0.01}}
        yield stack.enter_context(
            serving(
                *("--prefill", "1", "--decode", "1", "--host", a.address),
                *("--address", address, "--store", store),
                settings={"resources": where},
                command=a.command([sys.executable, "-m", "baton.cli.main"]),
                extra_env=NO_TOKEN,
            )
        )


@pytest.mark.timeout(280)
def test_kv_crosses_tcp_and_the_tokens_are_the_same() -> None:
    prompts = oracle.prompts(16, longest=1200)
    with cluster_over_two_machines() as cluster:
        greedy = tokens.run_greedy(cluster, prompts, num_tokens=48, concurrency=16)
        sampled = tokens.run_sampled(cluster, prompts, num_tokens=48, concurrency=16)
        with AdminClient(cluster.controller) as admin:
            members = {item.role: item for item in admin.status().instances}
        assert members["prefill"].node_id != members["decode"].node_id
        assert (
            members["prefill"].address.rpartition(":")[0]
            != (members["decode"].address.rpartition(":")[0])
        )
        values = metrics(members["decode"].metrics_address)
        assert values["baton_handoffs_total{result=arrived,side=decode}"] == 2 * len(prompts)
        assert values["baton_handoffs_total{result=recomputed,side=decode}"] == 0
        assert values["baton_kv_pulls_total{transport=tcp}"] >= 2 * len(prompts)
        assert values.get("baton_kv_pulls_total{transport=shm}", 0.0) == 0.0
        wait_until(
            lambda: metrics(members["prefill"].metrics_address)["baton_kv_leases"] == 0,
            timeout_s=5.0,
            what="leases released",
        )
    tokens.check_greedy(prompts, greedy)
    tokens.check_sampled(prompts, sampled)
