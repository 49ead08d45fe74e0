from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from baton.core.errors import ConfigError
from kvpool.checksum import checksum
from kvpool.disk import DiskTier
from kvpool.tiers import KVEvent, KVEventKind, Tier
from tests.kvpool.disk_kit import (
    BLOCK_BYTES,
    LAYOUT,
    SEGMENT_BYTES,
    Follower,
    bytes_of,
    get,
    ignore,
    key_of,
    keys_of,
    meta_of,
    open_tier,
    put,
    segments,
)

STORED, REMOVED = KVEventKind.STORED, KVEventKind.REMOVED


def test_blocks_come_back_as_they_were(tmp_path: Path) -> None:
    follower = Follower()
    tier = open_tier(tmp_path, follower)
    assert put(tier, "a", "ab", "b", "abc") == [True] * 4
    assert put(tier, "ab") == [False]
    assert [get(tier, name) for name in ("abc", "b", "ab", "a")] == [True] * 4
    assert not get(tier, "c")
    assert tier.contains(key_of("b"))
    assert not tier.contains(key_of("c"))
    assert tier.meta(key_of("ab")) == meta_of("ab")
    assert tier.checksum(key_of("ab")) == checksum(bytes_of(key_of("ab")))
    assert tier.meta(key_of("c")) is None
    assert tier.checksum(key_of("c")) is None
    assert [event.keys for event in follower.events] == [
        (key,) for key in keys_of("a", "ab", "b", "abc")
    ]
    found = tier.statistics()
    assert (found.num_blocks, found.num_puts, found.num_known) == (4, 4, 1)
    assert (found.num_hits, found.num_misses, found.suspended) == (4, 1, False)
    assert found.num_bytes == sum(path.stat().st_size for path in segments(tmp_path))
    tier.check_integrity()


