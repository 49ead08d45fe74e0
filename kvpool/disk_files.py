"""Segment files of the disk tier as files: written, scanned and read. The format is elsewhere."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

from kvpool.disk_segment import (
    HEADER_BYTES,
    RECORD_BYTES,
    Record,
    Scan,
    SegmentHeader,
    UnusableSegment,
    pack_record,
    scan_table,
    segment_name,
    segment_number,
)
from kvpool.tiers import BlockMeta


def scan_segment(path: str | Path, layout: str, block_bytes: int) -> Scan:
    """Read a segment's header and table; its blocks are not read.

    Raises UnusableSegment if it holds nothing that a tier of these parameters can use, OSError if
    it cannot be read.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        header = SegmentHeader.unpack(os.pread(fd, HEADER_BYTES, 0))
        if header.number != segment_number(os.path.basename(path)):
            raise UnusableSegment("its name is another segment's")
        if header.layout != layout:
            raise UnusableSegment(
                f"its layout is {header.layout!r}, this pool's is {layout!r}", other=True
            )
        if header.block_bytes != block_bytes:
            raise UnusableSegment(
                f"its blocks have {header.block_bytes} bytes, this pool's {block_bytes}", other=True
            )
        table = os.pread(fd, header.num_slots * RECORD_BYTES, HEADER_BYTES)
        return scan_table(header, table, os.fstat(fd).st_size)
    finally:
        os.close(fd)


class SegmentWriter:
    """The segment that is being filled. Used by one thread."""

    def __init__(self, header: SegmentHeader, path: str, fd: int, num_used: int) -> None:
        self.header = header
        self.path = path
        self.num_used = num_used
        """Slots that hold blocks; the next block goes into this one."""
        self._fd: int | None = fd

    @classmethod
    def create(cls, directory: str | Path, header: SegmentHeader) -> SegmentWriter:
        """Make an empty segment. Raises OSError, and leaves no file then."""
        path = os.path.join(directory, segment_name(header.number))
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, header.data_offset)
            _write_all(fd, header.pack(), 0)
        except BaseException:
            os.close(fd)
            os.unlink(path)
            raise
        return cls(header, path, fd, 0)

    @classmethod
    def resume(cls, path: str | Path, scan: Scan) -> SegmentWriter:
        """Go on where a former process ended; only if the scan says ``appendable``."""
        assert scan.appendable, scan
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        return cls(scan.header, str(path), fd, len(scan.records))

    @property
    def full(self) -> bool:
        """Whether all slots are used."""
        return self.num_used == self.header.num_slots

    def append(self, meta: BlockMeta, payload: memoryview, payload_checksum: int) -> int:
        """Write a block, then its record; returns the slot.

        Raises OSError, and then the slot stays free.
        """
        assert self._fd is not None
        slot = self.num_used
        record = pack_record(self.header, Record(meta, slot, payload_checksum))
        try:
            _write_all(self._fd, payload, self.header.slot_offset(slot))
            _write_all(self._fd, record, self.header.record_offset(slot))
        except OSError:
            self._undo(slot)
            raise
        self.num_used += 1
        return slot

    def _undo(self, slot: int) -> None:
        """Leave no half of a block, as far as the disk allows: a scan would find it torn."""
        assert self._fd is not None
        with contextlib.suppress(OSError):
            os.ftruncate(self._fd, self.header.used_bytes(slot))
            os.pwrite(self._fd, bytes(RECORD_BYTES), self.header.record_offset(slot))

    def close(self) -> None:
        """Bring everything to the disk and close the file. Idempotent. Raises OSError."""
        if self._fd is None:
            return
        fd, self._fd = self._fd, None
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def read_block(path: str | Path, header: SegmentHeader, slot: int, into: memoryview) -> int:
    """Read a block into ``into``, ``[block_bytes]`` bytes; returns how many there were."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        done, offset = 0, header.slot_offset(slot)
        while done < len(into):
            count = os.preadv(fd, [into[done:]], offset + done)
            if count == 0:
                break
            done += count
        return done
    finally:
        os.close(fd)


def _write_all(fd: int, data: memoryview | bytes, offset: int) -> None:
    view = memoryview(data)
    while len(view):
        count = os.pwrite(fd, view, offset)
        if count == 0:
            raise OSError(errno.EIO, "nothing was written")
        view, offset = view[count:], offset + count
