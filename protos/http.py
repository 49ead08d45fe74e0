"""An ASGI app on the caller's event loop: uvicorn without its signal handlers and its ticking.

The one way in which Baton's processes serve HTTP: the gateway's door, and everyone's metrics.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn

from baton.core.errors import ConfigError
from protos.serving import connectable

STOP_GRACE_S = 3.0
_START_TIMEOUT_S = 10.0
_BACKLOG = 2048
# For a call that was cancelled to clean up after itself.
_CANCEL_S = 1.0
_FLUSH_POLL_S = 0.01
_STOP_SLACK_S = _CANCEL_S + 0.5


class _EventServer(uvicorn.Server):
    """Sleeps until told to stop, and while open calls end; uvicorn itself looks now and then.

    Its main loop only watches a flag and renews a date header, which is off here.
    """

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.up = asyncio.Event()
        self.exit = asyncio.Event()

    async def main_loop(self) -> None:
        self.up.set()
        await self.exit.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        for listening in sockets or ():
            listening.close()
        # Idle connections end at once, busy ones after their answer.
        for connection in list(self.server_state.connections):
            connection.shutdown()
        loop = asyncio.get_running_loop()
        cut_at_s = loop.time() + (self.config.timeout_graceful_shutdown or 0)
        if self.server_state.tasks:
            _, late = await asyncio.wait(self.server_state.tasks, timeout=cut_at_s - loop.time())
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late, timeout=_CANCEL_S)
        # What was answered still has to leave; a client that does not read is cut in the end.
        # asyncio tells nobody of a flushed transport, hence the (short, bounded) polling.
        while self.server_state.connections and loop.time() < cut_at_s:  # noqa: ASYNC110
            await asyncio.sleep(_FLUSH_POLL_S)
        for connection in list(self.server_state.connections):
            if connection.transport is not None:
                connection.transport.abort()

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
        stop_grace_s: how long :meth:`stop` lets open calls go on; whole seconds.
    """

    def __init__(
        self,
        app: Any,
        *,
        host: str,
        port: int = 0,
        setting: str = "http_port",
        stop_grace_s: float = STOP_GRACE_S,
    ) -> None:
        self._app = app
        self._host = host
        self._port = port
        self._setting = setting
        self._stop_grace_s = math.ceil(stop_grace_s)
        self._server: _EventServer | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> str:
        """Bind and serve; returns the address for others to dial, once calls are accepted.

        Raises ConfigError, and holds nothing, if the port cannot be had.
        """
        bound = self._bind()
        config = uvicorn.Config(
            self._app,
            http="httptools",
            ws="none",
            loop="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            date_header=False,
            timeout_graceful_shutdown=self._stop_grace_s,
        )
        self._server = server = _EventServer(config)
        self._task = asyncio.create_task(server.serve(sockets=[bound]), name="http server")
        up = asyncio.create_task(server.up.wait())
        try:
            await asyncio.wait(
                {up, self._task}, timeout=_START_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED
            )
            if self._task.done():
                self._task.result()
            if not server.up.is_set():
                raise TimeoutError(f"the HTTP server did not start within {_START_TIMEOUT_S:g} s")
        except BaseException:
            self._task.cancel()
            bound.close()
            raise
        finally:
            up.cancel()
        return f"{connectable(self._host)}:{bound.getsockname()[1]}"

    async def stop(self) -> None:
        """Stop accepting, let open calls end within the grace, cut the rest. Idempotent."""
        if self._server is None or self._task is None:
            return
        server, self._server = self._server, None
        server.should_exit = True
        server.exit.set()
        await asyncio.wait([self._task], timeout=self._stop_grace_s + _STOP_SLACK_S)
        self._task.cancel()

    async def wait_failed(self) -> BaseException:
        """Return why serving ended by itself; never returns before that. Only after start."""
        assert self._task is not None, "not started"
        await asyncio.wait({self._task})
        error = None if self._task.cancelled() else self._task.exception()
        return error or RuntimeError("the HTTP server ended")

    def _bind(self) -> socket.socket:
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        # asyncio turns Nagle's algorithm off only for sockets that say they are TCP's; with it,
        # an event of a stream waits for the acknowledgement of the one before.
        bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            # Lets a restarted process take its port back at once; never shares a live one.
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind((self._host, self._port))
            # Listening makes the second of two binders fail here and not later.
            bound.listen(_BACKLOG)
            bound.setblocking(False)
        except OSError as error:
            bound.close()
            raise ConfigError(
                f"{self._setting} {self._port} on {self._host} cannot be used "
                f"({error.strerror}); choose another or stop what uses it",
                param=self._setting,
            ) from error
        return bound
