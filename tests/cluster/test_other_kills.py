"""``kill -9`` of what is not an instance: controller, gateway, pool node, Ray itself."""

from __future__ import annotations

import asyncio
import os
import signal

import httpx
import psutil
import pytest

from baton.client.admin import AdminClient
from baton.core.cluster import Role
from baton.core.errors import BatonError
from protos.baton.v1 import cluster_pb2
from tests.cluster import oracle
from tests.cluster.harness import (
    Cluster,
    Reply,
    assert_nothing_held,
    body,
    complete,
    complete_all,
    http_client,
    metrics,
    serving,
    shared_files,
    wait_until,
)

NUM_STREAMS = 6
NUM_TOKENS = 700
BACK_WITHIN_S = 90.0


def status_or_none(cluster: Cluster) -> cluster_pb2.ClusterStatus | None:
    """``None`` while there is no controller."""
    try:
        with AdminClient(cluster.controller) as admin:
            return admin.status()
    except BatonError:
        return None


def member(cluster: Cluster, kind: str) -> cluster_pb2.MemberStatus | None:
    status = status_or_none(cluster)
    return next((m for m in status.members if m.kind == kind), None) if status else None


async def open_streams(cluster: Cluster, client: httpx.AsyncClient) -> list[asyncio.Task[Reply]]:
    """Long streams, each of which has begun to decode."""
    prompts = oracle.prompts(NUM_STREAMS, longest=100)
    streams = [
        asyncio.create_task(complete(client, body(prompt, max_tokens=NUM_TOKENS)))
        for prompt in prompts
    ]

    def decoding() -> bool:
        return sum(item.num_running for item in cluster.live_instances()) >= NUM_STREAMS

    await asyncio.to_thread(wait_until, decoding, timeout_s=30.0, what="all streams run")
    return streams


def check_all_served(cluster: Cluster, replies: list[Reply]) -> None:
    assert [reply.error for reply in replies] == [None] * len(replies)
    assert {len(reply.token_ids) for reply in replies} == {NUM_TOKENS}
    prompts = oracle.prompts(NUM_STREAMS, longest=100)
    for prompt, reply in zip(prompts, replies, strict=True):
        oracle.check_greedy(prompt, reply.token_ids)


def check_new_requests(cluster: Cluster) -> None:
    prompts = oracle.prompts(4, longest=60)
    requests = [body(prompt, max_tokens=16) for prompt in prompts]
    for prompt, reply in zip(
        prompts, asyncio.run(complete_all(cluster, requests, concurrency=4)), strict=True
    ):
        assert reply.error is None, reply.error
        oracle.check_greedy(prompt, reply.token_ids)


def test_controller(two_pairs: Cluster) -> None:
    with AdminClient(two_pairs.controller) as admin:
        admin.set_role("prefill-1", Role.MIXED, force=False)
    before = status_or_none(two_pairs)
    assert before is not None

    async def run() -> list[Reply]:
        async with http_client(two_pairs) as client:
            streams = await open_streams(two_pairs, client)
            os.kill(before.controller_pid, signal.SIGKILL)
            # Asked while there is no controller: it waits for the next one.
            late = await complete(client, body([5, 6, 7], max_tokens=16))
            assert late.error is None, late.error
            return list(await asyncio.gather(*streams))

    check_all_served(two_pairs, asyncio.run(run()))

    def back() -> bool:
        now = status_or_none(two_pairs)
        return now is not None and now.ready and len(two_pairs.live_instances()) == 4

    wait_until(back, timeout_s=BACK_WITHIN_S, what="the controller is back")
    after = status_or_none(two_pairs)
    assert after is not None
    assert after.controller_pid != before.controller_pid
    assert after.epoch > before.epoch
    lives = {item.instance_id: item for item in after.instances}
    assert lives["prefill-1"].role == "mixed"
    for item in before.instances:
        assert lives[item.instance_id].incarnation == item.incarnation
        assert lives[item.instance_id].state == "ready"
    assert two_pairs.status()["ready"] is True
    check_new_requests(two_pairs)
    assert_nothing_held(two_pairs, within_s=10.0)


def test_gateway(two_pairs: Cluster) -> None:
    before = member(two_pairs, "gateway")
    assert before is not None

    async def run() -> None:
        async with http_client(two_pairs) as client:
            streams = await open_streams(two_pairs, client)
            os.kill(before.pid, signal.SIGKILL)
            async with asyncio.timeout(10.0):
                ends = await asyncio.gather(*streams, return_exceptions=True)
            assert all(isinstance(end, httpx.TransportError) for end in ends), ends

    asyncio.run(run())
    # Nobody has to come back for that.
    assert_nothing_held(two_pairs, within_s=10.0)

    def back() -> bool:
        try:
            return httpx.get(f"{two_pairs.url}/ready", timeout=5.0).status_code == 200
        except httpx.TransportError:
            return False

    wait_until(back, timeout_s=BACK_WITHIN_S, what="the gateway is back where it was")
    after = member(two_pairs, "gateway")
    assert after is not None
    assert after.pid != before.pid
    check_new_requests(two_pairs)
    assert_nothing_held(two_pairs, within_s=10.0)


def test_pool_node(two_pairs: Cluster) -> None:
    before = member(two_pairs, "pool")
    assert before is not None
    files = shared_files(two_pairs.name)
    assert len(files) == 5, "an arena of each instance, and the host tier"

    async def run() -> list[Reply]:
        async with http_client(two_pairs) as client:
            streams = await open_streams(two_pairs, client)
            os.kill(before.pid, signal.SIGKILL)
            return list(await asyncio.gather(*streams))

    check_all_served(two_pairs, asyncio.run(run()))

    def back() -> bool:
        now = member(two_pairs, "pool")
        return now is not None and now.pid != before.pid

    wait_until(back, timeout_s=BACK_WITHIN_S, what="the pool node is back")
    after = member(two_pairs, "pool")
    assert after is not None
    assert metrics(after.http_address)["baton_pool_arenas"] == 4
    assert shared_files(two_pairs.name) == files
    check_new_requests(two_pairs)
    assert_nothing_held(two_pairs, within_s=10.0)


@pytest.mark.parametrize("part", ["raylet", "gcs_server"])
def test_ray_itself(part: str) -> None:
    """Fatal, and said so: one sentence, exit code 1, nothing left (``serving`` checks that)."""
    with serving("--prefill", "1", "--decode", "1") as cluster:
        [victim] = [p for p in cluster.processes() if _name(p) == part]
        victim.kill()
        assert cluster.process.wait(30) == 1
        said = [line for line in cluster.log.read_text().splitlines() if "baton: " in line]
        assert len(said) == 1
        assert part in said[0]


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.NoSuchProcess:
        return ""
