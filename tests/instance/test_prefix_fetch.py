"""Prefixes from a real pool node into a cache; whatever fails is a shorter prefix."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from kvpool.tiers import Tier
from tests.instance.fetch_kit import (
    BLOCK_BYTES,
    Fetching,
    Line,
    content,
    fetching,
    keys_of,
    pool_of,
)
from tests.instance.instance_kit import BLOCK_SIZE, until

KEYS = keys_of(4)
OWN = (9, 3, 12, 5, 7)
"""Blocks of the sequence: four full ones, and the rest of the prompt."""
UNTOUCHED = b"x" * BLOCK_BYTES


@pytest.mark.parametrize("reserved_first", [True, False])
@pytest.mark.parametrize("num_there", [0, 1, 3, 4])
async def test_as_much_as_the_pool_has(
    tmp_path: Path, num_there: int, reserved_first: bool
) -> None:
    async with fetching(tmp_path) as (pool, bench):
        await pool.put(KEYS[:num_there])
        bench.fetcher.open("r", KEYS, 0)
        if reserved_first:
            bench.reserved(OWN)
        elif num_there:
            await bench.until_stage("pool_hit")
            assert not bench.fetched, "there is nothing to copy to"
            bench.reserved(OWN)
        assert await bench.ended() == num_there * BLOCK_SIZE
        found = [content(key) for key in KEYS[:num_there]]
        assert bench.blocks(OWN) == found + [UNTOUCHED] * (5 - num_there)
        assert bench.missing == KEYS[num_there:]
        counters = bench.fetcher.counters
        assert counters.num_blocks[Tier.HOST] == num_there
        assert counters.num_corrupt == 0
        tiers = {Tier.HOST: num_there * BLOCK_SIZE} if num_there else {}
        assert bench.fetcher.take_tiers("r") == tiers
        assert bench.fetcher.take_tiers("r") == {}
        await pool.idle()


async def test_only_what_is_not_cached_here_is_copied(tmp_path: Path) -> None:
    async with fetching(tmp_path) as (pool, bench):
        await pool.put(KEYS)
        bench.fetcher.open("r", KEYS, 1)
        bench.reserved(OWN, num_cached=1)
        assert await bench.ended() == 4 * BLOCK_SIZE
        assert bench.blocks(OWN)[0] == UNTOUCHED
        assert bench.blocks(OWN[1:4]) == [content(key) for key in KEYS[1:]]
        assert bench.fetcher.take_tiers("r") == {Tier.HOST: 3 * BLOCK_SIZE}


async def test_what_was_cached_here_meanwhile_is_not_copied(tmp_path: Path) -> None:
    async with fetching(tmp_path) as (pool, bench):
        await pool.put(KEYS)
        bench.fetcher.open("some", KEYS, 1)
        bench.fetcher.open("all", KEYS, 1)
        await bench.until_stage("pool_hit", "all")
        bench.reserved(OWN, num_cached=4, name="all")
        assert bench.fetched["all"] == 0
        bench.reserved(OWN, num_cached=3, name="some")
        assert await bench.ended("some") == 4 * BLOCK_SIZE
        assert bench.blocks(OWN)[:3] == [UNTOUCHED] * 3
        assert bench.blocks(OWN)[3] == content(KEYS[3])


async def test_what_was_evicted_here_between_asking_and_reserving_leaves_no_hole(
    tmp_path: Path,
) -> None:
    async with fetching(tmp_path) as (pool, bench):
        await pool.put(KEYS)
        bench.fetcher.open("r", KEYS, 2)
        await bench.until_stage("pool_hit")
        bench.reserved(OWN, num_cached=1)
        assert await bench.ended() == 0
        assert bench.blocks(OWN) == [UNTOUCHED] * 5
        await pool.idle()


async def test_what_is_not_worth_it_is_let_go(tmp_path: Path) -> None:
    async with fetching(tmp_path) as (pool, bench):
        await pool.put(KEYS)
        bench.rule.policy = "never"
        bench.fetcher.open("r", KEYS, 0)
        assert await bench.ended() == 0
        assert bench.fetcher.counters.num_not_worth == 1
        await pool.idle()


@pytest.mark.parametrize("bad", [0, 2])
async def test_a_corrupt_slot_ends_the_prefix_and_leaves_zeros(tmp_path: Path, bad: int) -> None:
    async with fetching(tmp_path) as (pool, bench):
        slots = await pool.put(KEYS)
        pool.arena.blocks.block(slots[bad])[5] ^= 1
        bench.fetcher.open("r", KEYS, 0)
        bench.reserved(OWN)
        assert await bench.ended() == bad * BLOCK_SIZE
        good = [content(key) for key in KEYS[:bad]]
        rest = [UNTOUCHED] * (4 - bad)
        assert bench.blocks(OWN) == [*good, bytes(BLOCK_BYTES), *rest]
        assert bench.fetcher.counters.num_corrupt == 1
        assert sum(bench.fetcher.take_tiers("r").values()) == bad * BLOCK_SIZE
        # The pool is told, looks for itself, and has it no more, nor what hangs on it.
        await until(lambda: not pool.table.has(KEYS[bad]))
        assert [pool.table.has(key) for key in KEYS] == [True] * bad + [False] * (4 - bad)
        await pool.idle()


async def test_a_slot_that_was_given_away_after_the_lease_is_not_believed(tmp_path: Path) -> None:
    async with fetching(tmp_path, num_slots=4, lease_s=0.05) as (pool, bench):
        await pool.put(KEYS)
        bench.fetcher.open("r", KEYS, 0)
        await bench.until_stage("pool_hit")
        await until(lambda: not pool.statistics().num_holds)
        # The last ones go first: blocks 2 and 3 are somebody else's now.
        await pool.put(keys_of(2, "other"))
        bench.reserved(OWN)
        assert await bench.ended() == 2 * BLOCK_SIZE
        assert bench.blocks(OWN)[:3] == [content(KEYS[0]), content(KEYS[1]), bytes(BLOCK_BYTES)]


async def test_a_late_copy_counts_as_far_as_it_got(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("baton.instance.prefix_fetch._LOAD_TIMEOUT_S", -1.0)
    async with fetching(tmp_path) as (pool, bench):
        await pool.put(KEYS)
        bench.fetcher.open("r", KEYS, 0)
        bench.reserved(OWN)
        assert await bench.ended() == 0
        assert bench.blocks(OWN) == [UNTOUCHED] * 5
        assert bench.fetcher.counters.num_corrupt == 1


async def test_an_abort_while_asking(tmp_path: Path) -> None:
    async with fetching(tmp_path) as (pool, bench):
        await pool.put(KEYS)
        bench.fetcher.open("r", KEYS, 0)
        assert bench.fetcher.abort("r")
        assert bench.aborted == ["r"]
        assert not bench.fetcher.abort("r")
        bench.reserved(OWN)  # an event that was on its way
        await until(lambda: bench.link.counters.num_holds == 1)
        await pool.idle()
        assert (bench.aborted, bench.fetched) == (["r"], {})


async def test_an_abort_while_waiting_for_blocks(tmp_path: Path) -> None:
    async with fetching(tmp_path) as (pool, bench):
        await pool.put(KEYS)
        bench.fetcher.open("r", KEYS, 0)
        await bench.until_stage("pool_hit")
        assert pool.statistics().num_held == 4
        assert bench.fetcher.abort("r")
        assert bench.aborted == ["r"]
        await pool.idle()
        assert not bench.fetched
        assert bench.blocks(OWN) == [UNTOUCHED] * 5


async def test_an_abort_while_copying_keeps_the_blocks_until_nothing_writes_to_them(
    tmp_path: Path,
) -> None:
    async with fetching(tmp_path) as (pool, bench):
        await pool.put(KEYS)
        with bench.copies_wait():
            bench.fetcher.open("r", KEYS, 0)
            bench.reserved(OWN)
            await bench.until_stage("pool_hit")
            assert bench.fetcher.abort("r")
            assert bench.fetcher.abort("r")
            assert (bench.aborted, bench.fetcher.num_open) == ([], 1)
            assert pool.statistics().num_held == 4
        await until(lambda: bench.aborted == ["r"])
        assert not bench.fetched
        assert bench.fetcher.take_tiers("r") == {}
        await pool.idle()


async def test_an_abort_of_others_changes_nothing(tmp_path: Path) -> None:
    async with fetching(tmp_path) as (pool, bench):
        await pool.put(KEYS)
        assert not bench.fetcher.abort("r")
        bench.reserved(OWN, name="stranger")
        bench.fetcher.open("r", KEYS, 0)
        bench.reserved(OWN)
        assert await bench.ended() == 4 * BLOCK_SIZE
        assert not bench.aborted


async def test_a_pool_node_that_ends_before_it_is_asked(tmp_path: Path) -> None:
    async with fetching(tmp_path) as (pool, bench):
        await pool.put(KEYS)
        await pool.stop_node()
        bench.fetcher.open("r", KEYS, 0)
        bench.reserved(OWN)
        assert await bench.ended() == 0


async def test_a_pool_node_that_ends_while_blocks_are_awaited(tmp_path: Path) -> None:
    """What it kept stays mapped, and is verified as always."""
    async with fetching(tmp_path) as (pool, bench):
        await pool.put(KEYS)
        bench.fetcher.open("r", KEYS, 0)
        await bench.until_stage("pool_hit")
        await pool.stop_node()
        bench.reserved(OWN)
        assert await bench.ended() == 4 * BLOCK_SIZE
        assert bench.blocks(OWN[:4]) == [content(key) for key in KEYS]


async def test_a_pool_node_that_is_killed_while_it_is_asked(tmp_path: Path) -> None:
    async with pool_of(tmp_path) as pool:
        await pool.put(KEYS)
        line = Line(pool.node.address)
        bench = Fetching(pool, address=line.address)
        bench.fetcher.open("warm", KEYS, 0)
        bench.reserved(OWN, name="warm")
        assert await bench.ended("warm") == 4 * BLOCK_SIZE
        line.hold_up()
        bench.fetcher.open("asked", KEYS, 0)
        bench.fetcher.open("aborted", KEYS, 0)
        await until(lambda: pool.statistics().num_holds == 2)
        assert bench.fetcher.abort("aborted")
        line.cut()
        bench.reserved(OWN, name="asked")
        assert await bench.ended("asked") == 0
        assert bench.aborted == ["aborted"]
        await bench.fetcher.stop()
        await bench.link.close()
        await line.close()
        # Nobody can tell it to release: as after a kill, the leases and the owner's end do.
        pool.forget_owner("reader")


async def test_a_silent_pool_node_costs_no_request_even_with_others_on_the_same_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first time limit closes the line under the calls that began later."""
    monkeypatch.setattr("kvpool.pool_link.CALL_TIMEOUT_S", 0.2)
    async with pool_of(tmp_path) as pool:
        await pool.put(KEYS)
        line = Line(pool.node.address)
        bench = Fetching(pool, address=line.address)
        bench.fetcher._timeout_s = 0.2
        bench.fetcher.open("warm", KEYS, 0)
        bench.reserved(OWN, name="warm")
        await bench.ended("warm")
        await until(lambda: not pool.statistics().num_holds)
        line.hold_up()
        bench.fetcher.open("first", KEYS, 0)
        await until(lambda: pool.statistics().num_holds == 1)
        bench.fetcher._timeout_s = 5.0
        bench.fetcher.open("second", KEYS, 0)
        await until(lambda: {"first", "second"} <= set(bench.fetched))
        assert bench.fetched["first"] == bench.fetched["second"] == 0
        await bench.fetcher.stop()
        await bench.link.close()
        await line.close()
        pool.forget_owner("reader")


async def test_a_stop_waits_for_the_copy_and_ends_what_is_asked(tmp_path: Path) -> None:
    async with pool_of(tmp_path) as pool:
        await pool.put(KEYS)
        bench = Fetching(pool)
        with bench.copies_wait():
            bench.fetcher.open("copied", KEYS, 0)
            bench.reserved(OWN, name="copied")
            await bench.until_stage("pool_hit", "copied")
            bench.fetcher.open("asked", KEYS, 0)
            stopping = asyncio.ensure_future(bench.fetcher.stop())
            await asyncio.sleep(0)
            assert not stopping.done()
        await asyncio.wait_for(stopping, 10.0)
        assert bench.fetched == {"copied": 4 * BLOCK_SIZE}
        await bench.link.close()
        pool.forget_owner("reader")
