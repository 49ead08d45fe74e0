"""Plans and results between an instance's driver and its ranks, over a Unix stream socket.

A rank connects and sends a fixed hello: magic, version, its number, the instance's secret. The
driver answers with its own magic and version, or closes. From then on both send frames: length
(uint32), kind (uint8), body. Bodies are pickles: both ends are processes of one instance that
have shown the secret, and pickled tuples of integers are the fastest that Python has: 0.17 ms to
encode and decode 64 decode rows with 64 blocks each, 0.35 ms for pickled dataclasses, 0.26 ms for
packed integers. ``benchmarks/plan_transport.py`` measures round trips.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import hmac
import pickle
import secrets
import socket
import struct
from typing import Any

from baton.core.errors import Code, ConfigError, RankLost
from baton.engine.memory import MemoryMap, MemoryNeeds
from baton.engine.plan import RowResult, SequenceStep, SlotBegin, StepPlan, StepResult

WIRE_VERSION = 1
SECRET_BYTES = 32

_MAGIC = b"batonrnk"
_HELLO = struct.Struct(f"<8sHI{SECRET_BYTES}s")
_WELCOME = struct.Struct("<8sH")
_HEADER = struct.Struct("<IB")
_MAX_FRAME_BYTES = 1 << 30
FRAME_TIMEOUT_S = 10.0
"""A frame is sent in one go, so what follows its first byte is under way."""


class Kind(enum.IntEnum):
    """What a frame asks or tells."""

    JOIN = 1
    """Driver: load and join the others. Body: rendezvous ``host:port``; None for rank 0 alone."""
    WARM_UP = 2
    """Driver: compute something, together with the others."""
    PROFILE = 3
    """Driver: run the largest steps, together with the others. Answer: ``encode_values``."""
    MEMORY = 4
    """Driver: account for your memory. Answer: ``encode_values``."""
    STEP = 5
    """Driver: see ``encode_step``."""
    EXIT = 6
    """Driver: leave the groups and end."""
    DONE = 7
    """Rank: done. Body: rank 0's rendezvous at first; a step's result from rank 0 of a group."""
    FAILED = 8
    """Rank: a ``Failure``. The rank computes nothing after it."""


@dataclasses.dataclass(frozen=True, slots=True)
class Failure:
    """Why a rank cannot go on."""

    message: str
    code: Code = Code.INTERNAL
    param: str | None = None
    lost_peer: bool = False
    """Another rank left it alone: that one is to blame."""


class Link:
    """One connection between driver and rank, after the handshake. One thread at each end."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    def fileno(self) -> int:
        """For ``poll``."""
        return self._socket.fileno()

    def peer_pid(self) -> int:
        """The process that made the connection, as the kernel knows it."""
        size = struct.calcsize("3i")
        credentials = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
        pid: int = struct.unpack("3i", credentials)[0]
        return pid

    def send(self, kind: Kind, body: bytes = b"") -> None:
        """Send a frame. OSError if it does not get away within ``FRAME_TIMEOUT_S``."""
        self._socket.settimeout(FRAME_TIMEOUT_S)
        self._socket.sendall(_HEADER.pack(len(body), kind) + body)

    def receive(self, *, wait: bool = False) -> tuple[Kind, bytes]:
        """The next frame: kind, body. Bounded, unless ``wait`` for the first byte without end.

        OSError where the frame does not come, EOFError where the other end is gone.
        """
        self._socket.settimeout(None if wait else FRAME_TIMEOUT_S)
        if wait:
            self._socket.recv(1, socket.MSG_PEEK)
            self._socket.settimeout(FRAME_TIMEOUT_S)
        length, kind = _HEADER.unpack(_read(self._socket, _HEADER.size))
        if length > _MAX_FRAME_BYTES:
            raise OSError(f"a frame of {length} bytes is not one of ours")
        return Kind(kind), _read(self._socket, length)

    def close(self) -> None:
        """Close; the other end sees it at once, even if a thread polls this one. Idempotent."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def new_secret() -> bytes:
    """For one instance: who knows it is one of its ranks."""
    return secrets.token_bytes(SECRET_BYTES)


def connect(path: str, rank: int, secret: bytes, timeout_s: float) -> Link:
    """A rank's end. RankLost if the driver is not there, ConfigError if it is another release."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout_s)
        sock.connect(path)
        sock.sendall(_HELLO.pack(_MAGIC, WIRE_VERSION, rank, secret))
        magic, version = _WELCOME.unpack(_read(sock, _WELCOME.size))
    except (OSError, EOFError) as error:
        sock.close()
        raise RankLost(f"rank {rank} is not let in by its driver at {path}: {error}") from error
    if (magic, version) != (_MAGIC, WIRE_VERSION):
        sock.close()
        raise ConfigError(
            f"the driver of rank {rank} speaks version {version} and the rank {WIRE_VERSION}: "
            "install the same release for both"
        )
    return Link(sock)


