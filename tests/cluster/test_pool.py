"""The KV pool in a running cluster: same tokens from every tier, whatever was restarted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.cluster import oracle
from tests.cluster.harness import assert_nothing_held, serving
from tests.cluster.pool_kit import ask, kill_instance, kill_pool_node, pool_numbers, settle

PAIR = ("--prefill", "1", "--decode", "1")


def settings(disk: Path | None = None, **pool: Any) -> dict[str, Any]:
    """A device tier of 128 blocks of 16 tokens: two long prompts fill it."""
    if disk is not None:
        pool["disk_path"] = str(disk)
    return {
        "engine": {"num_blocks": 128},
        "pool": {"write_back": "all", "fetch": "always", **pool},
    }


def long_prompts(count: int) -> list[list[int]]:
    """Of about 50 blocks each, and no prefix in common."""
    ids = oracle.corpus()
    return [ids[2000 * i : 2000 * i + 800 + 16 * i] for i in range(count)]


def test_device_and_host_hits_after_eviction_and_restarts() -> None:
    prompts = long_prompts(4)
    with serving(*PAIR, settings=settings()) as cluster:
        assert ask(cluster, prompts) == [{}] * 4
        settle(cluster)
        # The last one's blocks are on the device still; the first one's were evicted.
        again = ask(cluster, [prompts[3], prompts[0]])
        assert set(again[0]) == {"device"}
        assert again[1].get("host", 0) > 0
        longer = [*prompts[1], *oracle.corpus()[50:120]]
        assert ask(cluster, [longer])[0].get("host", 0) > 0, "a prefix, and then something new"

        kill_instance(cluster, "prefill-0")
        assert [set(found) for found in ask(cluster, prompts)] == [{"host"}] * 4

        published = pool_numbers(cluster)["baton_pool_host_used"]
        kill_pool_node(cluster)
        kill_instance(cluster, "prefill-0")
        assert pool_numbers(cluster)["baton_pool_host_used"] == published, "it was adopted"
        assert [set(found) for found in ask(cluster, prompts)] == [{"host"}] * 4

        # Somebody else's blocks are not found, whatever the prompt.
        assert ask(cluster, prompts[:1], salt="another tenant") == [{}]
        assert "device" in ask(cluster, prompts[:1], salt="another tenant")[0]

        shown = json.loads(cluster.command("kv", "--json").stdout)
        (pool,) = shown["pool_nodes"].values()
        assert pool["numbers"]["baton_pool_host_hits"] > 0
        assert pool["top_prefixes"][0]["num_blocks"] > 0
        assert "host" in cluster.command("kv").stdout
        settle(cluster)
        assert_nothing_held(cluster, within_s=10.0)


def test_disk_hits_and_a_machine_that_restarts(tmp_path: Path) -> None:
    prompts = long_prompts(5)
    # A host tier of 150 blocks: three of the prompts.
    small = settings(tmp_path / "disk", host_bytes=150 * 32768)
    with serving(*PAIR, settings=small) as cluster:
        assert ask(cluster, prompts) == [{}] * 5
        numbers = settle(cluster)
        assert numbers["baton_pool_host_slots"] <= 150
        assert numbers["baton_pool_disk_blocks"] > 0
        kill_instance(cluster, "prefill-0")
        # The newest first: the host tier has that, and then makes room for the older ones.
        found = ask(cluster, prompts[::-1])
        assert any("host" in tiers for tiers in found), found
        assert any("disk" in tiers for tiers in found), found
        settle(cluster)
        assert_nothing_held(cluster, within_s=10.0)
    # Shared memory is gone with the cluster; what was on disk, and in the host tier, is not.
    with serving(*PAIR, settings=small) as cluster:
        found = ask(cluster, prompts)
        assert sum("disk" in tiers for tiers in found) >= 3, found
        numbers = settle(cluster)
        assert numbers["baton_pool_promoted_disk"] > 0
        assert numbers["baton_pool_failed_disk"] == 0
        assert_nothing_held(cluster, within_s=10.0)
