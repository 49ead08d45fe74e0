"""Start, stop, drain, explain: what an operator does, on a loaded cluster."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys

import httpx
import pytest

from baton.client.admin import AdminClient
from tests.cluster import oracle
from tests.cluster.harness import (
    DEMO_MODEL,
    ROOT,
    Cluster,
    body,
    complete,
    http_client,
    serving,
)
from tests.cluster.load import streaming_load


@pytest.mark.parametrize("stop_signal", [signal.SIGINT, signal.SIGTERM])
def test_signals_leave_nothing(stop_signal: signal.Signals) -> None:
    """``serving`` itself checks processes and shared memory; here while streams are open."""

    async def use(cluster: Cluster) -> None:
        async with http_client(cluster) as client:
            streams = [
                asyncio.ensure_future(complete(client, body([5, 6, 7], max_tokens=2000)))
                for _ in range(4)
            ]
            await asyncio.sleep(1.0)
            assert not any(stream.done() for stream in streams)
            cluster.process.send_signal(stop_signal)
            # Open streams end in one way or another; they do not hang.
            async with asyncio.timeout(30.0):
                await asyncio.gather(*streams, return_exceptions=True)

    with serving("--prefill", "1", "--decode", "1", stop_signal=stop_signal) as cluster:
        assert len(cluster.processes()) > 5
        asyncio.run(use(cluster))
        assert cluster.process.wait(30) == 0
        # That is what Ray's handler prints, before it aborts.
        assert "SIGTERM received" not in cluster.log.read_text()


@pytest.mark.parametrize("setting", ["http-port", "grpc-port"])
def test_busy_port_is_refused_by_name(setting: str) -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = str(busy.getsockname()[1])
        result = subprocess.run(
            [
                *(sys.executable, "-m", "baton.cli.main", "serve", "--model", str(DEMO_MODEL)),
                *(f"--{setting}", port, "--cluster", "busy"),
            ],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=ROOT,
            check=False,
        )
    assert result.returncode == 2
    message = result.stderr.strip().splitlines()[-1]
    assert port in message
    assert setting.replace("-", "_") in message


def test_a_second_cluster_of_that_name_is_refused(two_pairs: Cluster) -> None:
    result = two_pairs.command(
        "serve", "--model", str(DEMO_MODEL), "--http-port", "0", "--grpc-port", "0"
    )
    assert result.returncode == 2
    assert "already runs" in result.stderr


def test_drain_under_load(two_pairs: Cluster) -> None:
    prompts = oracle.prompts(16, longest=300)

    async def run() -> list[str]:
        placed = []
        async with streaming_load(two_pairs, prompts, num_tokens=48, concurrency=12) as load:
            with AdminClient(two_pairs.controller) as admin:
                drained = await asyncio.to_thread(two_pairs.command, "drain", "decode-1")
                assert drained.returncode == 0, drained.stderr
                assert drained.stdout == "decode-1: drained\n"
                seen = len(load.replies)
                while len(load.replies) < seen + 24:
                    await asyncio.sleep(0.05)
                for _, later in load.replies[seen + 12 :]:
                    placed.append(admin.explain(later.request_id).attempts[-1].decode_instance)
                states = {i.instance_id: i.state for i in admin.status().instances}
                assert states["decode-1"] == "drained"
                back = await asyncio.to_thread(two_pairs.command, "drain", "decode-1", "--undo")
                assert back.stdout == "decode-1: back in service\n", back.stderr
                # A drain that does not wait, or not long enough, says what is still open.
                hasty = await asyncio.to_thread(
                    two_pairs.command, "drain", "decode-0", "--timeout", "0.01"
                )
                assert hasty.returncode == 1, hasty.stdout
                assert "still open" in hasty.stdout
                again = await asyncio.to_thread(two_pairs.command, "drain", "decode-0", "--undo")
                assert again.returncode == 0, again.stderr
        assert not load.failed, load.failed[0].error
        load.check_tokens(prompts, num_tokens=48)
        return placed

    placed = asyncio.run(run())
    assert placed
    assert set(placed) == {"decode-0"}
    assert {i.state for i in two_pairs.live_instances()} == {"ready"}


def test_explain_under_load(two_pairs: Cluster) -> None:
    prompts = oracle.prompts(16, longest=300)

    request_id = "look-at-me"

    async def run() -> subprocess.CompletedProcess[str]:
        async with (
            streaming_load(two_pairs, prompts, num_tokens=48, concurrency=8),
            http_client(two_pairs) as client,
        ):
            request = body(oracle.corpus()[100:300], max_tokens=20)
            async with client.stream(
                "POST", "/v1/completions", json=request, headers={"x-request-id": request_id}
            ) as response:
                assert response.headers["x-request-id"] == request_id
                await response.aread()
            return await asyncio.to_thread(two_pairs.command, "explain", request_id, "--json")

    result = asyncio.run(run())
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["outcome"] == "length"
    assert told["prompt_tokens"] == 200
    assert told["completion_tokens"] == 20
    assert told["ttft_s"] > 0
    [attempt] = told["attempts"]
    assert attempt["prefill_instance"].startswith("prefill-")
    assert attempt["decode_instance"].startswith("decode-")
    assert attempt["reason"]
    at = {(item["where"], item["stage"]): item["wall_s"] for item in attempt["stages"]}
    stages = [stage for _, stage in sorted(at, key=lambda key: at[key])]
    assert stages.index("prefill_received") < stages.index("prefilled")
    assert stages.index("prefilled") < stages.index("kv_arrived") < stages.index("finished")
    assert {where for where, _ in at} >= {attempt["prefill_instance"], attempt["decode_instance"]}

    table = two_pairs.command("explain", request_id)
    assert table.returncode == 0
    assert "kv_arrived" in table.stdout
    unknown = two_pairs.command("explain", "never-heard-of")
    assert unknown.returncode == 1
    assert "never-heard-of" in unknown.stderr


def test_status_names_every_process(two_pairs: Cluster) -> None:
    told = two_pairs.status()
    assert told["ready"] is True
    assert told["model"] == DEMO_MODEL.name
    assert {m["kind"] for m in told["members"]} == {"gateway", "pool"}
    for item in [*told["instances"], *told["members"]]:
        assert item["pid"] > 0
        assert int(item["rss_bytes"]) > 10 * 2**20
    assert int(told["controller_rss_bytes"]) > 10 * 2**20
    table = two_pairs.command("status")
    assert "decode-1" in table.stdout


def test_http_probes(two_pairs: Cluster) -> None:
    assert httpx.get(f"{two_pairs.url}/health").status_code == 200
    assert httpx.get(f"{two_pairs.url}/ready").status_code == 200
    text = httpx.get(f"{two_pairs.url}/metrics").text
    assert "baton_time_to_first_token_seconds_bucket" in text
