"""The KV pool in a running cluster: same tokens from device and host, whatever was restarted.

With the disk, with MLA, and with different numbers of ranks: ``scripts/acceptance 4.1``.
"""

from __future__ import annotations

import json

from tests.cluster import oracle
from tests.cluster.harness import assert_nothing_held, serving
from tests.cluster.pool_kit import ask, kill_instance, kill_pool_node, pool_numbers, settle

PAIR = ("--prefill", "1", "--decode", "1")


SETTINGS = {
    # Two long prompts fill it.
    "engine": {"num_blocks": 128},
    "pool": {"write_back": "all", "fetch": "always"},
}


def long_prompts(count: int) -> list[list[int]]:
    """Of about 50 blocks each, and no prefix in common."""
    ids = oracle.corpus()
    return [ids[2000 * i : 2000 * i + 800 + 16 * i] for i in range(count)]


def test_device_and_host_hits_after_eviction_and_restarts() -> None:
    prompts = long_prompts(4)
    with serving(*PAIR, settings=SETTINGS) as cluster:
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
