"""The bytes between a tcp reader and a tcp exporter, and moving them with scatter and gather.

A connection carries one exchange after another. Little-endian::

    reader    REQUEST, layout text, num_copies x (block uint32, generation uint64)
    exporter  REPLY, message          status other than OK: the exchange is over
              per frame of blocks: their bytes, xxh3-64 of those bytes as uint64
              REPLY, message          OK: all generations are unchanged after the last byte

A frame is ``frame_blocks`` blocks in the order asked for, the last one maybe fewer; both sides
compute it, so frames need no headers. A request without copies asks only whether the exporter is
the one that is meant.
"""

from __future__ import annotations

import enum
import socket
import struct
from collections.abc import Sequence

import numpy as np
import xxhash

from kvpool.transport import BlockCopy
from kvpool.transports.blocks import Budget

MAGIC = b"BKVT"
VERSION = 1
MAX_LAYOUT_BYTES = 1024
MAX_MESSAGE_BYTES = 1024
FRAME_BYTES = 4 << 20

# magic, version, token, number of copies, bytes per block, budget in ms, length of layout
REQUEST = struct.Struct("<4sB32sIQIH")
# magic, version, status, length of message
REPLY = struct.Struct("<4sBBH")
CHECKSUM = struct.Struct("<Q")
_COPY = np.dtype([("block", "<u4"), ("generation", "<u8")])
_MAX_BUFFERS = 512


class Status(enum.IntEnum):
    """What the exporter says."""

    OK = 0
    STALE = 1
    LAYOUT = 2
    TOKEN = 3
    BAD_REQUEST = 4


class ConnectionEnded(ConnectionError):
    """The other side closed the connection in the middle, or before the first byte."""

    def __init__(self, received: int) -> None:
        super().__init__(f"the peer closed the connection after {received} bytes")
        self.received = received


class BadFrame(Exception):
    """Bytes that are not this protocol's, or do not match their checksum."""


def frame_blocks(block_bytes: int) -> int:
    """Blocks per frame."""
    return max(1, FRAME_BYTES // block_bytes)


def pack_copies(copies: Sequence[BlockCopy]) -> bytes:
    """Sources and generations."""
    table = np.empty(len(copies), dtype=_COPY)
    table["block"] = [copy.src for copy in copies]
    table["generation"] = [copy.generation for copy in copies]
    return table.tobytes()


def unpack_copies(data: bytes | bytearray) -> list[BlockCopy]:
    """The inverse; destinations are the reader's business and are 0 here."""
    table = np.frombuffer(data, dtype=_COPY)
    pairs = zip(table["block"].tolist(), table["generation"].tolist(), strict=True)
    return [BlockCopy(src=block, generation=generation, dst=0) for block, generation in pairs]


def copies_bytes(num_copies: int) -> int:
    """Length of ``pack_copies``' result."""
    return num_copies * _COPY.itemsize


def pack_reply(status: Status, message: str = "") -> bytes:
    """A reply with its message."""
    text = message.encode()[:MAX_MESSAGE_BYTES]
    return REPLY.pack(MAGIC, VERSION, status, len(text)) + text


def receive_reply(sock: socket.socket, budget: Budget) -> tuple[Status, str]:
    """Read a reply. Raises BadFrame, ConnectionError, TimeoutError."""
    magic, version, status, length = REPLY.unpack(receive_bytes(sock, REPLY.size, budget))
    if magic != MAGIC or version != VERSION:
        raise BadFrame(f"the peer does not speak version {VERSION} of this protocol")
    if status not in Status._value2member_map_ or length > MAX_MESSAGE_BYTES:
        raise BadFrame(f"the peer sent a reply of status {status} and {length} bytes")
    message = receive_bytes(sock, length, budget).decode(errors="replace")
    return Status(status), message


def receive_bytes(sock: socket.socket, count: int, budget: Budget) -> bytes:
    """Exactly ``count`` bytes."""
    data = bytearray(count)
    receive_into(sock, [memoryview(data)], budget)
    return bytes(data)


def receive_into(sock: socket.socket, buffers: Sequence[memoryview], budget: Budget) -> None:
    """Fill all buffers straight from the socket. Raises ConnectionError, TimeoutError."""
    pending = [buffer for buffer in buffers if len(buffer)]
    received = first = 0
    while first < len(pending):
        sock.settimeout(budget())
        count = sock.recvmsg_into(pending[first : first + _MAX_BUFFERS])[0]
        if count == 0:
            raise ConnectionEnded(received)
        received += count
        first = _advance(pending, first, count)


def discard(sock: socket.socket, count: int, budget: Budget) -> None:
    """Read ``count`` bytes and forget them."""
    while count:
        size = min(count, 1 << 16)
        receive_bytes(sock, size, budget)
        count -= size


def send_from(sock: socket.socket, buffers: Sequence[memoryview | bytes], budget: Budget) -> None:
    """Send all buffers without joining them. Raises ConnectionError, TimeoutError."""
    pending = [memoryview(buffer) for buffer in buffers if len(buffer)]
    first = 0
    while first < len(pending):
        sock.settimeout(budget())
        first = _advance(pending, first, sock.sendmsg(pending[first : first + _MAX_BUFFERS]))


def _advance(pending: list[memoryview], first: int, count: int) -> int:
    """Drop ``count`` bytes off the front; returns the new first buffer."""
    while count:
        head = pending[first]
        if count < len(head):
            pending[first] = head[count:]
            return first
        count -= len(head)
        first += 1
    return first


def checksum(buffers: Sequence[memoryview]) -> int:
    """xxh3-64 over the buffers in order."""
    digest = xxhash.xxh3_64()
    for buffer in buffers:
        digest.update(buffer)
    return digest.intdigest()
