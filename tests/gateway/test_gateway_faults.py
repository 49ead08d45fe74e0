"""What breaks: instances, streams, the controller, clients that go away."""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path

import grpc
import grpc.aio
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.client import AsyncBatonClient, GenerateChunk, generate_request
from baton.client.admin import AdminClient
from baton.core.errors import BatonError, Code, InstanceLost, InvalidRequest
from baton.gateway.server import STOP_GRACE_S, GatewayServer
from tests.gateway.gateway_support import ToyInstance, until
from tests.gateway.toy_cluster import PROMPT, Toy, controller_service, expected, joined


@pytest.mark.parametrize("die_after", [1, 5, 18])
async def test_decode_instance_dies(toy: Toy, die_after: int) -> None:
    for instance in toy.decode:
        instance.step_s = 0.01
    # Whoever gets the request dies; the other one must not.
    toy.decode[0].die_after = die_after
    results = await asyncio.gather(*(toy.generate() for _ in range(6)))
    assert [joined(chunks) for chunks in results] == [expected()] * 6
    assert all(chunks[-1].finish_reason == "length" for chunks in results)
    assert await toy.metric('baton_replays_total{reason="instance_lost"}') >= 1
    assert await toy.metric("baton_requests_open") == 0


async def test_nobody_takes_over(toy: Toy) -> None:
    for instance in toy.decode:
        instance.step_s = 0.01
        instance.die_after = 5
    started = asyncio.get_running_loop().time()
    chunks: list[GenerateChunk] = []

    async def collect() -> None:
        async for chunk in toy.grpc.generate(generate_request(PROMPT, max_tokens=50, seed=3)):
            chunks.append(chunk)

    with pytest.raises(InstanceLost) as caught:
        await collect()
    assert caught.value.retryable
    assert joined(chunks) == expected(len(joined(chunks)))
    assert asyncio.get_running_loop().time() - started < 8


async def test_stream_tells_the_error_as_its_last_event(toy: Toy) -> None:
    for instance in toy.decode:
        instance.step_s = 0.01
        instance.die_after = 5
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 50, "stream": True}
    answer = await toy.http.post("/v1/completions", json=body)
    assert answer.status_code == 200
    last = [block for block in answer.text.split("\n\n") if block][-1]
    error = json.loads(last.removeprefix("data: "))["error"]
    assert (error["code"], error["type"]) == ("instance_lost", "service_unavailable_error")


async def test_a_lying_instance_is_replayed(toy: Toy) -> None:
    for instance in toy.decode:
        instance.lie_at = 0
    # Prefill must speak first, so that the lie is told later.
    for instance in toy.decode:
        instance.step_s = 0.02
    assert joined(await toy.generate()) == expected()
    assert await toy.metric('baton_replays_total{reason="mismatch"}') >= 1


async def test_prefill_dies_and_decode_goes_on(toy: Toy) -> None:
    for instance in toy.decode:
        instance.step_s = 0.02
    request = generate_request(PROMPT, max_tokens=20, seed=3, ignore_eos=True)
    stream = toy.grpc.generate(request)
    first = await anext(stream)
    await toy.instances["prefill-0"].stop()
    assert joined([first, *[chunk async for chunk in stream]]) == expected()
    assert await toy.metric('baton_replays_total{reason="instance_lost"}') == 0


async def test_refused_submits_go_elsewhere(toy: Toy) -> None:
    toy.decode[0].refuse = True
    results = await asyncio.gather(*(toy.generate() for _ in range(8)))
    assert [joined(chunks) for chunks in results] == [expected()] * 8
    assert not toy.decode[0].submitted
    await toy.idle()


async def test_silence_is_replayed_within_the_gap(toy: Toy) -> None:
    frozen = toy.decode[0]
    frozen.hold.clear()
    results = await asyncio.gather(*(toy.generate() for _ in range(4)))
    assert [joined(chunks) for chunks in results] == [expected()] * 4
    frozen.hold.set()
    await toy.idle()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("produced", [False, True])
async def test_disconnect_ends_the_work(toy: Toy, stream: bool, produced: bool) -> None:
    for instance in toy.instances.values():
        instance.step_s = 0.02
        if not produced:
            instance.hold.clear()
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 200, "stream": stream}
    async with httpx.AsyncClient(base_url=toy.http.base_url) as client:
        call = asyncio.create_task(client.post("/v1/completions", json=body))
        await until(lambda: any(item.open for item in toy.decode))
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
    await toy.idle()
    assert all(instance.aborted for instance in toy.decode if instance.submitted)
    assert await toy.metric('baton_aborts_total{reason="disconnect"}') == 1


async def test_who_leaves_the_queue_is_never_placed(toy: Toy) -> None:
    for instance in toy.decode:
        await instance.stop()
    core = toy.controller.shell.core
    await until(lambda: not core.state.ready)
    stays = asyncio.create_task(toy.generate(prompt=[1], max_tokens=2))
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 9}
    async with httpx.AsyncClient(base_url=toy.http.base_url) as client:
        leaves = asyncio.create_task(client.post("/v1/completions", json=body))
        await until(lambda: core.placements.num_queued == 2)
        leaves.cancel()
        await asyncio.gather(leaves, return_exceptions=True)
    await until(lambda: core.placements.num_queued == 1)
    late = toy.instances["decode-2"] = ToyInstance("decode-2")
    await late.start()
    await late.join(toy.controller.address, "decode")
    assert joined(await stays) == expected(2, prompt=[1])
    assert len(late.submitted) == 1
    await until(lambda: not core.state.open)


