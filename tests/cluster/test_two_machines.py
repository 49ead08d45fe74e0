"""Prefill on one machine, decode on another: KV crosses TCP under TLS, the tokens are the same.

And what only one machine has computed, the other one fetches; and nobody misses the metadata store.
Without TLS, with MLA, and with pool nodes that die: ``scripts/acceptance 4.1``.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from baton.client.admin import AdminClient
from baton.core.cluster import Role
from kvpool.transports.tcp_wire import MAGIC
from tests.cluster import oracle, tokens
from tests.cluster.harness import assert_nothing_held, metrics, wait_until
from tests.cluster.pool_kit import ask, pool_numbers, settle
from tests.cluster.two_nodes import ON_A, ON_B, TwoNodes, cluster_over_two_machines
from tests.cluster.wire import TLS_HANDSHAKE, Wire
from tests.kvpool.tls_kit import Authority

PAIR = ("--prefill", "1", "--decode", "1")
NUM_TOKENS = 48


@pytest.mark.timeout(280)
def test_kv_crosses_tcp_and_the_tokens_are_the_same(tmp_path: Path) -> None:
    settings = {
        "resources": {"prefill": ON_A, "decode": ON_B},
        "handoff": {"tls": dataclasses.asdict(Authority(tmp_path / "authority").issue("node"))},
        "pool": {"write_back": "all", "fetch": "always"},
    }
    prompts = oracle.prompts(16, longest=1200)
    with cluster_over_two_machines(*PAIR, settings=settings) as nodes:
        cluster = nodes.cluster
        (prefill,), (decode,) = nodes.instances_on(nodes.a), nodes.instances_on(nodes.b)
        assert prefill.node_id != decode.node_id
        with Wire(nodes.a.link).looking() as wire:
            nodes.redis.freeze()
            greedy = tokens.run_greedy(cluster, prompts, num_tokens=NUM_TOKENS, concurrency=16)
            nodes.redis.thaw()
            nodes.redis.kill()
            sampled = tokens.run_sampled(cluster, prompts, num_tokens=NUM_TOKENS, concurrency=16)
            values = metrics(decode.metrics_address)
            assert values["baton_handoffs_total{result=arrived,side=decode}"] == 2 * len(prompts)
            assert values["baton_handoffs_total{result=recomputed,side=decode}"] == 0
            assert values["baton_kv_pulls_total{transport=tcp}"] >= 2 * len(prompts)
            assert values.get("baton_kv_pulls_total{transport=shm}", 0.0) == 0.0
            check_remote_hit(nodes)
            assert wire.num_bytes(TLS_HANDSHAKE) > values["baton_kv_pulled_bytes_total"] > 0
            assert wire.num_bytes(MAGIC) == 0, "nothing went in the clear"
        assert_nothing_held(cluster, within_s=10.0)
    tokens.check_greedy(prompts, greedy)
    tokens.check_sampled(prompts, sampled)


def check_remote_hit(nodes: TwoNodes) -> None:
    """With the metadata store away, until the roles are others."""
    cluster, ids = nodes.cluster, oracle.corpus()
    fresh = [ids[333:833], ids[7333:7933]]
    # At its first token a request is done, and decode's machine has seen nothing of it.
    assert ask(cluster, fresh, num_tokens=1) == [{}, {}]
    settle(cluster)
    with AdminClient(cluster.controller) as admin:
        admin.set_role("decode-0", Role.MIXED)
        assert admin.drain("prefill-0").drained
    nodes.redis.start()
    assert ask(cluster, fresh) == [{"remote": len(prompt) // 16 * 16} for prompt in fresh]
    numbers = pool_numbers(cluster, nodes.b.address)
    assert numbers["baton_pool_promoted_remote"] == sum(len(prompt) // 16 for prompt in fresh)
    assert numbers["baton_pool_failed_remote"] == 0
    expected = {
        "role/decode-0": "mixed",
        "drain/prefill-0": "1",
        "controller": cluster.controller,
    }
    wait_until(
        lambda: expected.items() <= nodes.redis.values(cluster.name).items(),
        timeout_s=10.0,
        what="the store was told",
    )
