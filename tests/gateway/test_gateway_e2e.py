"""Both doors with a real controller and instances that speak the protocol (a toy model)."""

from __future__ import annotations

import asyncio

import grpc.aio
import openai
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.client import AdminClient, BatonClient, GenerateChunk, generate_request
from baton.core.errors import BatonError
from baton.core.request import Part
from baton.gateway.tokenizer import GatewayTokenizer
from tests.gateway.gateway_support import CONTEXT, token_at, tokens_of, until
from tests.gateway.toy_cluster import PROMPT, Toy, events, expected, joined


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


async def test_explain_of_an_abort(toy: Toy) -> None:
    toy.instances["prefill-0"].hold.clear()
    for instance in toy.decode:
        instance.hold.clear()
    call = asyncio.create_task(toy.generate(request_id="gone"))
    await until(lambda: any(item.open for item in toy.decode))
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    await toy.idle()
    with AdminClient(toy.controller.address) as admin:
        async with asyncio.timeout(5):
            while (told := await asyncio.to_thread(admin.explain, "gone")).outcome == "open":
                await asyncio.sleep(0.01)
    assert told.outcome == "abort"
    assert "aborted" in {mark.stage for mark in told.attempts[0].stages}


async def test_explain_tells_attempts_and_stages(toy: Toy) -> None:
    await toy.generate(request_id="why", n=2)
    with AdminClient(toy.controller.address) as admin:
        async with asyncio.timeout(5):
            while (told := await asyncio.to_thread(admin.explain, "why")).outcome == "open":
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


def test_the_toy_model_is_what_the_tests_think() -> None:
    assert expected(3) == [token_at(tuple(PROMPT), 3, 0, index) for index in range(3)]
    assert len(PROMPT) + 200 < CONTEXT
