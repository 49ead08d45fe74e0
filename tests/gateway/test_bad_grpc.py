"""Bad input to the real gRPC door on a real port, with no cluster behind it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from baton.client import AsyncBatonClient, BatonClient, generate_request
from baton.core.config import GatewayConfig
from baton.core.errors import BatonError, Code
from baton.gateway.server import GatewayServer
from baton.gateway.settings import GatewaySettings
from protos.baton.v1 import inference_pb2
from tests.gateway.gateway_support import CONTEXT, VOCAB

GENERATE = "/baton.v1.Inference/Generate"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def address(model_dir: Path) -> AsyncIterator[str]:
    server = GatewayServer(
        GatewaySettings(
            model=str(model_dir),
            served_model_name="tiny",
            host="127.0.0.1",
            http_port=0,
            grpc_port=0,
            controller_address="127.0.0.1:9",
            gateway_id="gw-test",
            node_id="node",
            limits=GatewayConfig(max_body_bytes=8192, max_n=4),
            queue_timeout_s=0.3,
            place_timeout_s=0.3,
        )
    )
    yield (await server.start()).grpc
    await server.stop()


pytestmark = pytest.mark.asyncio(loop_scope="module")

TABLE: list[tuple[Any, dict[str, Any], Code, str | None]] = [
    ("", {}, Code.INVALID_REQUEST, "prompt"),
    ([], {}, Code.INVALID_REQUEST, "prompt"),
    ([VOCAB], {}, Code.INVALID_REQUEST, "prompt"),
    ([5] * CONTEXT, {}, Code.CONTEXT_LENGTH_EXCEEDED, "prompt"),
    ("a", {"max_tokens": CONTEXT}, Code.CONTEXT_LENGTH_EXCEEDED, "max_tokens"),
    ("a", {"max_tokens": 0}, Code.INVALID_REQUEST, "max_tokens"),
    ("a", {"model": "other"}, Code.NOT_FOUND, "model"),
    ("a", {"n": 5}, Code.INVALID_REQUEST, "n"),
    ("a", {"n": 0}, Code.INVALID_REQUEST, "n"),
    ("a", {"temperature": 2.5}, Code.INVALID_REQUEST, "temperature"),
    ("a", {"temperature": float("nan")}, Code.INVALID_REQUEST, "temperature"),
    ("a", {"top_p": 0.0}, Code.INVALID_REQUEST, "top_p"),
    ("a", {"top_k": 0}, Code.INVALID_REQUEST, "top_k"),
    ("a", {"min_p": -1.0}, Code.INVALID_REQUEST, "min_p"),
    ("a", {"repetition_penalty": 0.0}, Code.INVALID_REQUEST, "repetition_penalty"),
    ("a", {"logprobs": 21}, Code.INVALID_REQUEST, "logprobs"),
    ("a", {"prompt_logprobs": 99}, Code.INVALID_REQUEST, "prompt_logprobs"),
    ("a", {"stop": ["x"] * 5}, Code.INVALID_REQUEST, "stop"),
    ("a", {"stop": [""]}, Code.INVALID_REQUEST, "stop"),
    ("a", {"stop_token_ids": [VOCAB]}, Code.INVALID_REQUEST, "stop_token_ids"),
    ("a", {"request_id": "x y"}, Code.INVALID_REQUEST, "request_id"),
]


@pytest.mark.parametrize(("prompt", "fields", "code", "param"), TABLE)
async def test_table(
    address: str, prompt: Any, fields: dict[str, Any], code: Code, param: str | None
) -> None:
    async with AsyncBatonClient(address) as client:
        with pytest.raises(BatonError) as caught:
            async for _ in client.generate(generate_request(prompt, **fields), timeout_s=10):
                pass
        assert (caught.value.code, caught.value.param) == (code, param), caught.value.message
        assert not caught.value.retryable
        assert (await client.model_info()).model == "tiny"


async def raw_status(address: str, method: str, payload: bytes) -> grpc.StatusCode:
    async with grpc.aio.insecure_channel(address) as channel:
        open_call = channel.unary_stream(
            method, request_serializer=bytes, response_deserializer=bytes
        )
        call = open_call(payload, timeout=10)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in call:
                pass
        return caught.value.code()


@pytest.mark.parametrize(
    ("method", "payload", "status"),
    [
        (GENERATE, b"\xff\xff\xff", grpc.StatusCode.INVALID_ARGUMENT),
        (GENERATE, b"", grpc.StatusCode.INVALID_ARGUMENT),
        (GENERATE, b"\x1a\x02\xff\xfe", grpc.StatusCode.INVALID_ARGUMENT),
        (GENERATE, b"\x1a" + b"\x80\x80\x01" + b"a" * 16384, grpc.StatusCode.RESOURCE_EXHAUSTED),
        ("/baton.v1.Inference/Abort", b"\xff", grpc.StatusCode.INVALID_ARGUMENT),
        ("/baton.v1.Inference/GetModelInfo", b"\xff", grpc.StatusCode.INVALID_ARGUMENT),
        ("/baton.v1.Inference/Nothing", b"", grpc.StatusCode.UNIMPLEMENTED),
        ("/baton.v1.Nothing/Generate", b"", grpc.StatusCode.UNIMPLEMENTED),
    ],
)
async def test_wrong_messages(
    address: str, method: str, payload: bytes, status: grpc.StatusCode
) -> None:
    assert await raw_status(address, method, payload) is status


async def test_good_requests_get_as_far_as_placement(address: str) -> None:
    async with AsyncBatonClient(address) as client:
        with pytest.raises(BatonError) as caught:
            async for _ in client.generate(generate_request("a", temperature=0.1)):
                pass
    assert caught.value.code is Code.UNAVAILABLE
    assert caught.value.retryable


async def test_deadline(address: str) -> None:
    async with AsyncBatonClient(address) as client:
        with pytest.raises(BatonError) as caught:
            async for _ in client.generate(generate_request("a"), timeout_s=0.05):
                pass
    assert caught.value.code is Code.DEADLINE_EXCEEDED


async def test_health_says_not_serving(address: str) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", "baton.v1.Inference"):
            reply = await stub.Check(health_pb2.HealthCheckRequest(service=name))
            assert reply.status == health_pb2.HealthCheckResponse.NOT_SERVING


async def test_reflection_lists_the_service(address: str) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        call = stub.ServerReflectionInfo(iter([asked]))
        reply = await call.read()
        names = {service.name for service in reply.list_services_response.service}
        assert {"baton.v1.Inference", "grpc.health.v1.Health"} <= names


async def test_model_info_and_abort_of_nothing(address: str) -> None:
    async with AsyncBatonClient(address) as client:
        info = await client.model_info()
        assert (info.vocab_size, info.max_model_len) == (VOCAB, CONTEXT)
        assert list(info.eos_token_ids) == [1, 2]
        assert info.architecture == "Qwen3MoeForCausalLM"
        await client.abort("unknown")
        with pytest.raises(BatonError, match="1 to 128"):
            await client.abort("")


async def test_request_builder_keeps_empty_token_ids_apart_from_text() -> None:
    assert generate_request([]).WhichOneof("prompt") == "token_ids"
    assert generate_request("").WhichOneof("prompt") == "text"
    assert isinstance(generate_request("a"), inference_pb2.GenerateRequest)
    with BatonClient("127.0.0.1:9") as client, pytest.raises(BatonError) as caught:
        client.model_info(timeout_s=0.5)
    assert caught.value.code in (Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED)
