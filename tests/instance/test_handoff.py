"""Prefill on one instance, decode on another: the tokens of one plain instance, nothing left."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import secrets
from pathlib import Path

import pytest

from baton.core.cluster import Role
from baton.core.config import HandoffConfig
from baton.core.request import FinishReason, Part
from kvpool.arena import BlockArena
from kvpool.transports import make_transports
from kvpool.transports.faulty import Fault
from protos.baton.internal.v1 import instance_pb2
from tests.instance.instance_kit import (
    BLOCK_SIZE,
    CONFIG,
    Client,
    Node,
    pair,
    plain,
    request,
    running,
    until,
)


async def test_tokens_are_those_of_one_instance_and_each_side_says_token_0() -> None:
    prefill, decode = pair()
    async with running(prefill, decode) as client:
        one = request()
        await client.hand_over(one, prefill, decode)
        await client.check(one)
        await prefill.idle()
        await decode.idle()
        firsts = [name for name, output in client.outputs if output.index == 0]
        assert sorted(firsts) == ["d", "p"]
        assert prefill.parts.prefill.counters.num_handed_off == 1
        assert decode.parts.decode.counters.num_handoffs == 1
        assert decode.parts.decode.counters.num_pulled_blocks == -(-22 // BLOCK_SIZE)
        assert decode.num_emptied
        assert prefill.num_emptied
        # Token 0 came before the tokens drawn here.
        indices = [output.index for name, output in client.outputs if name == "d"]
        assert indices == sorted(indices)


@pytest.mark.parametrize("names", [("tcp",), ("shm",), ("shm", "tcp")])
async def test_real_transports(tmp_path: Path, names: tuple[str, ...]) -> None:
    nodes = []
    for name, role in (("p", Role.PREFILL), ("d", Role.DECODE)):
        arena = BlockArena.create(
            tmp_path,
            "t",
            name,
            secrets.randbits(60),
            os.getpid(),
            CONFIG.kv_blocks,
            BLOCK_SIZE * 4,
            "toy",
        )
        transports = make_transports(names, "127.0.0.1")
        nodes.append(Node(name, role, arena=arena, transports=transports))
    async with running(*nodes) as client:
        for i in range(4):
            await client.hand_over(request(f"r{i}", num_prompt_tokens=10 + 9 * i), *nodes)
        for i in range(4):
            await client.check(request(f"r{i}", num_prompt_tokens=10 + 9 * i))
        counters = nodes[1].parts.decode.counters
        assert counters.num_handoffs == 4
        assert set(counters.num_pulls) == {names[0]}


FAULTS = [fault for fault in Fault if fault is not Fault.NONE]


async def test_another_layout_is_recomputed() -> None:
    prefill, decode = Node("p", layout="other"), Node("d")
    async with running(prefill, decode) as client:
        one = request()
        await client.hand_over(one, prefill, decode)
        await client.check(one)
        assert decode.parts.decode.counters.num_recomputed == 1
        await prefill.idle()


@pytest.mark.parametrize("greedy", [True, False])
async def test_sampling_and_prompt_logprobs_are_reported_once_by_each_side(greedy: bool) -> None:
    prefill, decode = pair(script=[Fault.CORRUPT])
    async with running(prefill, decode) as client:
        sampling = {"prompt_logprobs": 1, "temperature": 0.0 if greedy else 1.0}
        for name in ("recomputed", "pulled"):
            one = request(name, sampling=sampling)
            await client.hand_over(one, prefill, decode)
            await client.check(one)
            outputs = [o for o in client.of(name) if o.prompt_logprobs]
            assert all(len(o.prompt_logprobs) == 21 for o in outputs)
            assert {o.prompt_logprobs for o in outputs} == {outputs[0].prompt_logprobs}
            assert {o.index for o in outputs} == {0}


async def test_the_end_at_token_0_needs_no_handoff() -> None:
    prefill, decode = pair()
    first = plain(request())[0][0]
    async with running(prefill, decode) as client:
        one = request(sampling={"stop_token_ids": (first,)})
        await client.hand_over(one, prefill, decode)
        end = await client.ended("r")
        assert (end.finish_reason, end.token_ids) == (FinishReason.STOP, (first,))
        await prefill.idle()
        await decode.idle()
        assert decode.parts.decode.counters.num_recomputed == 0
        assert {name for name, _ in client.outputs} == {"p"}


async def test_the_end_at_token_0_is_told_to_a_decode_side_that_asks_late() -> None:
    prefill, decode = pair()
    first = plain(request())[0][0]
    async with running(prefill, decode) as client:
        one = request(sampling={"stop_token_ids": (first,)})
        await client.submit(one, Part.PREFILL, prefill)
        await client.ended("r")
        await client.submit(one, Part.DECODE, decode, prefill)
        await decode.idle()
        assert decode.parts.decode.counters.num_recomputed == 0
        assert {name for name, _ in client.outputs} == {"p"}


async def test_token_0_that_ends_the_request_only_on_the_decode_side() -> None:
    """Its engine may have a shorter limit: it says the end with a message without tokens."""
    prefill, decode = pair()
    decode.engine.max_model_len = 23
    async with running(prefill, decode) as client:
        one = request()
        await client.hand_over(one, prefill, decode)
        end = await client.ended("r")
        assert (end.token_ids, end.index, end.finish_reason) == ((), 1, FinishReason.LENGTH)
        assert client.tokens("r") == plain(one)[0][:1]
        await prefill.idle()
        await decode.idle()


async def test_a_replay_goes_on_after_the_tokens_it_has() -> None:
    prefill, decode = pair()
    async with running(prefill, decode) as client:
        tokens = plain(request())[0]
        one = request(attempt=3, output_ids=tuple(tokens[:5]))
        await client.hand_over(one, prefill, decode)
        await client.check(one)
        assert min(o.index for o in client.of("r", 3)) == 5


async def test_prefill_first_and_decode_later() -> None:
    prefill, decode = pair()
    async with running(prefill, decode) as client:
        one = request()
        await client.submit(one, Part.PREFILL, prefill)
        await until(lambda: prefill.parts.prefill.num_leases == 1)
        await client.submit(one, Part.DECODE, decode, prefill)
        await client.check(one)
        assert decode.parts.decode.counters.num_handoffs == 1
        await prefill.idle()


async def test_decode_that_waits_for_blocks_keeps_the_lease() -> None:
    handoff = HandoffConfig(lease_s=0.3, pull_timeout_s=2.0)
    prefill = Node("p", Role.PREFILL, handoff=handoff)
    small = dataclasses.replace(CONFIG, num_blocks=16)
    decode = Node("d", handoff=handoff, config=small)
    async with running(prefill, decode) as client:
        big = request("big", num_prompt_tokens=40, sampling={"max_tokens": 20})
        decode.runner.gate.clear()
        await client.submit(big, Part.WHOLE, decode)
        await until(lambda: bool(decode.runner.started))
        late = request("late", num_prompt_tokens=40)
        await client.hand_over(late, prefill, decode)
        await until(lambda: prefill.parts.prefill.num_leases == 1)
        await asyncio.sleep(0.9)  # three leases
        assert prefill.parts.prefill.num_leases == 1
        decode.runner.gate.set()
        await client.check(big)
        await client.check(late)
        assert decode.parts.decode.counters.num_handoffs == 1
        assert prefill.parts.prefill.counters.num_expired_leases == 0
        await prefill.idle()


async def test_prefill_under_memory_pressure_publishes_again_what_moved() -> None:
    small = dataclasses.replace(CONFIG, num_blocks=14, enable_prefix_cache=False)
    prefill, decode = Node("p", config=small), Node("d")
    async with running(prefill, decode) as client:
        rivals = [
            request(f"rival{i}", num_prompt_tokens=9, sampling={"max_tokens": 30}, priority=1)
            for i in range(2)
        ]
        for rival in rivals:
            await client.submit(rival, Part.WHOLE, prefill)
        ones = [request(f"one{i}", num_prompt_tokens=20 + 8 * i) for i in range(3)]
        for one in ones:
            await client.hand_over(one, prefill, decode)
        for item in (*rivals, *ones):
            await client.check(item)
        await prefill.idle()
        await decode.idle()


async def test_many_at_once() -> None:
    nodes = [Node("p0"), Node("p1"), Node("d0"), Node("d1", script=FAULTS)]
    async with running(*nodes) as client:
        ones = [
            request(f"r{i}", num_prompt_tokens=3 + 7 * i % 60, sampling={"max_tokens": 2 + i % 20})
            for i in range(24)
        ]
        await asyncio.gather(
            *(
                client.hand_over(one, nodes[i % 2], nodes[2 + i // 2 % 2])
                for i, one in enumerate(ones)
            )
        )
        for one in ones:
            await client.check(one)
        for node in nodes:
            await node.idle()


async def test_one_message_per_step_and_gateway() -> None:
    node = Node("m")
    async with running(node) as client:
        node.runner.gate.clear()
        ones = [request(f"r{i}", num_prompt_tokens=2) for i in range(4)]
        for one in ones:
            await client.submit(one, Part.WHOLE, node)
        node.runner.gate.set()
        for one in ones:
            await client.check(one)
        assert client.num_messages <= node.parts.loop.counters.num_steps


async def test_submissions_that_make_no_sense_are_refused_and_leave_nothing() -> None:
    prefill, decode = pair()
    async with running(prefill, decode) as client:
        wrong_role = await client.submit(request("a"), Part.PREFILL, decode)
        assert wrong_role.error.code == "refused"
        no_prefill = await client.submit(request("b"), Part.DECODE, decode)
        assert no_prefill.error.code == "invalid_request"
        too_long = request("c", num_prompt_tokens=120)
        assert (await client.submit(too_long, Part.PREFILL, prefill)).error.param == "prompt"
        stranger = request("d", gateway_id="nobody")
        assert (await client.submit(stranger, Part.PREFILL, prefill)).error.code == "refused"
        foreign = request("g", prompt_ids=(1, 2, 23))
        assert (await client.submit(foreign, Part.PREFILL, prefill)).error.param == "prompt"
        prefill.instance.incarnation = 2
        assert (await client.submit(request("e"), Part.PREFILL, prefill)).error.code == "fenced"
        record = instance_pb2.SubmissionRecord(request_id="f")
        batch = instance_pb2.SubmitBatch(
            items=[instance_pb2.SubmitItem(submission=record, part="whole", incarnation=2)]
        )
        reply = await client.stub(prefill).Submit(batch)
        assert reply.replies[0].error.code == "invalid_request"
        assert prefill.instance.counters.num_submitted == 0
        await prefill.idle()


async def test_a_second_client_is_not_disturbed() -> None:
    prefill, decode = pair()
    async with running(prefill, decode) as client:
        other = Client("h")
        await other.connect(prefill, decode)
        mine = request("mine", sampling={"max_tokens": 40})
        theirs = request("theirs", gateway_id="h", sampling={"max_tokens": 40})
        await client.hand_over(mine, prefill, decode)
        await other.hand_over(theirs, prefill, decode)
        await other.drop(decode)
        await other.drop(prefill)
        await client.check(mine)
        assert not client.of("theirs")
        await prefill.idle()
        await decode.idle()
        await other.close()
