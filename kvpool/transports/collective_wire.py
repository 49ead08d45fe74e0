"""The words between the two sides of a collective pair, on a tcp connection beside the group.

Little-endian::

    reader    HELLO, layout text
    exporter  REPLY, message             of OK: "slice_bytes address", where the group meets
              both join the group; then, per pull:
    reader    PULL, num_copies x (block uint32, generation uint64)
    exporter  REPLY, message             status other than OK: the pull is over
              per slice: xxh3-64 of its bytes as uint64; the bytes themselves go through the group
              REPLY, message             OK: all generations are unchanged after the last byte

A pull has a random number, which the first reply to it repeats; the last one has the number after
it. So what comes twice, or is left of another pull, is not taken for an answer; replies to a hello
have number 0. A hello of ``slice_bytes`` 0 asks only whether the exporter is the one that is meant.
"""

from __future__ import annotations

import dataclasses
import enum
import socket
import struct
from collections.abc import Sequence

import numpy as np

from kvpool.transport import BlockCopy
from kvpool.transports.blocks import Budget

MAGIC = b"BKVG"
VERSION = 2
MAX_LAYOUT_BYTES = 1024
MAX_MESSAGE_BYTES = 1024

# magic, version, token, back end, bytes per slice, budget in ms, length of layout
HELLO = struct.Struct("<4sB32s16sIIH")
# number of copies, bytes per block, budget in ms, number
PULL = struct.Struct("<IQIQ")
# magic, version, status, length of message, number
REPLY = struct.Struct("<4sBBHQ")
CHECKSUM = struct.Struct("<Q")
_COPY = np.dtype([("block", "<u4"), ("generation", "<u8")])
_MAX_MS = 2**32 - 1


class Status(enum.IntEnum):
    """What the exporter says."""

    OK = 0
    STALE = 1
    LAYOUT = 2
    TOKEN = 3
    BAD_REQUEST = 4
    BACKEND = 5
    BUSY = 6


class BadMessage(Exception):
    """Bytes that are not this protocol's, or do not match their checksum."""


@dataclasses.dataclass(frozen=True, slots=True)
class Hello:
    """What a reader says of itself. ``budget_s``: how long it will wait for the pair."""

    token: bytes
    backend: str
    slice_bytes: int
    budget_s: float
    layout: str


@dataclasses.dataclass(frozen=True, slots=True)
class Pull:
    """What a reader asks for; the copies follow. ``budget_s``: how long it will wait for all."""

    num_copies: int
    block_bytes: int
    budget_s: float
    number: int


def send_hello(
    sock: socket.socket, token: str, backend: str, slice_bytes: int, layout: str, budget: Budget
) -> None:
    """Introduce the reader."""
    text = layout.encode()
    fixed = HELLO.pack(
        MAGIC,
        VERSION,
        token.encode(),
        backend.encode(),
        slice_bytes,
        _milliseconds(budget),
        len(text),
    )
    send(sock, fixed + text, budget)


def receive_hello(sock: socket.socket, budget: Budget) -> Hello:
    """Read an introduction. Raises BadMessage, ConnectionError, TimeoutError."""
    fixed = HELLO.unpack(receive(sock, HELLO.size, budget))
    magic, version, token, backend, slice_bytes, milliseconds, layout_length = fixed
    if magic != MAGIC or version != VERSION or layout_length > MAX_LAYOUT_BYTES:
        raise BadMessage("not a collective KV reader of this version")
    layout = receive(sock, layout_length, budget).decode(errors="replace")
    name = backend.rstrip(b"\0").decode(errors="replace")
    return Hello(token, name, slice_bytes, milliseconds / 1000, layout)


def send_pull(
    sock: socket.socket,
    copies: Sequence[BlockCopy],
    block_bytes: int,
    number: int,
    budget: Budget,
) -> None:
    """Ask for blocks."""
    table = np.empty(len(copies), dtype=_COPY)
    table["block"] = [copy.src for copy in copies]
    table["generation"] = [copy.generation for copy in copies]
    fixed = PULL.pack(len(copies), block_bytes, _milliseconds(budget), number)
    send(sock, fixed + table.tobytes(), budget)


def receive_pull(sock: socket.socket, budget: Budget) -> Pull:
    """Read what is asked for, without the copies."""
    fixed = PULL.unpack(receive(sock, PULL.size, budget))
    num_copies, block_bytes, milliseconds, number = fixed
    return Pull(num_copies, block_bytes, milliseconds / 1000, number)


def receive_copies(sock: socket.socket, num_copies: int, budget: Budget) -> list[BlockCopy]:
    """Read sources and generations; destinations are the reader's business and are 0 here."""
    table = np.frombuffer(receive(sock, num_copies * _COPY.itemsize, budget), dtype=_COPY)
    pairs = zip(table["block"].tolist(), table["generation"].tolist(), strict=True)
    return [BlockCopy(src=block, generation=generation, dst=0) for block, generation in pairs]


def send_reply(
    sock: socket.socket, status: Status, message: str, budget: Budget, number: int = 0
) -> None:
    """A reply with its message. ``number``: of the pull that it answers."""
    text = message.encode()[:MAX_MESSAGE_BYTES]
    send(sock, REPLY.pack(MAGIC, VERSION, status, len(text), number) + text, budget)


def receive_reply(sock: socket.socket, budget: Budget, number: int = 0) -> tuple[Status, str]:
    """Read the reply to pull ``number``. Raises BadMessage, ConnectionError, TimeoutError."""
    fixed = REPLY.unpack(receive(sock, REPLY.size, budget))
    magic, version, status, length, replied_to = fixed
    if magic != MAGIC or version != VERSION:
        raise BadMessage(f"the peer does not speak version {VERSION} of this protocol")
    if status not in Status._value2member_map_ or length > MAX_MESSAGE_BYTES:
        raise BadMessage(f"the peer sent a reply of status {status} and {length} bytes")
    if replied_to != number:
        raise BadMessage("the peer sent the answer to another pull")
    message = receive(sock, length, budget).decode(errors="replace")
    return Status(status), message


def send(sock: socket.socket, data: bytes, budget: Budget) -> None:
    """Send all. Raises OSError, TimeoutError."""
    sock.settimeout(budget())
    sock.sendall(data)


def receive(sock: socket.socket, count: int, budget: Budget) -> bytes:
    """Exactly ``count`` bytes. Raises ConnectionError, TimeoutError."""
    data = bytearray(count)
    view = memoryview(data)
    while len(view):
        sock.settimeout(budget())
        received = sock.recv_into(view)
        if received == 0:
            raise ConnectionError("the peer closed the connection")
        view = view[received:]
    return bytes(data)


def _milliseconds(budget: Budget) -> int:
    return min(int(budget() * 1000) + 1, _MAX_MS)
