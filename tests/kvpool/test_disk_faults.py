"""The disk tier on disks that lie, and are full."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from baton.core.clock import VirtualClock
from kvpool.disk import RETRY_AFTER_S, DiskTier
from kvpool.disk_segment import HEADER_BYTES, RECORD_BYTES, SegmentHeader
from tests.kvpool.disk_kit import (
    BLOCK_BYTES,
    LAYOUT,
    SEGMENT_BYTES,
    Follower,
    full_disk,
    get,
    key_of,
    keys_of,
    no_file_may_grow,
    open_tier,
    put,
    segments,
)

HEADER = SegmentHeader.sized(1, BLOCK_BYTES, LAYOUT, SEGMENT_BYTES)


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


def names_in(tier: DiskTier, *names: str) -> list[str]:
    return [name for name in names if tier.contains(key_of(name))]


def test_after_a_torn_write_the_next_goes_to_a_new_segment(tmp_path: Path) -> None:
    tier = open_tier(tmp_path / "model")
    put(tier, "a", "ab")
    tier.close()
    (model,) = segments(tmp_path / "model")
    data = model.read_bytes()
    start = HEADER.record_offset(1)
    cut = [data[:size] for size in range(HEADER.slot_offset(1), len(data))]
    torn = [
        data[: start + size] + bytes(RECORD_BYTES - size) + data[start + RECORD_BYTES :]
        for size in range(RECORD_BYTES)
    ]
    for index, state in enumerate(one for one in cut + torn if one != data):
        directory = tmp_path / str(index)
        directory.mkdir()
        (directory / model.name).write_bytes(state)
        tier = open_tier(directory)
        assert names_in(tier, "a", "ab") == ["a"]
        found = tier.statistics()
        assert found.num_torn + found.num_corrupt == 1
        assert put(tier, "ab") == [True]
        assert len(segments(directory)) == 2
        tier.check_integrity()
        tier.close()
        tier = open_tier(directory)
        assert get(tier, "a")
        assert get(tier, "ab")
        tier.close()
        shutil.rmtree(directory)


def test_a_killed_writer_leaves_whole_blocks(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom pathlib import Path\nfrom tests.kvpool.disk_kit import open_tier, put\n"
        "tier = open_tier(Path(sys.argv[1]), print, num_segments=4096)\n"
        "for index in range(10**6):\n"
        "    put(tier, chr(200 + index))\n"
        "    print(index, flush=True)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        last = ""
        for line in process.stdout:
            last = line if line[0].isdigit() else last
            if last.strip() == "30":
                process.send_signal(signal.SIGKILL)
                break
    tier = open_tier(tmp_path, num_segments=4096)
    assert tier.statistics().num_torn <= 1
    assert all(get(tier, chr(200 + index)) for index in range(31))
    assert put(tier, "a") == [True]
    tier.check_integrity()


def test_a_flipped_bit_in_a_block_is_a_miss(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    put(tier, "a", "b")
    tier.close()
    (path,) = segments(tmp_path)
    for offset in range(HEADER.slot_offset(1), HEADER.slot_offset(1) + BLOCK_BYTES):
        flip(path, offset)
        follower = Follower(present=set(keys_of("a", "b")))
        tier = open_tier(tmp_path, follower)
        assert tier.contains(key_of("b"))
        assert not tier.get(key_of("b"), memoryview(bytearray(BLOCK_BYTES)))
        assert names_in(tier, "a", "b") == ["a"]
        assert follower.present == set(keys_of("a"))
        assert (tier.statistics().num_corrupt, tier.statistics().num_misses) == (1, 1)
        assert get(tier, "a")
        tier.close()
        flip(path, offset)
    assert get(open_tier(tmp_path), "b")


def test_a_damaged_block_takes_what_hangs_on_it(tmp_path: Path) -> None:
    follower = Follower()
    tier = open_tier(tmp_path, follower)
    put(tier, "a", "ab", "abc", "ad", "adx")
    flip(segments(tmp_path)[0], HEADER.slot_offset(1))
    assert not get(tier, "ab")
    assert follower.present == set(keys_of("a", "ad", "adx"))
    assert follower.events[-1].keys == tuple(keys_of("ab", "abc"))
    tier.check_integrity()
    assert put(tier, "ab", "abc") == [True, True]
    tier.close()
    # The damaged copy is still in its segment; the newer one counts.
    tier = open_tier(tmp_path)
    assert [get(tier, name) for name in ("ab", "abc")] == [True, True]


def test_a_block_is_verified_before_it_is_written_again(tmp_path: Path) -> None:
    tier = open_tier(tmp_path, num_segments=4)
    put(tier, "a", "ab", "c", "d")
    assert get(tier, "a")
    flip(segments(tmp_path)[0], HEADER.slot_offset(0))
    put(tier, *"0123456789ABx")
    assert (tier.statistics().num_carried, tier.statistics().num_corrupt) == (0, 1)
    assert names_in(tier, "a", "ab", "x") == ["x"]
    tier.check_integrity()


def test_what_hangs_on_a_damaged_block_is_not_written_again(tmp_path: Path) -> None:
    follower = Follower()
    tier = open_tier(tmp_path, follower, num_segments=4, num_slots=8)
    put(tier, "a", "ab", *"cdefgh")
    assert get(tier, "a")
    assert get(tier, "ab")
    flip(segments(tmp_path)[0], HEADER.slot_offset(0))
    others = [chr(200 + index) for index in range(25)]
    assert all(put(tier, *others))
    assert follower.present == set(keys_of(*others)) == set(tier.snapshot_keys())
    assert tier.statistics().num_carried == 0
    tier.check_integrity()


def test_a_damaged_record_makes_orphans(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    put(tier, "a", "ab", "abc", "abcd", "d", "abcx")
    tier.close()
    flip(segments(tmp_path)[0], HEADER.record_offset(1) + 9)
    tier = open_tier(tmp_path)
    assert set(tier.snapshot_keys()) == set(keys_of("a", "d"))
    assert (tier.statistics().num_orphans, tier.statistics().num_corrupt) == (3, 1)
    tier.check_integrity()
    tier.close()
    host = set(keys_of("ab"))
    tier = open_tier(tmp_path, elsewhere=host.__contains__)
    assert set(tier.snapshot_keys()) == set(keys_of("a", "d", "abc", "abcd", "abcx"))
    assert all(get(tier, name) for name in ("abc", "abcd", "abcx"))


def test_what_is_not_ours_stays(tmp_path: Path) -> None:
    (tmp_path / "README").write_text("mine")
    (tmp_path / "segment-1.kv").write_text("not quite a segment's name")
    (tmp_path / "folder").mkdir()
    tier = open_tier(tmp_path, num_segments=4)
    assert tier.statistics().num_foreign == 3
    put(tier, *(chr(200 + index) for index in range(40)))
    assert tier.statistics().num_bytes <= 4 * SEGMENT_BYTES
    assert (tmp_path / "README").read_text() == "mine"
    assert {"segment-1.kv", "folder"} <= set(os.listdir(tmp_path))


def test_segments_that_cannot_be_used_go_when_their_room_is_needed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tier = open_tier(tmp_path, layout="another layout")
    put(tier, "a", "b", "c", "d", "e")
    tier.close()
    other, empty, short, garbage = [
        *segments(tmp_path)[:1],
        tmp_path / "segment-00000000000000a0.kv",
        tmp_path / "segment-00000000000000a1.kv",
        tmp_path / "segment-00000000000000a2.kv",
    ]
    empty.touch()
    short.write_bytes(other.read_bytes()[: HEADER_BYTES - 1])
    garbage.write_bytes(b"\xa5" * SEGMENT_BYTES)
    with caplog.at_level(logging.WARNING):
        tier = open_tier(tmp_path, num_segments=5)
    assert len([r for r in caplog.records if " skipped: it" in r.message]) == 3
    found = tier.statistics()
    assert (found.num_other_layouts, found.num_torn, found.num_corrupt) == (2, 2, 1)
    assert (found.num_blocks, found.num_segments) == (0, 0)
    assert put(tier, "a") == [True]
    assert all(path.exists() for path in (other, empty, short, garbage))
    put(tier, *"bcdefghijklmnopqrst")
    assert not any(path.exists() for path in (other, empty, short, garbage))
    assert tier.statistics().num_blocks == 20
    assert segments(tmp_path)[0].name == "segment-00000000000000a3.kv"
    tier.check_integrity()


def test_the_other_layout_finds_its_segments_again(tmp_path: Path) -> None:
    for layout in ("one", "two"):
        tier = open_tier(tmp_path, layout=layout)
        put(tier, "a", "ab")
        tier.close()
    tier = open_tier(tmp_path, layout="one")
    assert get(tier, "ab")


def test_a_full_disk_suspends_writes_and_not_reads(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock, follower = VirtualClock(), Follower()
    tier = open_tier(tmp_path, follower, clock=clock)
    put(tier, "a")
    with full_disk(segments(tmp_path)[0]):
        assert put(tier, "b", "c") == [False, False]
        assert get(tier, "a")
        clock.advance(RETRY_AFTER_S)
        assert put(tier, "b") == [False]
        found = tier.statistics()
        assert (found.num_write_errors, found.num_failed_puts, found.suspended) == (2, 3, True)
    assert put(tier, "b") == [False]
    clock.advance(RETRY_AFTER_S)
    assert put(tier, "b", "c") == [True, True]
    assert not tier.statistics().suspended
    assert follower.present == set(keys_of("a", "b", "c"))
    messages = [record.message for record in caplog.records]
    assert [m.split(": ")[0] for m in messages] == [
        "the disk tier cannot write and stops writing for 30 s at a time",
        "the disk tier writes again",
    ]
    tier.check_integrity()
    tier.close()
    tier = open_tier(tmp_path)
    assert [get(tier, name) for name in "abc"] == [True] * 3
    assert tier.statistics().num_torn == 0


def test_a_segment_that_cannot_be_made_loses_only_what_made_room_for_it(tmp_path: Path) -> None:
    clock, follower = VirtualClock(), Follower()
    tier = open_tier(tmp_path, follower, num_segments=4, clock=clock)
    put(tier, "a", "ax", "c", "d", *"0123456789AB")
    assert get(tier, "a")
    with no_file_may_grow():
        assert put(tier, "x", "y") == [False, False]
    assert follower.present == set(keys_of(*"0123456789AB")) == set(tier.snapshot_keys())
    assert all(get(tier, name) for name in "0123456789AB")
    tier.check_integrity()
    clock.advance(RETRY_AFTER_S)
    assert put(tier, "x", "a") == [True, True]
    assert follower.present == set(keys_of(*"0123456789ABxa"))
    tier.check_integrity()


def test_what_cannot_be_written_again_is_dropped(tmp_path: Path) -> None:
    clock, follower = VirtualClock(), Follower()
    tier = open_tier(tmp_path, follower, num_segments=4, clock=clock)
    put(tier, "a", "b", "c", "d", "ax", *"0123456789A")
    assert get(tier, "a")
    # A header and a table, and no block.
    with no_file_may_grow(HEADER.slot_offset(0)):
        assert put(tier, "x") == [False]
    assert follower.present == set(keys_of(*"0123456789A")) == set(tier.snapshot_keys())
    tier.check_integrity()
    clock.advance(RETRY_AFTER_S)
    assert put(tier, "x") == [True]
    tier.check_integrity()


def test_a_lost_file_costs_its_blocks(tmp_path: Path) -> None:
    follower = Follower()
    tier = open_tier(tmp_path, follower)
    put(tier, "a", "b", "c", "d", "ab", "e")
    segments(tmp_path)[0].unlink()
    assert not get(tier, "a")
    assert follower.present == set(keys_of("b", "c", "d", "e"))
    assert get(tier, "e")
    assert tier.statistics().num_read_errors == 1
    with pytest.raises(AssertionError, match="expected"):
        tier.check_integrity()


@contextlib.contextmanager
def no_more_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_too_many_open_files_cost_no_block(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    put(tier, "a")
    with no_more_files():
        assert not get(tier, "a")
    assert get(tier, "a")
    assert tier.statistics().num_read_errors == 1


def test_too_many_open_files_when_a_segment_goes(tmp_path: Path) -> None:
    clock, follower = VirtualClock(), Follower()
    tier = open_tier(tmp_path, follower, num_segments=4, clock=clock)
    put(tier, "a", "b", "c", "d", "ax", *"0123456789A")
    assert get(tier, "a")
    with no_more_files():
        assert put(tier, "x") == [False]
    assert follower.present == set(keys_of(*"0123456789A")) == set(tier.snapshot_keys())
    tier.check_integrity()
    clock.advance(RETRY_AFTER_S)
    assert put(tier, "x") == [True]


def test_the_folder_is_given_up_on_every_path(tmp_path: Path) -> None:
    def broken(key: bytes) -> bool:
        raise ZeroDivisionError

    host = set(keys_of("a"))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        tier = open_tier(tmp_path, elsewhere=host.__contains__)
        put(tier, "ab", "b", "c", "d", "e")
        assert get(tier, "ab")
        tier.close()
        with pytest.raises(ZeroDivisionError):
            open_tier(tmp_path, elsewhere=broken)
    assert len(os.listdir("/proc/self/fd")) == before
