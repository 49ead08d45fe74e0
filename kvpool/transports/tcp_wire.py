"""The bytes between a tcp reader and a tcp exporter.

A connection carries one exchange after another. Little-endian::

    reader    REQUEST, layout text, num_copies x (block uint32, generation uint64)
    exporter  REPLY, message          status other than OK: the exchange is over
              per frame of blocks: their bytes, xxh3-64 of those bytes as uint64
              REPLY, message          OK: all generations are unchanged after the last byte

A frame is ``frame_blocks`` blocks in the order asked for, the last one maybe fewer; both sides
compute it, so frames need no headers. A request has a random number, which the first reply repeats;
the last one has the number after it. So what comes twice, or is left of another exchange, is not
taken for an answer. A request without copies asks only whether the exporter is the one that is
meant.
"""

from __future__ import annotations

import enum
import secrets
import struct
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvpool.transport import BlockCopy
from kvpool.transports.blocks import Budget
from kvpool.transports.tcp_channel import Channel, receive_bytes

MAGIC = b"BKVT"
VERSION = 2
MAX_LAYOUT_BYTES = 1024
MAX_MESSAGE_BYTES = 1024
FRAME_BYTES = 4 << 20

# magic, version, token, number of copies, bytes per block, budget in ms, length of layout, number
REQUEST = struct.Struct("<4sB32sIQIHQ")
# magic, version, status, length of message, number of the request
REPLY = struct.Struct("<4sBBHQ")
CHECKSUM = struct.Struct("<Q")
_COPY = np.dtype([("block", "<u4"), ("generation", "<u8")])
_TLS_HANDSHAKE = b"\x16\x03"


class Status(enum.IntEnum):
    """What the exporter says."""

    OK = 0
    STALE = 1
    LAYOUT = 2
    TOKEN = 3
    BAD_REQUEST = 4
    TLS = 5
    """One side has TLS and the other has not; said in the clear, for that reason."""


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


def unpack_copies(data: bytes) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint64]]:
    """Source blocks and generations, each ``[num_copies]``."""
    table = np.frombuffer(data, dtype=_COPY)
    return table["block"].astype(np.int64), table["generation"].astype(np.uint64)


def copies_bytes(num_copies: int) -> int:
    """Length of ``pack_copies``' result."""
    return num_copies * _COPY.itemsize


def new_number() -> int:
    """For one request."""
    return secrets.randbits(64)


def last_number(number: int) -> int:
    """What the last reply to a request has, if there is one after the first."""
    return (number + 1) % 2**64


def pack_reply(number: int, status: Status, message: str = "") -> bytes:
    """A reply with its message. ``number``: of the request, 0 if that could not be read."""
    text = message.encode()[:MAX_MESSAGE_BYTES]
    return REPLY.pack(MAGIC, VERSION, status, len(text), number) + text


def receive_reply(channel: Channel, number: int, budget: Budget) -> tuple[Status, str]:
    """Read the reply to request ``number``. Raises BadFrame, ConnectionError, TimeoutError."""
    fixed = receive_bytes(channel, REPLY.size, budget)
    magic, version, status, length, replied_to = REPLY.unpack(fixed)
    if magic != MAGIC or version != VERSION:
        raise BadFrame(f"the peer does not speak version {VERSION} of this protocol")
    if status not in Status._value2member_map_ or length > MAX_MESSAGE_BYTES:
        raise BadFrame(f"the peer sent a reply of status {status} and {length} bytes")
    if replied_to != number and status != Status.TLS:
        raise BadFrame("the peer sent the answer to another request")
    message = receive_bytes(channel, length, budget).decode(errors="replace")
    return Status(status), message


def is_tls_hello(start: bytes) -> bool:
    """Whether the first bytes of a request are those of a TLS handshake."""
    return start.startswith(_TLS_HANDSHAKE)
