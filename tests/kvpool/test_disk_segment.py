from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.core.errors import ConfigError
from kvpool.checksum import checksum
from kvpool.disk_files import SegmentWriter, read_block, scan_segment
from kvpool.disk_segment import (
    HEADER_BYTES,
    RECORD_BYTES,
    Record,
    Scan,
    SegmentHeader,
    UnusableSegment,
    pack_record,
    segment_name,
    segment_number,
    unpack_record,
)
from kvpool.tiers import BlockMeta
from tests.kvpool.disk_kit import (
    BLOCK_BYTES,
    LAYOUT,
    SEGMENT_BYTES,
    bytes_of,
    full_disk,
    key_of,
    meta_of,
    no_file_may_grow,
)

HEADER = SegmentHeader.sized(7, BLOCK_BYTES, LAYOUT, SEGMENT_BYTES)
NAMES = ["a", "ab", "abc"]
KEYS = st.binary(min_size=16, max_size=16)
METAS = st.builds(
    BlockMeta,
    KEYS,
    st.none() | KEYS,
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(-(2**63), 2**63 - 1),
)


def append(writer: SegmentWriter, name: str) -> int:
    payload = bytes_of(key_of(name))
    return writer.append(meta_of(name), payload, checksum(payload))


def write(directory: Path, *names: str) -> Path:
    writer = SegmentWriter.create(directory, HEADER)
    assert [append(writer, name) for name in names] == list(range(len(names)))
    writer.close()
    return Path(writer.path)


def scan(path: Path) -> Scan:
    return scan_segment(path, LAYOUT, BLOCK_BYTES)


def names_in(found: Scan) -> list[str]:
    names = {key_of(name): name for name in NAMES}
    return [names[record.meta.key] for record in found.records]


@given(METAS, st.integers(0, 3), st.integers(0, 2**64 - 1))
def test_records_say_what_they_were_told(meta: BlockMeta, slot: int, digest: int) -> None:
    data = pack_record(HEADER, Record(meta, slot, digest))
    assert len(data) == RECORD_BYTES
    assert unpack_record(HEADER, slot, data) == Record(meta, slot, digest)
    assert unpack_record(HEADER, slot + 1, data) is None
    elsewhere = SegmentHeader(8, HEADER.block_bytes, HEADER.num_slots, HEADER.layout)
    assert unpack_record(elsewhere, slot, data) is None


@pytest.mark.parametrize(
    "meta",
    [
        BlockMeta(b"short", None),
        BlockMeta(key_of("a"), b"short"),
        BlockMeta(key_of("a"), None, depth=2**32),
        BlockMeta(key_of("a"), None, num_tokens=-1),
    ],
)
def test_what_does_not_fit_into_a_record_is_refused(meta: BlockMeta) -> None:
    with pytest.raises(ValueError, match=r"block's key has 16 bytes|does not fit"):
        pack_record(HEADER, Record(meta, 0, 0))


@given(st.integers(1, 5000), st.integers(0, 200_000))
def test_a_segment_keeps_to_its_size(block_bytes: int, max_bytes: int) -> None:
    header = SegmentHeader.sized(1, block_bytes, LAYOUT, max_bytes)
    assert header.num_slots == 0 or header.full_bytes <= max_bytes
    larger = SegmentHeader(1, block_bytes, header.num_slots + 1, LAYOUT)
    assert larger.full_bytes > max_bytes
    ends = [header.record_offset(header.num_slots)]
    for slot in range(header.num_slots):
        assert header.slot_offset(slot) >= ends[-1]
        ends.append(header.slot_offset(slot) + block_bytes)
        assert header.used_bytes(slot + 1) == ends[-1]
    assert ends[-1] <= header.full_bytes


def test_blocks_of_whole_pages_lie_on_pages() -> None:
    header = SegmentHeader.sized(1, 8192, LAYOUT, 10**6)
    assert {header.slot_offset(slot) % 4096 for slot in range(header.num_slots)} == {0}


def test_names_are_numbers() -> None:
    assert segment_number(segment_name(0xABC)) == 0xABC
    for name in ("lock", "segment-1.kv", segment_name(1) + "~", "x" + segment_name(1)):
        assert segment_number(name) is None


def test_a_layout_must_fit_into_the_header() -> None:
    assert SegmentHeader.unpack(SegmentHeader(1, 1, 1, "x" * 4000).pack()).layout == "x" * 4000
    with pytest.raises(ConfigError, match="too long"):
        SegmentHeader(1, 1, 1, "x" * HEADER_BYTES)


def test_what_was_written_is_found_and_read(tmp_path: Path) -> None:
    path = write(tmp_path, *NAMES)
    found = scan(path)
    assert found.header == HEADER
    assert [record.meta for record in found.records] == [meta_of(name) for name in NAMES]
    assert (found.num_torn, found.num_corrupt, found.appendable) == (0, 0, True)
    assert found.num_bytes == path.stat().st_size == HEADER.used_bytes(3)
    for record in found.records:
        into = memoryview(bytearray(BLOCK_BYTES))
        assert read_block(path, HEADER, record.slot, into) == BLOCK_BYTES
        assert into == bytes_of(record.meta.key)
        assert checksum(into) == record.checksum


def test_a_segment_is_resumed_until_it_is_full(tmp_path: Path) -> None:
    path = write(tmp_path, *NAMES[:2])
    writer = SegmentWriter.resume(path, scan(path))
    assert append(writer, NAMES[2]) == 2
    assert writer.num_used == 3
    append(writer, "x")
    assert writer.full
    writer.close()
    writer.close()
    found = scan_segment(path, LAYOUT, BLOCK_BYTES)
    assert len(found.records) == 4
    assert not found.appendable


