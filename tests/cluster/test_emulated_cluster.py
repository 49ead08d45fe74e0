"""A whole cluster of emulated instances: every token is what a pure function says."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from baton.client.aio import AsyncBatonClient
from baton.client.messages import generate_request
from baton.engine.fingerprints import emulated_tokens
from tests.cluster.harness import (
    Cluster,
    assert_nothing_held,
    body,
    complete,
    complete_all,
    http_client,
    metrics,
    serving,
)

VOCABULARY, EOS = 4096, (0, 2)
"""Of the demo model, whose tokenizer is used."""
PROFILE = {
    "name": "fast",
    "source": "derived: none, for a test",
    "prefill": {"overhead_s": 0.002, "item_s": 1e-5, "context_s": 0.0},
    "decode": {"overhead_s": 0.002, "item_s": 0.0, "context_s": 1e-7},
    "handoff": {"latency_s": 0.001, "bytes_per_s": 1e10},
    "tiers": {"host": {"latency_s": 0.001, "bytes_per_s": 1e10}},
    "kv_bytes_per_token": 1000,
    "kv_capacity_tokens": 4000,
    "max_model_len": 20000,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 256,
    "block_size": 16,
}
"""Its caches are small: sequences are preempted, and prefixes come back from the pool."""


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    profile = tmp_path_factory.mktemp("profile") / "fast.yaml"
    profile.write_text(json.dumps(PROFILE))
    settings = {"pool": {"host_bytes": 8_000_000, "write_back": "all", "fetch": "always"}}
    sizes = ("--prefill", "2", "--decode", "2", "--device", "emulated", "--profile", str(profile))
    with serving(*sizes, settings=settings) as cluster:
        yield cluster


def prompts(count: int) -> list[list[int]]:
    """Several that begin alike; some longer than a step."""
    draw = random.Random(5)
    stems = [[draw.randrange(3, VOCABULARY) for _ in range(700)] for _ in range(6)]
    return [
        [*stems[i % len(stems)][: draw.randrange(1, 700)], *(draw.randrange(9, 4000) for _ in "ab")]
        for i in range(count)
    ]


def expected(prompt: list[int], count: int) -> list[int]:
    return emulated_tokens(prompt, count, vocab_size=VOCABULARY, avoid=EOS)


def values_of(cluster: Cluster, name: str) -> float:
    return sum(metrics(item.metrics_address)[name] for item in cluster.live_instances())


def test_every_token_over_http_is_right(emulated: Cluster) -> None:
    asked = prompts(120)
    requests = [body(prompt, max_tokens=30, temperature=i % 2) for i, prompt in enumerate(asked)]
    replies = asyncio.run(complete_all(emulated, requests, concurrency=24))
    for prompt, reply in zip(asked, replies, strict=True):
        assert (reply.error, reply.finish_reason) == (None, "length")
        assert reply.token_ids == expected(prompt, 30)
    assert values_of(emulated, "baton_emulated_faults_total") == 0
    assert values_of(emulated, "baton_handoffs_total{result=arrived,side=decode}") > 0
    assert values_of(emulated, "baton_cached_tokens_total") > 0
    assert values_of(emulated, "baton_kv_fetched_blocks_total{tier=host}") > 0
    assert_nothing_held(emulated, within_s=10.0)


def test_every_token_over_grpc_is_right(emulated: Cluster) -> None:
    async def run(prompt: list[int]) -> list[int]:
        async with AsyncBatonClient(emulated.grpc) as client:
            request = generate_request(prompt, max_tokens=20, ignore_eos=True)
            chunks = [chunk async for chunk in client.generate(request)]
        return [token for chunk in chunks for token in chunk.token_ids]

    async def run_all(asked: list[list[int]]) -> list[list[int]]:
        return await asyncio.gather(*map(run, asked))

    asked = prompts(12)
    assert asyncio.run(run_all(asked)) == [expected(prompt, 20) for prompt in asked]


def test_tokens_stay_right_while_roles_are_switched(emulated: Cluster) -> None:
    asked = prompts(40)

    async def load() -> list[list[int]]:
        async with http_client(emulated) as client:
            replies = [complete(client, body(prompt, max_tokens=150)) for prompt in asked]
            running = asyncio.gather(*replies)
            for instance, role in (("prefill-1", "mixed"), ("decode-1", "prefill")):
                switch = asyncio.to_thread(emulated.command, "role", instance, role)
                result = await switch
                assert result.returncode == 0, result.stderr
            return [reply.token_ids for reply in await running]

    assert asyncio.run(load()) == [expected(prompt, 150) for prompt in asked]


def test_prompts_may_be_longer_than_the_checkpoint_allows(
    emulated: Cluster, tmp_path: Path
) -> None:
    """The profile's model is what is emulated; 3,900 tokens are what its cache holds."""
    from baton.cli.settings import load_settings

    profile = tmp_path / "long.yaml"
    profile.write_text(json.dumps({**PROFILE, "kv_capacity_tokens": 100_000}))
    flags = {"model": "m", "device": "emulated", "profile": str(profile), "time_dilation": 3.0}
    engine = load_settings(None, flags).engine
    assert (engine.max_model_len, engine.num_blocks, engine.block_size) == (20_000, 6250, 16)
    prompt = [i % 4000 for i in range(3900)]
    [reply] = asyncio.run(complete_all(emulated, [body(prompt, max_tokens=9)], concurrency=1))
    assert reply.token_ids == expected(prompt, 9)


def test_an_emulated_instance_loads_no_torch(emulated: Cluster) -> None:
    for item in emulated.live_instances():
        maps = Path(f"/proc/{item.pid}/maps").read_text()
        assert "libtorch" not in maps, item.instance_id
