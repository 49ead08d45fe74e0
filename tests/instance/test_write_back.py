"""Complete prefixes, copied from a cache to a real pool node."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from baton.engine.events import PrefixComplete
from baton.instance.write_back import WriteBack
from kvpool.arena import BlockArena
from kvpool.block_io import BlockMover
from kvpool.pool_link import PoolLink
from tests.instance.fetch_kit import BLOCK_BYTES, LAYOUT, Pool, content, keys_of, pool_of
from tests.instance.instance_kit import BLOCK_SIZE, WAIT_S, until

KEYS = keys_of(4)
NUM_BLOCKS = 64


class Writing:
    """A cache whose complete prefixes are written back."""

    def __init__(self, link: PoolLink) -> None:
        self.cache = BlockArena.private(NUM_BLOCKS, BLOCK_BYTES, LAYOUT)
        self.writer = WriteBack(link, BlockMover(self.cache, LAYOUT), block_size=BLOCK_SIZE)
        self._task = asyncio.ensure_future(self.writer.run())
        self._next = 0

    def complete(self, keys: Sequence[bytes], *, priority: int = 0) -> list[int]:
        """A sequence of these keys is done; the blocks they are in."""
        blocks = [(self._next + i) % NUM_BLOCKS for i in range(len(keys))]
        self._next += len(keys)
        for block, key in zip(blocks, keys, strict=True):
            self.cache.generations[block] += 1
            self.cache.block(block)[:] = content(key)
        generations = tuple(self.cache.generation(block) for block in blocks)
        self.writer.on_complete(
            PrefixComplete("r", tuple(blocks), generations, tuple(keys), priority)
        )
        return blocks

    def evict(self, block: int) -> None:
        """The block is somebody else's now."""
        self.cache.generations[block] += 1
        self.cache.block(block)[:] = b"?" * BLOCK_BYTES

    async def drained(self) -> dict[str, int]:
        """What was counted, once nothing waits any more; without zeros."""
        await asyncio.wait_for(self.writer.drained(), WAIT_S)
        counters = self.writer.counters
        found = {
            "written": counters.num_written,
            "declined": counters.num_declined,
            "lost": counters.num_lost,
            "dropped": counters.num_dropped,
        }
        return {name: count for name, count in found.items() if count}

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await asyncio.wait_for(self.writer.stop(), WAIT_S)


@contextlib.asynccontextmanager
async def writing(directory: Path, num_slots: int = 32) -> AsyncIterator[tuple[Pool, Writing]]:
    async with pool_of(directory, num_slots) as pool:
        bench = Writing(pool.link("instance"))
        try:
            yield pool, bench
        finally:
            await bench.stop()


async def test_a_complete_prefix_is_there_for_others(tmp_path: Path) -> None:
    async with writing(tmp_path) as (pool, bench):
        bench.complete(KEYS, priority=3)
        assert await bench.drained() == {"written": 4}
        assert await pool.read(KEYS) == [content(key) for key in KEYS]
        assert bench.writer.num_queued == 0
        assert {entry.priority for entry in pool.table._blocks.slots.listed.values()} == {3}


async def test_more_than_a_batch_and_than_one_prompt(tmp_path: Path) -> None:
    async with writing(tmp_path, 64) as (pool, bench):
        prompts = [keys_of(20, name) for name in "abc"]
        for keys in prompts:
            bench.complete(keys)
        assert await bench.drained() == {"written": 60}
        for keys in prompts:
            assert await pool.read(keys) == [content(key) for key in keys]


async def test_what_the_pool_has_is_not_offered_again(tmp_path: Path) -> None:
    async with writing(tmp_path) as (pool, bench):
        bench.complete(KEYS[:2])
        await bench.drained()
        bench.complete(KEYS)
        assert bench.writer.num_queued == 2
        assert await bench.drained() == {"written": 4}
        # Another instance has to ask once.
        other = Writing(pool.link("other"))
        other.complete(KEYS)
        assert await other.drained() == {"declined": 4}
        other.complete(KEYS)
        assert other.writer.num_queued == 0
        await other.stop()


