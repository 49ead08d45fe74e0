"""Errors across gRPC: a :class:`BatonError` to a status and back, and nowhere else.

A status carries the code and the message; the rest of the error travels as a serialized
``baton.v1.ErrorDetail`` in the trailing metadata, so that a client of Baton gets the very error
that was raised, and any other gRPC client still gets a sensible status.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from baton.core.errors import BatonError, Code, Stage, error_from_code
from protos.baton.v1 import inference_pb2

DETAIL_KEY = "baton-error-bin"

# Metadata shares one bounded header frame; a message that long helps nobody.
_MAX_MESSAGE_CHARS = 1500

STATUS_BY_CODE: dict[Code, grpc.StatusCode] = {
    Code.INVALID_REQUEST: grpc.StatusCode.INVALID_ARGUMENT,
    Code.CONTEXT_LENGTH_EXCEEDED: grpc.StatusCode.INVALID_ARGUMENT,
    Code.UNSUPPORTED_PARAMETER: grpc.StatusCode.INVALID_ARGUMENT,
    Code.NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    Code.UNAUTHENTICATED: grpc.StatusCode.UNAUTHENTICATED,
    Code.TOO_LARGE: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Code.CONFIG: grpc.StatusCode.FAILED_PRECONDITION,
    Code.UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    Code.OVERLOADED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Code.REFUSED: grpc.StatusCode.FAILED_PRECONDITION,
    Code.DEADLINE_EXCEEDED: grpc.StatusCode.DEADLINE_EXCEEDED,
    Code.ABORTED: grpc.StatusCode.CANCELLED,
    Code.FENCED: grpc.StatusCode.ABORTED,
    Code.TRANSFER_FAILED: grpc.StatusCode.UNAVAILABLE,
    Code.INSTANCE_LOST: grpc.StatusCode.UNAVAILABLE,
    Code.INTERNAL: grpc.StatusCode.INTERNAL,
}

# For a status without a detail: raised by gRPC itself, or by somebody else's server.
_CODE_BY_STATUS: dict[grpc.StatusCode, Code] = {
    grpc.StatusCode.INVALID_ARGUMENT: Code.INVALID_REQUEST,
    grpc.StatusCode.OUT_OF_RANGE: Code.INVALID_REQUEST,
    grpc.StatusCode.NOT_FOUND: Code.NOT_FOUND,
    grpc.StatusCode.UNAUTHENTICATED: Code.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED: Code.UNAUTHENTICATED,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Code.TOO_LARGE,
    grpc.StatusCode.UNAVAILABLE: Code.UNAVAILABLE,
    grpc.StatusCode.FAILED_PRECONDITION: Code.REFUSED,
    grpc.StatusCode.DEADLINE_EXCEEDED: Code.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED: Code.ABORTED,
    grpc.StatusCode.ABORTED: Code.FENCED,
}


def error_to_detail(error: BatonError) -> inference_pb2.ErrorDetail:
    """To the wire."""
    return inference_pb2.ErrorDetail(
        code=error.code,
        message=error.message[:_MAX_MESSAGE_CHARS],
        param=error.param or "",
        stage=error.stage,
        retryable=error.retryable,
        retry_after_s=error.retry_after_s or 0.0,
    )


def error_from_detail(detail: inference_pb2.ErrorDetail) -> BatonError:
    """From the wire."""
    error = error_from_code(
        detail.code, detail.message, stage=detail.stage, param=detail.param or None
    )
    error.retryable = detail.retryable
    error.retry_after_s = detail.retry_after_s or None
    return error


async def abort_with(context: grpc.aio.ServicerContext[Any, Any], error: BatonError) -> NoReturn:
    """End a call with the status of ``error``, and the error itself in the trailing metadata."""
    detail = error_to_detail(error)
    await context.abort(
        STATUS_BY_CODE[error.code],
        detail.message,
        trailing_metadata=((DETAIL_KEY, detail.SerializeToString()),),
    )
    raise AssertionError("abort raises")


def error_from_rpc(error: grpc.RpcError, *, stage: Stage = Stage.CONTROL) -> BatonError:
    """The error a server raised with :func:`abort_with`, or the nearest one for any other status.

    ``stage`` is used where the server did not say one.
    """
    # Synchronous and asynchronous calls raise unrelated classes with the same three methods.
    call: Any = error
    if not callable(getattr(call, "code", None)):
        return BatonError(str(error) or type(error).__name__, stage=stage)
    trailing: Iterable[tuple[str, str | bytes]] = call.trailing_metadata() or ()
    status: grpc.StatusCode = call.code()
    text: str = call.details() or ""
    for key, value in trailing:
        if key == DETAIL_KEY and isinstance(value, bytes):
            try:
                return error_from_detail(inference_pb2.ErrorDetail.FromString(value))
            except DecodeError:
                break
    code = _CODE_BY_STATUS.get(status, Code.INTERNAL)
    return error_from_code(code, text or status.name.lower(), stage=stage)
