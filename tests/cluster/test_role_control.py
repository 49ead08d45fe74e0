"""Operators and the planner of roles on a running cluster, while requests run."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

from baton.client.admin import AdminClient
from baton.core.cluster import Role
from tests.cluster import oracle
from tests.cluster.harness import Cluster, assert_nothing_held, metrics
from tests.cluster.load import streaming_load


def roles_json(cluster: Cluster, *args: str) -> dict[str, Any]:
    result = cluster.command("roles", *args, "--json")
    assert result.returncode == 0, result.stderr
    loaded: dict[str, Any] = json.loads(result.stdout)
    return loaded


def said(cluster: Cluster, *args: str) -> str:
    result = cluster.command("roles", *args)
    assert result.returncode == 0, result.stderr
    return result.stdout


def operate(cluster: Cluster) -> None:
    """Pin, pause, look, unpin and resume, as an operator would."""
    assert said(cluster, "pin", "prefill-1") == "prefill-1: pinned to prefill\n"
    assert "for 300 s" in said(cluster, "pause", "--for", "300")
    switched = cluster.command("role", "decode-1", "mixed")
    assert switched.returncode == 0, switched.stderr
    status = roles_json(cluster)
    assert status["paused"]
    assert 200 < status["paused_for_s"] <= 300
    assert {
        item["instance_id"]: (item["role"], item["pinned"]) for item in status["instances"]
    } == {
        "prefill-0": ("prefill", False),
        "prefill-1": ("prefill", True),
        "decode-0": ("decode", False),
        "decode-1": ("mixed", True),
    }
    assert len({item["flip_group"] for item in status["instances"]}) == 1
    flip = roles_json(cluster, "log", "--limit", "1")["log"][0]
    assert (flip["instance_id"], flip["from_role"], flip["to_role"]) == (
        "decode-1",
        "decode",
        "mixed",
    )
    assert (flip["who"], flip["state"]) == ("operator", "done")
    assert 0 < flip["seconds"] < 5
    assert "decode-1: decode -> mixed" in said(cluster, "log")
    assert "now mixed" in said(cluster, "unpin", "decode-1")
    said(cluster, "unpin", "prefill-1")
    said(cluster, "resume")
    status = roles_json(cluster)
    assert not status["paused"]
    assert not any(item["pinned"] for item in status["instances"])


async def under_load(cluster: Cluster, action: Callable[[Cluster], None]) -> None:
    """Streams run meanwhile, and get every token they should."""
    prompts = oracle.prompts(8, longest=300)
    async with streaming_load(cluster, prompts, num_tokens=32, concurrency=4) as load:
        await asyncio.to_thread(action, cluster)
    assert not load.failed, load.failed[0].error
    assert load.replies
    load.check_tokens(prompts, num_tokens=32)


def test_pin_pause_log_unpin_and_resume_under_load(two_pairs: Cluster) -> None:
    asyncio.run(under_load(two_pairs, operate))
    with AdminClient(two_pairs.controller) as admin:
        admin.set_role("decode-1", Role.DECODE)
        assert admin.pin_role("decode-1", pinned=False) is Role.DECODE
        controller = admin.status().controller_metrics_address
    values = metrics(controller)
    there = "baton_role_flips_total{from=decode,result=done,to=mixed,who=operator}"
    back = "baton_role_flips_total{from=mixed,result=done,to=decode,who=operator}"
    assert (values[there], values[back]) == (1.0, 1.0)
    assert values["baton_role_flip_seconds_count"] >= 2.0
    assert values["baton_roles_paused"] == 0.0
    assert_nothing_held(two_pairs, within_s=5.0)


def test_an_unknown_instance_is_named(two_pairs: Cluster) -> None:
    result = two_pairs.command("roles", "pin", "prefill-9")
    assert result.returncode == 1
    assert "prefill-9" in result.stderr
