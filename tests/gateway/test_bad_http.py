"""Bad input to the real HTTP door on a real port, with no cluster behind it.

Nothing here may reach placement: that would answer 503 instead of the table's 4xx.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from baton.core.config import GatewayConfig
from baton.core.errors import ConfigError
from baton.gateway.server import GatewayServer
from baton.gateway.settings import GatewaySettings
from tests.gateway.gateway_support import CONTEXT, VOCAB, write_model

MAX_BODY = 4096


def settings(model: Path, **changes: Any) -> GatewaySettings:
    values: dict[str, Any] = {
        "model": str(model),
        "served_model_name": "tiny",
        "host": "127.0.0.1",
        "http_port": 0,
        "grpc_port": 0,
        "controller_address": "127.0.0.1:9",
        "gateway_id": "gw-test",
        "node_id": "node",
        "limits": GatewayConfig(max_body_bytes=MAX_BODY, max_n=4),
        "queue_timeout_s": 0.3,
        "place_timeout_s": 0.3,
    }
    return GatewaySettings(**{**values, **changes})


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def base_url(model_dir: Path) -> AsyncIterator[str]:
    server = GatewayServer(settings(model_dir))
    addresses = await server.start()
    yield f"http://{addresses.http}"
    await server.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(base_url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=base_url) as shared:
        yield shared


pytestmark = pytest.mark.asyncio(loop_scope="module")

TEXT = {"model": "tiny", "prompt": "def"}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
C, M = "/v1/completions", "/v1/chat/completions"
INVALID, UNSUPPORTED, LONG = (
    "invalid_request",
    "unsupported_parameter",
    "context_length_exceeded",
)

# path, body (a dict is added to a good one), status, param, code
TABLE: list[tuple[str, Any, int, str | None, str]] = [
    (C, b"{", 400, None, INVALID),
    (C, b"", 400, None, INVALID),
    (C, b"[]", 400, None, INVALID),
    (C, b"null", 400, None, INVALID),
    (C, b'{"model": "tiny", "prompt": "\xff"}', 400, None, INVALID),
    (C, b'{"model": "tiny", "prompt": "\\ud800"}', 400, "prompt", INVALID),
    (C, b'{"model": "tiny", "prompt": "a", "temperature": NaN}', 400, None, INVALID),
    (C, b'{"model": "tiny", "prompt": "a", "temperature": 1e999}', 400, "temperature", INVALID),
    (C, b"[" * 2000, 400, None, INVALID),
    (C, b'{"a":' * 600, 400, None, INVALID),
    (C, b'{"model": "tiny", "prompt": "' + b"a" * MAX_BODY + b'"}', 413, None, "request_too_large"),
    (C, {"model": "other"}, 404, "model", "not_found"),
    (C, {"model": None}, 400, "model", INVALID),
    (C, {"model": 5}, 400, "model", INVALID),
    (C, {"prompt": ""}, 400, "prompt", INVALID),
    (C, {"prompt": []}, 400, "prompt", INVALID),
    (C, {"prompt": [[]]}, 400, "prompt", INVALID),
    (C, {"prompt": ["a", ""]}, 400, "prompt", INVALID),
    (C, {"prompt": 5}, 400, "prompt", INVALID),
    (C, {"prompt": None}, 400, "prompt", INVALID),
    (C, {"prompt": ["a", 5]}, 400, "prompt", INVALID),
    (C, {"prompt": [1, True]}, 400, "prompt", INVALID),
    (C, {"prompt": [1.5]}, 400, "prompt", INVALID),
    (C, {"prompt": [-1]}, 400, "prompt", INVALID),
    (C, {"prompt": [VOCAB]}, 400, "prompt", INVALID),
    (C, {"prompt": [[1], [VOCAB]]}, 400, "prompt", INVALID),
    (C, {"prompt": [5] * CONTEXT}, 400, "prompt", LONG),
    (C, {"prompt": "世" * CONTEXT}, 400, "prompt", LONG),
    (C, {"prompt": [5] * 10, "max_tokens": CONTEXT - 9}, 400, "max_tokens", LONG),
    (C, {"max_tokens": 0}, 400, "max_tokens", INVALID),
    (C, {"max_tokens": "5"}, 400, "max_tokens", INVALID),
    (C, {"max_tokens": 1.5}, 400, "max_tokens", INVALID),
    (C, {"max_tokens": True}, 400, "max_tokens", INVALID),
    (C, {"n": 0}, 400, "n", INVALID),
    (C, {"n": 5}, 400, "n", INVALID),
    (C, {"n": 10**30}, 400, "n", INVALID),
    (C, {"temperature": -0.1}, 400, "temperature", INVALID),
    (C, {"temperature": 2.1}, 400, "temperature", INVALID),
    (C, {"temperature": "hot"}, 400, "temperature", INVALID),
    (C, {"top_p": 0}, 400, "top_p", INVALID),
    (C, {"top_p": 1.1}, 400, "top_p", INVALID),
    (C, {"top_k": -2}, 400, "top_k", INVALID),
    (C, {"top_k": 2**40}, 400, "top_k", INVALID),
    (C, {"min_p": 2}, 400, "min_p", INVALID),
    (C, {"repetition_penalty": 0}, 400, "repetition_penalty", INVALID),
    (C, {"presence_penalty": 3}, 400, "presence_penalty", INVALID),
    (C, {"frequency_penalty": -3}, 400, "frequency_penalty", INVALID),
    (C, {"seed": 2**64}, 400, "seed", INVALID),
    (C, {"seed": 1.5}, 400, "seed", INVALID),
    (C, {"logprobs": 21}, 400, "logprobs", INVALID),
    (C, {"logprobs": True}, 400, "logprobs", INVALID),
    (C, {"stop": ["a"] * 5}, 400, "stop", INVALID),
    (C, {"stop": ""}, 400, "stop", INVALID),
    (C, {"stop": [""]}, 400, "stop.0", INVALID),
    (C, {"stop": 5}, 400, "stop", INVALID),
    (C, {"stop_token_ids": [VOCAB]}, 400, "stop_token_ids", INVALID),
    (C, {"stop_token_ids": [-1]}, 400, "stop_token_ids.0", INVALID),
    (C, {"stream": "yes"}, 400, "stream", INVALID),
    (C, {"stream_options": {"include_usage": True}}, 400, "stream_options", INVALID),
    (C, {"stream": True, "stream_options": {"x": 1}}, 400, "stream_options.x", UNSUPPORTED),
    (C, {"timeout": 0}, 400, "timeout", INVALID),
    (C, {"request_id": "a b"}, 400, "request_id", INVALID),
    (C, {"priority": 2**40}, 400, "priority", INVALID),
    (C, {"best_of": 3}, 400, "best_of", UNSUPPORTED),
    (C, {"suffix": "x"}, 400, "suffix", UNSUPPORTED),
    (C, {"logit_bias": {"5": 1}}, 400, "logit_bias", UNSUPPORTED),
    (C, {"temprature": 1}, 400, "temprature", UNSUPPORTED),
    (C, {"messages": []}, 400, "messages", UNSUPPORTED),
    (M, {"messages": []}, 400, "messages", INVALID),
    (M, {"messages": "hi"}, 400, "messages", INVALID),
    (M, {"messages": [{"role": "king", "content": "x"}]}, 400, "messages.0.role", INVALID),
    (M, {"messages": [{"role": "user"}]}, 400, "messages.0.content", INVALID),
    (M, {"messages": [{"role": "user", "content": None}]}, 400, "messages.0.content", INVALID),
    (
        M,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "text": "x"}]}]},
        400,
        "messages.0.content.0.type",
        INVALID,
    ),
    (
        M,
        {"messages": [{"role": "user", "content": "x", "tool_calls": []}]},
        400,
        "messages.0.tool_calls",
        UNSUPPORTED,
    ),
    (
        M,
        {"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]},
        400,
        "messages",
        INVALID,
    ),
    (M, {"messages": [{"role": "user", "content": "世" * CONTEXT}]}, 400, "messages", LONG),
    (M, {"max_tokens": 5, "max_completion_tokens": 5}, 400, "max_tokens", INVALID),
    (M, {"max_completion_tokens": CONTEXT}, 400, "max_completion_tokens", LONG),
    (M, {"top_logprobs": 2}, 400, "top_logprobs", INVALID),
    (M, {"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", INVALID),
    (M, {"logprobs": 1}, 400, "logprobs", INVALID),
    (M, {"tools": [{"type": "function"}]}, 400, "tools", UNSUPPORTED),
    (M, {"response_format": {"type": "json_object"}}, 400, "response_format", UNSUPPORTED),
    (M, {"store": True}, 400, "store", UNSUPPORTED),
    (M, {"prompt": "x"}, 400, "prompt", UNSUPPORTED),
    (M, {"echo": True}, 400, "echo", UNSUPPORTED),
]


def body_of(path: str, body: Any) -> bytes:
    if isinstance(body, bytes):
        return body
    return json.dumps({**(TEXT if path == C else CHAT), **body}).encode()


@pytest.mark.parametrize(("path", "body", "status", "param", "code"), TABLE)
async def test_table(
    client: httpx.AsyncClient, path: str, body: Any, status: int, param: str | None, code: str
) -> None:
    headers = {"content-type": "application/json", "x-request-id": "mine-1"}
    answer = await client.post(path, content=body_of(path, body), headers=headers)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (status, param, code), error
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert answer.headers["x-request-id"] == "mine-1"
    assert answer.headers["x-should-retry"] == "false"
    assert (await client.get("/health")).status_code == 200


async def test_the_table_is_long_enough() -> None:
    assert len(TABLE) >= 40


@pytest.mark.parametrize(
    "extra",
    [
        {"best_of": 1},
        {"best_of": None},
        {"suffix": None, "logit_bias": {}, "user": "u", "metadata": {"a": "b"}},
        {"n": 2, "best_of": 2},
        {"top_k": -1},
        {"top_k": 0},
        {"seed": -(2**63)},
        {"max_tokens": CONTEXT - 1, "prompt": [5]},
        {"prompt": [[5], [6, 7]]},
        {"prompt": ["a", "b"]},
        {"temperature": 1, "stop": None, "stream": False},
    ],
)
async def test_good_requests_get_as_far_as_placement(
    client: httpx.AsyncClient, extra: dict[str, Any]
) -> None:
    answer = await client.post(C, json={**TEXT, **extra})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (503, "unavailable"), error
    assert "controller" in error["message"]
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.headers["x-should-retry"] == "true"


@pytest.mark.parametrize("stream", [False, True])
async def test_chat_extras_that_ask_for_nothing(client: httpx.AsyncClient, stream: bool) -> None:
    extra = {"tools": None, "response_format": {"type": "text"}, "store": False, "stream": stream}
    answer = await client.post(M, json={**CHAT, **extra})
    assert answer.status_code == 503


@pytest.mark.parametrize(
    ("headers", "param"),
    [
        ({"content-type": "text/plain"}, "content-type"),
        ({"content-type": ""}, "content-type"),
        ({"x-request-id": "a" * 129}, "x-request-id"),
        ({"x-request-id": "a b"}, "x-request-id"),
        ({"x-request-timeout": "soon"}, "x-request-timeout"),
        ({"x-request-timeout": "-1"}, "x-request-timeout"),
        ({"x-request-timeout": "inf"}, "x-request-timeout"),
    ],
)
async def test_bad_headers(client: httpx.AsyncClient, headers: dict[str, str], param: str) -> None:
    content = json.dumps(TEXT)
    sent = {"content-type": "application/json", **headers}
    answer = await client.post(C, content=content, headers=sent)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert len(answer.headers["x-request-id"]) == 32


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("POST", "/", 404),
        ("GET", C, 405),
        ("DELETE", M, 405),
        ("POST", "/health", 405),
        ("GET", "/v1/models/other", 404),
    ],
)
async def test_wrong_routes(client: httpx.AsyncClient, method: str, path: str, status: int) -> None:
    answer = await client.request(method, path)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


async def test_not_ready_without_a_controller(client: httpx.AsyncClient) -> None:
    answer = await client.get("/ready")
    assert answer.status_code == 503
    assert "controller" in answer.json()["error"]["message"]
    models = (await client.get("/v1/models")).json()
    assert [card["id"] for card in models["data"]] == ["tiny"]
    card = (await client.get("/v1/models/tiny")).json()
    assert (card["max_model_len"], card["vocab_size"]) == (CONTEXT, VOCAB)


async def test_refused_requests_are_counted(client: httpx.AsyncClient) -> None:
    name = 'baton_requests_total{endpoint="chat",outcome="not_found"}'

    async def count() -> float:
        text = (await client.get("/metrics")).text
        return next(float(x.rsplit(" ", 1)[1]) for x in text.splitlines() if name in x)

    before = await count()
    await client.post(M, json={**CHAT, "model": "other"})
    assert await count() == before + 1


async def test_a_body_that_never_ends_does_not_hold_the_server(
    base_url: str, client: httpx.AsyncClient
) -> None:
    host, port = base_url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        b"content-length: 100\r\n\r\n{"
    )
    await writer.drain()
    assert (await client.get("/health")).status_code == 200
    writer.close()


async def test_model_without_tokenizer(tmp_path: Path) -> None:
    server = GatewayServer(settings(write_model(tmp_path / "bare", tokenizer=False)))
    addresses = await server.start()
    try:
        async with httpx.AsyncClient(base_url=f"http://{addresses.http}") as client:
            for extra, param in (({}, "prompt"), ({"prompt": [5], "stop": "x"}, "stop")):
                answer = await client.post(C, json={**TEXT, **extra})
                assert answer.status_code == 400
                assert answer.json()["error"]["param"] == param
                assert "no tokenizer" in answer.json()["error"]["message"]
            assert (await client.post(C, json={**TEXT, "prompt": [5]})).status_code == 503
    finally:
        await server.stop()


@pytest.mark.parametrize("name", ["http_port", "grpc_port"])
async def test_busy_ports_are_named(base_url: str, model_dir: Path, name: str) -> None:
    port = int(base_url.rsplit(":", 1)[1])
    server = GatewayServer(settings(model_dir, **{name: port}))
    with pytest.raises(ConfigError, match=str(port)) as caught:
        await server.start()
    assert caught.value.param == name
