"""Issue 4, line 1: what one machine has computed, another one fetches, whole or in part, in the
clear or under TLS (line 8), while pool nodes and instances die. The same tokens always."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import os
import shutil
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from baton.client.admin import AdminClient
from kvpool.transports.tcp_wire import MAGIC
from tests.cluster import oracle
from tests.cluster.families import check_greedy
from tests.cluster.harness import DEMO_MODEL, Cluster, assert_nothing_held, metrics, wait_until
from tests.cluster.pool_kit import (
    Check,
    Tiers,
    ask,
    kill_instance,
    kill_pool_node,
    pool_numbers,
    pools,
    settle,
)
from tests.cluster.two_nodes import ON_A, TwoNodes, cluster_over_two_machines
from tests.cluster.wire import TLS_HANDSHAKE, Wire
from tests.engine.same_tokens import random_prompt
from tests.engine.tiny_models import VARIANTS, save
from tests.kvpool.tls_kit import Authority

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(600)]

SHAPE = ("--prefill", "2", "--decode", "1")
BLOCK = 16
LENGTHS = [305 + BLOCK * i for i in range(20)]
"""19 to 38 blocks, and a rest."""


@dataclasses.dataclass(frozen=True, slots=True)
class Model:
    """What is served, and what it should say."""

    folder: Path
    prompts: list[list[int]]
    """Without a prefix in common."""
    check: Check


def demo(_: Path) -> Model:
    """Grouped-query attention."""
    ids = oracle.corpus()
    prompts = [ids[2000 * i : 2000 * i + length] for i, length in enumerate(LENGTHS)]
    return Model(DEMO_MODEL, prompts, oracle.check_greedy)


def latent(folder: Path) -> Model:
    """Multi-head latent attention."""
    reference = save(folder, VARIANTS["v3"])
    for file in DEMO_MODEL.glob("tokenizer*"):
        shutil.copy(file, folder)
    prompts = [random_prompt(length) for length in LENGTHS]
    return Model(folder, prompts, functools.partial(check_greedy, reference))


@contextlib.contextmanager
def only(nodes: TwoNodes, here: str, away: str) -> Iterator[None]:
    """Prompts are computed by the one prefill instance and not by the other."""
    with AdminClient(nodes.cluster.controller) as admin:
        assert admin.drain(away).drained
        yield
        admin.drain(away, undo=True)
        wait_until(
            lambda: {i.state for i in nodes.cluster.live_instances()} == {"ready"},
            timeout_s=10.0,
            what=f"{away} takes prompts again",
        )


@contextlib.contextmanager
def frozen(cluster: Cluster, host: str) -> Iterator[None]:
    """A machine's pool node says nothing during the block, and goes on after it."""
    (member,) = pools(cluster, host)
    os.kill(member.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(member.pid, signal.SIGCONT)


def whole(prompts: Sequence[Sequence[int]], tier: str) -> list[Tiers]:
    """All full blocks from one tier."""
    return [{tier: len(prompt) // BLOCK * BLOCK} for prompt in prompts]


CASES = {"gqa": (demo, False), "gqa tls": (demo, True), "mla tls": (latent, True)}


@pytest.mark.parametrize(("make", "encrypted"), CASES.values(), ids=CASES)
def test_remote_hits(make: Any, encrypted: bool, tmp_path: Path) -> None:
    model: Model = make(tmp_path / "model")
    prompts = model.prompts
    settings: dict[str, Any] = {
        "resources": {"decode": ON_A},
        "pool": {"write_back": "all", "fetch": "always"},
    }
    if encrypted:
        tls = Authority(tmp_path / "authority").issue("node")
        settings["handoff"] = {"tls": dataclasses.asdict(tls)}
    with cluster_over_two_machines(*SHAPE, settings=settings, model=model.folder) as nodes:
        cluster, a, b = nodes.cluster, nodes.a.address, nodes.b.address
        asking = functools.partial(ask, cluster, check=model.check)
        (decode,) = (i for i in nodes.instances_on(nodes.a) if i.role == "decode")
        near = next(i.instance_id for i in nodes.instances_on(nodes.a) if i.role == "prefill")
        (far,) = (i.instance_id for i in nodes.instances_on(nodes.b))
        with Wire(nodes.a.link).looking() as wire:
            with only(nodes, near, far):
                assert asking(prompts) == [{}] * len(prompts)
                settle(cluster)
                assert pool_numbers(cluster, b)["baton_pool_host_used"] == 0
            with only(nodes, far, near):
                assert asking(prompts[:3]) == whole(prompts[:3], "remote")
                mixed = [*prompts[3][: 20 * BLOCK + 5], *prompts[0][:200]]
                assert asking([mixed]) == [{"remote": 20 * BLOCK}]
                num_blocks = 20 + sum(len(prompt) // BLOCK for prompt in prompts[:3])
                check_wire(nodes, wire, num_blocks=num_blocks, encrypted=encrypted)
                settle(cluster)

                kill_instance(cluster, far)
                assert asking(prompts[:3]) == whole(prompts[:3], "host"), "fetched once, kept here"
                assert asking([mixed])[0].keys() == {"host"}

                # Dead when some blocks have come, dead for a while, back with what it had.
                before = pool_numbers(cluster, b)["baton_pool_promoted_remote"]
                with concurrent.futures.ThreadPoolExecutor(6) as threads:
                    asked = [threads.submit(asking, [prompt]) for prompt in prompts[4:10]]
                    wait_until(
                        lambda: pool_numbers(cluster, b)["baton_pool_promoted_remote"] > before,
                        timeout_s=30.0,
                        what="the first block from the other machine",
                        every_s=0.005,
                    )
                    kill_pool_node(cluster, a)
                    during = [each.result(60.0)[0] for each in asked]
                assert any(during), "some came before"
                assert pool_numbers(cluster, a)["baton_pool_host_used"] > 0, "it was adopted"
                left = iter(prompts[10:19])
                wait_until(
                    # What was computed here once is not asked for again.
                    lambda: asking([next(left)]) != [{}],
                    timeout_s=30.0,
                    what="it is asked again, some seconds after it failed",
                    every_s=2.0,
                )
                with frozen(cluster, a):
                    assert asking(prompts[19:]) == [{}], "a late answer is none"
                settle(cluster)
                failed = pool_numbers(cluster, b)["baton_pool_failed_remote"]
            pulls = metrics(decode.metrics_address)["baton_kv_pulls_total{transport=tcp}"]
            assert pulls > 0, "prefill was on the other machine"
        # A lease of the killed one's, or on it, ends by itself.
        assert_nothing_held(cluster, within_s=40.0)
        print(f"while the pool node died: {during}; {failed:.0f} blocks did not come")


def check_wire(nodes: TwoNodes, wire: Wire, *, num_blocks: int, encrypted: bool) -> None:
    """So many blocks were fetched, and went over the wire in the one way and not in the other."""
    numbers = pool_numbers(nodes.cluster, nodes.b.address)
    assert numbers["baton_pool_promoted_remote"] == num_blocks
    assert numbers["baton_pool_failed_remote"] == 0
    block_bytes = numbers["baton_pool_host_bytes"] / numbers["baton_pool_host_slots"]
    used, unused = (TLS_HANDSHAKE, MAGIC) if encrypted else (MAGIC, TLS_HANDSHAKE)
    assert wire.num_bytes(used) >= num_blocks * block_bytes
    assert wire.num_bytes(unused) == 0
