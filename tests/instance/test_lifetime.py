"""However a request ends, and wherever it stands then, nothing of it is left."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from baton.core.config import HandoffConfig
from baton.core.request import FinishReason, Part
from kvpool.transports.faulty import Fault
from tests.instance.instance_kit import CONFIG, Client, Node, pair, plain, request, running, until

LONG = {"max_tokens": 80}
STALLED = HandoffConfig(lease_s=20.0, pull_timeout_s=0.4)


async def test_abort_while_prefill_waits_and_computes() -> None:
    prefill, decode = pair()
    async with running(prefill, decode) as client:
        prefill.runner.gate.clear()
        ones = [request(f"r{i}", num_prompt_tokens=60) for i in range(3)]
        for one in ones:
            await client.hand_over(one, prefill, decode)
        await until(lambda: bool(prefill.runner.started))
        for one in ones:
            await client.abort(one.request_id, 0, prefill, decode)
        assert prefill.instance.num_open == decode.instance.num_open == 0
        prefill.runner.gate.set()
        await prefill.idle()
        await decode.idle()
        assert not client.outputs


async def test_abort_on_the_prefill_side_first_does_not_start_a_recomputation() -> None:
    prefill, decode = pair()
    async with running(prefill, decode) as client:
        prefill.runner.gate.clear()
        await client.hand_over(request(num_prompt_tokens=60), prefill, decode)
        await until(lambda: bool(prefill.runner.started))
        await client.abort("r", 0, prefill)
        await decode.idle()
        assert decode.parts.decode.counters.num_recomputed == 0
        assert not decode.runner.started
        prefill.runner.gate.set()


async def test_abort_of_a_held_prefill() -> None:
    prefill, decode = pair()
    async with running(prefill, decode) as client:
        await client.submit(request(), Part.PREFILL, prefill)
        await until(lambda: prefill.parts.prefill.num_leases == 1)
        await client.abort("r", 0, prefill)
        await prefill.idle()


async def test_abort_while_decode_waits_for_blocks() -> None:
    decode = Node("d", config=dataclasses.replace(CONFIG, num_blocks=16))
    prefill = Node("p")
    async with running(prefill, decode) as client:
        decode.runner.gate.clear()
        big = request("big", num_prompt_tokens=40)
        await client.submit(big, Part.WHOLE, decode)
        await until(lambda: bool(decode.runner.started))
        await client.hand_over(request("late", num_prompt_tokens=30), prefill, decode)
        assert decode.engine.load().num_pending_kv == 1
        await client.abort("late", 0, decode)
        assert decode.engine.load().num_pending_kv == 0
        await prefill.idle()  # the prefill side was told, and lets go at token 0
        decode.runner.gate.set()
        await client.check(big)


async def test_abort_while_a_pull_runs_keeps_its_blocks_until_it_ends() -> None:
    prefill, decode = pair(script=[Fault.STALL], handoff=STALLED)
    async with running(prefill, decode) as client:
        await client.hand_over(request(), prefill, decode)
        await until(lambda: bool(decode.parts.decode._running))
        await client.abort("r", 0, decode, prefill)
        assert decode.instance.num_open == 0
        assert decode.engine.block_statistics().num_referenced == 6
        num_emptied = decode.num_emptied
        await decode.idle()
        assert decode.num_emptied > num_emptied, "the controller learns that it is empty now"
        await prefill.idle()


async def test_a_new_attempt_runs_while_the_old_ones_pull_still_does() -> None:
    prefill, decode = pair(script=[Fault.STALL], handoff=STALLED)
    async with running(prefill, decode) as client:
        await client.hand_over(request(), prefill, decode)
        await until(lambda: bool(decode.parts.decode._running))
        again = request(attempt=1)
        await client.hand_over(again, prefill, decode)
        await client.check(again)
        assert client.end("r") is None
        await decode.idle()
        await prefill.idle()


async def test_abort_while_decoding() -> None:
    prefill, decode = pair()
    async with running(prefill, decode) as client:
        await client.hand_over(request(sampling=LONG), prefill, decode)
        await until(lambda: len(client.of("r")) > 4)
        decode.runner.gate.clear()
        await client.abort("r", 0, prefill, decode)
        decode.runner.gate.set()
        await decode.idle()
        assert client.end("r") is None


async def test_an_abort_that_overtakes_its_submission() -> None:
    node = Node("m")
    async with running(node) as client:
        await client.abort("r", 1, node)
        for attempt in (0, 1):
            reply = await client.submit(request(attempt=attempt), Part.WHOLE, node)
            assert reply.error.code == "fenced"
        newer = request(attempt=2)
        assert not (await client.submit(newer, Part.WHOLE, node)).HasField("error")
        assert (await client.submit(request(attempt=1), Part.WHOLE, node)).HasField("error")
        await client.check(newer)


async def test_a_repeated_submission_runs_once() -> None:
    node = Node("m")
    async with running(node) as client:
        node.runner.gate.clear()
        for _ in range(3):
            reply = await client.submit(request(), Part.WHOLE, node)
            assert not reply.HasField("error")
        assert node.instance.num_open == node.instance.counters.num_submitted == 1
        node.runner.gate.set()
        await client.check(request())


@pytest.mark.parametrize("part", [Part.PREFILL, Part.WHOLE])
async def test_the_deadline_of_work_that_waits(part: Part) -> None:
    node = Node("m")
    async with running(node) as client:
        node.runner.gate.clear()
        await client.submit(request(budget_s=0.1), part, node)
        end = await client.ended("r")
        assert (end.finish_reason, end.error_code) == (FinishReason.ERROR, "deadline_exceeded")
        assert (end.index, end.token_ids) == (0, ())
        node.runner.gate.set()
        await node.idle()


async def test_the_deadline_of_a_held_prefill_says_nothing() -> None:
    prefill, decode = pair()
    async with running(prefill, decode) as client:
        await client.submit(request(budget_s=0.2), Part.PREFILL, prefill)
        await until(lambda: prefill.parts.prefill.num_leases == 1)
        await prefill.idle()
        assert client.end("r") is None
        assert prefill.instance.counters.num_failed == 0


async def test_the_deadline_while_a_pull_runs() -> None:
    prefill, decode = pair(script=[Fault.STALL], handoff=STALLED)
    async with running(prefill, decode) as client:
        await client.hand_over(request(budget_s=0.2), prefill, decode)
        end = await client.ended("r")
        assert end.error_code == "deadline_exceeded"
        await decode.idle()
        await prefill.idle()


async def test_a_gateway_that_goes_away_takes_its_requests_along() -> None:
    prefill, decode = pair()
    async with running(prefill, decode) as client:
        decode.runner.gate.clear()
        for i in range(3):
            await client.hand_over(request(f"r{i}", sampling=LONG), prefill, decode)
        await client.submit(request("held"), Part.PREFILL, prefill)
        await client.drop(decode)
        await client.drop(prefill)
        decode.runner.gate.set()
        await prefill.idle()
        await decode.idle()
        reply = await client.submit(request("late"), Part.PREFILL, prefill)
        assert reply.error.code == "refused"


async def test_a_gateway_that_lost_prefill_only_gets_its_tokens_from_decode() -> None:
    prefill, decode = pair()
    async with running(prefill, decode) as client:
        prefill.runner.gate.clear()
        one = request(num_prompt_tokens=60)
        await client.hand_over(one, prefill, decode)
        await until(lambda: bool(prefill.runner.started))
        await client.drop(prefill)
        prefill.runner.gate.set()
        await client.check(one)
        assert decode.parts.decode.counters.num_recomputed == 1


async def test_a_gateway_that_comes_back_goes_on_over_its_new_stream() -> None:
    node = Node("m")
    async with running(node) as client:
        node.runner.gate.clear()
        await client.submit(request(), Part.WHOLE, node)
        newer = Client()
        await newer.connect(node)
        node.runner.gate.set()
        await newer.check(request())
        assert not client.of("r")
        await newer.close()


@pytest.mark.parametrize("after_chunk", [False, True])
async def test_prefill_that_dies_is_replaced_by_recomputation(after_chunk: bool) -> None:
    prefill, decode = pair(config=dataclasses.replace(CONFIG, async_scheduling=False))
    async with running(prefill, decode) as client:
        prefill.runner.gate.clear()
        one = request(num_prompt_tokens=60)
        await client.hand_over(one, prefill, decode)
        await until(lambda: len(prefill.runner.started) == 1)
        if after_chunk:
            prefill.runner.fails = lambda plan: not prefill.runner.gate.is_set()
            prefill.runner.gate.set()
            await until(lambda: decode.parts.decode.counters.num_pulled_blocks >= 4)
        await prefill.kill()
        await client.check(one)
        assert decode.parts.decode.num_pulls_open == 0
        prefill.runner.gate.set()


async def test_decode_that_dies_leaves_prefill_with_a_short_lease(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("prefill_worker.worker._ORPHAN_LEASE_S", 0.1)
    prefill, decode = pair(script=[Fault.STALL])
    async with running(prefill, decode) as client:
        await client.hand_over(request(), prefill, decode)
        await until(lambda: prefill.parts.prefill.num_leases == 1)
        # Only of a decode side that has asked can prefill see that it died.
        await until(lambda: decode.held()["running_pulls"] == 1)
        await decode.parts.decode.stop()
        await prefill.idle()
        assert prefill.parts.prefill.counters.num_expired_leases == 1
        assert client.tokens("r")[:1] == plain(request())[0][:1]


async def test_a_step_that_fails_ends_only_its_requests() -> None:
    node = Node("m", config=dataclasses.replace(CONFIG, max_num_seqs=2))
    async with running(node) as client:
        node.runner.gate.clear()
        ones = [request(f"r{i}", num_prompt_tokens=16) for i in range(3)]
        for one in ones:
            await client.submit(one, Part.WHOLE, node)
        node.runner.fails = lambda plan: plan.step == 0
        node.runner.gate.set()
        end = await client.ended("r0")
        assert (end.finish_reason, end.error_code) == (FinishReason.ERROR, "instance_lost")
        assert "scripted" in (end.error_message or "")
        await client.check(ones[1])
        await client.check(ones[2])
        assert node.parts.loop.counters.num_failed_steps == 1
        await node.idle()


async def test_a_failed_prefill_step_is_recomputed_by_decode() -> None:
    prefill, decode = pair()
    async with running(prefill, decode) as client:
        prefill.runner.fails = lambda plan: plan.step == 1
        one = request(num_prompt_tokens=60)
        await client.hand_over(one, prefill, decode)
        await until(lambda: any(o.finish_reason is FinishReason.LENGTH for o in client.of("r")))
        assert client.tokens("r") == plain(one)[0]
        await prefill.idle()


async def test_stop_in_the_middle_of_everything() -> None:
    prefill, decode = pair(script=[Fault.NONE, Fault.STALL, Fault.STALL], handoff=STALLED)
    async with running(prefill, decode) as client:
        for i in range(8):
            await client.hand_over(request(f"r{i}", sampling=LONG), prefill, decode)
        await asyncio.sleep(0.05)
    assert not [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