def test_a_match_ends_at_the_first_gap(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    put(tier, "a", "ab", "abc")
    assert tier.match(keys_of("a", "ab", "abc", "abcd")) == 3
    assert tier.match(keys_of("a", "x", "abc")) == 1
    assert tier.match(keys_of("x", "a")) == tier.match([]) == 0


def test_any_buffer_of_the_right_size_will_do(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    wide = bytes_of(key_of("a")).cast("Q")
    assert tier.put(meta_of("a"), wide)
    into = memoryview(bytearray(BLOCK_BYTES)).cast("I")
    assert tier.get(key_of("a"), into)
    assert into.tobytes() == wide.tobytes()
    for size in (0, BLOCK_BYTES - 1, BLOCK_BYTES + 1):
        with pytest.raises(ValueError, match="a block has 96 bytes"):
            tier.put(meta_of("b"), memoryview(bytearray(size)))
        with pytest.raises(ValueError, match="a block has 96 bytes"):
            tier.get(key_of("a"), memoryview(bytearray(size)))


def test_bytes_that_are_not_the_expected_ones_are_refused(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    payload = bytes_of(key_of("a"))
    assert not tier.put(meta_of("a"), payload, checksum(payload) ^ 1)
    assert tier.statistics().num_refused == 1
    assert tier.put(meta_of("a"), payload, checksum(payload))


def test_a_block_needs_the_one_before_it(tmp_path: Path) -> None:
    host: set[bytes] = set()
    tier = open_tier(tmp_path, elsewhere=host.__contains__)
    assert put(tier, "ab") == [False]
    host.add(key_of("a"))
    assert put(tier, "ab", "abc") == [True, True]
    assert tier.match(keys_of("a", "ab")) == 0
    assert tier.statistics().num_refused == 1
    tier.check_integrity()


def test_what_hangs_on_another_tier_goes_with_it(tmp_path: Path) -> None:
    host = set(keys_of("a", "b", "c"))
    follower = Follower(host.__contains__)
    tier = open_tier(tmp_path, follower, elsewhere=host.__contains__)
    put(tier, "ab", "abc", "abd", "b", "bc", "cd")
    host.difference_update(keys_of("a", "b"))
    assert tier.left_elsewhere(keys_of("a", "b")) == 3
    assert follower.present == set(keys_of("b", "bc", "cd"))
    removed = [event.keys for event in follower.events if event.kind is REMOVED]
    assert removed[-1][0] == key_of("ab")
    assert sorted(map(len, removed)) == [1, 2]


def test_everything_is_there_after_a_restart(tmp_path: Path) -> None:
    names = ["a", "ab", "b", "bc", "abc", "bcd"]
    tier = open_tier(tmp_path)
    put(tier, *names[:5])
    tier.close()
    follower = Follower(present=set(keys_of(*names[:5])))
    tier = open_tier(tmp_path, follower)
    assert follower.events == []
    put(tier, *names[5:])
    tier.check_integrity()
    # The second segment was only half full.
    assert len(segments(tmp_path)) == 2
    tier.close()
    tier = open_tier(tmp_path)
    assert set(tier.snapshot_keys()) == set(keys_of(*names))
    assert all(get(tier, name) for name in names)
    assert [tier.meta(key_of(name)) for name in names] == [meta_of(name) for name in names]


def test_a_snapshot_names_parents_first(tmp_path: Path) -> None:
    host = set(keys_of("a"))
    tier = open_tier(tmp_path, elsewhere=host.__contains__)
    put(tier, "ab", "abc", "abcd", "a", "b")
    order = list(tier.snapshot_keys())
    assert sorted(order) == sorted(keys_of("a", "ab", "abc", "abcd", "b"))
    places = [order.index(key) for key in keys_of("a", "ab", "abc", "abcd")]
    assert places == sorted(places)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    with pytest.raises(ConfigError, match=r"in use by process \d+: give each pool node") as caught:
        open_tier(tmp_path)
    assert caught.value.param == "disk_path"
    program = (
        "import sys; from kvpool.disk import DiskTier;"
        "DiskTier.open(sys.argv[1], layout='a', block_bytes=9, max_bytes=10**6, on_event=print)"
    )
    other = [sys.executable, "-c", program, str(tmp_path)]
    root = Path(__file__).parents[2]
    result = subprocess.run(other, cwd=root, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert "is in use by process" in result.stderr
    tier.close()
    open_tier(tmp_path).close()


def test_a_closed_tier_says_so(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    put(tier, "a")
    tier.close()
    tier.close()
    with pytest.raises(ValueError, match="closed"):
        put(tier, "b")
    with pytest.raises(ValueError, match="closed"):
        get(tier, "a")


def test_settings_that_cannot_work_are_refused(tmp_path: Path) -> None:
    def attempt(directory: Path, block_bytes: int, max_bytes: int) -> DiskTier:
        return DiskTier.open(
            directory,
            layout=LAYOUT,
            block_bytes=block_bytes,
            max_bytes=max_bytes,
            on_event=ignore,
        )

    for block_bytes, max_bytes in ((0, 10**6), (5000, 4 * 10_000), (64 << 20, 10**9)):
        with pytest.raises(ConfigError, match="raise max_bytes"):
            attempt(tmp_path, block_bytes, max_bytes)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot use the folder"):
        attempt(tmp_path / "file", 96, 10**6)
    attempt(tmp_path / "new" / "folder", 96, 10**6).close()


def test_the_oldest_segment_goes_first(tmp_path: Path) -> None:
    follower = Follower()
    tier = open_tier(tmp_path, follower, num_segments=4)
    names = [chr(ord("a") + index) for index in range(20)]
    for name in names:
        assert put(tier, name) == [True]
        assert tier.statistics().num_bytes <= 4 * SEGMENT_BYTES
    assert set(tier.snapshot_keys()) == set(keys_of(*names[4:])) == follower.present
    assert [path.name[-4:] for path in segments(tmp_path)] == ["2.kv", "3.kv", "4.kv", "5.kv"]
    assert tier.statistics().num_dropped == 4
    tier.check_integrity()


def fill(tier: DiskTier, *, segments: int, first: str = "0") -> list[str]:
    """Whole segments of blocks that nobody reads; they hang on nothing."""
    names = [chr(ord(first) + index) for index in range(4 * segments)]
    assert put(tier, *names) == [True] * len(names)
    return names


def test_blocks_that_were_read_survive_their_segment(tmp_path: Path) -> None:
    follower = Follower()
    tier = open_tier(tmp_path, follower, num_segments=4)
    put(tier, "a", "ab", "abc", "d")
    assert get(tier, "a")
    fill(tier, segments=3)
    assert put(tier, "x") == [True]
    # One in four slots of the new segment.
    assert tier.statistics().num_carried == 1
    assert [tier.match(keys_of("a", "ab")), get(tier, "a"), get(tier, "x")] == [1, True, True]
    removed = [event.keys for event in follower.events if event.kind is REMOVED]
    assert sorted(removed, key=len) == [tuple(keys_of("d")), tuple(keys_of("ab", "abc"))]
    tier.check_integrity()
    tier.close()
    assert get(open_tier(tmp_path, num_segments=4), "a")


def test_what_was_carried_must_be_read_again(tmp_path: Path) -> None:
    tier = open_tier(tmp_path, num_segments=4)
    put(tier, "a", "b", "c", "d")
    get(tier, "a")
    fill(tier, segments=7)
    assert tier.statistics().num_carried == 1
    assert not tier.contains(key_of("a"))


def test_offline_blocks_never_survive(tmp_path: Path) -> None:
    tier = open_tier(tmp_path, num_segments=4)
    put(tier, "a", priority=-1)
    put(tier, "b", "c", "d")
    get(tier, "a")
    get(tier, "a")
    get(tier, "b")
    fill(tier, segments=3)
    put(tier, "x")
    assert [tier.contains(key) for key in keys_of("a", "b")] == [False, True]


def test_what_hangs_below_a_dropped_block_goes_with_it(tmp_path: Path) -> None:
    follower = Follower()
    tier = open_tier(tmp_path, follower, num_segments=4)
    put(tier, "a", priority=-1)
    put(tier, "b", "c", "d", "ab", "abc", "abd")
    fill(tier, segments=2)
    put(tier, "x", "y")
    assert follower.present == set(tier.snapshot_keys())
    assert follower.present.isdisjoint(keys_of("a", "ab", "abc", "abd"))
    removed = [key for e in follower.events if e.kind is REMOVED for key in reversed(e.keys)]
    places = [removed.index(key) for key in keys_of("abc", "ab", "a")]
    assert places == sorted(places)
    assert removed.index(key_of("abd")) < removed.index(key_of("ab"))
    tier.check_integrity()


def test_it_stays_if_the_dropped_block_is_elsewhere(tmp_path: Path) -> None:
    host = set(keys_of("a"))
    follower = Follower(host.__contains__)
    tier = open_tier(tmp_path, follower, num_segments=4, elsewhere=host.__contains__)
    put(tier, "a", priority=-1)
    put(tier, "b", "c", "d", "ab", "abc")
    fill(tier, segments=3)
    assert not tier.contains(key_of("a"))
    assert get(tier, "abc")
    assert get(tier, "ab")


def test_the_block_before_a_new_one_survives(tmp_path: Path) -> None:
    tier = open_tier(tmp_path, num_segments=4)
    put(tier, "a", "b", "c", "d")
    fill(tier, segments=3)
    assert put(tier, "cx") == [True]
    assert tier.match(keys_of("c", "cx")) == 2


def test_a_new_block_is_refused_if_the_one_before_it_had_to_go(tmp_path: Path) -> None:
    tier = open_tier(tmp_path, num_segments=4)
    put(tier, "a", "b", "c", "d", priority=-1)
    fill(tier, segments=3)
    assert put(tier, "ax") == [False]
    assert put(tier, "x") == [True]
    assert tier.statistics().num_refused == 1
    tier.check_integrity()


def test_parents_on_which_later_segments_hang_survive(tmp_path: Path) -> None:
    tier = open_tier(tmp_path, num_segments=4)
    put(tier, "a", "b", "c", "d", "ab", "ac")
    fill(tier, segments=2)
    put(tier, "x", "y", "z")
    assert tier.statistics().num_carried == 1
    assert [get(tier, name) for name in ("a", "ab", "ac", "b")] == [True, True, True, False]


def test_less_room_than_before_costs_the_oldest(tmp_path: Path) -> None:
    tier = open_tier(tmp_path, num_segments=8)
    names = fill(tier, segments=7)
    tier.close()
    tier = open_tier(tmp_path, num_segments=4)
    assert set(tier.snapshot_keys()) == set(keys_of(*names[12:]))
    assert tier.statistics().num_bytes <= 4 * SEGMENT_BYTES
    tier.check_integrity()
    fill(tier, segments=2, first="a")
    tier.check_integrity()


def test_the_end_of_the_newest_segment_needs_room_too(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    names = fill(tier, segments=4)
    put(tier, "a")
    tier.close()
    max_bytes = tier.statistics().num_bytes + 100
    tier = DiskTier.open(
        tmp_path,
        layout=LAYOUT,
        block_bytes=BLOCK_BYTES,
        max_bytes=max_bytes,
        segment_bytes=SEGMENT_BYTES,
        on_event=ignore,
    )
    put(tier, "b", "c", "d")
    assert tier.statistics().num_bytes <= max_bytes
    assert set(tier.snapshot_keys()) == set(keys_of("a", "b", "c", "d", *names[4:]))
    tier.check_integrity()


def test_a_segment_larger_than_todays_limit_is_not_filled_up(tmp_path: Path) -> None:
    tier = DiskTier.open(
        tmp_path, layout=LAYOUT, block_bytes=BLOCK_BYTES, max_bytes=10**6, on_event=ignore
    )
    put(tier, "a", "b")
    tier.close()
    tier = open_tier(tmp_path, num_segments=40)
    put(tier, *"0123456789")
    assert len(segments(tmp_path)) == 4
    assert [get(tier, name) for name in "ab9"] == [True] * 3
    tier.check_integrity()


def test_events_name_the_disk(tmp_path: Path) -> None:
    follower = Follower()
    put(open_tier(tmp_path, follower), "a")
    assert follower.events == [KVEvent(STORED, Tier.DISK, (key_of("a"),))]
