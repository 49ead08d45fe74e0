"""What the disk tier says of itself."""

from __future__ import annotations

import dataclasses

from kvpool.disk_store import SegmentStore


@dataclasses.dataclass(frozen=True, slots=True)
class DiskStatistics:
    """What the disk tier holds (first five) and has done since it was opened."""

    num_blocks: int
    num_bytes: int
    """Of all its files."""
    max_bytes: int
    num_segments: int
    suspended: bool
    """The last write failed; reads go on, and so will writes after a while."""
    num_orphans: int
    """Found at open without the blocks before them, and dropped."""
    num_torn: int
    """Blocks and segments whose writing was never completed."""
    num_corrupt: int
    """Damaged records, segments and blocks."""
    num_other_layouts: int
    """Whole segments of another layout, kept until their room is needed."""
    num_foreign: int
    """Files in the folder that are not the tier's, and left alone."""
    num_puts: int
    """Blocks that were written."""
    num_known: int
    """Not written: on disk already."""
    num_refused: int
    """Not written: the block before is neither on disk nor elsewhere, or the bytes are wrong."""
    num_failed_puts: int
    """Not written: the disk failed, or had failed shortly before."""
    num_hits: int
    num_misses: int
    """Gets without a block, those that failed included."""
    num_dropped: int
    """Blocks removed."""
    num_carried: int
    """Blocks that were written again because they were in use when their segment was dropped."""
    num_write_errors: int
    num_read_errors: int


@dataclasses.dataclass(slots=True)
class DiskCounts:
    """What is counted as it happens; see ``DiskStatistics``."""

    orphans: int = 0
    corrupt: int = 0
    puts: int = 0
    known: int = 0
    refused: int = 0
    failed_puts: int = 0
    hits: int = 0
    misses: int = 0
    dropped: int = 0
    carried: int = 0
    write_errors: int = 0
    read_errors: int = 0

    def statistics(
        self, store: SegmentStore, *, num_blocks: int, suspended: bool
    ) -> DiskStatistics:
        """With what the files say."""
        return DiskStatistics(
            num_blocks=num_blocks,
            num_bytes=store.num_bytes,
            max_bytes=store.max_bytes,
            num_segments=store.num_segments,
            suspended=suspended,
            num_orphans=self.orphans,
            num_torn=store.num_torn,
            num_corrupt=store.num_corrupt + self.corrupt,
            num_other_layouts=store.num_other,
            num_foreign=store.num_foreign,
            num_puts=self.puts,
            num_known=self.known,
            num_refused=self.refused,
            num_failed_puts=self.failed_puts,
            num_hits=self.hits,
            num_misses=self.misses,
            num_dropped=self.dropped,
            num_carried=self.carried,
            num_write_errors=self.write_errors,
            num_read_errors=self.read_errors,
        )
