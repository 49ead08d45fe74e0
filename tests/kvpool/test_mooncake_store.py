"""External stores: one suite over the shipped fake and a real Mooncake Store, then each alone."""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import secrets
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from baton.core.errors import ConfigError
from kvpool import mooncake_store
from kvpool.breaker import Breaker
from kvpool.external import CheckedStore, ExternalStatistics
from kvpool.external_memory import MemoryValues
from kvpool.external_values import HEADER_BYTES, Values, pack_header
from kvpool.mooncake_store import MooncakeStore, MooncakeValues
from kvpool.tiers import BlockMeta
from tests.kvpool.mooncake_kit import HOST, Master, holder

BLOCK = 1000
SEGMENT = 64 << 20
BATCH = 4 * (HEADER_BYTES + BLOCK)

Block = tuple[BlockMeta, memoryview]
Make = Callable[[str], CheckedStore]


@pytest.fixture(scope="module")
def values_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Values]]:
    """Stores by name, made once: setting up and closing one of Mooncake's takes a second."""
    made: dict[str, Values] = {}
    with contextlib.ExitStack() as stack:

        def get(name: str) -> Values:
            if name not in made:
                if name == "memory":
                    made[name] = MemoryValues(SEGMENT, BATCH)
                else:
                    master = Master(tmp_path_factory.mktemp("master"))
                    stack.callback(master.kill)
                    made[name] = mooncake_values(master)
                stack.callback(made[name].close)
            return made[name]

        yield get


@pytest.fixture(params=["memory", "mooncake"])
def values(request: pytest.FixtureRequest, values_of: Callable[[str], Values]) -> Values:
    return values_of(request.param)


def mooncake_values(
    master: Master, segment_bytes: int = SEGMENT, batch_bytes: int = BATCH
) -> MooncakeValues:
    return MooncakeValues(
        master.address,
        host=HOST,
        metadata="P2PHANDSHAKE",
        protocol="tcp",
        device="",
        segment_bytes=segment_bytes,
        batch_bytes=batch_bytes,
    )


def checked(values: Values, layout: str | None = None, timeout_s: float = 5.0) -> CheckedStore:
    """A store of its own: nobody else uses its layout."""
    return CheckedStore(
        values,
        name="the store",
        layout=secrets.token_hex(8) if layout is None else layout,
        timeout_s=timeout_s,
    )


def chain(count: int, block_bytes: int = BLOCK) -> list[Block]:
    keys = [secrets.token_bytes(16) for _ in range(count)]
    return [
        (
            BlockMeta(key, keys[i - 1] if i else None, i, 16, -1),
            memoryview(secrets.token_bytes(block_bytes)),
        )
        for i, key in enumerate(keys)
    ]


def keys_of(blocks: list[Block]) -> list[bytes]:
    return [meta.key for meta, _ in blocks]


def targets(count: int, block_bytes: int = BLOCK) -> list[memoryview]:
    return [memoryview(bytearray(block_bytes)) for _ in range(count)]


def until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    pause = threading.Event()
    for _ in range(int(timeout_s / 0.1)):
        if condition():
            return
        pause.wait(0.1)
    raise AssertionError(f"not within {timeout_s:g} s")


def test_what_was_put_is_got(values: Values) -> None:
    store, blocks = checked(values), chain(11)  # several batches
    into = targets(11)
    assert store.match(keys_of(blocks)) == 0
    assert store.get(keys_of(blocks), into) == 0
    assert store.put(blocks) == 11
    assert store.match(keys_of(blocks)) == 11
    assert store.get(keys_of(blocks), into) == 11
    assert into == [payload for _, payload in blocks]
    counts = store.statistics()
    assert (counts.hits, counts.stored, counts.misses) == (11, 11, 11)
    assert (counts.errors, counts.late, counts.skipped) == (0, 0, 0)


@pytest.mark.parametrize("gap", [0, 1, 5, 9])
def test_only_what_comes_before_a_gap_counts(values: Values, gap: int) -> None:
    store, blocks = checked(values), chain(10)
    assert store.put(blocks[:gap]) == gap
    store.put(blocks[gap + 1 :])
    into = targets(10)
    assert store.match(keys_of(blocks)) == gap
    assert store.get(keys_of(blocks), into) == gap
    assert into[:gap] == [payload for _, payload in blocks[:gap]]


def test_equal_keys_are_equal_blocks(values: Values) -> None:
    store, blocks = checked(values), chain(3)
    assert store.put(blocks) == store.put(blocks) == store.put(blocks[1:] + blocks[:1]) == 3
    into = targets(3)
    assert store.get(keys_of(blocks), into) == 3
    assert into == [payload for _, payload in blocks]


def test_other_layouts_see_nothing(values: Values) -> None:
    store, other, blocks = checked(values), checked(values), chain(2)
    store.put(blocks)
    assert other.match(keys_of(blocks)) == 0
    assert other.get(keys_of(blocks), targets(2)) == 0


def test_nothing_is_asked_for_nothing(values: Values) -> None:
    store = checked(values)
    assert store.match([]) == store.get([], []) == store.put([]) == 0
    with pytest.raises(ValueError, match="2 keys for 1"):
        store.get([b"a" * 16, b"b" * 16], targets(1))


@pytest.mark.parametrize("change", [-1, 1])
def test_a_block_of_another_length(values: Values, change: int) -> None:
    store, blocks = checked(values), chain(2)
    meta, _ = blocks[1]
    wrong = memoryview(secrets.token_bytes(BLOCK + change))
    store.put([blocks[0], (meta, wrong)])
    assert store.get(keys_of(blocks), targets(2)) == 1
    counts = store.statistics()
    assert (counts.hits, counts.wrong_lengths, counts.wrong_checksums) == (1, 1, 0)
    # It is gone, so that a good one finds room.
    assert store.match(keys_of(blocks)) == 1
    assert store.put(blocks) == 2
    assert store.get(keys_of(blocks), targets(2)) == 2


