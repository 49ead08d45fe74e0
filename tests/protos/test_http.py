"""The HTTP server that every process uses: ports, stopping, slow clients."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Any

import httpx
import pytest

from baton.core.errors import ConfigError
from protos.http import HttpServer

BIG_BYTES = 64 << 20


class App:
    """Answers at once, holds the answer until told, or sends more than sockets buffer."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.entered = asyncio.Event()
        self.cancelled = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.entered.set()
        try:
            if scope["path"] == "/hold":
                await self.go.wait()
            body = bytes(BIG_BYTES) if scope["path"] == "/big" else b"ok"
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": body})
        except asyncio.CancelledError:
            self.cancelled.set()
            raise


async def test_serves_and_stops_at_once_when_idle() -> None:
    server = HttpServer(App(), host="127.0.0.1")
    address = await server.start()
    async with httpx.AsyncClient(base_url=f"http://{address}") as client:
        assert (await client.get("/")).text == "ok"
        # The client's connection is still open, and idle.
        async with asyncio.timeout(1.0):
            await server.stop()
    await server.stop()
    assert "ended" in str(await server.wait_failed())
    host, _, port = address.rpartition(":")
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind((host, int(port)))


async def test_small_writes_leave_at_once() -> None:
    seen: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        transport = send.__self__.transport
        connection = transport.get_extra_info("socket")
        seen.append(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    server = HttpServer(app, host="127.0.0.1")
    address = await server.start()
    async with httpx.AsyncClient() as client:
        assert (await client.get(f"http://{address}/")).status_code == 204
    await server.stop()
    assert seen == [1]


async def test_a_port_in_use_is_refused_by_name() -> None:
    server = HttpServer(App(), host="127.0.0.1")
    port = int((await server.start()).rpartition(":")[2])
    with pytest.raises(ConfigError, match=rf"grid_port {port} on 127.0.0.1") as caught:
        await HttpServer(App(), host="127.0.0.1", port=port, setting="grid_port").start()
    assert caught.value.param == "grid_port"
    await server.stop()


async def test_open_calls_may_end() -> None:
    app = App()
    server = HttpServer(app, host="127.0.0.1", stop_grace_s=30.0)
    address = await server.start()
    async with httpx.AsyncClient(base_url=f"http://{address}") as client:
        call = asyncio.create_task(client.get("/hold"))
        await app.entered.wait()
        stop = asyncio.create_task(server.stop())
        await asyncio.sleep(0)  # the stop begins
        with pytest.raises(httpx.ConnectError):
            await httpx.AsyncClient().get(f"http://{address}/")
        app.go.set()
        assert (await call).text == "ok"
        await stop


async def test_open_calls_that_do_not_end_are_cancelled() -> None:
    app = App()
    server = HttpServer(app, host="127.0.0.1", stop_grace_s=0.0)
    address = await server.start()
    async with httpx.AsyncClient(base_url=f"http://{address}") as client:
        call = asyncio.create_task(client.get("/hold"))
        await app.entered.wait()
        await server.stop()
        assert app.cancelled.is_set()
        await asyncio.gather(call, return_exceptions=True)


async def test_a_client_that_does_not_read_is_cut() -> None:
    app = App()
    server = HttpServer(app, host="127.0.0.1", stop_grace_s=1.0)
    host, _, port = (await server.start()).rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
    writer.write(b"GET /big HTTP/1.1\r\nhost: x\r\n\r\n")
    await app.entered.wait()
    await server.stop()
    num_read = 0
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(1 << 20):
            num_read += len(data)
    assert num_read < BIG_BYTES
    writer.close()
