"""The one map from error codes to HTTP, in the shape that OpenAI clients know."""

from __future__ import annotations

import logging
import math
from typing import Any

from baton.core.errors import BatonError, Code

_LOG = logging.getLogger(__name__)

HTTP_STATUS: dict[Code, int] = {
    Code.INVALID_REQUEST: 400,
    Code.CONTEXT_LENGTH_EXCEEDED: 400,
    Code.UNSUPPORTED_PARAMETER: 400,
    Code.NOT_FOUND: 404,
    Code.UNAUTHENTICATED: 401,
    Code.TOO_LARGE: 413,
    Code.CONFIG: 500,
    Code.UNAVAILABLE: 503,
    Code.OVERLOADED: 429,
    Code.REFUSED: 503,
    Code.DEADLINE_EXCEEDED: 504,
    Code.ABORTED: 499,
    Code.FENCED: 503,
    Code.TRANSFER_FAILED: 503,
    Code.INSTANCE_LOST: 503,
    Code.INTERNAL: 500,
}

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    429: "overloaded_error",
    499: "request_aborted_error",
    500: "internal_server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
_DEFAULT_RETRY_AFTER_S = 1.0


def http_status(error: BatonError) -> int:
    """The status that goes with an error's code."""
    return HTTP_STATUS[error.code]


def error_body(error: BatonError, *, status: int | None = None) -> dict[str, Any]:
    """``{"error": {...}}`` as OpenAI clients read it."""
    return {
        "error": {
            "message": error.message,
            "type": _TYPES[status or http_status(error)],
            "param": error.param,
            "code": str(error.code),
        }
    }


def error_headers(error: BatonError) -> dict[str, str]:
    """``Retry-After`` in whole seconds, and the hint that the OpenAI clients obey."""
    headers = {"x-should-retry": "true" if error.retryable else "false"}
    if http_status(error) in (429, 503) or error.retry_after_s is not None:
        retry_after_s = error.retry_after_s or _DEFAULT_RETRY_AFTER_S
        headers["retry-after"] = str(max(1, math.ceil(retry_after_s)))
    return headers


def as_baton_error(error: BaseException) -> BatonError:
    """What the client is told; an internal bug is logged here and shown without its details."""
    if isinstance(error, BatonError):
        return error
    _LOG.error("internal error while serving a request", exc_info=error)
    return BatonError("internal error: the gateway's log has the details")
