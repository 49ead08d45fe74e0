"""The disk tier of a machine: blocks in segment files, found again after a restart.

Blocks are appended to the newest segment; when there is no room for another, the oldest is dropped,
and what is in use of it is written again. There is no fsync per block: a segment is brought to the
disk when it is full, so a crash of the machine may lose the blocks of the last one. What such a
crash, or the disk, left of a block is found out by its checksum, which every read verifies.
"""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from baton.core.blocks import BlockKey
from baton.core.clock import Clock, SystemClock
from kvpool.checksum import checksum
from kvpool.disk_index import DiskEntry, DiskIndex, Elsewhere
from kvpool.disk_segment import Scan
from kvpool.disk_statistics import DiskCounts, DiskStatistics
from kvpool.disk_store import SegmentStore
from kvpool.tiers import BlockMeta, KVEvent, KVEventKind, Tier

log = logging.getLogger(__name__)

SEGMENT_BYTES = 64 * 1024 * 1024
RETRY_AFTER_S = 30.0
CARRIED_SHARE = 4
"""One in so many slots of a new segment may go to blocks of the one that it replaces."""

# The process is short of something; the block on disk is as good as before.
_PASSING_ERRORS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN}


def never_elsewhere(key: BlockKey) -> bool:
    """For a disk tier that is the only tier."""
    return False


