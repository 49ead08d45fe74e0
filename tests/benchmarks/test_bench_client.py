"""The clients against small servers: what they count, and how failures are named."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from benchmarks import serve
from benchmarks.grpc_sender import GrpcSender
from benchmarks.http_sender import HttpSender, read_events
from benchmarks.load import run_load
from benchmarks.outcome import Outcome
from benchmarks.workload import Item, PromptMaker
from protos.baton.v1 import inference_pb2 as pb
from protos.baton.v1 import inference_pb2_grpc as rpc

Behaviour = Callable[[dict[str, Any], asyncio.StreamWriter], Any]


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def token(index: int, last: int) -> bytes:
    reason = "length" if index == last else None
    return event(choices=[{"text": "x", "token_ids": [index], "finish_reason": reason}])


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


async def streams(request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    """All the tokens, cut into packets at awkward places."""
    count = request["max_tokens"]
    body = b"".join(chunk(token(i, count - 1)) for i in range(count))
    body += chunk(event(choices=[], usage={"completion_tokens": count}))
    body += chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"
    for start in range(0, len(body), 37):
        writer.write((HEAD if start == 0 else b"") + body[start : start + 37])
        await writer.drain()
        await asyncio.sleep(0)


async def stops_short(request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    writer.write(HEAD + chunk(token(0, 0)) + b"0\r\n\r\n")


async def never_says_why(request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    writer.write(HEAD + chunk(token(0, 99)) + b"0\r\n\r\n")


async def breaks(request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    writer.write(HEAD + chunk(token(0, 99)))


async def errs_inside(request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    error = event(error={"code": "instance_lost", "message": "gone"})
    writer.write(HEAD + chunk(token(0, 99)) + chunk(error) + b"0\r\n\r\n")


async def is_full(request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 4\r\n\r\nfull")


async def refuses(request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 3\r\n\r\nbad")


async def hangs(request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    writer.write(HEAD)
    await asyncio.sleep(30)


async def talks_nonsense(request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    writer.write(b"SSH-2.0-OpenSSH\r\n")


@contextlib.asynccontextmanager
async def server(behave: Behaviour) -> AsyncIterator[tuple[str, list[dict[str, Any]]]]:
    """An HTTP server that notes the requests; its URL."""
    seen: list[dict[str, Any]] = []
    tasks: set[asyncio.Task[Any]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            length = int(head.partition("content-length:")[2].split()[0])
            body = await reader.readexactly(length)
            if head.startswith("get /v1/models"):
                data = json.dumps({"data": [{"id": "m", "vocab_size": 64}]}).encode()
                writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(data)}\r\n\r\n".encode())
                writer.write(data)
            else:
                assert head.startswith("post /v1/completions")
                seen.append(json.loads(body))
                await behave(seen[-1], writer)
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    listening = await asyncio.start_server(handle, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}", seen
    finally:
        listening.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_streams_are_counted_token_by_token() -> None:
    items = [Item(i * 0.01, 20, 5) for i in range(6)]
    changes: list[tuple[str | None, bool]] = []
    async with server(streams) as (url, seen):
        result = await run_load(
            items,
            PromptMaker(64, 0).prompt,
            HttpSender(url, "m"),
            timeout_s=20,
            on_change=lambda outcome, ended: changes.append((outcome.failure, ended)),
        )
    assert [o.failure for o in result.outcomes] == [None] * 6
    for outcome in result.outcomes:
        assert outcome.token_ids == [0, 1, 2, 3, 4]
        assert outcome.num_prompt_tokens == 20
        assert outcome.token_times_s == sorted(outcome.token_times_s)
        assert outcome.sent_s <= outcome.token_times_s[0]
        assert outcome.arrival_s == outcome.due_s
    dues = [o.due_s - result.start_s for o in result.outcomes]
    assert dues == pytest.approx([item.at_s for item in items])
    assert len(changes) == 12
    assert sum(ended for _, ended in changes) == 6
    assert all(r["ignore_eos"] and r["return_token_ids"] and r["stream"] for r in seen)
    assert len({tuple(r["prompt"]) for r in seen}) == 6


@pytest.mark.parametrize(
    ("behave", "kind"),
    [
        (stops_short, "short"),
        (never_says_why, "unfinished"),
        (breaks, "unfinished"),
        (errs_inside, "error_instance_lost"),
        (is_full, "shed"),
        (refuses, "http_400"),
        (hangs, "timeout"),
        (talks_nonsense, "connection"),
    ],
)
async def test_failures_have_names(behave: Behaviour, kind: str) -> None:
    async with server(behave) as (url, _):
        result = await run_load(
            [Item(0.0, 4, 3)], PromptMaker(64, 0).prompt, HttpSender(url, "m"), timeout_s=0.5
        )
    (outcome,) = result.outcomes
    assert outcome.failure == kind
    assert outcome.detail
    assert outcome.timing is None
    assert outcome.end_s is not None


async def test_nobody_listens() -> None:
    async with server(streams) as (url, _):
        pass
    result = await run_load(
        [Item(0.0, 4, 3)], PromptMaker(64, 0).prompt, HttpSender(url, "m"), timeout_s=5
    )
    assert result.outcomes[0].failure == "connection"


async def test_concurrency_caps_what_is_open() -> None:
    now_open = most_open = 0

    async def slow(request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        nonlocal now_open, most_open
        now_open += 1
        most_open = max(most_open, now_open)
        await asyncio.sleep(0.02)
        now_open -= 1
        await streams(request, writer)

    async with server(slow) as (url, _):
        result = await run_load(
            [Item(0.0, 4, 2)] * 9,
            PromptMaker(64, 0).prompt,
            HttpSender(url, "m"),
            timeout_s=20,
            concurrency=3,
        )
    assert most_open == 3
    assert not any(o.failure for o in result.outcomes)
    # The last ones were held back by the cap; the server is not blamed for it.
    assert result.outcomes[-1].arrival_s > result.outcomes[-1].due_s


def test_usage_that_disagrees_is_a_failure() -> None:
    outcome = Outcome(0, 0, 0, 1, 1)
    read_events([(1.0, token(0, 0) + event(choices=[], usage={"completion_tokens": 2}))], outcome)
    assert outcome.failure == "miscounted"


def test_a_message_of_several_tokens() -> None:
    outcome = Outcome(0, 0, 0, 1, 3)
    first = event(choices=[{"token_ids": [7], "finish_reason": None}])
    rest = event(choices=[{"token_ids": [8, 9], "finish_reason": "length"}])
    read_events([(1.0, first + rest[:9]), (2.0, rest[9:])], outcome)
    assert outcome.failure is None
    assert outcome.token_times_s == [1.0, 2.0, 2.0]
    assert outcome.gaps_s == [1.0, 0.0]


async def test_command_writes_its_json(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    command = ["--model", "m", "--num-requests", "4", "--rate", "inf", "--input-len", "8"]
    command += ["--output-len", "3", "--json", str(file), "--per-request", "--slo", "ttft=30"]
    async with server(streams) as (url, _):
        status = await asyncio.to_thread(serve.main, [*command, "--url", url])
    assert status == 0
    document = json.loads(file.read_text())
    assert document["schema"] == "baton.benchmark.serve/1"
    assert document["attainment"] == 1
    assert document["output_tokens"] == 12
    assert document["workload"]["prompt_tokens_mean"] == 8
    assert len(document["per_request"]) == 4
    assert document["machine"]["cores"] >= 1


async def test_command_fails_with_the_requests() -> None:
    command = ["--model", "m", "--num-requests", "2", "--rate", "inf"]
    async with server(is_full) as (url, _):
        assert await asyncio.to_thread(serve.main, [*command, "--url", url]) == 1
        wrong = [*command, "--url", url, "--output-len", "x"]
        assert await asyncio.to_thread(serve.main, wrong) == 2
        other = ["--model", "other", "--url", url]
        assert await asyncio.to_thread(serve.main, other) == 2


class Inference(rpc.InferenceServicer):
    """Makes tokens in messages of two; refuses prompts of one token."""

    async def Generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.GenerateResponse]:
        if len(request.token_ids.ids) == 1:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "too short")
        count = request.sampling.max_tokens
        for start in range(0, count, 2):
            ids = list(range(start, min(start + 2, count)))
            last = "length" if start + 2 >= count else ""
            yield pb.GenerateResponse(index=start, token_ids=ids, finish_reason=last)

    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.GetModelInfoResponse:
        return pb.GetModelInfoResponse(model="m", vocab_size=99)

    async def Abort(
        self, request: pb.AbortRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.AbortResponse:
        return pb.AbortResponse()


async def test_grpc() -> None:
    running = grpc.aio.server()
    rpc.add_InferenceServicer_to_server(Inference(), running)
    port = running.add_insecure_port("127.0.0.1:0")
    await running.start()
    sender = GrpcSender(f"127.0.0.1:{port}", "m")
    try:
        assert await sender.vocab_size() == 99
        result = await run_load(
            [Item(0.0, 4, 5), Item(0.0, 1, 5)], PromptMaker(99, 0).prompt, sender, timeout_s=20
        )
    finally:
        await sender.close()
        await running.stop(None)
    good, bad = result.outcomes
    assert good.failure is None
    assert good.token_ids == [0, 1, 2, 3, 4]
    assert (bad.failure, bad.detail) == ("grpc_invalid_argument", "too short")
