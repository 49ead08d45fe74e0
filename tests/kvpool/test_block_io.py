"""Blocks between a cache and the host tier's arena: there and back, and what must not count."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvpool.arena import BlockArena
from kvpool.block_io import BlockMover
from kvpool.checksum import checksum
from kvpool.host_arena import HostArena
from kvpool.host_values import Grant
from kvpool.layout import KVLayout
from kvpool.pool_link import Slot
from kvpool.tiers import Tier
from tests.kvpool.tier_kit import LAYOUT, SLOT_BYTES

SHARDED = dataclasses.replace(LAYOUT, num_kv_heads=1, num_shards=2)
BLOCKS = 4


class Overtaken(BlockArena):
    """While its blocks are copied they are given to other content."""

    def block(self, index: int) -> memoryview:
        self.generations[index] += np.uint64(1)
        return super().block(index)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[BlockArena]:
    arena = HostArena.create(
        tmp_path, "c", num_slots=BLOCKS, slot_bytes=SLOT_BYTES, layout=LAYOUT.text
    )
    yield arena.blocks
    arena.close()


def make_cache(layout: KVLayout, kind: type[BlockArena] = BlockArena) -> BlockArena:
    """Distinct bytes everywhere, and generations that are not 0."""
    cache = kind.private(BLOCKS, layout.block_bytes, layout.text)
    numbers = np.random.default_rng(1).integers(0, 256, len(cache.buffer), dtype=np.uint8)
    np.copyto(np.frombuffer(cache.buffer, dtype=np.uint8), numbers)
    cache.generations[:] = np.arange(7, 7 + BLOCKS)
    return cache


def grants(host: BlockArena, *slots: int) -> list[Grant]:
    return [Grant(100 + slot, slot, host.generation(slot)) for slot in slots]


def slots_of(host: BlockArena, *slots: int) -> list[Slot]:
    return [Slot(s, host.generation(s), checksum(host.block(s)), Tier.HOST) for s in slots]


def far() -> float:
    return time.monotonic() + 60.0


@pytest.mark.parametrize("layout", [LAYOUT, SHARDED], ids=["equal", "resharded"])
def test_there_and_back(host: BlockArena, layout: KVLayout) -> None:
    cache = make_cache(layout)
    before = [bytes(cache.block(block)) for block in range(BLOCKS)]
    mover = BlockMover(cache, LAYOUT.text)
    moves = [(b, 7 + b, g) for b, g in zip((0, 2, 3), grants(host, 3, 0, 1), strict=True)]
    filled = mover.store(host, moves)
    assert filled == [(g.ticket, checksum(host.block(g.slot))) for _, _, g in moves]
    cache.buffer[:] = bytes(len(cache.buffer))
    assert mover.load(host, slots_of(host, 3, 0, 1), [0, 2, 3], far()) == 3
    assert not mover.faults
    assert [bytes(cache.block(block)) for block in (0, 2, 3)] == [before[b] for b in (0, 2, 3)]
    assert bytes(cache.block(1)) == bytes(layout.block_bytes)


def test_the_host_has_the_canonical_layout(host: BlockArena) -> None:
    """Two instances with different numbers of ranks write the same bytes for the same heads."""
    sharded = make_cache(SHARDED)
    BlockMover(sharded, LAYOUT.text).store(host, [(0, 7, grants(host, 0)[0])])
    per_shard = np.frombuffer(sharded.block(0), dtype=np.uint32).reshape(2, 2, 2, 4, 1, 2)
    heads = np.concatenate(list(per_shard), axis=3)
    assert bytes(host.block(0)) == heads.tobytes()
    one_rank = make_cache(LAYOUT)
    assert BlockMover(one_rank, LAYOUT.text).load(host, slots_of(host, 0), [2], far()) == 1
    assert bytes(one_rank.block(2)) == heads.tobytes()


def test_layouts_that_cannot_be_converted() -> None:
    other = dataclasses.replace(LAYOUT, head_dim=4)
    with pytest.raises(ValueError, match="head dim"):
        BlockMover(make_cache(other), LAYOUT.text)


def test_a_block_that_has_other_content_is_not_stored(host: BlockArena) -> None:
    mover = BlockMover(make_cache(LAYOUT), LAYOUT.text)
    stale, late, good = grants(host, 0, 1, 2)
    host.generations[1] += np.uint64(1)
    found = mover.store(host, [(0, 6, stale), (1, 8, late), (2, 9, good)])
    assert found == [None, None, (good.ticket, checksum(host.block(2)))]


def test_content_that_changes_during_the_copy_is_not_stored(host: BlockArena) -> None:
    cache = make_cache(LAYOUT, Overtaken)
    assert BlockMover(cache, LAYOUT.text).store(host, [(0, 7, grants(host, 0)[0])]) == [None]
    arena = Overtaken.private(BLOCKS, SLOT_BYTES, LAYOUT.text)
    mover = BlockMover(make_cache(LAYOUT), LAYOUT.text)
    assert mover.store(arena, [(0, 7, grants(arena, 0)[0])]) == [None]


@pytest.mark.parametrize("layout", [LAYOUT, SHARDED], ids=["equal", "resharded"])
@pytest.mark.parametrize("what", ["flipped byte", "wrong checksum", "old generation"])
def test_a_slot_that_does_not_verify(host: BlockArena, layout: KVLayout, what: str) -> None:
    cache = make_cache(layout)
    host.buffer[:] = b"\x55" * len(host.buffer)
    slots = slots_of(host, 0, 1, 2)
    if what == "flipped byte":
        host.block(1)[SLOT_BYTES - 1] ^= 1
    elif what == "wrong checksum":
        slots[1] = dataclasses.replace(slots[1], checksum=slots[1].checksum ^ 1)
    else:
        host.generations[1] += np.uint64(1)
    untouched = bytes(cache.block(3))
    mover = BlockMover(cache, LAYOUT.text)
    assert mover.load(host, slots, [0, 2, 3], far()) == 1
    assert bytes(cache.block(0)) == b"\x55" * layout.block_bytes
    assert bytes(cache.block(2)) == bytes(layout.block_bytes)
    assert bytes(cache.block(3)) == untouched
    assert mover.faults == {"stale" if what == "old generation" else "corrupt": 1}


def test_a_slot_that_is_given_away_during_the_copy() -> None:
    cache = make_cache(LAYOUT)
    arena = Overtaken.private(BLOCKS, SLOT_BYTES, LAYOUT.text)
    slot = Slot(0, arena.generation(0), checksum(bytes(SLOT_BYTES)), Tier.HOST)
    assert BlockMover(cache, LAYOUT.text).load(arena, [slot], [0], far()) == 0
    assert bytes(cache.block(0)) == bytes(SLOT_BYTES)


def test_nothing_after_the_deadline(host: BlockArena) -> None:
    cache = make_cache(LAYOUT)
    before = bytes(cache.buffer)
    mover = BlockMover(cache, LAYOUT.text)
    assert mover.load(host, slots_of(host, 0, 1), [0, 1], time.monotonic()) == 0
    assert bytes(cache.buffer) == before
    assert mover.faults == {"late": 1}