async def test_what_was_evicted_before_it_was_copied_is_lost_and_never_published(
    tmp_path: Path,
) -> None:
    async with writing(tmp_path) as (pool, bench):
        bench.evict(bench.complete(KEYS)[2])
        # The last one hangs on it.
        assert await bench.drained() == {"written": 2, "lost": 2}
        assert await pool.read(KEYS) == [content(key) for key in KEYS[:2]]
        await pool.idle()
        bench.complete(KEYS)
        assert await bench.drained() == {"written": 4, "lost": 2}
        assert await pool.read(KEYS) == [content(key) for key in KEYS]


async def test_a_full_pool_declines(tmp_path: Path) -> None:
    async with writing(tmp_path, 2) as (pool, bench):
        bench.complete(KEYS)
        # Being written, and parents of such, the first two make room for nobody.
        assert await bench.drained() == {"written": 2, "declined": 2}
        assert await pool.read(KEYS) == [content(key) for key in KEYS[:2]]
        await pool.idle()
        bench.complete(keys_of(1, "other"))
        assert await bench.drained() == {"written": 3, "declined": 2}


async def test_a_prefix_whose_beginning_the_pool_let_go_of_is_offered_whole(
    tmp_path: Path,
) -> None:
    async with writing(tmp_path) as (pool, bench):
        bench.complete(KEYS[:3])
        await bench.drained()
        pool.table.drop(KEYS[1], 0.0)
        bench.complete(KEYS)
        assert await bench.drained() == {"written": 3, "declined": 1}
        bench.complete(KEYS)
        # The first one is known, and says so once more.
        assert await bench.drained() == {"written": 6, "declined": 2}
        assert await pool.read(KEYS) == [content(key) for key in KEYS]


async def test_what_a_reader_missed_is_offered_again(tmp_path: Path) -> None:
    """Evicted there from the end, nothing that hangs on it would ever say so."""
    async with writing(tmp_path) as (pool, bench):
        bench.complete(KEYS)
        await bench.drained()
        pool.table.drop(KEYS[2], 0.0)
        bench.complete(KEYS)
        assert await bench.drained() == {"written": 4}
        bench.writer.forget(KEYS[2:])
        bench.complete(KEYS)
        assert await bench.drained() == {"written": 6}
        assert await pool.read(KEYS) == [content(key) for key in KEYS]


async def test_the_queue_and_the_memory_of_keys_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("baton.instance.write_back._MAX_QUEUED_BLOCKS", 5)
    monkeypatch.setattr("baton.instance.write_back._MAX_KNOWN", 3)
    async with writing(tmp_path) as (pool, bench):
        bench.complete(keys_of(4, "old"))
        bench.complete(KEYS)
        assert bench.writer.num_queued == 5
        # The old one's last block has lost those that it hangs on.
        assert await bench.drained() == {"written": 4, "declined": 1, "dropped": 3}
        assert await pool.read(KEYS) == [content(key) for key in KEYS]
        assert len(bench.writer._known) == 3


async def test_without_a_pool_node_all_is_lost_and_later_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvpool.pool_link._PAUSE_S", 0.0)
    for name in ("first", "other"):
        (tmp_path / name).mkdir()
    async with pool_of(tmp_path / "other") as other, pool_of(tmp_path / "first") as first:
        link = first.link("instance")
        bench = Writing(link)
        bench.complete(KEYS)
        assert await bench.drained() == {"written": 4}
        await first.stop_node()
        bench.complete(keys_of(3, "lost"))
        assert await bench.drained() == {"written": 4, "lost": 3}
        first.node = other.node  # where it is looked up
        bench.complete(keys_of(3, "found"))
        assert await bench.drained() == {"written": 7, "lost": 3}
        assert await other.read(keys_of(3, "found")) == [
            content(key) for key in keys_of(3, "found")
        ]
        await bench.stop()


async def test_a_stop_during_a_copy_waits_for_it_and_leaves_its_slots_to_the_lease(
    tmp_path: Path,
) -> None:
    async with pool_of(tmp_path, lease_s=0.1) as pool:
        bench = Writing(pool.link("instance"))
        gate = threading.Event()
        bench.writer._thread.submit(gate.wait, WAIT_S)
        bench.complete(KEYS)
        await until(lambda: pool.statistics().num_tickets == 4)
        stopping = asyncio.ensure_future(bench.stop())
        await asyncio.sleep(0)
        gate.set()
        await stopping
        assert await pool.read(KEYS) == []
        pool.forget_owner("instance")
        await pool.idle()
