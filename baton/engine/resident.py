"""What of this process's memory is resident, by the kernel's own account (Linux).

Mapped is not resident: pages that nobody touched take no memory. ``smaps`` says how much of each
mapping is resident, ``pagemap`` says it of single pages.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import mmap
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

_PAGE = mmap.PAGESIZE
_PRESENT = np.uint64(1 << 63)
_HEADER = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) \S+ \S+ \d+ *(.*)$")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_APART_BYTES, _REUSED_BYTES = 2**20, 32 * 2**20
"""From this size up a piece has its own mapping: while loading, and later (glibc's maximum)."""
_ARENA_BYTES = 64 * 2**20
"""Arenas of threads begin at multiples of it (glibc, HEAP_MAX_SIZE)."""


@dataclasses.dataclass(frozen=True, slots=True)
class Mapping:
    """One mapping of the process."""

    begin: int
    end: int
    kind: str
    """heap, stack, anonymous, compiled (made at run time), shared, file"""
    resident: int
    """Bytes."""


@dataclasses.dataclass(frozen=True, slots=True)
class ProcessMemory:
    """Totals of the process, in bytes."""

    anonymous: int
    file: int
    shared: int
    peak: int
    """The most that was ever resident, or since ``reset_peak``."""

    @property
    def total(self) -> int:
        """All that is resident."""
        return self.anonymous + self.file + self.shared

    @property
    def unreclaimable(self) -> int:
        """What the kernel cannot drop when memory is short, as it can a file's pages."""
        return self.anonymous + self.shared


def process_memory() -> ProcessMemory:
    """Of this process, now."""
    fields = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("RssAnon", "RssFile", "RssShmem", "VmHWM"):
            fields[name] = int(value.split()[0]) * 1024
    return ProcessMemory(fields["RssAnon"], fields["RssFile"], fields["RssShmem"], fields["VmHWM"])


def reset_peak() -> bool:
    """Begin a new peak. ``False`` where the kernel does not allow it: peaks then come too high."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def mappings() -> list[Mapping]:
    """All of this process's mappings of which something is resident."""
    found = []
    begin = end = 0
    kind = ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line.startswith("Rss:"):
            resident = int(line.split()[1]) * 1024
            if resident:
                found.append(Mapping(begin, end, kind, resident))
        elif header := _HEADER.match(line):
            begin, end = int(header[1], 16), int(header[2], 16)
            kind = _kind(header[3], header[4], begin, end)
    return found


def resident_bytes(ranges: Sequence[tuple[int, int]]) -> list[int]:
    """Bytes of each address range [begin, end) whose pages are here; all where nobody tells."""
    result = []
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            for begin, end in ranges:
                result.append(_resident(pagemap.fileno(), begin, end))
    except OSError:
        return [end - begin for begin, end in ranges]
    return result


def heap_used_bytes() -> int:
    """What was taken from the C library's heap and not given back; 0 where it does not tell.

    Pieces that are large enough to have mappings of their own do not count.
    """
    info = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if info is None:
        return 0
    info.restype = _MallInfo
    return int(info().uordblks)


def trim_heap() -> None:
    """Give free pages of the C library's heap back to the system."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@contextlib.contextmanager
def large_pieces_apart() -> Iterator[None]:
    """Let every large piece have a mapping of its own, which goes when it is freed.

    For loading: pieces that come and go between others that stay would leave holes in the C
    library's heap. Afterwards thresholds are those to which it moves by itself once steps free
    their tensors: what a step gives back serves the next one, and need not be had anew.
    """
    option = getattr(ctypes.CDLL(None), "mallopt", None)
    if option is None:
        yield
        return
    option(_M_MMAP_THRESHOLD, _APART_BYTES)
    try:
        yield
    finally:
        option(_M_MMAP_THRESHOLD, _REUSED_BYTES)
        option(_M_TRIM_THRESHOLD, 2 * _REUSED_BYTES)
        trim_heap()


def keep_large_pieces_apart() -> None:
    """As ``large_pieces_apart``, for good: the heap then has few holes, and a process stays near
    what it needs at once. Each large piece costs its page faults anew: some 15 % of the time of
    steps that make many of them.
    """
    option = getattr(ctypes.CDLL(None), "mallopt", None)
    if option is not None:
        option(_M_MMAP_THRESHOLD, _APART_BYTES)


def memory_limit() -> int:
    """Bytes that this process can get at most: the machine's, or its control group's."""
    fields = Path("/proc/meminfo").read_text().split()
    limit = int(fields[fields.index("MemTotal:") + 1]) * 1024
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            text = Path("/sys/fs/cgroup", name).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            limit = min(limit, int(text))
    return limit


class _MallInfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    ]


def _kind(permissions: str, name: str, begin: int, end: int) -> str:
    if name == "[heap]":
        return "heap"
    if name.startswith("[stack"):
        return "stack"
    if permissions.endswith("s") and (name.startswith("/dev/shm/") or not name):
        return "shared"
    if name.startswith("/"):
        return "file"
    if "x" in permissions:
        return "compiled"
    if begin % _ARENA_BYTES == 0 and end - begin < _ARENA_BYTES:
        return "heap"
    return "anonymous"


def _resident(pagemap: int, begin: int, end: int) -> int:
    if end <= begin:
        return 0
    first, last = begin // _PAGE, (end - 1) // _PAGE
    raw = os.pread(pagemap, (last - first + 1) * 8, first * 8)
    present = (np.frombuffer(raw, np.uint64) & _PRESENT) != 0
    if not len(present):
        return 0
    count = int(np.count_nonzero(present)) * _PAGE
    # The ends may lie within a page.
    if present[0]:
        count -= begin - first * _PAGE
    if present[-1]:
        count -= (last + 1) * _PAGE - end
    return count
