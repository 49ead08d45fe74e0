"""Instances with a pool: the tokens of a plain one, wherever a prefix came from."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from baton.core.cluster import Role
from baton.core.errors import Code
from baton.core.request import Part, Submission
from kvpool.tiers import Tier
from tests.instance.fetch_kit import LAYOUT, Pool, pool_of
from tests.instance.instance_kit import (
    BLOCK_SIZE,
    CONFIG,
    WAIT_S,
    Client,
    Node,
    request,
    running,
    until,
)

LONG = 41
"""Tokens of a prompt: ten full blocks, and the last token, which is always computed."""


@contextlib.asynccontextmanager
async def two(directory: Path, num_blocks: int = 64) -> AsyncIterator[tuple[Pool, Node, Node]]:
    """Instances that share only the pool."""
    config = dataclasses.replace(CONFIG, num_blocks=num_blocks)
    async with pool_of(directory, 64) as pool:
        a, b = (Node(name, config=config, layout=LAYOUT, pool=pool.side) for name in ("a", "b"))
        yield pool, a, b


async def written(node: Node) -> None:
    """Wait until all that is complete is written back."""
    assert node.parts.pool is not None
    assert node.parts.pool.write_back is not None
    await asyncio.wait_for(node.parts.pool.write_back.drained(), WAIT_S)


async def ask(client: Client, one: Submission, node: Node) -> dict[str, int]:
    """Its tokens are right; the tokens of its prompt by tier."""
    reply = await client.submit(one, Part.WHOLE, node)
    assert not reply.HasField("error"), reply.error.message
    await client.check(one)
    first = client.of(one.request_id)[0]
    assert sum(count for _, count in first.cached_by_tier) == first.num_cached_tokens
    return dict(first.cached_by_tier)


def named(one: Submission, name: str) -> Submission:
    return dataclasses.replace(one, request_id=name)


async def test_what_one_computed_another_fetches(tmp_path: Path) -> None:
    async with two(tmp_path) as (pool, a, b), running(a, b) as client:
        one = request(num_prompt_tokens=LONG)
        assert await ask(client, one, a) == {}
        await written(a)
        fetched = (LONG - 1) // BLOCK_SIZE * BLOCK_SIZE
        assert await ask(client, named(one, "host"), b) == {Tier.HOST: fetched}
        assert await ask(client, named(one, "device"), b) == {Tier.DEVICE: fetched}
        assert await ask(client, named(one, "own"), a) == {Tier.DEVICE: fetched}
        await pool.idle()


async def test_a_cached_beginning_and_a_fetched_rest(tmp_path: Path) -> None:
    async with two(tmp_path) as (_, a, b), running(a, b) as client:
        one = request(num_prompt_tokens=LONG)
        short = dataclasses.replace(named(one, "short"), prompt_ids=one.prompt_ids[:14])
        assert await ask(client, short, b) == {}
        await written(b)
        assert await ask(client, one, a) == {Tier.HOST: 12}
        await written(a)
        assert await ask(client, named(one, "both"), b) == {Tier.DEVICE: 12, Tier.HOST: 28}


async def test_tenants_share_nothing(tmp_path: Path) -> None:
    async with two(tmp_path) as (_, a, b), running(a, b) as client:
        one = request(num_prompt_tokens=LONG)
        await ask(client, one, a)
        await written(a)
        other = dataclasses.replace(named(one, "other"), tenant="somebody else")
        assert await ask(client, other, b) == {}


async def test_prompt_logprobs_are_computed_and_not_fetched(tmp_path: Path) -> None:
    async with two(tmp_path) as (_, a, b), running(a, b) as client:
        one = request(num_prompt_tokens=LONG)
        await ask(client, one, a)
        await written(a)
        sampling = dataclasses.replace(one.sampling, prompt_logprobs=0)
        wants = dataclasses.replace(named(one, "wants"), sampling=sampling)
        assert await ask(client, wants, b) == {}
        assert len(client.of("wants")[0].prompt_logprobs) == LONG - 1


async def test_what_was_evicted_everywhere_is_computed_and_written_again(tmp_path: Path) -> None:
    async with two(tmp_path) as (pool, a, b), running(a, b) as client:
        one = request(num_prompt_tokens=LONG)
        await ask(client, one, a)
        await written(a)
        await pool.idle()
        await ask(client, named(one, "again"), b)
        for key in pool.table.snapshot_keys():
            pool.table.drop(key, 0.0)
        # Enough others that b has nothing of it any more.
        for number in range(6):
            await ask(client, request(f"other {number}", num_prompt_tokens=60), b)
        await written(b)
        for key in pool.table.snapshot_keys():
            pool.table.drop(key, 0.0)
        assert await ask(client, named(one, "missed"), b) == {}
        await written(b)
        keys = b.engine.prefix_keys(one)
        assert pool.table.match(keys, now=0.0) == len(keys)


@pytest.mark.parametrize("how", ["abort", "deadline", "gateway", "newer"])
async def test_an_end_while_a_prefix_is_copied_frees_everything(tmp_path: Path, how: str) -> None:
    async with two(tmp_path) as (pool, a, b), running(a, b) as client:
        one = request(num_prompt_tokens=LONG)
        await ask(client, one, a)
        await written(a)
        await pool.idle()
        assert b.parts.pool is not None
        fetcher = b.parts.pool.fetcher
        gate = threading.Event()
        fetcher._thread.submit(gate.wait, WAIT_S)
        budget_s = 0.2 if how == "deadline" else None
        ended = dataclasses.replace(named(one, "ended"), budget_s=budget_s)
        await client.submit(ended, Part.WHOLE, b)
        await until(lambda: any(fetch.loading for fetch in fetcher._fetches.values()))
        match how:
            case "abort":
                await client.abort("ended", 0, b)
            case "deadline":
                assert (await client.ended("ended")).error_code == Code.DEADLINE_EXCEEDED
            case "gateway":
                await client.drop(b)
            case "newer":
                await client.submit(dataclasses.replace(ended, attempt=1), Part.WHOLE, b)
        await until(lambda: "ended@0" not in b.instance._open)
        assert "ended@0" in b.engine.request_ids(), "something still writes to its blocks"
        gate.set()
        await b.idle()
        await pool.idle()
        if how == "newer":
            await client.check(dataclasses.replace(ended, attempt=1))


async def test_a_pool_node_that_ends_costs_no_request(tmp_path: Path) -> None:
    async with two(tmp_path) as (pool, a, b), running(a, b) as client:
        one = request(num_prompt_tokens=LONG)
        await ask(client, one, a)
        await written(a)
        await pool.stop_node()
        assert await ask(client, named(one, "alone"), b) == {}
        await written(b)


async def test_more_requests_than_blocks_all_fetching(tmp_path: Path) -> None:
    async with two(tmp_path, num_blocks=20) as (pool, a, b), running(a, b) as client:
        prompts = [request(name, num_prompt_tokens=LONG) for name in "vwxyz"]
        for one in prompts:
            await ask(client, one, a)
            await written(a)
        again = [named(one, f"{one.request_id} again") for one in prompts]
        for one in again:
            await client.submit(one, Part.WHOLE, b)
        for one in again:
            await client.check(one)
        await b.idle()
        await pool.idle()
        assert b.parts.pool is not None
        assert b.parts.pool.fetcher.counters.num_blocks[Tier.HOST] > 0


async def test_prefill_fetches_and_hands_over(tmp_path: Path) -> None:
    async with pool_of(tmp_path, 64) as pool:
        nodes = [
            Node("p", Role.PREFILL, layout=LAYOUT, pool=pool.side),
            Node("q", Role.PREFILL, layout=LAYOUT, pool=pool.side),
            Node("d", Role.DECODE, layout=LAYOUT, pool=pool.side),
        ]
        p, q, d = nodes
        async with running(*nodes) as client:
            one = request(num_prompt_tokens=LONG)
            await client.hand_over(one, p, d)
            await client.check(one)
            await written(p)
            await written(d)
            again = named(one, "again")
            await client.hand_over(again, q, d)
            await client.check(again)
            assert q.parts.pool is not None
            assert q.parts.pool.fetcher.counters.num_blocks[Tier.HOST] == 10
            await q.idle()
            await pool.idle()


async def test_a_replay_counts_its_prompt_only(tmp_path: Path) -> None:
    """The outputs of an earlier attempt come from the pool too, but are no prompt tokens."""
    async with two(tmp_path) as (_, a, b), running(a, b) as client:
        one = request(num_prompt_tokens=14)
        await ask(client, one, a)
        await written(a)
        outputs = tuple(client.tokens(one.request_id)[:11])
        replay = dataclasses.replace(one, attempt=1, output_ids=outputs)
        await client.submit(replay, Part.WHOLE, b)
        await client.check(replay)
        first = client.of(one.request_id, 1)[0]
        assert (first.num_cached_tokens, first.cached_by_tier) == (14, ((Tier.HOST, 14),))
