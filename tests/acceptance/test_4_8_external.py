"""Issue 4, line 8: a Mooncake Store as the lowest tier of a running cluster."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cluster import oracle
from tests.cluster.harness import Cluster, assert_nothing_held, serving, wait_until
from tests.cluster.pool_kit import ask, pool_numbers, settle
from tests.kvpool.mooncake_kit import Master, holder

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(300)]

PAIR = ("--prefill", "1", "--decode", "1")


def external_numbers(cluster: Cluster) -> dict[str, float]:
    prefix = "baton_pool_external_"
    return {
        name.removeprefix(prefix): value
        for name, value in pool_numbers(cluster).items()
        if name.startswith(prefix)
    }


def test_a_store_outlives_the_cluster(tmp_path: Path) -> None:
    ids = oracle.corpus()
    prompts = [ids[2000 * i : 2000 * i + 600 + 16 * i] for i in range(3)]
    num_blocks = sum((len(prompt) - 1) // 16 for prompt in prompts)
    master = Master(tmp_path)
    settings = {
        "engine": {"num_blocks": 256},
        "pool": {
            "write_back": "all",
            "fetch": "always",
            "external": {"master": master.address, "batch_bytes": 4 << 20},
        },
    }
    try:
        with holder(master.address, 256 << 20):
            with serving(*PAIR, settings=settings) as cluster:
                assert ask(cluster, prompts) == [{}] * 3
                wait_until(
                    lambda: external_numbers(cluster)["stored"] >= num_blocks,
                    timeout_s=20.0,
                    what="the store to have it all",
                )
            # Nothing is left on this machine.
            with serving(*PAIR, settings=settings) as cluster:
                for prompt, found in zip(prompts, ask(cluster, prompts), strict=True):
                    assert found == {"external": (len(prompt) - 1) // 16 * 16}
                assert set(ask(cluster, prompts[:1])[0]) == {"device"}
                assert ask(cluster, prompts[:1], salt="another tenant") == [{}]
                shown = json.loads(cluster.command("kv", "--json").stdout)
                (pool,) = shown["pool_nodes"].values()
                assert pool["numbers"]["baton_pool_promoted_external"] == num_blocks
                assert "external" in cluster.command("kv").stdout

                # Gone under load: what it has is computed, and nobody fails.
                master.kill()
                others = [ids[1000 + 2000 * i : 1300 + 2000 * i] for i in range(4)]
                assert ask(cluster, others) == [{}] * 4
                faults = external_numbers(cluster)
                assert faults["errors"] + faults["late"] + faults["skipped"] > 0
                settle(cluster)
                assert_nothing_held(cluster, within_s=10.0)
    finally:
        master.kill()


def test_a_store_that_is_not_there(tmp_path: Path) -> None:
    settings = {"pool": {"fetch": "always", "external": {"master": "127.0.0.1:9"}}}
    with serving(*PAIR, settings=settings) as cluster:
        assert ask(cluster, oracle.prompts(2, longest=300)) == [{}] * 2
        assert external_numbers(cluster)["connected"] == 0
        assert "not reached" in cluster.command("kv").stdout
