"""Frames between driver and ranks."""

from __future__ import annotations

import concurrent.futures
import socket
import struct
from pathlib import Path
from typing import Any

import pytest

from baton.core.errors import Code, ConfigError, RankLost
from baton.core.request import SamplingParams, TokenLogprobs
from baton.engine.parallel import wire
from baton.engine.parallel.wire import Failure, Kind, Link
from baton.engine.plan import RowResult, SequenceStep, SlotBegin, StepPlan, StepResult

SECRET = wire.new_secret()
PLAN = StepPlan(
    7,
    (
        SlotBegin(0, SamplingParams(seed=2**64 - 1, stop_token_ids=(3,)), (1, 2, 2**31), ()),
        SlotBegin(3, SamplingParams(temperature=0.0, logprobs=4), (5,), (6, 7)),
    ),
    (
        SequenceStep(0, 0, (1, 2, 2**31), (9, 4), sample=False, prompt_logprobs=True),
        SequenceStep(3, 130, None, tuple(range(9)), sample=True, uniform=0.1),
        SequenceStep(4, 8, (), (2, 1), sample=True, uniform=1 - 2**-53),
    ),
)
RESULT = StepResult(
    7,
    (
        RowResult(None, None, (TokenLogprobs(4, -0.25, 1, ((4, -0.25), (5, -2.0))),)),
        RowResult(11, TokenLogprobs(11, -1e-9, 1)),
        RowResult(12),
    ),
    0.125,
)


def test_steps_arrive_as_they_were() -> None:
    assert wire.decode_step(wire.encode_step(PLAN, (3, 0, 5))) == (PLAN, (3, 0, 5))
    assert wire.decode_step(wire.encode_step(None, (0, 1))) == (None, (0, 1))


def test_answers_arrive_as_they_were() -> None:
    assert wire.decode_result(wire.encode_result(RESULT)) == RESULT
    assert wire.encode_result(None) == b""
    assert wire.decode_result(b"") is None
    failure = Failure("no room", Code.CONFIG, "num_blocks", lost_peer=True)
    assert wire.decode_failure(wire.encode_failure(failure)) == failure


class Driver:
    """Listens, and takes one connection in."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "ranks")
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen()
        self._listener.settimeout(10)

    def take(self) -> tuple[int, Link] | None:
        with self._listener:
            return wire.accept(self._listener.accept()[0], SECRET, num_ranks=4)


@pytest.fixture
def driver(tmp_path: Path) -> Driver:
    return Driver(tmp_path)


def joined(driver: Driver, rank: int = 2) -> tuple[Link, Link]:
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        taken = pool.submit(driver.take)
        ours = wire.connect(driver.path, rank, SECRET, 10)
        answer = taken.result(10)
    assert answer is not None
    assert answer[0] == rank
    return ours, answer[1]


def test_frames_both_ways(driver: Driver) -> None:
    ours, theirs = joined(driver)
    # More than a socket's buffer holds.
    large = bytes(range(256)) * 40_000
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        for wait in (True, False):
            arrived = pool.submit(ours.receive, wait=wait)
            theirs.send(Kind.STEP, large)
            assert arrived.result(10) == (Kind.STEP, large)
    ours.send(Kind.DONE)
    ours.send(Kind.FAILED, b"x")
    assert theirs.receive() == (Kind.DONE, b"")
    assert theirs.receive() == (Kind.FAILED, b"x")
    ours.close()
    with pytest.raises(EOFError):
        theirs.receive()
    theirs.close()
    theirs.close()


def test_an_absurd_length_is_refused(driver: Driver) -> None:
    ours, theirs = joined(driver)
    ours._socket.sendall(struct.pack("<IB", 2**32 - 1, 5))
    with pytest.raises(OSError, match="not one of ours"):
        theirs.receive()
    ours.close()
    theirs.close()


STRANGERS = {
    "another secret": (2, bytes(wire.SECRET_BYTES)),
    "a rank that does not exist": (4, SECRET),
}


@pytest.mark.parametrize("hello", STRANGERS.values(), ids=STRANGERS)
def test_strangers_are_turned_away(driver: Driver, hello: tuple[int, bytes]) -> None:
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        taken = pool.submit(driver.take)
        with pytest.raises(RankLost, match="not let in"):
            wire.connect(driver.path, *hello, 10)
        assert taken.result(10) is None


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\n", b"x" * 4096])
def test_garbage_is_turned_away(driver: Driver, said: bytes) -> None:
    with concurrent.futures.ThreadPoolExecutor(1) as pool, socket.socket(socket.AF_UNIX) as sock:
        taken = pool.submit(driver.take)
        sock.connect(driver.path)
        sock.sendall(said)
        sock.shutdown(socket.SHUT_WR)
        assert taken.result(10) is None


def test_another_release_is_told_so(driver: Driver) -> None:
    """Each end speaks its own version, and both say what to do."""
    hello: Any = struct.pack(f"<8sHI{wire.SECRET_BYTES}s", b"batonrnk", 99, 2, SECRET)
    with concurrent.futures.ThreadPoolExecutor(1) as pool, socket.socket(socket.AF_UNIX) as sock:
        taken = pool.submit(driver.take)
        sock.connect(driver.path)
        sock.sendall(hello)
        assert sock.recv(64) == struct.pack("<8sH", b"batonrnk", wire.WIRE_VERSION)
        with pytest.raises(ConfigError, match=r"version 99 .* same release"):
            taken.result(10)


def test_no_driver(tmp_path: Path) -> None:
    with pytest.raises(RankLost, match="rank 1 is not let in"):
        wire.connect(str(tmp_path / "nobody"), 1, SECRET, 10)
