"""What the tests of the disk tier share: tiny blocks whose bytes follow from their keys."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

from baton.core.blocks import BlockKey
from baton.core.clock import Clock
from kvpool.disk import DiskTier, never_elsewhere
from kvpool.tiers import BlockMeta, KVEvent, KVEventKind, Tier

LAYOUT = "a layout"
BLOCK_BYTES = 96
SLOT_BYTES = 512
# A header page, a page for the table, four slots.
SEGMENT_BYTES = 2 * 4096 + 4 * SLOT_BYTES


PARENTS: dict[BlockKey, BlockKey | None] = {}
"""Of all keys that ``meta_of`` has named."""


def key_of(name: str) -> BlockKey:
    return hashlib.blake2b(name.encode(), digest_size=16).digest()


def meta_of(name: str, priority: int = 0) -> BlockMeta:
    """The name is the path: "abc" hangs on "ab"."""
    parent = key_of(name[:-1]) if len(name) > 1 else None
    PARENTS[key_of(name)] = parent
    return BlockMeta(key_of(name), parent, len(name) - 1, 16, priority)


def keys_of(*names: str) -> list[BlockKey]:
    return [key_of(name) for name in names]


def bytes_of(key: BlockKey) -> memoryview:
    return memoryview(hashlib.shake_128(key).digest(BLOCK_BYTES))


@dataclasses.dataclass
class Follower:
    """Knows what is on disk from the events alone, and that they come in a possible order."""

    elsewhere: Callable[[BlockKey], bool] = never_elsewhere
    present: set[BlockKey] = dataclasses.field(default_factory=set)
    events: list[KVEvent] = dataclasses.field(default_factory=list)

    def __call__(self, event: KVEvent) -> None:
        self.events.append(event)
        assert event.tier is Tier.DISK
        assert event.keys
        pairs = zip(event.keys, event.keys[1:], strict=False)
        assert all(PARENTS[key] == before for before, key in pairs)
        if event.kind is KVEventKind.STORED:
            assert self.present.isdisjoint(event.keys)
            self.present.update(event.keys)
        else:
            assert event.kind is KVEventKind.REMOVED
            assert self.present.issuperset(event.keys)
            self.present.difference_update(event.keys)
            below = [key for key in self.present if PARENTS[key] in event.keys]
            assert all(self.elsewhere(PARENTS[key] or key) for key in below)

    def check_closed(self) -> None:
        """Each block's parent is there, on disk or elsewhere."""
        parents = {PARENTS[key] for key in self.present} - self.present
        assert all(parent is None or self.elsewhere(parent) for parent in parents)


def ignore(event: KVEvent) -> None:
    pass


def open_tier(
    directory: Path,
    follower: Callable[[KVEvent], None] | None = None,
    *,
    num_segments: int = 8,
    num_slots: int = 4,
    layout: str = LAYOUT,
    elsewhere: Callable[[BlockKey], bool] = never_elsewhere,
    clock: Clock | None = None,
) -> DiskTier:
    """A tier of so many segments of so many blocks."""
    segment_bytes = SEGMENT_BYTES + (num_slots - 4) * SLOT_BYTES
    return DiskTier.open(
        directory,
        layout=layout,
        block_bytes=BLOCK_BYTES,
        max_bytes=num_segments * segment_bytes,
        segment_bytes=segment_bytes,
        on_event=follower or ignore,
        elsewhere=elsewhere,
        clock=clock,
    )


def put(tier: DiskTier, *names: str, priority: int = 0) -> list[bool]:
    return [tier.put(meta_of(n, priority), bytes_of(key_of(n))) for n in names]


def get(tier: DiskTier, name: str) -> bool:
    """Whether it is there; then its bytes are checked."""
    into = memoryview(bytearray(BLOCK_BYTES))
    found = tier.get(key_of(name), into)
    assert not found or into == bytes_of(key_of(name))
    return found


def segments(directory: Path) -> list[Path]:
    """Oldest first."""
    return sorted(directory.glob("segment-*.kv"))


@contextlib.contextmanager
def full_disk(path: Path) -> Iterator[None]:
    """Writes to an open file meet ``ENOSPC``: its descriptor leads to ``/dev/full`` meanwhile."""
    (fd,) = [
        int(entry.name)
        for entry in Path("/proc/self/fd").iterdir()
        if entry.exists() and os.path.samefile(entry, path)
    ]
    saved, full = os.dup(fd), os.open("/dev/full", os.O_RDWR)
    os.dup2(full, fd)
    try:
        yield
    finally:
        os.dup2(saved, fd)
        os.close(saved)
        os.close(full)


@contextlib.contextmanager
def no_file_may_grow(beyond_bytes: int = 0) -> Iterator[None]:
    """Writes of this process past a file size meet ``EFBIG``."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (beyond_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
