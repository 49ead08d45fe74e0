"""Decode bound when prefill is done: only then is an instance asked to decode."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest_asyncio

from baton.client import generate_request
from baton.client.admin import AdminClient
from baton.core.cluster import Role
from baton.core.request import Part
from protos.baton.v1 import cluster_pb2
from tests.gateway.gateway_support import ToyInstance, until
from tests.gateway.toy_cluster import PROMPT, Toy, expected, joined, toy_cluster

POLICIES = "tests.gateway.late_policies"


@pytest_asyncio.fixture
async def late(tmp_path: Path, model_dir: Path) -> AsyncIterator[Toy]:
    async with toy_cluster(tmp_path, model_dir, policy=f"{POLICIES}:GuessThenBind") as cluster:
        yield cluster


def parts(toy: Toy) -> dict[str, list[str]]:
    return {
        name: [item.part for item in instance.submitted]
        for name, instance in toy.instances.items()
        if instance.submitted
    }


async def join(toy: Toy, name: str) -> ToyInstance:
    instance = toy.instances[name] = ToyInstance(name)
    await instance.start()
    await instance.join(toy.controller.address, name.split("-")[0])
    await until(lambda: toy.controller.shell.core.state.instances[name].state.placeable)
    return instance


def explained(toy: Toy, request_id: str) -> cluster_pb2.ExplainResponse:
    with AdminClient(toy.controller.address) as admin:
        return admin.explain(request_id)


async def test_decode_goes_where_the_controller_says_after_prefill(late: Toy) -> None:
    late.instances["prefill-0"].hold.clear()
    call = asyncio.create_task(late.generate(request_id="mine"))
    await until(lambda: bool(late.instances["prefill-0"].submitted))
    assert parts(late) == {"prefill-0": [Part.PREFILL]}, "nobody decodes yet"
    late.instances["prefill-0"].hold.set()
    assert joined(await call) == expected()
    assert parts(late) == {"prefill-0": [Part.PREFILL], "decode-1": [Part.DECODE]}
    item = late.instances["decode-1"].submitted[0]
    assert item.prefill_instance_id == "prefill-0"
    assert not item.submission.output_ids, "it begins where prefill began"
    await late.idle()
    await until(lambda: not late.controller.shell.core.state.open)
    view = late.controller.shell.core.state.columns.view
    assert not view.open_decode.any()
    answer = await asyncio.to_thread(explained, late, "mine")
    attempt = answer.attempts[0]
    assert (attempt.prefill_instance, attempt.decode_instance) == ("prefill-0", "decode-1")
    assert "after prefill" in attempt.reason
    stages = [stage.stage for stage in attempt.stages]
    assert stages.index("first_token") < stages.index("bound")


async def test_one_token_needs_nobody_to_decode(late: Toy) -> None:
    assert joined(await late.generate(max_tokens=1)) == expected(1)
    assert parts(late) == {"prefill-0": [Part.WHOLE]}


async def test_what_ends_at_its_first_token_is_not_bound(late: Toy) -> None:
    chunks = await late.generate(stop_token_ids=[expected(1)[0]])
    assert joined(chunks) == expected(1)
    assert parts(late) == {"prefill-0": [Part.PREFILL]}


async def test_the_guess_will_do_while_the_controller_is_away(late: Toy) -> None:
    late.instances["prefill-0"].hold.clear()
    stream = late.grpc.generate(generate_request(PROMPT, max_tokens=20, seed=3, ignore_eos=True))
    first = asyncio.create_task(anext(stream))
    await until(lambda: bool(late.instances["prefill-0"].submitted))
    await late.controller.stop()
    late.instances["prefill-0"].hold.set()
    chunk = await first
    assert not late.instances["decode-0"].submitted, "the first token did not wait for an answer"
    assert joined([chunk, *[more async for more in stream]]) == expected()
    assert parts(late) == {"prefill-0": [Part.PREFILL], "decode-0": [Part.DECODE]}
    assert await late.metric('baton_replays_total{reason="gap"}') == 0


async def test_the_guess_takes_over_from_one_that_refuses(late: Toy) -> None:
    late.instances["decode-1"].refuse = True
    assert joined(await late.generate()) == expected()
    assert parts(late) == {"prefill-0": [Part.PREFILL], "decode-0": [Part.DECODE]}


async def test_nobody_decodes_it_and_prefill_is_repeated_elsewhere(late: Toy) -> None:
    for instance in late.decode:
        instance.refuse = True
    call = asyncio.create_task(late.generate())
    await until(lambda: bool(late.instances["prefill-0"].aborted))
    await join(late, "decode-2")
    assert joined(await call) == expected()
    await late.idle()


async def test_prefill_dies_before_anybody_decodes(late: Toy) -> None:
    prefill = late.instances["prefill-0"]
    prefill.hold.clear()
    call = asyncio.create_task(late.generate())
    await until(lambda: bool(prefill.submitted))
    await join(late, "prefill-1")
    await prefill.stop()
    assert joined(await call) == expected()
    assert await late.metric('baton_replays_total{reason="instance_lost"}') == 1


async def test_prefill_dies_after_decode_was_bound(late: Toy) -> None:
    decode = late.instances["decode-1"]
    decode.step_s = 0.02
    call = asyncio.create_task(late.generate())
    await until(lambda: bool(decode.submitted))
    await late.instances["prefill-0"].stop()
    assert joined(await call) == expected()
    assert await late.metric('baton_replays_total{reason="instance_lost"}') == 0


async def test_a_bound_instance_that_stays_silent_is_replayed(late: Toy) -> None:
    frozen = late.instances["decode-1"]
    frozen.hold.clear()
    assert joined(await late.generate()) == expected()
    assert parts(late)["decode-1"] == [Part.DECODE]
    assert await late.metric('baton_replays_total{reason="gap"}') == 1
    frozen.hold.set()
    await late.idle()


async def test_a_client_that_leaves_before_the_binding_leaves_nothing(late: Toy) -> None:
    prefill = late.instances["prefill-0"]
    prefill.hold.clear()
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 9}
    async with httpx.AsyncClient(base_url=late.http.base_url) as client:
        call = asyncio.create_task(client.post("/v1/completions", json=body))
        await until(lambda: bool(prefill.submitted))
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
    await late.idle()
    assert parts(late) == {"prefill-0": [Part.PREFILL]}


async def test_decode_stays_where_the_prompt_is(tmp_path: Path, model_dir: Path) -> None:
    async with toy_cluster(tmp_path, model_dir, policy=f"{POLICIES}:GuessThenStay") as toy:
        prefill = toy.instances["prefill-0"]
        prefill.hold.clear()
        call = asyncio.create_task(toy.generate(request_id="mine"))
        await until(lambda: bool(prefill.submitted))
        state = toy.controller.shell.core.state
        state.set_role(state.instances["prefill-0"], Role.MIXED)
        prefill.hold.set()
        assert joined(await call) == expected()
        assert parts(toy) == {"prefill-0": [Part.PREFILL, Part.WHOLE]}
        first, second = (item.submission for item in prefill.submitted)
        assert (first.attempt, second.attempt) == (0, 1)
        assert list(second.output_ids) == expected(1)
        await toy.idle()
        await until(lambda: not toy.controller.shell.core.state.open)
        answer = await asyncio.to_thread(explained, toy, "mine")
        assert answer.attempts[0].decode_instance == "prefill-0"
