"""The format of the disk tier's segment files. ``kvpool/disk_files.py`` reads and writes them.

A segment is a header page, a table with one record per slot, and the slots::

    0                   header: magic, version, number, block_bytes, num_slots, layout, checksum
    4096                num_slots records of 128 bytes
    data_offset         num_slots slots, each a block's bytes, 512-aligned

It is filled front to back and nothing in it is ever changed: first a block's bytes, then its
record. So a record vouches for a block that had been written, a scan reads one contiguous table
and no blocks, and a record that cannot be read costs one block, since all others lie where they
must. All checksums are xxh3-64; a record's is seeded with its place, so that it counts there only.

There is no fsync per block, so a crash of the machine may lose records, or keep one and lose its
block. The block's checksum, verified by each read, makes a miss of that.
"""

from __future__ import annotations

import dataclasses
import re
import struct
from collections.abc import Sequence

import xxhash

from baton.core.errors import ConfigError
from kvpool.tiers import BlockMeta

MAGIC = b"BATONSEG"
VERSION = 1
HEADER_BYTES = 4096
RECORD_BYTES = 128
"""Divides a sector, so that no record lies in two."""

_RECORD_MAGIC = b"BKVR"
_SLOT_ALIGNMENT = 512
_PAGE_BYTES = 4096
# magic, version, number, block_bytes, num_slots, bytes of the layout's text
_HEADER = struct.Struct("<8sIQQIH")
# magic, has a parent, key, parent, depth, num_tokens, priority, payload bytes, payload checksum
_RECORD = struct.Struct("<4s?16s16sIIqQQ")
_CHECKSUM = struct.Struct("<Q")
_CHECKSUM_OFFSET = RECORD_BYTES - _CHECKSUM.size
_KEY_BYTES = 16
_NO_PARENT = bytes(_KEY_BYTES)
_NAME = re.compile(r"segment-([0-9a-f]{16})\.kv")


def segment_name(number: int) -> str:
    """File name of a segment."""
    return f"segment-{number:016x}.kv"


def segment_number(name: str) -> int | None:
    """Which segment a file is by its name; ``None`` if that is not a segment's."""
    match = _NAME.fullmatch(name)
    return None if match is None else int(match[1], 16)


class UnusableSegment(Exception):
    """Nothing of a file can be used; the message ends the sentence "it is skipped: ..."."""

    def __init__(self, message: str, *, torn: bool = False, other: bool = False) -> None:
        super().__init__(message)
        self.torn = torn
        """It was never completed."""
        self.other = other
        """It is whole, and of another layout."""


@dataclasses.dataclass(frozen=True, slots=True)
class SegmentHeader:
    """What a segment says about itself, and where in it things are (offsets in bytes)."""

    number: int
    """Later segments have higher ones; never used again in a folder."""
    block_bytes: int
    num_slots: int
    layout: str

    def __post_init__(self) -> None:
        if _HEADER.size + len(self.layout.encode()) + _CHECKSUM.size > HEADER_BYTES:
            raise ConfigError("the layout's text is too long for a segment file", param="layout")

    @classmethod
    def sized(cls, number: int, block_bytes: int, layout: str, max_bytes: int) -> SegmentHeader:
        """The segment with the most slots that fits into ``max_bytes``; it may have none."""
        per_slot = _align(block_bytes, _SLOT_ALIGNMENT) + RECORD_BYTES
        num_slots = max(0, max_bytes - HEADER_BYTES) // per_slot
        while num_slots and cls(number, block_bytes, num_slots, layout).full_bytes > max_bytes:
            num_slots -= 1
        return cls(number, block_bytes, num_slots, layout)

    @property
    def data_offset(self) -> int:
        """Where slot 0 begins; page-aligned."""
        return _align(HEADER_BYTES + self.num_slots * RECORD_BYTES, _PAGE_BYTES)

    @property
    def full_bytes(self) -> int:
        """Size of the file when all slots are used."""
        return self.data_offset + self.num_slots * _align(self.block_bytes, _SLOT_ALIGNMENT)

    def record_offset(self, slot: int) -> int:
        """Where a slot's record begins."""
        return HEADER_BYTES + slot * RECORD_BYTES

    def slot_offset(self, slot: int) -> int:
        """Where a slot's block begins."""
        return self.data_offset + slot * _align(self.block_bytes, _SLOT_ALIGNMENT)

    def used_bytes(self, num_used: int) -> int:
        """Size of the file when the first ``num_used`` slots are used."""
        return self.slot_offset(num_used - 1) + self.block_bytes if num_used else self.data_offset

    def pack(self) -> bytes:
        """The header page."""
        layout = self.layout.encode()
        fixed = _HEADER.pack(
            MAGIC, VERSION, self.number, self.block_bytes, self.num_slots, len(layout)
        )
        page = (fixed + layout).ljust(HEADER_BYTES - _CHECKSUM.size, b"\0")
        return page + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(page))

    @classmethod
    def unpack(cls, page: bytes) -> SegmentHeader:
        """Parse a header page. Raises UnusableSegment if it is short, damaged or something else."""
        if len(page) < HEADER_BYTES:
            raise UnusableSegment("it is shorter than a segment's header", torn=True)
        if not page.startswith(MAGIC):
            raise UnusableSegment("it is no segment of a disk tier")
        if _CHECKSUM.unpack_from(page, HEADER_BYTES - _CHECKSUM.size)[0] != (
            xxhash.xxh3_64_intdigest(page[: HEADER_BYTES - _CHECKSUM.size])
        ):
            raise UnusableSegment("its header is damaged")
        _, version, number, block_bytes, num_slots, length = _HEADER.unpack_from(page)
        if version != VERSION:
            raise UnusableSegment(f"it has version {version}, this process reads {VERSION}")
        layout = page[_HEADER.size : _HEADER.size + length].decode()
        return cls(number, block_bytes, num_slots, layout)


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """What a segment says about the block in one of its slots."""

    meta: BlockMeta
    slot: int
    checksum: int
    """Of the block's bytes."""


