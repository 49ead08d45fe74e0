"""A policy of one's own, in one file: it binds decode late. Overload: shed, or in turn."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx

from tests.cluster import oracle, tokens
from tests.cluster.harness import (
    ROOT,
    Cluster,
    assert_nothing_held,
    body,
    complete,
    complete_all,
    http_client,
    serving,
    wait_until,
)

EXAMPLES = ROOT / "deploy" / "examples"
SLOW = """
name: slow
source: made up for a test
prefill: {overhead_s: 0.0, item_s: 0.1, context_s: 0.0}
decode: {overhead_s: 0.01, item_s: 0.0, context_s: 0.0}
handoff: {latency_s: 0.0, bytes_per_s: 1.0e+12}
kv_bytes_per_token: 1
kv_capacity_tokens: 32768
max_model_len: 4096
max_num_seqs: 64
max_num_batched_tokens: 512
"""


def explained(cluster: Cluster, request_id: str) -> list[dict[str, Any]]:
    """The attempts, as ``baton explain --json`` has them once the request's end was reported."""
    answer: dict[str, Any] = {}

    def ended() -> bool:
        result = cluster.command("explain", request_id, "--json")
        assert result.returncode == 0, result.stderr
        answer.update(json.loads(result.stdout))
        return bool(answer["outcome"] != "open")

    wait_until(ended, timeout_s=10.0, what=f"the end of {request_id} is reported")
    return list(answer["attempts"])


def test_decode_is_bound_after_prefill_by_a_policy_of_ones_own() -> None:
    prompts = oracle.prompts(16, longest=600)
    requests = [body(prompt, max_tokens=24) for prompt in prompts]
    with serving(
        *("--prefill", "2", "--decode", "2"),
        settings={"controller": {"policy": "fewest_open:FewestOpen"}},
        extra_env={"PYTHONPATH": str(EXAMPLES)},
    ) as cluster:
        replies = asyncio.run(complete_all(cluster, requests, concurrency=8))
        assert [reply.error for reply in replies if reply.error] == []
        attempts = [one for r in replies[-6:] for one in explained(cluster, r.request_id)]
        assert_nothing_held(cluster, within_s=5.0)
    tokens.check_greedy(prompts, [reply.token_ids for reply in replies])
    for attempt in attempts:
        assert "fewest open" in attempt["reason"]
        assert "after prefill" in attempt["reason"]
        where = {stage["stage"]: stage["where"] for stage in attempt["stages"]}
        assert where["decode_received"] == attempt["decode_instance"]
        stages = [stage["stage"] for stage in attempt["stages"]]
        assert stages.index("prefilled") < stages.index("bound") < stages.index("decode_received")


def test_decode_stays_where_prefill_was() -> None:
    """On mixed instances the bound one is often the one that has the KV: no handoff then."""
    prompts = oracle.prompts(12, longest=400)
    requests = [body(prompt, max_tokens=24) for prompt in prompts]
    with serving(
        *("--prefill", "0", "--decode", "0", "--mixed", "2"),
        settings={"controller": {"policy": "tests.cluster.stay_policy:StayWithPrefill"}},
    ) as cluster:
        replies = asyncio.run(complete_all(cluster, requests, concurrency=4))
        assert [reply.error for reply in replies if reply.error] == []
        last = explained(cluster, replies[-1].request_id)
        assert_nothing_held(cluster, within_s=5.0)
    tokens.check_greedy(prompts, [reply.token_ids for reply in replies])
    assert last[0]["decode_instance"] == last[0]["prefill_instance"]
    assert [attempt["attempt"] for attempt in last] == [0, 1]


def test_shed_requests_are_told_when_to_come_back(tmp_path: Path) -> None:
    profile = tmp_path / "slow.yaml"
    profile.write_text(SLOW)
    settings = {
        "controller": {"profile": str(profile), "admission": {"max_ttft_factor": 2.0}},
        "service": {"classes": {"quick": {"ttft_s": 1.0}, "patient": {"ttft_s": 600.0}}},
    }
    with serving("--prefill", "1", "--decode", "1", settings=settings) as cluster:
        url = f"{cluster.url}/v1/completions"
        prompt = oracle.corpus()[:200]  # 20 seconds, the profile says
        request = {**body(prompt, max_tokens=2, stream=False)}
        shed = httpx.post(url, json=request, headers={"x-baton-class": "quick"}, timeout=30)
        assert shed.status_code == 429, shed.text
        assert shed.json()["error"]["code"] == "overloaded"
        assert 10 <= int(shed.headers["retry-after"]) <= 20
        assert shed.headers["x-should-retry"] == "true"
        for headers in ({"x-baton-class": "patient"}, {}):
            served = httpx.post(url, json=request, headers=headers, timeout=30)
            assert served.status_code == 200, served.text


def test_a_flood_does_not_starve_another_tenant() -> None:
    settings = {
        "controller": {"queue_timeout_s": 60.0, "admission": {"max_open_per_instance": 2}},
    }
    prompt = oracle.corpus()[:50]
    with serving("--prefill", "1", "--decode", "1", settings=settings) as cluster:

        async def run() -> list[str]:
            order: list[str] = []
            async with http_client(cluster) as client:

                async def ask(tenant: str) -> None:
                    request = body(prompt, max_tokens=24, cache_salt=tenant)
                    reply = await complete(client, request)
                    assert reply.error is None, reply.error
                    order.append(tenant)

                flood = [asyncio.create_task(ask("flood")) for _ in range(24)]
                await asyncio.sleep(0.2)
                small = [asyncio.create_task(ask("small")) for _ in range(3)]
                await asyncio.gather(*flood, *small)
            return order

        order = asyncio.run(run())
        # Both end in turns; without turns the small one's would be the last three of all.
        last = max(index for index, tenant in enumerate(order) if tenant == "small")
        assert last < len(order) - 6, order
        assert_nothing_held(cluster, within_s=5.0)
