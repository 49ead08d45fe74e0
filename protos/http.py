"""An ASGI app on the caller's event loop: uvicorn without its signal handlers and its ticking."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn

from baton.core.errors import ConfigError

_STOP_TIMEOUT_S = 5.0
_START_TIMEOUT_S = 10.0


class _EventServer(uvicorn.Server):
    """Sleeps until told to stop; uvicorn's own loop wakes ten times a second to look."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.exit = asyncio.Event()

    async def main_loop(self) -> None:
        await self.on_tick(0)
        await self.exit.wait()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # Signals belong to the process's owner, not to one of its servers.
        yield


class HttpServer:
    """Serves one ASGI app on one port.

    Args:
        app: the ASGI application.
        host, port: where to bind; port 0 takes a free one.
        setting: the setting's name, for the error when the port is in use.
    """

    def __init__(self, app: Any, *, host: str, port: int = 0, setting: str = "http_port") -> None:
        self._app = app
        self._host = host
        self._port = port
        self._setting = setting
        self._server: _EventServer | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> str:
        """Bind and serve. Returns host:port. Raises ConfigError if the port is taken."""
        bound = socket.socket()
        try:
            # Lets a restarted process take its port back at once; never shares a live one.
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind((self._host, self._port))
            bound.listen(2048)
        except OSError as error:
            bound.close()
            raise ConfigError(
                f"{self._setting} {self._port} on {self._host} cannot be used "
                f"({error.strerror}); choose another or stop what uses it",
                param=self._setting,
            ) from error
        config = uvicorn.Config(
            self._app,
            lifespan="off",
            access_log=False,
            log_level="warning",
            date_header=False,
            http="httptools",
            timeout_graceful_shutdown=int(_STOP_TIMEOUT_S),
        )
        self._server = _EventServer(config)
        self._task = asyncio.ensure_future(self._server.serve(sockets=[bound]))
        host, port = bound.getsockname()[:2]
        return f"{host}:{port}"

    async def stop(self) -> None:
        """Stop accepting, let open calls end (bounded), close. Idempotent."""
        if self._server is None or self._task is None:
            return
        self._server.should_exit = True
        self._server.exit.set()
        await asyncio.wait([self._task], timeout=_STOP_TIMEOUT_S + 1.0)
        self._task.cancel()
