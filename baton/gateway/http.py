"""The HTTP door: OpenAI's endpoints, models, health, readiness and metrics."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from baton.core.clock import Clock
from baton.core.errors import (
    Aborted,
    Code,
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    Unavailable,
)
from baton.gateway.errors import as_baton_error
from baton.gateway.metrics import GatewayMetrics
from baton.gateway.openai_format import AnswerFormat, ChatFormat, CompletionFormat, Presentation
from baton.gateway.openai_types import ChatBody, CompletionBody, parse_body
from baton.gateway.requests import RequestChecker, RequestHead, check_request_id, is_request_id
from baton.gateway.service import InferenceService
from baton.gateway.service_levels import AskedLevel, with_headers
from baton.gateway.sse import AnswerResponse, error_response

BODY_TIMEOUT_S = 60.0
_DRAIN_BYTES = 16 * 1024 * 1024
"""How much of a body that is too large is still read, so that the client sees the answer."""

Body = TypeVar("Body", CompletionBody, ChatBody)


class HttpDoor:
    """The handlers. ``checker`` and ``why_not_ready`` are asked anew for each request."""

    def __init__(
        self,
        service: InferenceService,
        metrics: GatewayMetrics,
        clock: Clock,
        *,
        checker: Callable[[], RequestChecker],
        why_not_ready: Callable[[], str | None],
        created_s: int,
    ) -> None:
        self._service = service
        self._metrics = metrics
        self._clock = clock
        self._checker = checker
        self._why_not_ready = why_not_ready
        self._created_s = created_s

    def app(self) -> ASGIApp:
        """The ASGI application."""
        app = FastAPI(title="Baton", docs_url=None, redoc_url=None)
        post = {
            "/v1/completions": self._completions,
            "/v1/chat/completions": self._chat,
        }
        get: dict[str, Callable[[Request], Awaitable[Response]]] = {
            "/v1/models": self._models,
            "/v1/models/{model:path}": self._model,
            "/health": self._health,
            "/ready": self._ready,
            "/metrics": self._render_metrics,
        }
        for path, handler in post.items():
            app.add_api_route(path, handler, methods=["POST"], response_model=None)
        for path, reader in get.items():
            app.add_api_route(path, reader, methods=["GET"], response_model=None)
        app.add_exception_handler(HTTPException, _on_http_error)
        app.add_exception_handler(Exception, _on_bug)
        return _RequestIds(app)

    async def _completions(self, request: Request) -> Response:
        return await self._answer(request, "completions", self._parse_completion)

    async def _chat(self, request: Request) -> Response:
        return await self._answer(request, "chat", self._parse_chat)

    async def _answer(
        self,
        request: Request,
        endpoint: str,
        parse: Callable[[Request, float], Awaitable[tuple[AnswerFormat, bool]]],
    ) -> Response:
        received_s = self._clock.now()
        try:
            answer, stream = await parse(request, received_s)
            self._service.check_free(answer.request.request_id, param="x-request-id")
        except Exception as problem:
            error = as_baton_error(problem)
            self._metrics.requests.labels(endpoint, str(error.code)).inc()
            return error_response(error)
        return AnswerResponse(
            lambda: self._service.generate(answer.request, received_s=received_s),
            answer,
            stream=stream,
        )

    async def _parse_completion(
        self, request: Request, received_s: float
    ) -> tuple[AnswerFormat, bool]:
        checker = self._checker()
        body = parse_body(CompletionBody, await _read_json(request, checker))
        checked = await checker.completion(body, _head(request, body))
        shown = _presentation(body, checker, echo=bool(body.echo))
        return CompletionFormat(checked, shown, checker.tokenizer), bool(body.stream)

    async def _parse_chat(self, request: Request, received_s: float) -> tuple[AnswerFormat, bool]:
        checker = self._checker()
        body = parse_body(ChatBody, await _read_json(request, checker))
        checked = await checker.chat(body, _head(request, body))
        shown = _presentation(body, checker, echo=False)
        return ChatFormat(checked, shown, checker.tokenizer), bool(body.stream)

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model_card()]})

    async def _model(self, request: Request) -> Response:
        try:
            self._checker().check_model(request.path_params["model"])
        except NotFound as error:
            return error_response(error)
        return JSONResponse(self._model_card())

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _ready(self, request: Request) -> Response:
        reason = self._why_not_ready()
        if reason is None:
            return JSONResponse({"status": "ready"})
        return error_response(Unavailable(f"not ready: {reason}", retry_after_s=1.0))

    async def _render_metrics(self, request: Request) -> Response:
        text = self._metrics.render(self._clock.now())
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    def _model_card(self) -> dict[str, Any]:
        checker = self._checker()
        return {
            "id": checker.served_name,
            "object": "model",
            "created": self._created_s,
            "owned_by": "baton",
            "max_model_len": checker.max_model_len,
            "vocab_size": checker.model.vocab_size,
        }


class _RequestIds:
    """Puts ``x-request-id`` on every answer: the client's own, or a new one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state: MutableMapping[str, Any] = scope.setdefault("state", {})
        own = Headers(scope=scope).get("x-request-id", "")
        # An id that will be refused is not echoed.
        state["request_id"] = own if is_request_id(own) else uuid.uuid4().hex

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                header = (b"x-request-id", state["request_id"].encode())
                message = {**message, "headers": [*message.get("headers", ()), header]}
            await send(message)

        await self._app(scope, receive, send_with_id)


