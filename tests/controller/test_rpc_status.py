"""Errors across gRPC: every code survives the trip, and strangers' statuses make sense."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import pytest

from baton.core.errors import BatonError, Code, Stage, error_from_code
from protos.serving import channel_options, server_options
from protos.status import STATUS_BY_CODE, abort_with, error_from_rpc

METHOD = "/test.Test/Fail"


if TYPE_CHECKING:
    Handler = grpc.GenericRpcHandler[Any, Any]
else:
    Handler = grpc.GenericRpcHandler


class Failing(Handler):
    """A server whose one method fails as it is told."""

    def __init__(self) -> None:
        self.error: BatonError | None = None
        self.status = grpc.StatusCode.UNKNOWN

    def service(self, handler_call_details: Any) -> Any:
        async def fail(request: bytes, context: Any) -> bytes:
            if self.error is not None:
                await abort_with(context, self.error)
            await context.abort(self.status, "plain words")
            return b""

        return grpc.unary_unary_rpc_method_handler(fail)


class Caller:
    def __init__(self, handler: Failing, channel: grpc.aio.Channel) -> None:
        self.handler = handler
        self.channel = channel

    async def fail(self) -> BatonError:
        channel: Any = self.channel
        call = channel.unary_unary(METHOD)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(b"", timeout=10.0)
        return error_from_rpc(caught.value, stage=Stage.PREFILL)


@pytest.fixture
async def caller() -> AsyncIterator[Caller]:
    handler = Failing()
    server = grpc.aio.server(options=server_options())
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=channel_options()) as channel:
        yield Caller(handler, channel)
    await server.stop(None)


@pytest.mark.parametrize("code", Code)
async def test_each_code_survives(caller: Caller, code: Code) -> None:
    sent = error_from_code(code, "because: ünd", stage=Stage.DECODE, param="seed")
    sent.retry_after_s = 1.5
    caller.handler.error = sent
    got = await caller.fail()
    assert type(got) is type(sent)
    assert (got.code, got.message, got.param) == (code, "because: ünd", "seed")
    assert (got.stage, got.retryable, got.retry_after_s) == (sent.stage, sent.retryable, 1.5)


def test_every_code_has_a_status() -> None:
    assert set(STATUS_BY_CODE) == set(Code)


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (grpc.StatusCode.UNAVAILABLE, Code.UNAVAILABLE),
        (grpc.StatusCode.DEADLINE_EXCEEDED, Code.DEADLINE_EXCEEDED),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, Code.TOO_LARGE),
        (grpc.StatusCode.UNIMPLEMENTED, Code.INTERNAL),
        (grpc.StatusCode.UNKNOWN, Code.INTERNAL),
    ],
)
async def test_plain_statuses(caller: Caller, status: grpc.StatusCode, code: Code) -> None:
    caller.handler.status = status
    got = await caller.fail()
    assert (got.code, got.message, got.stage) == (code, "plain words", Stage.PREFILL)


async def test_long_messages_still_arrive(caller: Caller) -> None:
    caller.handler.error = BatonError("x" * 100_000)
    got = await caller.fail()
    assert got.code is Code.INTERNAL
    assert got.message.startswith("xxx")


async def test_nobody_there() -> None:
    async with grpc.aio.insecure_channel("127.0.0.1:1", options=channel_options()) as channel:
        got = await Caller(Failing(), channel).fail()
    assert got.code is Code.UNAVAILABLE
    assert got.retryable


def test_an_rpc_error_without_a_status() -> None:
    assert error_from_rpc(grpc.RpcError("strange")).code is Code.INTERNAL
