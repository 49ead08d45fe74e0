"""What the host tier's arena says of each slot: one record of 64 bytes, in the file itself.

Written by the pool node alone. It may be killed between any two stores, so a record counts only
while its state is READY; that is stored last, and taken away before anything else changes.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from baton.core.blocks import BlockKey
from kvpool.tiers import BlockMeta

TABLE_VERSION = 1
"""Raised with every change of :data:`RECORD`: a table of another version is not read."""

KEY_BYTES = 16
_NO_KEY = bytes(KEY_BYTES)

RECORD = np.dtype(
    {
        "names": [
            *("key", "parent", "checksum", "order"),
            *("depth", "num_tokens", "priority", "state", "flags"),
        ],
        "formats": ["V16", "V16", "<u8", "<u8", "<u4", "<u4", "<i4", "u1", "u1"],
        "offsets": [0, 16, 32, 40, 48, 52, 56, 60, 61],
        "itemsize": 64,
    }
)
"""``order`` counts publications: what was published later has a higher one."""


class RecordState(enum.IntEnum):
    """A fresh file is zeros, and so all free."""

    FREE = 0
    FILLING = 1
    READY = 2


class RecordFlag(enum.IntFlag):
    """Bits of ``flags``."""

    HAS_PARENT = 1
    ON_DISK = 2
    TRANSIENT = 4


_HAS_PARENT, _ON_DISK, _TRANSIENT = (int(flag) for flag in RecordFlag)

_SIZE = RECORD.itemsize
# Neighbouring fields that are written together, and where the first of them is.
_KEYS = struct.Struct("<16s16s")  # key, parent
_FINISH, _FINISH_AT = struct.Struct("<QQ"), 32  # checksum, order
_COUNTS, _COUNTS_AT = struct.Struct("<IIi"), 48  # depth, num_tokens, priority
_STATE, _FLAGS = 60, 61


class Records:
    """A table of :data:`RECORD`, ``[num_slots]``, and the order in which it is written."""

    def __init__(self, table: npt.NDArray[np.void]) -> None:
        if table.ndim != 1 or table.dtype != RECORD or not len(table):
            raise ValueError(
                f"the table must be records of {_SIZE} bytes in one dimension,"
                f" got {table.dtype} of shape {table.shape}"
            )
        if not table.flags.c_contiguous:
            raise ValueError("the records must lie one behind the other")
        self.num_slots = len(table)
        self._states = table["state"]
        self._priorities = table["priority"]
        # Bytes are several times faster to write one at a time than fields of an array.
        self._bytes = table.view(np.uint8).data

    def states(self) -> list[int]:
        """``RecordState`` of each slot; other numbers where the table is damaged."""
        states: list[int] = self._states.tolist()
        return states

    def begin(self, slot: int) -> None:
        """What the slot held is over. Before anything else of it changes."""
        self._bytes[slot * _SIZE + _STATE] = RecordState.FILLING

    def describe(self, slot: int, meta: BlockMeta, *, transient: bool) -> None:
        """Say what will be in a slot that has begun."""
        start = slot * _SIZE
        flags = _TRANSIENT if transient else 0
        if meta.parent is not None:
            flags |= _HAS_PARENT
        _KEYS.pack_into(self._bytes, start, meta.key, meta.parent or _NO_KEY)
        _COUNTS.pack_into(
            self._bytes, start + _COUNTS_AT, meta.depth, meta.num_tokens, meta.priority
        )
        self._bytes[start + _FLAGS] = flags

    def finish(self, slot: int, checksum: int, order: int) -> None:
        """The slot holds what was described."""
        start = slot * _SIZE
        _FINISH.pack_into(self._bytes, start + _FINISH_AT, checksum, order)
        self._bytes[start + _STATE] = RecordState.READY

    def clear(self, slot: int) -> None:
        """The slot holds nothing."""
        self._bytes[slot * _SIZE + _STATE] = RecordState.FREE

    def set_priority(self, slot: int, priority: int) -> None:
        """One store, at any time."""
        self._priorities[slot] = priority

    def set_on_disk(self, slot: int, on_disk: bool) -> None:
        """One store, at any time."""
        at = slot * _SIZE + _FLAGS
        flags = self._bytes[at]
        self._bytes[at] = flags | _ON_DISK if on_disk else flags & ~_ON_DISK

    def meta(self, slot: int) -> BlockMeta:
        """What a slot was described as."""
        start = slot * _SIZE
        key, parent = _KEYS.unpack_from(self._bytes, start)
        depth, num_tokens, priority = _COUNTS.unpack_from(self._bytes, start + _COUNTS_AT)
        return BlockMeta(
            key=key,
            parent=parent if RecordFlag.HAS_PARENT in self.flags(slot) else None,
            depth=depth,
            num_tokens=num_tokens,
            priority=priority,
        )

    def flags(self, slot: int) -> RecordFlag:
        """What else is known of it."""
        return RecordFlag(self._bytes[slot * _SIZE + _FLAGS])

    def checksum(self, slot: int) -> int:
        """Of the bytes, as their writer said."""
        checksum: int = _FINISH.unpack_from(self._bytes, slot * _SIZE + _FINISH_AT)[0]
        return checksum

    def order(self, slot: int) -> int:
        """When it was published, among others."""
        order: int = _FINISH.unpack_from(self._bytes, slot * _SIZE + _FINISH_AT)[1]
        return order

    def whole_chains(self) -> Iterator[tuple[int, BlockMeta]]:
        """READY slots whose prefixes are READY too, parents before children.

        Transient ones are not among them: who wanted them is not known here.
        """
        children: dict[BlockKey | None, list[tuple[int, BlockMeta]]] = {}
        keys: set[BlockKey] = set()
        for slot in np.flatnonzero(self._states == RecordState.READY).tolist():
            meta = self.meta(slot)
            if RecordFlag.TRANSIENT in self.flags(slot) or meta.key in keys:
                continue
            keys.add(meta.key)
            children.setdefault(meta.parent, []).append((slot, meta))
        pending = children.pop(None, [])
        while pending:
            slot, meta = pending.pop()
            yield slot, meta
            pending.extend(children.pop(meta.key, ()))


def key_problem(meta: BlockMeta) -> str | None:
    """Why a block cannot be described; ``None`` if it can."""
    if len(meta.key) != KEY_BYTES or (meta.parent is not None and len(meta.parent) != KEY_BYTES):
        return f"a key has {KEY_BYTES} bytes, got {meta.key.hex()!r} below {meta.parent!r}"
    if not 0 <= meta.num_tokens < 1 << 32:
        return f"a block cannot hold {meta.num_tokens} tokens"
    if not -(1 << 31) <= meta.priority < 1 << 31:
        return f"priority {meta.priority} is out of range"
    return None