@pytest.mark.parametrize("at", [0, 4, 5, 6, 22, 40, HEADER_BYTES - 9, HEADER_BYTES - 1, -1])
def test_a_bit_that_flipped_in_the_store(values: Values, at: int) -> None:
    layout = secrets.token_hex(8)
    store, blocks = checked(values, layout), chain(1)
    ((meta, payload),) = blocks
    value = bytearray(pack_header(meta, payload) + payload)
    value[at] ^= 1
    assert values.save([store._named(meta.key)], [[bytes(value)]], 5.0) == 1
    assert store.match([meta.key]) == 1
    assert store.get([meta.key], targets(1)) == 0
    counts = store.statistics()
    assert counts.wrong_checksums + counts.wrong_lengths == 1
    assert store.put(blocks) == 1
    assert store.get([meta.key], targets(1)) == 1


def test_another_blocks_value(values: Values) -> None:
    store, (one, other) = checked(values), chain(2)
    assert values.save([store._named(one[0].key)], [(pack_header(*other), other[1])], 5.0) == 1
    assert store.get([one[0].key], targets(1)) == 0
    assert store.statistics().wrong_checksums == 1


def test_many_threads(values: Values) -> None:
    store = checked(values)
    blocks = chain(40)

    def work(part: list[Block]) -> int:
        into = targets(len(part))
        store.put(part)
        found = store.get(keys_of(part), into)
        assert into[:found] == [payload for _, payload in part[:found]]
        return found

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        parts = [blocks[i : i + 5] for i in range(0, 40, 5)]
        assert sum(pool.map(work, parts)) == 40


def test_more_than_a_batch_in_one_block_of_mooncake(values_of: Callable[[str], Values]) -> None:
    store, blocks = checked(values_of("mooncake")), chain(1, BATCH)
    assert store.put(blocks) == 0
    assert store.statistics().errors == 1
    assert store.get(keys_of(blocks), targets(1, BATCH)) == 0
    assert store.statistics().errors == 2


def test_more_than_fits(tmp_path: Path) -> None:
    """Mooncake drops values and says that it stored them: they are misses, never other bytes."""
    size = 1 << 20
    master = Master(tmp_path)
    try:
        values = mooncake_values(master, 16 << 20, 8 << 20)
        store, blocks = checked(values), chain(24, size)
        for block in blocks:
            store.put([block])
        into = targets(24, size)
        found = [
            store.get([meta.key], [target]) for (meta, _), target in zip(blocks, into, strict=True)
        ]
        assert 0 < sum(found) < 24
        for (_, payload), target, there in zip(blocks, into, found, strict=True):
            assert not there or target == payload
        store.close()
        store.close()
        assert store.match(keys_of(blocks)) == 0
    finally:
        master.kill()


def test_a_holder_that_dies(tmp_path: Path) -> None:
    master = Master(tmp_path)
    try:
        with holder(master.address, SEGMENT) as peer:
            store = MooncakeStore(master.address, layout="x", timeout_s=2.0)
            blocks, into = chain(8), targets(8)
            until(lambda: store.put(blocks) == 8)
            assert store.get(keys_of(blocks), into) == 8
            peer.kill()
            # For a while the store says that they are there.
            fresh = targets(8)
            assert store.match(keys_of(blocks)) == 8
            assert store.get(keys_of(blocks), fresh) == 0
            store.close()
    finally:
        master.kill()


def test_a_master_that_freezes_dies_and_comes_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    master = Master(tmp_path)
    caplog.set_level(logging.INFO)
    now = 0.0
    store = CheckedStore(
        mooncake_values(master),
        name="the store",
        layout="x",
        timeout_s=0.3,
        breaker=Breaker(max_failures=2),
        clock=lambda: now,
    )
    try:
        blocks = chain(2)
        assert store.put(blocks) == 2
        master.freeze()
        assert store.match(keys_of(blocks)) == 0
        assert store.get(keys_of(blocks), targets(2)) == 0
        # Twice is enough: it is left alone.
        assert store.put(chain(1)) == 0
        counts = store.statistics()
        assert (counts.late, counts.skipped) == (2, 1)
        master.kill()
        master.start()

        def works() -> bool:
            nonlocal now
            now += 100.0
            store.put(blocks)
            return store.get(keys_of(blocks), targets(2)) == 2

        until(works, 40.0)
        messages = [record.message for record in caplog.records if "the store" in record.message]
        assert len(messages) == 2
        assert "is left alone" in messages[0]
        assert "works again" in messages[1]
    finally:
        master.thaw()
        store.close()
        master.kill()


def test_closing_waits_for_no_master(tmp_path: Path) -> None:
    master = Master(tmp_path)
    values = mooncake_values(master)
    try:
        master.freeze()
        checked(values).close()
        assert mooncake_store._left == [values]
    finally:
        master.thaw()
        mooncake_store._left.clear()
        values._store.close()
        master.kill()


def test_no_master_is_a_wrong_setting() -> None:
    for address in ("nonsense", f"{HOST}:1"):
        with pytest.raises(ConfigError, match="cannot be reached") as caught:
            MooncakeStore(address, layout="x")
        assert caught.value.param == "pool.external.master"


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mooncake.store", None)
    with pytest.raises(ConfigError, match="install mooncake-transfer-engine") as caught:
        MooncakeStore(f"{HOST}:1", layout="x")
    assert caught.value.param == "pool.external.master"


def test_counts_begin_at_nothing(values: Values) -> None:
    assert checked(values).statistics() == ExternalStatistics()
