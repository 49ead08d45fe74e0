"""Answers over ASGI that notice at once when their client goes away.

While no token comes there is nothing to send, so a broken connection is only seen by listening:
each answer runs beside a task that waits for ``http.disconnect``, and is cancelled by it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from baton.core.errors import BatonError
from baton.gateway.errors import as_baton_error, error_body, error_headers, http_status
from baton.gateway.openai_format import AnswerFormat
from baton.gateway.service import SEND_GRACE_S, ChoiceDelta

_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]

Deltas = AsyncGenerator[ChoiceDelta, None]


class AnswerResponse(Response):
    """Runs a generation and answers with it: one JSON body, or a stream of events.

    The status waits for the first delta, so that a request that cannot be placed gets a proper
    status also when it asked for a stream; later errors become the stream's last event.
    """

    def __init__(self, deltas: Callable[[], Deltas], answer: AnswerFormat, *, stream: bool) -> None:
        """``deltas`` is called once, when the answer begins."""
        self.status_code = 200
        self.background = None
        self.init_headers()
        self._deltas = deltas
        self._answer = answer
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        serve = self._serve_stream if self._stream else self._serve_whole

        async def work() -> None:
            async with asyncio.timeout(self._answer.request.timeout_s + SEND_GRACE_S):
                await serve(scope, receive, send)

        await _until_disconnect(receive, work)

    async def _serve_whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        response: Response
        try:
            async with contextlib.aclosing(self._deltas()) as deltas:
                collected = [delta async for delta in deltas]
            response = JSONResponse(self._answer.body(collected))
        except Exception as error:
            response = error_response(as_baton_error(error))
        await response(scope, receive, send)

    async def _serve_stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False
        try:
            async with contextlib.aclosing(self._deltas()) as deltas:
                async for delta in deltas:
                    if not started:
                        started = True
                        await _send_start(send)
                    await _send_event(send, self._answer.chunk(delta), event_id=delta.index)
                if self._answer.shown.include_usage:
                    await _send_event(send, self._answer.usage_chunk())
            await _send_body(send, b"data: [DONE]\n\n")
        except OSError:
            return  # the client is gone; the watcher says so too
        except Exception as problem:
            error = as_baton_error(problem)
            if not started:
                await error_response(error)(scope, receive, send)
                return
            await _send_event(send, error_body(error))
        await _send_body(send, b"", more=False)


def error_response(error: BatonError, *, status: int | None = None) -> JSONResponse:
    """An error as OpenAI clients read it."""
    return JSONResponse(
        error_body(error, status=status),
        status_code=status or http_status(error),
        headers=error_headers(error),
    )


async def _send_start(send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})


async def _send_event(send: Send, data: dict[str, Any], *, event_id: int | None = None) -> None:
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    prefix = "" if event_id is None else f"id: {event_id}\n"
    await _send_body(send, f"{prefix}data: {text}\n\n".encode())


async def _send_body(send: Send, body: bytes, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})


async def _until_disconnect(receive: Receive, work: Callable[[], Awaitable[None]]) -> None:
    """Run ``work`` to its end, or cancel it when the client goes away. The body must be read."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    worker = asyncio.ensure_future(work())
    watcher = asyncio.ensure_future(watch())
    try:
        await asyncio.wait({worker, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if worker.done():
            worker.result()
    finally:
        worker.cancel()
        watcher.cancel()
        await asyncio.gather(worker, watcher, return_exceptions=True)