def interrupted_writes(before: bytes, after: bytes) -> Iterator[bytes]:
    """What the file holds when the writer is killed: after each byte of the block, then each of
    the record.
    """
    slot, start = 2, HEADER.record_offset(2)
    for size in range(HEADER.slot_offset(slot) + 1, len(after) + 1):
        yield before[:start] + bytes(RECORD_BYTES) + after[start + RECORD_BYTES : size]
    for size in range(1, RECORD_BYTES):
        record = after[start : start + size].ljust(RECORD_BYTES, b"\0")
        yield after[:start] + record + after[start + RECORD_BYTES :]


def test_a_write_torn_at_any_byte_costs_only_its_block(tmp_path: Path) -> None:
    whole = write(tmp_path, *NAMES).read_bytes()
    (tmp_path / "before").mkdir()
    path = write(tmp_path / "before", *NAMES[:2])
    states = [state for state in interrupted_writes(path.read_bytes(), whole) if state != whole]
    assert len(states) >= BLOCK_BYTES + RECORD_BYTES - 2
    for state in states:
        path.write_bytes(state)
        found = scan(path)
        assert names_in(found) == NAMES[:2]
        assert (found.num_torn + found.num_corrupt, found.appendable) == (1, False)


def test_a_file_cut_at_any_byte_keeps_its_whole_blocks(tmp_path: Path) -> None:
    path = write(tmp_path, *NAMES)
    ends = [HEADER.used_bytes(count + 1) for count in range(3)]
    for size in range(ends[2] - 1, HEADER.slot_offset(0) - 1, -1):
        os.truncate(path, size)
        found = scan(path)
        kept = sum(end <= size for end in ends)
        assert names_in(found) == NAMES[:kept]
        assert (found.num_torn, found.num_corrupt, found.appendable) == (3 - kept, 0, False)


def test_a_file_cut_in_its_table_or_header_has_nothing(tmp_path: Path) -> None:
    path = write(tmp_path, *NAMES)
    for size in range(HEADER.slot_offset(0) - 1, HEADER_BYTES - 1, -97):
        os.truncate(path, size)
        found = scan(path)
        assert names_in(found) == []
        assert found.num_torn > 0
        assert not found.appendable
    for size in [*range(HEADER_BYTES - 1, 0, -97), 0]:
        os.truncate(path, size)
        with pytest.raises(UnusableSegment, match="shorter") as caught:
            scan(path)
        assert caught.value.torn


def flipped(data: bytes, offset: int, bit: int) -> bytes:
    changed = bytearray(data)
    changed[offset] ^= 1 << bit
    return bytes(changed)


def test_a_flipped_bit_in_a_record_costs_that_record(tmp_path: Path) -> None:
    path = write(tmp_path, *NAMES)
    data = path.read_bytes()
    for offset in range(RECORD_BYTES):
        path.write_bytes(flipped(data, HEADER.record_offset(1) + offset, offset % 8))
        found = scan(path)
        assert names_in(found) == ["a", "abc"]
        assert (found.num_torn, found.num_corrupt, found.appendable) == (0, 1, False)


def test_a_flipped_bit_in_the_header_costs_the_segment(tmp_path: Path) -> None:
    path = write(tmp_path, *NAMES)
    data = path.read_bytes()
    for offset in [*range(64), *range(64, HEADER_BYTES, 61)]:
        path.write_bytes(flipped(data, offset, offset % 8))
        with pytest.raises(UnusableSegment, match=r"damaged|no segment") as caught:
            scan(path)
        assert not caught.value.torn


def test_a_lost_record_between_others_is_counted(tmp_path: Path) -> None:
    path = write(tmp_path, *NAMES)
    with path.open("r+b") as file:
        file.seek(HEADER.record_offset(1))
        file.write(bytes(RECORD_BYTES))
    found = scan(path)
    assert names_in(found) == ["a", "abc"]
    assert (found.num_torn, found.appendable) == (1, False)


def test_others_are_named(tmp_path: Path) -> None:
    path = write(tmp_path, "a")
    with pytest.raises(UnusableSegment, match="layout is 'a layout', this pool's is 'b'") as caught:
        scan_segment(path, "b", BLOCK_BYTES)
    assert caught.value.other
    with pytest.raises(UnusableSegment, match="blocks have 96 bytes") as caught:
        scan_segment(path, LAYOUT, 128)
    assert caught.value.other
    path = path.rename(tmp_path / segment_name(8))
    with pytest.raises(UnusableSegment, match="another segment's"):
        scan(path)


def test_a_full_disk_leaves_the_slot_free(tmp_path: Path) -> None:
    writer = SegmentWriter.create(tmp_path, HEADER)
    append(writer, "a")
    path = Path(writer.path)
    with full_disk(path), pytest.raises(OSError, match="No space left"):
        append(writer, "ab")
    # Room for half of the block.
    with no_file_may_grow(HEADER.slot_offset(1) + 40), pytest.raises(OSError, match="too large"):
        append(writer, "ab")
    assert names_in(scan(path)) == ["a"]
    assert scan(path).appendable
    assert append(writer, "ab") == 1
    writer.close()
    assert names_in(scan(path)) == ["a", "ab"]


def test_a_segment_that_cannot_be_made_leaves_nothing(tmp_path: Path) -> None:
    with no_file_may_grow(100), pytest.raises(OSError, match="too large"):
        SegmentWriter.create(tmp_path, HEADER)
    assert list(tmp_path.iterdir()) == []
