"""The gateway with a real controller and instances that speak the protocol (a toy model)."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import openai
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.client import AdminClient, AsyncBatonClient, BatonClient, GenerateChunk, generate_request
from baton.core.config import ControllerConfig, GatewayConfig
from baton.core.errors import BatonError, Code, InstanceLost, InvalidRequest
from baton.core.request import Part
from baton.gateway.server import GatewayServer
from baton.gateway.settings import GatewaySettings
from baton.gateway.tokenizer import GatewayTokenizer
from controller.service import ControllerService
from controller.store_memory import MemoryStore
from tests.gateway.gateway_support import CONTEXT, ToyInstance, token_at, tokens_of, until

PROMPT = [5, 6, 7, 8]


@dataclasses.dataclass
class Toy:
    controller: ControllerService
    gateway: GatewayServer
    instances: dict[str, ToyInstance]
    http: httpx.AsyncClient
    grpc: AsyncBatonClient
    settings: GatewaySettings

    @property
    def decode(self) -> list[ToyInstance]:
        return [item for name, item in self.instances.items() if name.startswith("decode")]

    async def generate(self, **fields: Any) -> list[GenerateChunk]:
        values = {"max_tokens": 20, "seed": 3, "ignore_eos": True, **fields}
        prompt = values.pop("prompt", PROMPT)
        return [chunk async for chunk in self.grpc.generate(generate_request(prompt, **values))]

    async def metric(self, line: str) -> float:
        text = (await self.http.get("/metrics")).text
        return next(float(x.rsplit(" ", 1)[1]) for x in text.splitlines() if x.startswith(line))

    async def idle(self) -> None:
        """Nothing runs anywhere."""
        await until(lambda: not any(item.open for item in self.instances.values()))
        async with asyncio.timeout(5):
            while await self.metric("baton_requests_open"):  # noqa: ASYNC110
                await asyncio.sleep(0.01)


def expected(count: int = 20, choice: int = 0, prompt: list[int] = PROMPT) -> list[int]:
    return tokens_of(tuple(prompt), 3, count, choice)


def joined(chunks: list[GenerateChunk], choice: int = 0) -> list[int]:
    mine = [chunk for chunk in chunks if chunk.choice == choice]
    indices = [chunk.index + i for chunk in mine for i in range(len(chunk.token_ids))]
    assert indices == list(range(len(indices)))
    return [token for chunk in mine for token in chunk.token_ids]


def controller_service(tmp_path: Path, port: int = 0) -> ControllerService:
    return ControllerService(
        cluster="toy",
        host="127.0.0.1",
        port=port,
        store_url="memory",
        config=ControllerConfig(heartbeat_s=0.5, dead_after_s=1.5, queue_timeout_s=1.0),
        model="tiny",
        store=MemoryStore("toy", directory=tmp_path),
    )


@pytest_asyncio.fixture
async def toy(tmp_path: Path, model_dir: Path) -> AsyncIterator[Toy]:
    async with contextlib.AsyncExitStack() as stack:
        controller = controller_service(tmp_path)
        await controller.start()
        instances = {name: ToyInstance(name) for name in ("prefill-0", "decode-0", "decode-1")}
        for name, instance in instances.items():
            await instance.start()
            await instance.join(controller.address, name.split("-")[0])
        settings = GatewaySettings(
            model=str(model_dir),
            served_model_name="tiny",
            host="127.0.0.1",
            http_port=0,
            grpc_port=0,
            controller_address=controller.address,
            gateway_id="gw-0",
            node_id="node",
            limits=GatewayConfig(gap_timeout_s=1.0, replay_timeout_s=2.0, max_replays=3),
            place_timeout_s=5.0,
        )
        gateway = GatewayServer(settings)
        addresses = await gateway.start()
        http = await stack.enter_async_context(
            httpx.AsyncClient(base_url=f"http://{addresses.http}", timeout=20)
        )
        client = await stack.enter_async_context(AsyncBatonClient(addresses.grpc))
        made = Toy(controller, gateway, instances, http, client, settings)
        await ready(http)
        yield made
        await gateway.stop()
        for instance in instances.values():
            await instance.stop()
        await made.controller.stop()


async def ready(http: httpx.AsyncClient) -> None:
    async with asyncio.timeout(5):
        while (await http.get("/ready")).status_code != 200:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    blocks = [block for block in answer.text.split("\n\n") if block]
    assert blocks[-1] == "data: [DONE]"
    return [json.loads(block.split("data: ", 1)[1]) for block in blocks[:-1]]


async def test_tokens_come_once_from_two_instances(toy: Toy) -> None:
    chunks = await toy.generate()
    assert joined(chunks) == expected()
    last = chunks[-1]
    assert (last.finish_reason, last.prompt_tokens, last.completion_tokens) == ("length", 4, 20)
    parts = {item.part for one in toy.instances.values() for item in one.submitted}
    assert parts == {Part.PREFILL, Part.DECODE}
    await toy.idle()


async def test_one_token_needs_one_instance(toy: Toy) -> None:
    assert joined(await toy.generate(max_tokens=1)) == expected(1)
    assert [item.part for item in toy.instances["prefill-0"].submitted] == [Part.WHOLE]
    assert not any(item.submitted for item in toy.decode)


async def test_choices_differ_and_each_is_in_order(toy: Toy) -> None:
    chunks = await toy.generate(n=3)
    for choice in range(3):
        assert joined(chunks, choice) == expected(20, choice)


async def test_ready_and_health_follow_the_view(toy: Toy) -> None:
    async with grpc.aio.insecure_channel(toy.gateway.addresses.grpc) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service="baton.v1.Inference"))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        await toy.instances["prefill-0"].stop()
        async with asyncio.timeout(5):
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watch.cancel()
    answer = await toy.http.get("/ready")
    assert answer.status_code == 503
    assert "prefill" in answer.json()["error"]["message"]
    with pytest.raises(BatonError) as caught:
        await toy.generate()
    assert caught.value.retryable


async def test_http_stream_with_usage_and_token_ids(toy: Toy, tokenizer: GatewayTokenizer) -> None:
    body = {
        "model": "tiny",
        "prompt": PROMPT,
        "max_tokens": 8,
        "seed": 3,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
        "ignore_eos": True,
    }
    answer = await toy.http.post("/v1/completions", json=body, headers={"x-request-id": "r1"})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-request-id"] == "r1"
    *chunks, usage = events(answer)
    assert {chunk["id"] for chunk in chunks} == {"cmpl-r1"}
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [token for choice in choices for token in choice["token_ids"]] == expected(8)
    assert "".join(choice["text"] for choice in choices) == tokenizer.decode(expected(8))
    assert choices[0]["prompt_token_ids"] == PROMPT
    assert {choice["prompt_token_ids"] for choice in choices[1:]} == {None}
    assert [choice["finish_reason"] for choice in choices] == [None] * 7 + ["length"]
    ids = [line for line in answer.text.splitlines() if line.startswith("id: ")]
    assert ids == [f"id: {index}" for index in range(8)]
    assert usage["choices"] == []
    assert usage["usage"]["total_tokens"] == 12


async def test_completion_with_echo_and_logprobs(toy: Toy, tokenizer: GatewayTokenizer) -> None:
    body = {
        "model": "tiny",
        "prompt": "def hello",
        "max_tokens": 3,
        "seed": 3,
        "echo": True,
        "logprobs": 2,
        "ignore_eos": True,
    }
    choice = (await toy.http.post("/v1/completions", json=body)).json()["choices"][0]
    ids = tokenizer.encode("def hello")
    output = tokens_of(tuple(ids), 3, 3)
    assert choice["text"] == "def hello" + tokenizer.decode(output)
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == [tokenizer.token_text(token) for token in [*ids, *output]]
    assert logprobs["token_logprobs"] == [None] + [-0.5] * (len(ids) + 2)
    assert logprobs["text_offset"][0] == 0
    assert logprobs["top_logprobs"][0] is None
    assert len(logprobs["top_logprobs"][1]) == 2


async def test_list_of_prompts(toy: Toy) -> None:
    body = {
        "model": "tiny",
        "prompt": [[5], [6, 7]],
        "n": 2,
        "max_tokens": 4,
        "seed": 3,
        "return_token_ids": True,
        "ignore_eos": True,
    }
    answer = (await toy.http.post("/v1/completions", json=body)).json()
    got = [choice["token_ids"] for choice in answer["choices"]]
    prompts = [[5], [5], [6, 7], [6, 7]]
    assert got == [expected(4, index % 2, prompt) for index, prompt in enumerate(prompts)]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"]["prompt_tokens"] == 3


async def test_chat(toy: Toy, tokenizer: GatewayTokenizer) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    body = {
        "model": "tiny",
        "messages": messages,
        "max_tokens": 4,
        "seed": 3,
        "logprobs": True,
        "top_logprobs": 1,
        "ignore_eos": True,
    }
    ids = await tokenizer.encode_chat([{"role": "user", "content": "hi"}])
    text = tokenizer.decode(tokens_of(tuple(ids), 3, 4))
    whole = (await toy.http.post("/v1/chat/completions", json=body)).json()
    assert whole["choices"][0]["message"]["content"] == text
    assert len(whole["choices"][0]["logprobs"]["content"]) == 4
    stream = events(await toy.http.post("/v1/chat/completions", json={**body, "stream": True}))
    deltas = [chunk["choices"][0]["delta"] for chunk in stream]
    assert deltas[0]["role"] == "assistant"
    assert "".join(delta.get("content", "") for delta in deltas) == text
    assert stream[-1]["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("include", [False, True])
async def test_stop_string_ends_the_work(
    toy: Toy, tokenizer: GatewayTokenizer, include: bool
) -> None:
    for instance in toy.instances.values():
        instance.step_s = 0.01
    text = tokenizer.decode(expected())
    stop = text[3:6]
    at = text.index(stop)
    chunks = await toy.generate(stop=[stop], max_tokens=200, include_stop_str_in_output=include)
    assert "".join(chunk.text for chunk in chunks) == text[: at + 3 if include else at]
    assert (chunks[-1].finish_reason, chunks[-1].stop_reason) == ("stop", stop)
    await toy.idle()


async def test_stop_token_is_reported_and_left_out_of_the_text(
    toy: Toy, tokenizer: GatewayTokenizer
) -> None:
    stop = next(t for i, t in enumerate(expected()) if i > 2 and t not in expected()[:i])
    count = expected().index(stop) + 1
    chunks = await toy.generate(stop_token_ids=[stop])
    assert joined(chunks) == expected(count)
    assert (chunks[-1].finish_reason, chunks[-1].stop_reason) == ("stop", str(stop))
    assert "".join(chunk.text for chunk in chunks) == tokenizer.decode(expected(count - 1))


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
    run = asyncio.create_task(toy.generate())
    await until(lambda: any(item.submitted for item in toy.decode))
    await toy.instances["prefill-0"].stop()
    assert joined(await run) == expected()
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
    for instance in toy.instances.values():
        if instance.submitted and instance.name.startswith("decode"):
            assert instance.aborted
    assert await toy.metric('baton_aborts_total{reason="disconnect"}') == 1


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


async def test_explain_tells_attempts_and_stages(toy: Toy) -> None:
    await toy.generate(request_id="why", n=2)
    with AdminClient(toy.controller.address) as admin:
        async with asyncio.timeout(5):
            while (  # noqa: ASYNC110
                told := await asyncio.to_thread(admin.explain, "why")
            ).outcome == "open":
                await asyncio.sleep(0.01)
        status = await asyncio.to_thread(admin.status)
    assert told.outcome == "length"
    assert told.completion_tokens == 40
    assert {attempt.choice for attempt in told.attempts} == {0, 1}
    stages = {(mark.stage, mark.where) for mark in told.attempts[0].stages}
    for stage in ("received", "placed", "submitted", "first_token", "last_token"):
        assert (stage, "gateway") in stages
    assert ("prefill_0", "prefill-0") in stages
    members = [(m.kind, m.member_id, m.http_address) for m in status.members]
    assert ("gateway", "gw-0", toy.gateway.addresses.http) in members


async def test_the_official_client(toy: Toy, tokenizer: GatewayTokenizer) -> None:
    base_url = f"http://{toy.gateway.addresses.http}/v1"
    async with openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
        text = tokenizer.decode(expected(6, prompt=tokenizer.encode("abc")))
        whole = await client.completions.create(model="tiny", prompt="abc", max_tokens=6, seed=3)
        assert whole.choices[0].text == text
        assert whole.usage is not None
        assert whole.usage.completion_tokens == 6
        stream = await client.completions.create(
            model="tiny", prompt="abc", max_tokens=6, seed=3, stream=True
        )
        assert "".join([chunk.choices[0].text async for chunk in stream]) == text
        chat = await client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "hi"}],
            max_completion_tokens=6,
            seed=3,
            logprobs=True,
            top_logprobs=2,
        )
        answer = chat.choices[0].message.content
        pieces = await client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "hi"}],
            max_completion_tokens=6,
            seed=3,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in pieces]
        joined_text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert joined_text == answer
        assert chunks[-1].usage is not None
        assert [model.id async for model in client.models.list()] == ["tiny"]
        with pytest.raises(openai.BadRequestError) as caught:
            await client.completions.create(model="tiny", prompt="abc", max_tokens=10_000)
        assert caught.value.code == "context_length_exceeded"
        assert caught.value.param == "max_tokens"


async def test_the_synchronous_client(toy: Toy) -> None:
    def run() -> tuple[list[GenerateChunk], GenerateChunk]:
        with BatonClient(toy.gateway.addresses.grpc) as client:
            request = generate_request(PROMPT, seed=3, max_tokens=20, ignore_eos=True, logprobs=2)
            whole = list(client.generate(request, timeout_s=10))
            endless = client.generate(generate_request(PROMPT, seed=3, max_tokens=200))
            first = next(endless)
            del endless  # an iterator that is dropped cancels its request
            return whole, first

    whole, first = await asyncio.to_thread(run)
    assert joined(whole) == expected()
    assert [len(chunk.logprobs[0].top) for chunk in whole] == [2] * 20
    assert first.token_ids == (expected(1)[0],)
    await toy.idle()


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


def test_the_toy_model_is_what_the_tests_think() -> None:
    assert expected(3) == [token_at(tuple(PROMPT), 3, 0, index) for index in range(3)]
    assert len(PROMPT) + 200 < CONTEXT
