"""`baton memory`: what an instance's memory is used for, told by the instance itself."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from tests.cluster import oracle
from tests.cluster.harness import Cluster, body, complete_all


def test_the_map_of_an_instance(pair: Cluster) -> None:
    requests = [body(prompt, max_tokens=16) for prompt in oracle.prompts(8, longest=200)]
    asyncio.run(complete_all(pair, requests, concurrency=4))
    for instance in ("prefill-0", "decode-0"):
        told = pair.command("memory", instance, "--json")
        assert told.returncode == 0, told.stderr
        reply = json.loads(told.stdout)
        assert reply["instance_id"] == instance
        [found] = reply["maps"]
        in_use = int(found["in_use"])
        assert abs(int(found["unaccounted"])) <= 0.05 * in_use, told.stdout
        entries: dict[str, Any] = {entry["tag"]: entry for entry in found["entries"]}
        assert int(entries["runtime.heap"]["in_use"]) <= 0.05 * in_use, told.stdout
        needs = {name: float(value) for name, value in found["needs"].items()}
        assert int(entries["kv_cache"]["size"]) == 2048 * needs["block_bytes"]
        assert 0 < int(entries["kv_cache"]["in_use"]) < int(entries["kv_cache"]["size"])
        largest = max(needs["prefill"], needs["decode"], needs["mixed"])
        beside = needs["held"] + largest + needs["reserve"] + needs["margin"]
        assert beside + int(entries["kv_cache"]["size"]) <= needs["limit"]


def test_the_table(pair: Cluster) -> None:
    told = pair.command("memory", "decode-0")
    assert told.returncode == 0, told.stderr
    for word in ("kv_cache", "weights.experts", "workspace", "unaccounted", "largest prefill"):
        assert word in told.stdout
    unknown = pair.command("memory", "nobody")
    assert unknown.returncode == 1
    assert "decode-0, prefill-0" in unknown.stderr
