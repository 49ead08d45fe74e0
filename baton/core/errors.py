"""The one tree of errors, and the one table of their codes.

Every error a user can meet is a :class:`BatonError`. It carries

* ``code``: a stable, machine-readable name from :class:`Code`;
* ``stage``: which part of a request's life it happened in;
* ``retryable``: whether the same request may succeed if it is sent again;
* ``param``: the name of the offending field, for bad input;
* ``retry_after_s``: when to try again, where that is known.

The edges (HTTP, gRPC) map a code to a status once, in ``baton/gateway/errors.py``. Internal
bugs are asserts and other exceptions; they surface as ``INTERNAL`` and are never retryable by
themselves::

    BatonError
    ├── InvalidRequest      the caller must change the request
    ├── NotFound            no such model, instance or request
    ├── ConfigError         the operator must change a setting, a file or a port
    ├── Unavailable         nothing can serve it now; retry later
    ├── Overloaded          shed: its targets could not be met; retry later
    ├── Refused             this instance will not; place it elsewhere
    ├── DeadlineExceeded    its time budget ran out
    ├── Aborted             the client went away or asked for it to stop
    ├── Fenced              an older attempt or incarnation spoke
    ├── TransferFailed      KV bytes did not arrive or did not verify
    └── InstanceLost        the instance that served it died or froze
        └── RankLost        one of the instance's ranks did; the message names it
"""

from __future__ import annotations

import enum


class Code(enum.StrEnum):
    """Stable names of what went wrong; part of the API."""

    INVALID_REQUEST = "invalid_request"
    CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
    UNSUPPORTED_PARAMETER = "unsupported_parameter"
    NOT_FOUND = "not_found"
    UNAUTHENTICATED = "unauthenticated"
    TOO_LARGE = "request_too_large"
    CONFIG = "config_error"
    UNAVAILABLE = "unavailable"
    OVERLOADED = "overloaded"
    REFUSED = "refused"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    ABORTED = "aborted"
    FENCED = "fenced"
    TRANSFER_FAILED = "transfer_failed"
    INSTANCE_LOST = "instance_lost"
    INTERNAL = "internal"


class Stage(enum.StrEnum):
    """Where in a request's life an error happened."""

    CONFIG = "config"
    GATEWAY = "gateway"
    PLACEMENT = "placement"
    PREFILL = "prefill"
    HANDOFF = "handoff"
    DECODE = "decode"
    CONTROL = "control"


class BatonError(Exception):
    """Base of all errors that a user of Baton can meet."""

    code: Code = Code.INTERNAL
    retryable: bool = False

    def __init__(
        self,
        message: str,
        *,
        stage: Stage = Stage.GATEWAY,
        param: str | None = None,
        code: Code | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.stage = stage
        self.param = param
        self.retry_after_s = retry_after_s
        if code is not None:
            self.code = code


class InvalidRequest(BatonError):
    """The caller must change the request; ``param`` names the field."""

    code = Code.INVALID_REQUEST


class NotFound(BatonError):
    """No such model, instance or request."""

    code = Code.NOT_FOUND


class ConfigError(BatonError):
    """A setting, a file or a port is wrong; the message says which and what to do."""

    code = Code.CONFIG

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message, stage=Stage.CONFIG, param=param)


class Unavailable(BatonError):
    """Nothing can serve this now; retry after ``retry_after_s``."""

    code = Code.UNAVAILABLE
    retryable = True


class Overloaded(BatonError):
    """Shed by admission control: more is asked for than can be served in time.

    Retry after ``retry_after_s``.
    """

    code = Code.OVERLOADED
    retryable = True


class Refused(BatonError):
    """An instance will not take this work (wrong role, draining, full); place it elsewhere."""

    code = Code.REFUSED
    retryable = True


class DeadlineExceeded(BatonError):
    """The request's time budget ran out."""

    code = Code.DEADLINE_EXCEEDED


class Aborted(BatonError):
    """The client went away, cancelled, or a stop string ended the request."""

    code = Code.ABORTED


class Fenced(BatonError):
    """A message of an older attempt or incarnation; its sender must stop."""

    code = Code.FENCED


class TransferFailed(BatonError):
    """KV bytes did not arrive in time or did not verify; the receiver recomputes.

    ``fault``: a word of ``kvpool.transport.TransferFault``, by which it is counted.
    """

    code = Code.TRANSFER_FAILED
    retryable = True

    def __init__(
        self,
        message: str,
        *,
        stage: Stage = Stage.GATEWAY,
        param: str | None = None,
        code: Code | None = None,
        fault: str = "other",
    ) -> None:
        super().__init__(message, stage=stage, param=param, code=code)
        self.fault = fault


class InstanceLost(BatonError):
    """The instance that served the request died or froze."""

    code = Code.INSTANCE_LOST
    retryable = True


class RankLost(InstanceLost):
    """A rank died, froze or failed, and its instance with it; the message names the rank."""

    def __init__(self, message: str, *, stage: Stage = Stage.CONTROL) -> None:
        super().__init__(message, stage=stage)


ERRORS_BY_CODE: dict[Code, type[BatonError]] = {
    Code.INVALID_REQUEST: InvalidRequest,
    Code.CONTEXT_LENGTH_EXCEEDED: InvalidRequest,
    Code.UNSUPPORTED_PARAMETER: InvalidRequest,
    Code.UNAUTHENTICATED: InvalidRequest,
    Code.TOO_LARGE: InvalidRequest,
    Code.NOT_FOUND: NotFound,
    Code.CONFIG: ConfigError,
    Code.UNAVAILABLE: Unavailable,
    Code.OVERLOADED: Overloaded,
    Code.REFUSED: Refused,
    Code.DEADLINE_EXCEEDED: DeadlineExceeded,
    Code.ABORTED: Aborted,
    Code.FENCED: Fenced,
    Code.TRANSFER_FAILED: TransferFailed,
    Code.INSTANCE_LOST: InstanceLost,
    Code.INTERNAL: BatonError,
}


def error_from_code(
    code: str, message: str, *, stage: str = Stage.GATEWAY, param: str | None = None
) -> BatonError:
    """Rebuild an error that crossed a process boundary. Unknown codes become ``INTERNAL``."""
    known = Code(code) if code in Code._value2member_map_ else Code.INTERNAL
    where = Stage(stage) if stage in Stage._value2member_map_ else Stage.GATEWAY
    if known is Code.CONFIG:
        return ConfigError(message, param=param)
    return ERRORS_BY_CODE[known](message, stage=where, param=param, code=known)