def _presentation(
    body: CompletionBody | ChatBody, checker: RequestChecker, *, echo: bool
) -> Presentation:
    return Presentation(
        model=checker.served_name,
        echo=echo,
        logprobs=body.logprobs is not None and body.logprobs is not False,
        return_token_ids=bool(body.return_token_ids),
        include_usage=body.stream_options is not None and body.stream_options.include_usage,
    )


def _head(request: Request, body: CompletionBody | ChatBody) -> RequestHead:
    asked = AskedLevel(
        service_class=body.service_class,
        ttft_s=body.ttft_s,
        tpot_s=body.tpot_s,
        deadline_s=body.deadline_s,
        priority=body.priority,
    )
    return RequestHead(
        _request_id(request, body), _timeout_s(request, body), with_headers(asked, request.headers)
    )


def _request_id(request: Request, body: CompletionBody | ChatBody) -> str:
    """The header's, the body's, or the new one; also for the answer's header."""
    header = request.headers.get("x-request-id")
    if header is not None:
        check_request_id(header, param="x-request-id")
    if body.request_id is not None:
        check_request_id(body.request_id, param="request_id")
        if header is not None and header != body.request_id:
            raise InvalidRequest("differs from the header x-request-id", param="request_id")
    chosen = body.request_id or request.state.request_id
    request.state.request_id = chosen
    return str(chosen)


def _timeout_s(request: Request, body: CompletionBody | ChatBody) -> float | None:
    asked = [] if body.timeout is None else [body.timeout]
    header = request.headers.get("x-request-timeout")
    if header is not None:
        try:
            asked.append(float(header))
        except ValueError:
            asked.append(0.0)
        if not 0 < asked[-1] < float("inf"):
            raise InvalidRequest(
                f"must be a positive number of seconds, got {header!r}", param="x-request-timeout"
            )
    return min(asked, default=None)


async def _read_json(request: Request, checker: RequestChecker) -> object:
    media_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if media_type != "application/json":
        raise InvalidRequest(
            f"content-type must be application/json, got {media_type or 'none'}",
            param="content-type",
        )
    raw = await _read_body(request, checker.limits.max_body_bytes)
    try:
        return json.loads(raw.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is not valid UTF-8 (byte {error.start})") from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None
    except ValueError as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from None


async def _read_body(request: Request, limit: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for part in request.stream():
                size += len(part)
                if size > limit + _DRAIN_BYTES:
                    break
                if size <= limit:
                    parts.append(part)
    except TimeoutError:
        raise DeadlineExceeded(f"no complete body within {BODY_TIMEOUT_S:g} s") from None
    except ClientDisconnect:
        raise Aborted("the client went away in the middle of the body") from None
    if size > limit:
        raise InvalidRequest(
            f"the body is larger than {limit} bytes (max_body_bytes)", code=Code.TOO_LARGE
        )
    return b"".join(parts)


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return error_response(NotFound(f"there is no {request.method} {request.url.path}"))
    status = error.status_code if error.status_code == 405 else 400
    text = f"{request.method} is not allowed for {request.url.path}"
    message = text if status == 405 else str(error.detail)
    response = error_response(InvalidRequest(message), status=status)
    for name, value in (error.headers or {}).items():
        response.headers[name] = value
    return response


async def _on_bug(request: Request, error: Exception) -> Response:
    return error_response(as_baton_error(error))
