"""What an external store holds for a block: bytes that say themselves what they are.

A store that is not ours keeps names and values and promises little: no lengths, no checksums, old
values for new ones. So a value begins with a header, little-endian: magic, version, whether there
is a parent, key, parent, depth, tokens, priority, bytes of the payload, and xxh3-64 of the header
(with 0 in this place) and the payload.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import numpy as np
import numpy.typing as npt
import xxhash

from baton.core.blocks import BlockKey
from kvpool.tiers import BlockMeta

_MAGIC = b"BKVX"
_VERSION = 1
_HEADER = struct.Struct("<4sB?16s16sIIiQQ")
HEADER_BYTES = _HEADER.size
_NO_KEY = bytes(16)


class WrongLength(Exception):
    """A value with more or fewer bytes than it should have."""


class WrongChecksum(Exception):
    """A value whose bytes are not those that were stored, or another block's."""


class StoreFailed(Exception):
    """The store did not do what it was asked for."""


Value = memoryview | None | StoreFailed
"""Bytes, nothing of that name, or why it cannot be told. A value that is too long is empty."""


class Values(Protocol):
    """A store of named values. Any thread may call; all block, for ``timeout_s`` at most.

    Raises StoreFailed, TimeoutError.
    """

    @property
    def batch_bytes(self) -> int:
        """Bytes that one ``load`` or ``save`` may be asked to move; a single value may have more
        than that only if the store can."""

    def exist(self, names: Sequence[str], timeout_s: float) -> list[bool]:
        """Which of them are there; may be wrong."""

    def load(
        self, names: Sequence[str], num_bytes: Sequence[int], timeout_s: float
    ) -> AbstractContextManager[Sequence[Value]]:
        """The values, of at most so many bytes each, until the context is left.

        They may change while they are looked at: copy first, then check the copy.
        """

    def save(
        self, names: Sequence[str], values: Sequence[Sequence[bytes | memoryview]], timeout_s: float
    ) -> int:
        """Store values, each given in parts, and return how many of them, from the first on, the
        store has accepted; it has no room for the next one. It may drop them at any time. The
        parts are not looked at any more after the return."""

    def drop(self, name: str, timeout_s: float) -> None:
        """Remove a value, if it is there."""

    def close(self) -> None:
        """Release everything. Idempotent."""


def pack_header(meta: BlockMeta, payload: memoryview) -> bytes:
    """The header of a block's value."""

    def packed(checksum: int) -> bytes:
        return _HEADER.pack(
            _MAGIC,
            _VERSION,
            meta.parent is not None,
            meta.key,
            meta.parent or _NO_KEY,
            meta.depth,
            meta.num_tokens,
            meta.priority,
            len(payload),
            checksum,
        )

    return packed(_checksum(packed(0), payload))


def unpack(value: memoryview, key: BlockKey, into: memoryview) -> BlockMeta:
    """Copy the payload of ``key``'s value to ``into`` and verify what lies there then.

    Raises WrongLength, WrongChecksum; ``into`` holds garbage then.
    """
    if len(value) != HEADER_BYTES + len(into):
        raise WrongLength(f"{len(value)} bytes, not {HEADER_BYTES + len(into)}")
    header = bytes(value[:HEADER_BYTES])
    # numpy copies without holding the interpreter lock; memoryview assignment does not.
    np.copyto(_array(into), _array(value)[HEADER_BYTES:])
    magic, version, has_parent, found, parent, depth, tokens, priority, length, checksum = (
        _HEADER.unpack(header)
    )
    if magic != _MAGIC or version != _VERSION:
        raise WrongChecksum("not a block of this version")
    if length != len(into):
        raise WrongLength(f"a payload of {length} bytes, not {len(into)}")
    zeroed = header[: -struct.calcsize("<Q")] + bytes(struct.calcsize("<Q"))
    if found != key or checksum != _checksum(zeroed, into):
        raise WrongChecksum("other bytes than were stored")
    return BlockMeta(
        key=found,
        parent=parent if has_parent else None,
        depth=depth,
        num_tokens=tokens,
        priority=priority,
    )


def _array(memory: memoryview) -> npt.NDArray[np.uint8]:
    return np.frombuffer(memory, dtype=np.uint8, count=len(memory))


def _checksum(header: bytes, payload: memoryview) -> int:
    digest = xxhash.xxh3_64(header)
    digest.update(payload)
    return digest.intdigest()
