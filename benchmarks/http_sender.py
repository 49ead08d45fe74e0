"""A lean HTTP/1.1 client for streamed completions.

The client shares the machine with the cluster that it measures, so it must cost little: one
connection per request, C parsing (httptools, which uvicorn brings along), a time stamp when bytes
arrive and JSON only after the stream has ended.
"""

from __future__ import annotations

import asyncio
import json
import time
import urllib.parse
from typing import Any

import httptools

from benchmarks.outcome import Outcome
from benchmarks.workload import Prompt

SHED = {429, 503}


class _Exchange(asyncio.Protocol):
    """One request and its response; ``done`` is set when it has ended."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._parser = httptools.HttpResponseParser(self)
        self._now_s = 0.0
        self._transport: asyncio.Transport | None = None
        self.chunks: list[tuple[float, bytes]] = []
        self.status = 0
        self.complete = False
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._now_s = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._finish(error)

    def connection_lost(self, exc: Exception | None) -> None:
        self._finish(exc)

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self.chunks.append((self._now_s, body))

    def on_message_complete(self) -> None:
        self.complete = True
        self._finish(None)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _finish(self, error: Exception | None) -> None:
        if not self.done.done():
            if error is None:
                self.done.set_result(None)
            else:
                self.done.set_exception(error)


class HttpSender:
    """Streams ``/v1/completions`` of an OpenAI-compatible server at ``http://host:port``."""

    def __init__(self, url: str, model: str, *, temperature: float = 0.0) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise ValueError(f"the URL must be http://host:port, got {url!r}")
        self._host, self._port = parts.hostname, parts.port or 80
        self._path = parts.path.rstrip("/")
        self._model = model
        self._temperature = temperature

    async def send(self, prompt: Prompt, outcome: Outcome) -> None:
        """See :class:`benchmarks.outcome.Sender`."""
        body = json.dumps(
            {
                "model": self._model,
                "prompt": prompt,
                "max_tokens": outcome.num_wanted,
                "temperature": self._temperature,
                "ignore_eos": True,
                "return_token_ids": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        ).encode()
        try:
            exchange = await self._exchange("POST", "/v1/completions", body)
        except (OSError, httptools.HttpParserError) as error:
            outcome.fail("connection", f"{type(error).__name__}: {error}")
            return
        if exchange.status != 200:
            kind = "shed" if exchange.status in SHED else f"http_{exchange.status}"
            outcome.fail(kind, _text(exchange))
            return
        read_events(exchange.chunks, outcome)
        if not exchange.complete:
            outcome.fail("connection", "the connection closed inside the stream")

    async def model_info(self) -> dict[str, Any]:
        """The server's entry for the model. Raises LookupError or OSError."""
        exchange = await self._exchange("GET", "/v1/models", b"")
        if exchange.status != 200:
            raise LookupError(f"/v1/models answers {exchange.status}: {_text(exchange)}")
        entries: list[dict[str, Any]] = json.loads(_text(exchange))["data"]
        for entry in entries:
            if entry["id"] == self._model:
                return entry
        raise LookupError(f"no model {self._model!r}; there are {[e['id'] for e in entries]}")

    async def close(self) -> None:
        """Nothing is kept between requests."""

    async def _exchange(self, method: str, path: str, body: bytes) -> _Exchange:
        head = (
            f"{method} {self._path}{path} HTTP/1.1\r\nHost: {self._host}:{self._port}\r\n"
            "Content-Type: application/json\r\nAccept: */*\r\nConnection: close\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        ).encode()
        loop = asyncio.get_running_loop()
        _, exchange = await loop.create_connection(
            lambda: _Exchange(head + body), self._host, self._port
        )
        try:
            await exchange.done
        finally:
            exchange.close()
        return exchange


def _text(exchange: _Exchange) -> str:
    return b"".join(chunk for _, chunk in exchange.chunks).decode(errors="replace")


def read_events(chunks: list[tuple[float, bytes]], outcome: Outcome) -> None:
    """Read server-sent events; each has the time of the chunk that completed it."""
    buffer = b""
    finished = False
    num_completion_tokens: int | None = None
    for at_s, chunk in chunks:
        *events, buffer = (buffer + chunk).replace(b"\r\n", b"\n").split(b"\n\n")
        for event in events:
            for line in event.split(b"\n"):
                if not line.startswith(b"data:"):
                    continue
                data = line[5:].strip()
                if data == b"[DONE]":
                    continue
                message = json.loads(data)
                if "error" in message:
                    error = message["error"]
                    outcome.fail(f"error_{error.get('code') or 'event'}", str(error))
                    return
                if message.get("usage"):
                    num_completion_tokens = message["usage"]["completion_tokens"]
                for choice in message.get("choices", ()):
                    ids = choice.get("token_ids") or []
                    outcome.token_ids.extend(ids)
                    outcome.token_times_s.extend([at_s] * len(ids))
                    finished = finished or choice.get("finish_reason") is not None
    count = len(outcome.token_times_s)
    if not finished:
        outcome.fail("unfinished", f"the stream ended after {count} tokens, with no finish reason")
    elif num_completion_tokens is not None and num_completion_tokens != count:
        outcome.fail("miscounted", f"usage says {num_completion_tokens}, {count} tokens came")
    elif count != outcome.num_wanted:
        outcome.fail("short", f"{count} of {outcome.num_wanted} tokens")