async def test_grpc_cancel_abort_and_deadline_end_the_work(toy: Toy) -> None:
    for instance in toy.instances.values():
        instance.step_s = 0.02
    request = generate_request(PROMPT, max_tokens=200, request_id="long")
    stream = toy.grpc.generate(request)
    await anext(stream)
    with pytest.raises(InvalidRequest, match="still open"):
        await anext(toy.grpc.generate(request))
    await stream.aclose()
    await toy.idle()

    stream = toy.grpc.generate(request)
    await anext(stream)
    await toy.grpc.abort("long")
    with pytest.raises(BatonError) as caught:
        async for _ in stream:
            pass
    assert caught.value.code is Code.ABORTED
    await toy.idle()

    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 200, "timeout": 0.2}
    answer = await toy.http.post("/v1/completions", json=body)
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "deadline_exceeded"
    await toy.idle()


async def test_controller_away_streams_go_on_and_new_requests_wait(
    toy: Toy, tmp_path: Path
) -> None:
    for instance in toy.instances.values():
        instance.step_s = 0.02
    running = asyncio.create_task(toy.generate(max_tokens=60))
    await until(lambda: any(item.submitted for item in toy.decode))
    port = int(toy.controller.address.rsplit(":", 1)[1])
    await toy.controller.stop()
    waiting = asyncio.create_task(toy.generate(prompt=[9]))
    assert joined(await running) == expected(60)
    toy.controller = controller_service(tmp_path, port)
    await toy.controller.start()
    for instance in toy.instances.values():
        await instance.join(toy.controller.address, instance.name.split("-")[0])
    assert joined(await waiting) == expected(20, prompt=[9])


async def test_cancel_storm_leaves_nothing(toy: Toy) -> None:
    for instance in toy.instances.values():
        instance.step_s = 0.005

    async def one(number: int) -> None:
        stream = toy.grpc.generate(generate_request([5, 6, number], max_tokens=100))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.002 * (number % 50)):
                async for _ in stream:
                    pass
        await stream.aclose()

    await asyncio.gather(*(one(number) for number in range(100)))
    await toy.idle()


async def test_who_leaves_at_the_last_token_is_settled_too(toy: Toy) -> None:
    """The request has ended by itself, and is cancelled while its end is settled."""
    names = [f"last-{number}" for number in range(60)]
    for name in names:
        async with AsyncBatonClient(toy.gateway.addresses.grpc) as client:
            request = generate_request(PROMPT, request_id=name, max_tokens=1, ignore_eos=True)
            async with contextlib.aclosing(client.generate(request)) as chunks:
                await anext(chunks)
    await toy.idle()
    with AdminClient(toy.controller.address) as admin:
        async with asyncio.timeout(5):
            for name in names:
                while (told := await asyncio.to_thread(admin.explain, name)).outcome == "open":
                    await asyncio.sleep(0.01)
                assert told.outcome in ("length", "abort")


async def test_stop_ends_open_requests_with_a_retryable_error(toy: Toy) -> None:
    for instance in toy.instances.values():
        instance.step_s = 0.02
    running = asyncio.create_task(toy.generate(max_tokens=200))
    await until(lambda: any(item.submitted for item in toy.decode))
    await toy.gateway.stop()
    with pytest.raises(BatonError) as caught:
        await running
    assert caught.value.retryable
    await until(lambda: not any(item.open for item in toy.instances.values()))
    # The fixture stops it again: that must be harmless.


async def test_a_watched_gateway_stops_at_once(toy: Toy) -> None:
    async with grpc.aio.insecure_channel(toy.gateway.addresses.grpc) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        async with asyncio.timeout(STOP_GRACE_S):
            await toy.gateway.stop()
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert await watch.read() is grpc.aio.EOF  # type: ignore[attr-defined]
        assert await watch.code() is grpc.StatusCode.OK


async def test_a_gateway_that_comes_back_is_another_to_instances(toy: Toy) -> None:
    await toy.generate()
    await toy.gateway.stop()
    again = GatewayServer(toy.settings)
    addresses = await again.start()
    async with AsyncBatonClient(addresses.grpc) as client:
        request = generate_request(PROMPT, max_tokens=20, seed=3, ignore_eos=True)
        assert joined([chunk async for chunk in client.generate(request)]) == expected()
    await again.stop()
    lives = {
        item.submission.gateway_id
        for instance in toy.instances.values()
        for item in instance.submitted
    }
    assert len(lives) == 2
    assert all(life.startswith("gw-0-") for life in lives)


async def test_a_broken_stream_of_a_living_instance_is_replayed(toy: Toy) -> None:
    for instance in toy.decode:
        instance.step_s = 0.02
    running = [asyncio.create_task(toy.generate(request_id=f"r{i}")) for i in range(4)]
    await until(lambda: all(item.submitted for item in toy.decode))
    toy.decode[0].break_streams()
    assert [joined(await run) for run in running] == [expected()] * 4
    assert await toy.metric('baton_replays_total{reason="instance_lost"}') >= 1
    # The old attempt still ran there: it was told to stop.
    assert {attempt for _, attempt in toy.decode[0].aborted} == {0}
    await toy.idle()