def accept(sock: socket.socket, secret: bytes, num_ranks: int) -> tuple[int, Link] | None:
    """The driver's end of an accepted connection: the rank that speaks, or None for a stranger.

    ConfigError for a rank of another release. Bounded; ``sock`` is closed unless a link is
    returned.
    """
    sock.settimeout(FRAME_TIMEOUT_S)
    try:
        magic, version, rank, shown = _HELLO.unpack(_read(sock, _HELLO.size))
        known = magic == _MAGIC and hmac.compare_digest(shown, secret) and rank < num_ranks
        if known:
            sock.sendall(_WELCOME.pack(_MAGIC, WIRE_VERSION))
    except (OSError, EOFError):
        known = False
    if not known:
        sock.close()
        return None
    if version != WIRE_VERSION:
        sock.close()
        raise ConfigError(
            f"rank {rank} speaks version {version} and its driver {WIRE_VERSION}: install the same "
            "release for both"
        )
    return rank, Link(sock)


def encode_step(plan: StepPlan | None, group_tokens: tuple[int, ...]) -> bytes:
    """Body of ``STEP``: what one dp group does, and the real tokens of all groups."""
    fields: tuple[Any, ...] | None = None
    if plan is not None:
        begins = [(b.slot, b.sampling, b.prompt_ids, b.output_ids) for b in plan.begins]
        rows = [
            (
                row.slot,
                row.start,
                row.token_ids,
                row.block_table,
                row.sample,
                row.uniform,
                row.prompt_logprobs,
            )
            for row in plan.rows
        ]
        fields = (plan.step, begins, rows)
    return pickle.dumps((fields, group_tokens), 5)


def decode_step(body: bytes) -> tuple[StepPlan | None, tuple[int, ...]]:
    """The inverse of ``encode_step``."""
    fields, group_tokens = pickle.loads(body)
    if fields is None:
        return None, group_tokens
    step, begins, rows = fields
    plan = StepPlan(
        step,
        tuple(SlotBegin(*begin) for begin in begins),
        tuple([SequenceStep(*row) for row in rows]),
    )
    return plan, group_tokens


def encode_result(result: StepResult | None) -> bytes:
    """Body of a step's ``DONE``; empty for None, which is not worth a pickle."""
    if result is None:
        return b""
    rows = [(row.token_id, row.logprobs, row.prompt_logprobs) for row in result.rows]
    return pickle.dumps((result.step, rows, result.seconds), 5)


def decode_result(body: bytes) -> StepResult | None:
    """The inverse of ``encode_result``."""
    if not body:
        return None
    step, rows, seconds = pickle.loads(body)
    return StepResult(step, tuple([RowResult(*row) for row in rows]), seconds)


def encode_failure(failure: Failure) -> bytes:
    """Body of ``FAILED``."""
    return pickle.dumps(dataclasses.astuple(failure), 5)


def decode_failure(body: bytes) -> Failure:
    """The inverse of ``encode_failure``."""
    return Failure(*pickle.loads(body))


def _read(sock: socket.socket, count: int) -> bytes:
    data = bytearray(count)
    view = memoryview(data)
    done = 0
    while done < count:
        got = sock.recv_into(view[done:])
        if not got:
            raise EOFError("the other end is gone")
        done += got
    return bytes(data)


def encode_values(value: MemoryNeeds | list[MemoryMap]) -> bytes:
    """Body of an answer to ``PROFILE`` or ``MEMORY``."""
    return pickle.dumps(value, 5)


def decode_needs(body: bytes) -> MemoryNeeds:
    """The answer to ``PROFILE``."""
    needs = pickle.loads(body)
    assert isinstance(needs, MemoryNeeds)
    return needs


def decode_maps(body: bytes) -> list[MemoryMap]:
    """The answer to ``MEMORY``."""
    maps: list[MemoryMap] = pickle.loads(body)
    return maps
