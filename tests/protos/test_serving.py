from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from protos.serving import ServerThread, channel_options, server_options


class Probe:
    """A service that records what is done to it, and breaks when told."""

    def __init__(
        self, *, start_error: Exception | None = None, hang: bool = False, bad_stop: bool = False
    ) -> None:
        self.calls: list[str] = []
        self._start_error = start_error
        self._hang = hang
        self._bad_stop = bad_stop
        self.broken: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()

    async def start(self) -> str:
        self.calls.append("start")
        if self._start_error is not None:
            raise self._start_error
        if self._hang:
            try:
                await asyncio.Event().wait()
            finally:
                self.calls.append("cancelled")
        return "started"

    async def stop(self) -> None:
        self.calls.append("stop")
        if self._bad_stop:
            raise OSError("cannot stop")

    async def wait_failed(self) -> BaseException:
        return await asyncio.shield(self.broken)

    async def double(self, value: int) -> int:
        return 2 * value


class Made:
    """Keeps the service that a thread made."""

    def __init__(self, **kwargs: Any) -> None:
        self.service: Probe | None = None
        self._kwargs = kwargs

    def __call__(self) -> Probe:
        self.service = Probe(**self._kwargs)
        return self.service

    @property
    def calls(self) -> list[str]:
        assert self.service is not None
        return self.service.calls


def test_start_call_stop() -> None:
    made, failures = Made(), list[BaseException]()
    thread = ServerThread("probe", made)
    thread.on_failure = failures.append
    thread.start(5)
    assert thread.call(lambda service: service.double(21), 5) == 42
    thread.stop(5)
    thread.stop(5)
    assert made.calls == ["start", "stop"]
    assert failures == []
    assert "probe" not in {one.name for one in threading.enumerate()}
    with pytest.raises(RuntimeError, match="not running"):
        thread.call(lambda service: service.double(1), 5)


def test_errors_of_the_start_are_raised() -> None:
    made, failures = Made(start_error=ValueError("port taken")), list[BaseException]()
    thread = ServerThread("probe", made)
    thread.on_failure = failures.append
    with pytest.raises(ValueError, match="port taken"):
        thread.start(5)
    thread.stop(5)
    assert made.calls == ["start"]
    assert failures == []


def test_errors_of_the_factory_are_raised() -> None:
    def factory() -> Probe:
        raise ValueError("bad setting")

    with pytest.raises(ValueError, match="bad setting"):
        ServerThread("probe", factory).start(5)


def test_a_start_that_hangs_is_given_up() -> None:
    made = Made(hang=True)
    thread = ServerThread("probe", made)
    with pytest.raises(TimeoutError, match=r"did not start within 0\.05 s"):
        thread.start(0.05)
    thread.stop(5)
    assert made.calls == ["start", "cancelled"]


def test_a_service_that_breaks_is_stopped_and_told() -> None:
    made, failures, told = Made(), list[BaseException](), threading.Event()
    thread = ServerThread("probe", made)

    def on_failure(error: BaseException) -> None:
        failures.append(error)
        told.set()

    thread.on_failure = on_failure
    thread.start(5)

    async def break_it(service: Probe) -> None:
        service.broken.set_result(RuntimeError("socket closed"))

    thread.call(break_it, 5)
    assert told.wait(5)
    thread.stop(5)
    assert [str(error) for error in failures] == ["socket closed"]
    assert made.calls == ["start", "stop"]


def test_calls_raise_what_the_coroutine_raised_or_time_out() -> None:
    thread = ServerThread("probe", Made())
    thread.start(5)

    async def fail(service: Probe) -> None:
        raise KeyError("x")

    async def late(service: Probe) -> None:
        raise TimeoutError("of its own")

    async def hang(service: Probe) -> None:
        await asyncio.Event().wait()

    with pytest.raises(KeyError):
        thread.call(fail, 5)
    with pytest.raises(TimeoutError, match="of its own"):
        thread.call(late, 5)
    with pytest.raises(TimeoutError, match="did not answer within"):
        thread.call(hang, 0.05)
    thread.stop(5)


def test_a_call_under_way_at_the_stop_ends() -> None:
    thread = ServerThread("probe", Made())
    thread.start(5)
    entered, outcome = threading.Event(), list[str]()

    async def hang(service: Probe) -> None:
        entered.set()
        await asyncio.Event().wait()

    def call() -> None:
        try:
            thread.call(hang, 30)
        except RuntimeError as error:
            outcome.append(str(error))

    caller = threading.Thread(target=call, daemon=True)
    caller.start()
    assert entered.wait(5)
    thread.stop(5)
    caller.join(5)
    assert outcome == ["probe stopped during the call"]


def test_a_second_start_is_a_bug() -> None:
    thread = ServerThread("probe", Made())
    thread.start(5)
    with pytest.raises(RuntimeError, match="started before"):
        thread.start(5)
    thread.stop(5)


def test_ports_are_never_shared_and_messages_bounded() -> None:
    assert dict(server_options())["grpc.so_reuseport"] == 0
    for options in (server_options(), channel_options()):
        assert dict(options)["grpc.max_receive_message_length"] == 64 << 20
