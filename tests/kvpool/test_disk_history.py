"""Random histories of the disk tier, against what its events and a dict say."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from baton.core.blocks import BlockKey
from baton.core.clock import VirtualClock
from kvpool.disk import RETRY_AFTER_S
from kvpool.disk_segment import HEADER_BYTES, SegmentHeader
from tests.kvpool.disk_kit import (
    BLOCK_BYTES,
    LAYOUT,
    PARENTS,
    SEGMENT_BYTES,
    SLOT_BYTES,
    Follower,
    get,
    key_of,
    keys_of,
    meta_of,
    no_file_may_grow,
    open_tier,
    put,
    segments,
)

NUM_SEGMENTS = 4
NUM_SLOTS = 8
MAX_SEGMENT_BYTES = SEGMENT_BYTES + (NUM_SLOTS - 4) * SLOT_BYTES
MAX_BYTES = NUM_SEGMENTS * MAX_SEGMENT_BYTES
HEADER = SegmentHeader.sized(1, BLOCK_BYTES, LAYOUT, MAX_SEGMENT_BYTES)
NAMES = [
    root + rest
    for root in "abc"
    for rest in ("", "1", "12", "13", "121", "122", "1221", "12211", "2", "21", "22", "3")
]
NAME = st.sampled_from(NAMES)
for _name in NAMES:
    meta_of(_name)


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


class DiskHistory(RuleBasedStateMachine):
    """``follower.present`` is the model: what is on disk as told by events alone."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="disk-history-"))
        self.host: set[BlockKey] = set()
        self.faults = False
        self.clock = VirtualClock()
        self.follower = Follower(self.host.__contains__)
        self.open()

    def open(self) -> None:
        self.tier = open_tier(
            self.directory,
            self.follower,
            num_segments=NUM_SEGMENTS,
            num_slots=NUM_SLOTS,
            elsewhere=self.host.__contains__,
            clock=self.clock,
        )

    @initialize(faults=st.booleans())
    def choose(self, faults: bool) -> None:
        """Without damage to the files the tier must have all that it says it has."""
        self.faults = faults

    def teardown(self) -> None:
        self.tier.close()
        shutil.rmtree(self.directory)

    @rule(names=st.lists(NAME, min_size=1, max_size=9), priority=st.sampled_from([0, 0, -1]))
    def write(self, names: list[str], priority: int) -> None:
        for name in sorted(names):
            key, parent = key_of(name), PARENTS[key_of(name)]
            known = key in self.follower.present
            reachable = parent is None or parent in self.follower.present | self.host
            (written,) = put(self.tier, name, priority=priority)
            assert not (written and known)
            assert reachable or not written
            assert (key in self.follower.present) == (written or known)
            if written:
                assert get(self.tier, name)

    @rule(name=NAME)
    def read(self, name: str) -> None:
        key = key_of(name)
        here = key in self.follower.present
        found = get(self.tier, name)
        assert found == here or (self.faults and not found)
        assert (key in self.follower.present) == found

    @rule(name=NAME)
    def read_chain(self, name: str) -> None:
        names = [name[: end + 1] for end in range(len(name))]
        count = self.tier.match(keys_of(*names))
        present = [key in self.follower.present for key in keys_of(*names)]
        assert count == (present.index(False) if False in present else len(present))
        for one in names[:count]:
            get(self.tier, one)

    @rule(name=NAME)
    def store_in_host(self, name: str) -> None:
        self.host.add(key_of(name))

    @rule(name=NAME)
    def drop_from_host(self, name: str) -> None:
        self.host.discard(key_of(name))
        self.tier.left_elsewhere([key_of(name)])

    @rule(beyond_bytes=st.integers(0, HEADER.full_bytes), name=NAME)
    def write_to_a_full_disk(self, beyond_bytes: int, name: str) -> None:
        with no_file_may_grow(beyond_bytes):
            for one in (name[:1], name):
                (written,) = put(self.tier, one)
                assert not written or get(self.tier, one)

    @rule()
    def wait(self) -> None:
        self.clock.advance(RETRY_AFTER_S)

    @precondition(lambda self: self.faults and bool(segments(self.directory)))
    @rule(data=st.data(), bit=st.integers(0, 7))
    def damage_a_block(self, data: st.DataObject, bit: int) -> None:
        path = data.draw(st.sampled_from(segments(self.directory)), label="segment")
        size = path.stat().st_size
        if size > HEADER.slot_offset(0):
            offset = data.draw(st.integers(HEADER.slot_offset(0), size - 1), label="offset")
            overwrite(path, offset, bytes([path.read_bytes()[offset] ^ 1 << bit]))

    @rule()
    def restart(self) -> None:
        before = set(self.follower.present)
        self.tier.close()
        self.open()
        after = set(self.tier.snapshot_keys())
        # Copies of blocks that had been dropped with others may be found again.
        assert before <= after
        self.adopt(after)

    @precondition(lambda self: self.faults)
    @rule(data=st.data())
    def crash(self, data: st.DataObject) -> None:
        """The machine's: the newest segment loses its end, or bits of its table."""
        self.tier.close()
        if found := segments(self.directory):
            size = found[-1].stat().st_size
            if data.draw(st.booleans(), label="cut"):
                os.truncate(found[-1], data.draw(st.integers(0, size), label="size"))
            elif size > HEADER_BYTES:
                offset = data.draw(st.integers(0, HEADER.slot_offset(0) - 1), label="offset")
                changed = data.draw(st.binary(min_size=1, max_size=200), label="bytes")
                overwrite(found[-1], offset, changed)
        self.open()
        self.adopt(set(self.tier.snapshot_keys()))

    def adopt(self, present: set[BlockKey]) -> None:
        self.follower.present.clear()
        self.follower.present.update(present)

    @invariant()
    def events_and_index_agree(self) -> None:
        order = self.tier.snapshot_keys()
        assert set(order) == self.follower.present
        assert len(order) == len(set(order)) == self.tier.statistics().num_blocks
        places = {key: place for place, key in enumerate(order)}
        for key in order:
            assert places.get(PARENTS[key] or key, 0) <= places[key]

    @invariant()
    def what_is_here_is_of_use(self) -> None:
        self.follower.check_closed()

    @invariant()
    def files_keep_to_the_limit(self) -> None:
        total = sum(path.stat().st_size for path in segments(self.directory))
        assert total == self.tier.statistics().num_bytes <= MAX_BYTES
        self.tier.check_integrity()


TestDiskHistory = DiskHistory.TestCase
TestDiskHistory.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_any_thread_may_ask_while_one_writes(tmp_path: Path) -> None:
    tier = open_tier(tmp_path, num_segments=NUM_SEGMENTS)
    stop, errors = threading.Event(), list[BaseException]()
    num_asked = 0

    def ask() -> None:
        nonlocal num_asked
        try:
            while not stop.is_set():
                assert 0 <= tier.match(keys_of("a", "a1", "a12")) <= 3
                assert tier.contains(key_of("a")) in (True, False)
                order = tier.snapshot_keys()
                assert len(order) == len(set(order))
                assert tier.statistics().num_bytes <= NUM_SEGMENTS * SEGMENT_BYTES
                num_asked += 1
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        rounds = 0
        while rounds < 5 or (num_asked < 20 and not errors and rounds < 1000):
            put(tier, *NAMES)
            rounds += 1
    finally:
        stop.set()
        thread.join(10)
    assert not errors
    assert not thread.is_alive()
    assert num_asked >= 20
    tier.check_integrity()
