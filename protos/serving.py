"""How Baton's processes serve: gRPC options in one place, and an asyncio server in a thread.

A Ray actor's constructor must return, and its methods run on Ray's threads, so the real server (a
plain class with ``async start`` and ``async stop``) lives on an event loop of its own in a daemon
thread. :class:`ServerThread` is that thread: a bounded start that raises what the service raised,
coroutines run on its loop from other threads, a bounded stop, and a callback when the service
breaks by itself.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import importlib
import logging
import os
import socket
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeVar

import grpc

from baton.core.errors import ConfigError

log = logging.getLogger(__name__)

T = TypeVar("T")

MAX_MESSAGE_BYTES = 64 << 20


def server_options() -> list[tuple[str, int]]:
    """Options of every gRPC server.

    ``so_reuseport`` is off: with it two servers can share a port and each gets half the calls.
    """
    return [
        ("grpc.so_reuseport", 0),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.keepalive_time_ms", 10_000),
        ("grpc.keepalive_timeout_ms", 5_000),
        ("grpc.keepalive_permit_without_calls", 1),
        # The clients' own keepalive must not count as abuse.
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.default_compression_algorithm", int(grpc.Compression.NoCompression)),
    ]


def channel_options() -> list[tuple[str, int]]:
    """Options of every gRPC channel.

    Reconnects back off from 50 ms to 1 s: members of a cluster come back quickly or not at all.
    Each channel has its own subchannel pool, so that closing one never waits for another's.
    """
    return [
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.keepalive_time_ms", 10_000),
        ("grpc.keepalive_timeout_ms", 5_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 50),
        # Not a pause, whatever its name says: how long an attempt may take at least. A busy
        # machine needs more than a moment to answer, and calls fail when an attempt does.
        ("grpc.min_reconnect_backoff_ms", 2_000),
        ("grpc.max_reconnect_backoff_ms", 1_000),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_http_proxy", 0),
        ("grpc.default_compression_algorithm", int(grpc.Compression.NoCompression)),
    ]


def connectable(host: str) -> str:
    """A bound host as others can dial it: never the wildcard, and IPv6 in brackets."""
    if host in ("0.0.0.0", "::"):
        return socket.gethostname()
    return f"[{host}]" if ":" in host else host


class Service(Protocol):
    """A server that lives on one event loop. Made, started and stopped on that loop."""

    async def start(self) -> object:
        """Bind and serve; returns once requests are accepted. Holds nothing if it raises.

        May be cancelled; what it returns is ignored here.
        """

    async def stop(self) -> None:
        """Release everything; bounded. Called once, also after a failure, not if start raised."""

    async def wait_failed(self) -> BaseException:
        """Return why the service broke by itself; never returns while it is well."""


class ServerThread:
    """Runs one :class:`Service` on its own event loop in a daemon thread.

    ``factory`` is called on the loop. ``on_failure`` (set it before ``start``) is called in the
    server's thread, once, with the reason, if the service breaks after it started; the service
    has been stopped by then. It is never called for a failed ``start`` or after ``stop``.
    """

    def __init__(self, name: str, factory: Callable[[], Service]) -> None:
        self.name = name
        self.on_failure: Callable[[BaseException], None] | None = None
        self._factory = factory
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._service: Service | None = None
        self._stopping: asyncio.Event | None = None
        self._stop_requested = False
        self._started: concurrent.futures.Future[None] = concurrent.futures.Future()

    def start(self, timeout_s: float) -> None:
        """Start and wait until the service serves.

        Raises what the service's factory or ``start`` raised, or TimeoutError after ``timeout_s``
        (the half-started service is then cancelled). Call once.
        """
        if self._thread is not None:
            raise RuntimeError(f"{self.name} was started before")
        self._thread = threading.Thread(target=self._run, name=self.name, daemon=True)
        self._thread.start()
        try:
            self._started.result(timeout_s)
        except concurrent.futures.TimeoutError as error:
            if not self._started.done():
                self._request_stop()
                raise TimeoutError(f"{self.name} did not start within {timeout_s:g} s") from error
            raise

    def call(self, coro_factory: Callable[[Any], Coroutine[Any, Any, T]], timeout_s: float) -> T:
        """Run a coroutine of the service on its loop, from another thread, and return its result.

        Raises what it raised, TimeoutError after ``timeout_s`` (it is cancelled then), or
        RuntimeError if the service is not running.
        """
        loop, service = self._loop, self._service
        if loop is None or service is None or not self.alive:
            raise RuntimeError(f"{self.name} is not running")

        async def run() -> T:
            return await coro_factory(service)

        coroutine = run()
        try:
            future = asyncio.run_coroutine_threadsafe(coroutine, loop)
        except RuntimeError:
            coroutine.close()
            raise RuntimeError(f"{self.name} is not running") from None
        try:
            return future.result(timeout_s)
        except concurrent.futures.TimeoutError as error:
            if future.done() and not future.cancelled():
                raise
            future.cancel()
            raise TimeoutError(f"{self.name} did not answer within {timeout_s:g} s") from error
        except concurrent.futures.CancelledError:
            raise RuntimeError(f"{self.name} stopped during the call") from None

    def stop(self, timeout_s: float) -> None:
        """Stop the service and its thread. Idempotent. TimeoutError if it takes longer."""
        thread = self._thread
        if thread is None:
            return
        self._request_stop()
        if thread is threading.current_thread():
            return
        thread.join(timeout_s)
        if thread.is_alive():
            raise TimeoutError(f"{self.name} did not stop within {timeout_s:g} s")

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread is not None and self._thread.is_alive()

    def _request_stop(self) -> None:
        self._stop_requested = True
        loop, stopping = self._loop, self._stopping
        if loop is not None and stopping is not None:
            # The loop may have closed by itself in the meantime.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(stopping.set)

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=loop_factory()) as runner:
                failure = runner.run(self._main())
        except BaseException as error:
            failure = error
        if not self._started.done():
            self._started.set_exception(failure or RuntimeError(f"{self.name} was stopped"))
            return
        if failure is not None and self._started.exception() is None:
            log.error("%s failed: %r", self.name, failure)
            if self.on_failure is not None:
                self.on_failure(failure)

    async def _main(self) -> BaseException | None:
        """Serve until stopped (None) or broken (why)."""
        self._stopping = stopping = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        if self._stop_requested:
            stopping.set()
        stop_wait = asyncio.ensure_future(stopping.wait())
        service = self._factory()
        start = asyncio.ensure_future(service.start())
        await asyncio.wait([start, stop_wait], return_when=asyncio.FIRST_COMPLETED)
        if not start.done():
            start.cancel()
            await asyncio.wait([start])
        try:
            start.result()
        except asyncio.CancelledError:
            stop_wait.cancel()
            return None
        except BaseException:
            stop_wait.cancel()
            raise
        self._service = service
        failed = asyncio.ensure_future(service.wait_failed())
        self._started.set_result(None)
        await asyncio.wait([failed, stop_wait], return_when=asyncio.FIRST_COMPLETED)
        failure: BaseException | None = None
        if failed.done() and not stopping.is_set():
            failure = failed.exception() or failed.result()
        failed.cancel()
        stop_wait.cancel()
        try:
            await service.stop()
        except Exception as error:
            if stopping.is_set():
                log.exception("%s did not stop cleanly", self.name)
            else:
                failure = failure or error
        return failure


class HostedServer:
    """A service inside an actor process: what a Ray actor's constructor starts.

    The supervisor restarts an actor whose *process* ended, but not one whose constructor raised.
    So a wrong setting is kept and raised by every call (trying again cannot help), and any other
    failure, at the start or later, is logged and ends the process.
    """

    def __init__(
        self, name: str, factory: Callable[[], Service], *, start_timeout_s: float
    ) -> None:
        logging.basicConfig(
            level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
        )
        self._error: ConfigError | None = None
        self._thread = ServerThread(name, factory)
        self._thread.on_failure = self._end_process
        try:
            self._thread.start(start_timeout_s)
        except ConfigError as error:
            self._error = error
        except Exception as error:
            self._end_process(error)

    def call(self, coro_factory: Callable[[Any], Coroutine[Any, Any, T]], timeout_s: float) -> T:
        """See :meth:`ServerThread.call`. Raises the ConfigError that kept it from starting."""
        if self._error is not None:
            raise self._error
        return self._thread.call(coro_factory, timeout_s)

    def stop(self, timeout_s: float) -> None:
        """Release everything; the actor can then be killed."""
        self._thread.stop(timeout_s)

    def _end_process(self, error: BaseException) -> None:
        log.critical("%s cannot go on, ending the process", self._thread.name, exc_info=error)
        logging.shutdown()
        os._exit(1)


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    """uvloop's where it is installed, asyncio's elsewhere."""
    try:
        new_loop: Callable[[], asyncio.AbstractEventLoop] = importlib.import_module(
            "uvloop"
        ).new_event_loop
    except ImportError:
        new_loop = asyncio.new_event_loop
    return new_loop