def pack_record(header: SegmentHeader, record: Record) -> bytes:
    """A record's bytes. Raises ValueError for a key or a number that does not fit into it."""
    meta = record.meta
    parent = _NO_PARENT if meta.parent is None else meta.parent
    if len(meta.key) != _KEY_BYTES or len(parent) != _KEY_BYTES:
        raise ValueError(f"a block's key has {_KEY_BYTES} bytes, got {meta}")
    try:
        fixed = _RECORD.pack(
            _RECORD_MAGIC,
            meta.parent is not None,
            meta.key,
            parent,
            meta.depth,
            meta.num_tokens,
            meta.priority,
            header.block_bytes,
            record.checksum,
        )
    except struct.error as error:
        raise ValueError(f"{meta} does not fit into a record: {error}") from None
    body = fixed.ljust(_CHECKSUM_OFFSET, b"\0")
    return body + _CHECKSUM.pack(_record_checksum(header, record.slot, body))


def unpack_record(header: SegmentHeader, slot: int, data: bytes) -> Record | None:
    """Parse the record of a slot; ``None`` if it is damaged or belongs to another place."""
    body = data[:_CHECKSUM_OFFSET]
    if data[_CHECKSUM_OFFSET:] != _CHECKSUM.pack(_record_checksum(header, slot, body)):
        return None
    magic, has_parent, key, parent, depth, num_tokens, priority, num_bytes, payload_checksum = (
        _RECORD.unpack_from(body)
    )
    if magic != _RECORD_MAGIC or num_bytes != header.block_bytes:
        return None
    meta = BlockMeta(key, parent if has_parent else None, depth, num_tokens, priority)
    return Record(meta, slot, payload_checksum)


@dataclasses.dataclass(frozen=True, slots=True)
class Scan:
    """What there is in a segment file."""

    header: SegmentHeader
    records: Sequence[Record]
    """Those that can be read, in order of their slots."""
    num_bytes: int
    """Size of the file."""
    num_torn: int
    """Blocks whose writing was never completed."""
    num_corrupt: int
    """Records that were complete once."""

    @property
    def appendable(self) -> bool:
        """Whether more may be written: there is a free slot, and nothing in it is damaged."""
        return not (self.num_torn or self.num_corrupt) and len(self.records) < self.header.num_slots


def scan_table(header: SegmentHeader, table: bytes, num_bytes: int) -> Scan:
    """Judge a segment by its table, as far as that is there, and its file's size in bytes."""
    records: list[Record] = []
    num_torn = num_corrupt = num_gaps = num_used = 0
    for slot in range(-(-len(table) // RECORD_BYTES)):
        data = table[slot * RECORD_BYTES : (slot + 1) * RECORD_BYTES]
        if not any(data):
            num_gaps += 1
            continue
        # A slot is used only after the one before it: gaps below it are records that got lost.
        num_torn += num_gaps
        num_gaps, num_used = 0, slot + 1
        record = unpack_record(header, slot, data)
        if record is None and not any(data[_CHECKSUM_OFFSET:]):
            num_torn += 1
        elif record is None:
            num_corrupt += 1
        elif header.used_bytes(slot + 1) > num_bytes:
            num_torn += 1
        else:
            records.append(record)
    # Bytes of a block whose record was never written, or a table that was never completed.
    num_torn += num_bytes > header.used_bytes(num_used) or num_bytes < header.data_offset
    return Scan(header, records, num_bytes, num_torn, num_corrupt)


def _align(value: int, to: int) -> int:
    return -(-value // to) * to


def _record_checksum(header: SegmentHeader, slot: int, body: bytes) -> int:
    return xxhash.xxh3_64_intdigest(body, seed=(header.number << 24 ^ slot) & (1 << 64) - 1)