class DiskTier:
    """One machine's blocks on disk. Made by ``open`` only.

    One thread at a time calls the methods that read and write; ``contains``, ``match``, ``meta``,
    ``checksum``, ``snapshot_keys`` and ``statistics`` may be called from any. The index changes
    under a lock that is never held during I/O, a callback, or a wait.

    ``on_event`` and ``elsewhere`` are called on the thread that reads and writes; they must neither
    block nor raise.
    """

    def __init__(
        self,
        store: SegmentStore,
        on_event: Callable[[KVEvent], None],
        elsewhere: Elsewhere,
        retry_after_s: float,
        clock: Clock,
    ) -> None:
        self._store = store
        self._on_event = on_event
        self._elsewhere = elsewhere
        self._retry_after_s = retry_after_s
        self._clock = clock
        self._index = DiskIndex()
        self._lock = threading.Lock()
        self._counts = DiskCounts()
        self._suspended_until: float | None = None
        self._closed = False

    @classmethod
    def open(
        cls,
        directory: str | Path,
        *,
        layout: str,
        block_bytes: int,
        max_bytes: int,
        on_event: Callable[[KVEvent], None],
        segment_bytes: int = SEGMENT_BYTES,
        elsewhere: Elsewhere = never_elsewhere,
        retry_after_s: float = RETRY_AFTER_S,
        clock: Clock | None = None,
    ) -> DiskTier:
        """Take a folder, made if need be, and find the blocks that a former process left there.

        No events are emitted for those: ``snapshot_keys`` names them. ``elsewhere`` says whether
        a faster tier of this machine has a block, so that others may hang on it. After a failed
        write there are none for ``retry_after_s``. Segments have ``segment_bytes``, or less if
        ``max_bytes``, for all of them, is less than four times that.

        Raises ConfigError if the folder cannot be used, another process uses it, or ``max_bytes``
        is too few.
        """
        store, scans = SegmentStore.open(
            str(directory),
            layout=layout,
            block_bytes=block_bytes,
            max_bytes=max_bytes,
            segment_bytes=segment_bytes,
        )
        tier = cls(store, on_event, elsewhere, retry_after_s, clock or SystemClock())
        try:
            tier._load(scans)
        except BaseException:
            tier.close()
            raise
        return tier

    def put(self, meta: BlockMeta, payload: memoryview, expected: int | None = None) -> bool:
        """Write a block of ``[block_bytes]`` bytes; True if it is on disk now and was not before.

        False if it is known, nobody has the block before it, its xxh3-64 is not ``expected``, or
        the disk fails or has failed shortly before. Raises ValueError for another length, or a
        ``meta`` that does not fit into a record.
        """
        data = self._as_bytes(payload)
        if meta.key in self._index:
            self._counts.known += 1
            return False
        if self._suspended_until is not None and self._clock.now() < self._suspended_until:
            self._counts.failed_puts += 1
            return False
        found = checksum(data)
        if not self._reachable(meta) or (expected is not None and found != expected):
            self._counts.refused += 1
            return False
        try:
            if not self._store.free_slots:
                self._begin_segment(meta.parent)
                # What had to go for it may have been the block before this one.
                if not self._reachable(meta):
                    self._counts.refused += 1
                    return False
            self._append(meta, data, found)
        except OSError as error:
            self._counts.failed_puts += 1
            self._write_failed(error)
            return False
        self._write_succeeded()
        self._counts.puts += 1
        self._on_event(KVEvent(KVEventKind.STORED, Tier.DISK, (meta.key,)))
        return True

    def get(self, key: BlockKey, into: memoryview) -> bool:
        """Read a block into ``into``, ``[block_bytes]`` writable bytes, and verify it.

        False if it is not here, or cannot be read or does not verify: then it is dropped, with
        what hangs below it, and ``into`` holds anything. Raises ValueError for another length.
        """
        data = self._as_bytes(into)
        entry = self._index.get(key)
        if entry is None or not self._read(entry, data):
            self._counts.misses += 1
            return False
        entry.num_reads += 1
        self._counts.hits += 1
        return True

    def contains(self, key: BlockKey) -> bool:
        """Whether a block is on disk, as far as is known. Any thread."""
        with self._lock:
            return key in self._index

    def match(self, keys: Sequence[BlockKey]) -> int:
        """How many of ``keys``, from the first on, are on disk without a gap. Any thread."""
        with self._lock:
            return self._index.match(keys)

    def meta(self, key: BlockKey) -> BlockMeta | None:
        """What is known of a block; ``None`` if it is not on disk. Any thread."""
        with self._lock:
            entry = self._index.get(key)
            return None if entry is None else entry.meta

    def checksum(self, key: BlockKey) -> int | None:
        """xxh3-64 of a block's bytes; ``None`` if it is not on disk. Any thread."""
        with self._lock:
            entry = self._index.get(key)
            return None if entry is None else entry.checksum

    def snapshot_keys(self) -> tuple[BlockKey, ...]:
        """All blocks, parents before children. Any thread."""
        with self._lock:
            return self._index.snapshot_keys()

    def left_elsewhere(self, keys: Collection[BlockKey]) -> int:
        """The faster tier has dropped blocks: drop what hung on them alone; returns how many.

        Call it after ``elsewhere`` denies them. Those of ``keys`` that are on disk are kept.
        """
        gone = [key for key in keys if key not in self._index]
        return self._remove(self._index.below(gone, self._elsewhere))

    def statistics(self) -> DiskStatistics:
        """Numbers as of now. Any thread."""
        return self._counts.statistics(
            self._store, num_blocks=len(self._index), suspended=self._suspended_until is not None
        )

    def check_integrity(self) -> None:
        """Raise AssertionError, with what is wrong, unless index and files agree.

        The closure under prefixes is checked only where nothing can be elsewhere: others drop
        blocks when they like.
        """
        self._store.check()
        alone = self._elsewhere is never_elsewhere
        elsewhere = self._elsewhere if alone else lambda key: True
        self._index.check(elsewhere, self._store.used_slots())

    def close(self) -> None:
        """Bring everything to the disk and give up the folder. Idempotent, never raises OSError.

        Afterwards reads and writes raise ValueError.
        """
        self._closed = True
        try:
            self._store.close()
        except OSError as error:
            self._write_failed(error)

    # What follows runs on the thread that reads and writes.

    def _load(self, scans: Sequence[Scan]) -> None:
        for scan in scans:
            for record in scan.records:
                # Of two with a key, which names its bytes, the newer one will live longer.
                self._index.put(
                    DiskEntry(record.meta, scan.header.number, record.slot, record.checksum)
                )
        orphans = self._index.unreachable(self._elsewhere)
        self._index.remove(orphans)
        self._counts.orphans = len(orphans)
        self._store.resume(scans)
        try:
            while self._store.excess_bytes(0) > 0:
                if not self._store.drop_unusable():
                    number = self._store.numbers[0]
                    self._store.drop(number)
                    self._index.remove(self._index.plan_drop(number, 0, self._elsewhere).removed)
        except OSError as error:
            self._write_failed(error)
        if orphans:
            log.warning("%d blocks on disk lack the blocks before them: dropped", len(orphans))

    def _as_bytes(self, block: memoryview) -> memoryview:
        if self._closed:
            raise ValueError("the disk tier is closed")
        block_bytes = self._store.shape.block_bytes
        if block.nbytes != block_bytes:
            raise ValueError(f"a block has {block_bytes} bytes, not {block.nbytes}")
        return block.cast("B")

    def _reachable(self, meta: BlockMeta) -> bool:
        return meta.parent is None or meta.parent in self._index or self._elsewhere(meta.parent)

    def _append(self, meta: BlockMeta, payload: memoryview, payload_checksum: int) -> None:
        segment, slot = self._store.append(meta, payload, payload_checksum)
        with self._lock:
            self._index.put(DiskEntry(meta, segment, slot, payload_checksum))

    def _begin_segment(self, wanted: BlockKey | None) -> None:
        """Make a new segment, and room for it. Raises OSError, with the index right for what is."""
        limit = self._store.shape.num_slots // CARRIED_SHARE
        carried: list[tuple[DiskEntry, memoryview]] = []
        try:
            while self._store.excess_bytes(self._store.shape.full_bytes) > 0:
                if not self._store.drop_unusable():
                    carried += self._drop_oldest(limit - len(carried), wanted)
            self._store.begin()
            while carried:
                entry, payload = carried[0]
                # It may have gone with one that it hung on and that could not be read.
                if entry.meta.key in self._index:
                    self._append(entry.meta, payload, entry.checksum)
                    self._counts.carried += 1
                del carried[0]
        finally:
            # Only if something was raised: their segment is gone.
            lost = [entry.meta.key for entry, _ in carried]
            self._remove(self._index.below(lost, self._elsewhere))

    def _drop_oldest(
        self, limit: int, wanted: BlockKey | None
    ) -> list[tuple[DiskEntry, memoryview]]:
        """Delete the oldest segment; returns those of its blocks that are to be written again."""
        number = self._store.numbers[0]
        drop = self._index.plan_drop(number, limit, self._elsewhere, wanted)
        survivors, lost = [], set(drop.removed)
        for entry in drop.survivors:
            payload = memoryview(bytearray(self._store.shape.block_bytes))
            if self._read(entry, payload):
                survivors.append((entry, payload))
            else:
                lost.add(entry.meta.key)
        self._store.drop(number)
        self._remove(self._index.below(lost, self._elsewhere))
        return survivors

    def _read(self, entry: DiskEntry, into: memoryview) -> bool:
        """Read and verify; a block that is not what it was is dropped."""
        try:
            num_bytes = self._store.read(entry.segment, entry.slot, into)
        except OSError as error:
            self._counts.read_errors += 1
            if error.errno in _PASSING_ERRORS:
                log.warning("a block on disk cannot be read for now: %s", error)
                return False
            problem = f"cannot be read: {error}"
        else:
            if num_bytes == into.nbytes and checksum(into) == entry.checksum:
                return True
            self._counts.corrupt += 1
            problem = "is not what was written"
        log.warning(
            "block %s in segment %d of the disk tier %s; it is dropped",
            entry.meta.key.hex(),
            entry.segment,
            problem,
        )
        self._remove(self._index.below([entry.meta.key], self._elsewhere))
        return False

    def _remove(self, keys: Collection[BlockKey]) -> int:
        """Forget blocks and say so, those below first; returns how many there were."""
        with self._lock:
            chains = self._index.remove(keys)
        for chain in chains:
            self._on_event(KVEvent(KVEventKind.REMOVED, Tier.DISK, chain))
        count = sum(map(len, chains))
        self._counts.dropped += count
        return count

    def _write_failed(self, error: OSError) -> None:
        self._counts.write_errors += 1
        if self._suspended_until is None:
            log.error(
                "the disk tier cannot write and stops writing for %g s at a time: %s",
                self._retry_after_s,
                error,
            )
        self._suspended_until = self._clock.now() + self._retry_after_s

    def _write_succeeded(self) -> None:
        if self._suspended_until is not None:
            log.warning("the disk tier writes again")
        self._suspended_until = None
