"""The segment files of one folder: made, filled, read and dropped, within a number of bytes.

The folder belongs to one process at a time, by a lock file. Files named like segments belong to
the tier; it never touches others. A segment that cannot be used (of another layout, damaged) stays
until its room is needed, and goes first then.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Sequence

from baton.core.errors import ConfigError
from kvpool.disk_files import SegmentWriter, read_block, scan_segment
from kvpool.disk_segment import Scan, SegmentHeader, UnusableSegment, segment_name, segment_number
from kvpool.tiers import BlockMeta

log = logging.getLogger(__name__)

LOCK_NAME = "lock"
_MIN_SEGMENTS = 4
"""Dropping one must not empty the tier."""


class SegmentStore:
    """Used by one thread. Made by ``open`` only."""

    def __init__(self, directory: str, lock_fd: int, shape: SegmentHeader, max_bytes: int) -> None:
        self.shape = shape
        """Header of the next segment to be made."""
        self.max_bytes = max_bytes
        self.num_bytes = 0
        """Of all segment files, unusable ones included."""
        self.num_torn = 0
        """Blocks, and whole segments, whose writing was never completed."""
        self.num_corrupt = 0
        """Records, and whole segments, that cannot be read."""
        self.num_other = 0
        """Whole segments of another layout."""
        self.num_foreign = 0
        """Files in the folder that are not the tier's."""
        self._directory = directory
        self._lock_fd: int | None = lock_fd
        self._headers: dict[int, SegmentHeader] = {}
        self._sizes: dict[int, int] = {}
        self._unusable: dict[str, int] = {}
        self._writer: SegmentWriter | None = None

    @classmethod
    def open(
        cls, directory: str, *, layout: str, block_bytes: int, max_bytes: int, segment_bytes: int
    ) -> tuple[SegmentStore, list[Scan]]:
        """Take a folder, made if need be, and read what is in it, oldest segment first.

        Raises ConfigError if the numbers do not fit, or the folder cannot be used or is in use.
        """
        segment_bytes = min(segment_bytes, max_bytes // _MIN_SEGMENTS)
        shape = SegmentHeader.sized(1, block_bytes, layout, segment_bytes)
        if block_bytes < 1 or shape.num_slots < 1:
            raise ConfigError(
                f"a disk tier of {max_bytes} bytes in segments of {segment_bytes} has no room for"
                f" blocks of {block_bytes} bytes: raise max_bytes or segment_bytes",
                param="max_bytes",
            )
        lock_fd = _lock(directory)
        store = cls(directory, lock_fd, shape, max_bytes)
        try:
            scans = store._scan()
        except OSError as error:
            store.close()
            raise ConfigError(f"cannot read the disk tier's folder {directory}: {error}") from error
        except BaseException:
            store.close()
            raise
        return store, scans

    @property
    def numbers(self) -> list[int]:
        """The segments, oldest first."""
        return sorted(self._headers)

    @property
    def num_segments(self) -> int:
        """Segments that can be used."""
        return len(self._headers)

    def used_slots(self) -> dict[int, int]:
        """Slots that have been given out, by segment."""
        used = {number: header.num_slots for number, header in self._headers.items()}
        if self._writer is not None:
            used[self._writer.header.number] = self._writer.num_used
        return used

    @property
    def free_slots(self) -> int:
        """How many blocks can be appended before ``begin`` must be called."""
        if self._writer is None:
            return 0
        return self._writer.header.num_slots - self._writer.num_used

    def excess_bytes(self, new_bytes: int) -> int:
        """By how much all files, that being filled taken as full, and ``new_bytes`` are too much.

        Not above 0 if they fit.
        """
        open_end = 0
        if self._writer is not None:
            header = self._writer.header
            open_end = header.full_bytes - self._sizes[header.number]
        return self.num_bytes + open_end + new_bytes - self.max_bytes

    def resume(self, scans: Sequence[Scan]) -> None:
        """Go on in the newest segment, if nothing of it is damaged and it has free slots."""
        if not scans or not scans[-1].appendable:
            return
        if scans[-1].header.num_slots > self.shape.num_slots:
            return  # larger than the limits of today allow
        number = scans[-1].header.number
        try:
            self._writer = SegmentWriter.resume(self._path(number), scans[-1])
        except OSError as error:
            log.warning("%s cannot be written on, a new one is made: %s", self._path(number), error)

    def begin(self) -> None:
        """End the segment that is being filled, and make the next. Raises OSError."""
        self.seal()
        self._writer = SegmentWriter.create(self._directory, self.shape)
        header, self.shape = self.shape, _next(self.shape)
        self._headers[header.number] = header
        self._resize(header.number, header.data_offset)

    def append(self, meta: BlockMeta, payload: memoryview, checksum: int) -> tuple[int, int]:
        """Write a block; returns its segment and slot. Raises OSError, and nothing changed then."""
        assert self._writer is not None
        header = self._writer.header
        slot = self._writer.append(meta, payload, checksum)
        self._resize(header.number, header.used_bytes(slot + 1))
        return header.number, slot

    def read(self, segment: int, slot: int, into: memoryview) -> int:
        """Read a block; returns how many of its bytes there were. Raises OSError."""
        return read_block(self._path(segment), self._headers[segment], slot, into)

    def drop_unusable(self) -> bool:
        """Delete one segment that cannot be used; False if there is none. Raises OSError."""
        path = next(iter(self._unusable), None)
        if path is None:
            return False
        _unlink(path)
        self.num_bytes -= self._unusable.pop(path)
        return True

    def drop(self, number: int) -> None:
        """Delete a segment. Raises OSError, and it is still there then."""
        if self._writer is not None and self._writer.header.number == number:
            self.seal()
        _unlink(self._path(number))
        del self._headers[number]
        self.num_bytes -= self._sizes.pop(number)

    def seal(self) -> None:
        """Bring the segment that is being filled to the disk and end it. Raises OSError."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    def close(self) -> None:
        """Seal, and give up the folder. Idempotent. Raises OSError, and all is released then."""
        try:
            self.seal()
        finally:
            lock_fd, self._lock_fd = self._lock_fd, None
            if lock_fd is not None:
                os.close(lock_fd)

    def check(self) -> None:
        """Raise AssertionError if the files are not what they are taken for."""
        for number, size in self._sizes.items():
            path = self._path(number)
            found = os.stat(path).st_size if os.path.exists(path) else None
            assert found == size, f"segment {number} has {found} bytes, expected {size}"
        total = sum(self._sizes.values()) + sum(self._unusable.values())
        assert self.num_bytes == total, f"{self.num_bytes} bytes are counted, {total} are there"
        assert self.num_bytes <= self.max_bytes, f"{self.num_bytes} bytes of {self.max_bytes}"
        newest = max(self._headers, default=0)
        assert self._writer is None or self._writer.header.number == newest, newest
        assert self.shape.number > newest, f"{self.shape.number} after {newest}"

    def _resize(self, number: int, num_bytes: int) -> None:
        self.num_bytes += num_bytes - self._sizes.get(number, 0)
        self._sizes[number] = num_bytes

    def _path(self, number: int) -> str:
        return os.path.join(self._directory, segment_name(number))

    def _scan(self) -> list[Scan]:
        """Read all tables. Raises OSError if the folder itself cannot be read."""
        scans: list[Scan] = []
        numbers: list[int] = []
        for name in os.listdir(self._directory):
            number = segment_number(name)
            if number is not None:
                numbers.append(number)
            elif name != LOCK_NAME:
                self.num_foreign += 1
                path = os.path.join(self._directory, name)
                log.warning("%s is not the disk tier's and is left alone", path)
        skipped: dict[str, list[str]] = {}
        for number in sorted(numbers):
            scan = self._scan_one(self._path(number), skipped)
            if scan is not None:
                scans.append(scan)
                self._headers[number] = scan.header
                self._resize(number, scan.num_bytes)
        for reason, paths in skipped.items():
            more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
            log.warning("%s%s of the disk tier skipped: %s", paths[0], more, reason)
        self.shape = _next(self.shape, max(numbers, default=0))
        return scans

    def _scan_one(self, path: str, skipped: dict[str, list[str]]) -> Scan | None:
        try:
            scan = scan_segment(path, self.shape.layout, self.shape.block_bytes)
        except (UnusableSegment, OSError) as error:
            skipped.setdefault(str(error), []).append(path)
            if isinstance(error, UnusableSegment) and error.torn:
                self.num_torn += 1
            elif isinstance(error, UnusableSegment) and error.other:
                self.num_other += 1
            else:
                self.num_corrupt += 1
            with contextlib.suppress(OSError):
                self._unusable[path] = os.stat(path).st_size
                self.num_bytes += self._unusable[path]
            return None
        if scan.num_torn or scan.num_corrupt:
            log.warning(
                "%s of the disk tier: %d blocks were never completed and %d records are damaged;"
                " the other %d are used",
                path,
                scan.num_torn,
                scan.num_corrupt,
                len(scan.records),
            )
        self.num_torn += scan.num_torn
        self.num_corrupt += scan.num_corrupt
        return scan


def _next(shape: SegmentHeader, after: int | None = None) -> SegmentHeader:
    number = (shape.number if after is None else after) + 1
    return SegmentHeader(number, shape.block_bytes, shape.num_slots, shape.layout)


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _lock(directory: str) -> int:
    """Make a folder this process's own until the descriptor is closed."""
    path = os.path.join(directory, LOCK_NAME)
    try:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(
            f"the disk tier cannot use the folder {directory}: {error}", param="disk_path"
        ) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    except BlockingIOError as error:
        owner = os.pread(fd, 32, 0).decode(errors="replace").strip()
        os.close(fd)
        raise ConfigError(
            f"the disk tier's folder {directory} is in use by process {owner}: give each pool node"
            " a folder of its own",
            param="disk_path",
        ) from error
    except OSError as error:
        os.close(fd)
        raise ConfigError(
            f"the disk tier cannot lock the folder {directory}: {error}", param="disk_path"
        ) from error
    return fd
