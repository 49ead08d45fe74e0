"""A machine's host tier with its timers and a real disk below it."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from baton.core.errors import ConfigError
from kvpool.disk import DiskTier
from kvpool.host_tier import HostTier
from kvpool.host_values import Grant, Skip, SkipReason
from kvpool.tiers import KVEvent, KVEventBatch, KVEventKind, Tier
from tests.kvpool.tier_kit import (
    LEASE_S,
    SLOT_BYTES,
    bytes_of,
    chain,
    hold,
    keys_of,
    open_tier,
    running,
    spec,
    store,
    until,
    use,
    write,
)

HOST, DISK = Tier.HOST, Tier.DISK


def disk_of(tier: HostTier) -> DiskTier:
    assert tier.disk is not None
    return tier.disk


def events_of(tier: HostTier) -> list[KVEvent]:
    batch = tier.events.batch_after(0, 1000)
    return list(batch.events) if isinstance(batch, KVEventBatch) else []


async def disk_is_idle(tier: HostTier) -> None:
    """What was asked of the disk is done, and what it tells has been heard."""
    for _ in range(3):
        await tier.on_disk_thread(lambda: None)
        await asyncio.sleep(0)


# Writers, readers, leases.


async def test_reserve_fill_publish_hold_release(tmp_path: Path) -> None:
    async with running(tmp_path, with_disk=False) as tier:
        metas = chain("a", 3)
        granted = tier.reserve(metas, owner="writer", lease_s=LEASE_S)
        assert await hold(tier, metas) == (0, [])
        filled = write(tier.arena.blocks, metas, granted)
        assert tier.publish(filled[:2], [filled[2][0]]) == [True, True]
        assert tier.reserve(metas[:1], owner="w", lease_s=1.0) == [Skip(SkipReason.KNOWN)]
        hold_id, slots = await hold(tier, metas)
        assert [slot.tier for slot in slots] == [HOST, HOST]
        assert tier.table.statistics().num_held == 2
        assert (await hold(tier, metas, skip=2)) == (0, [])
        second, slots = await hold(tier, metas, skip=1)
        assert len(slots) == 1
        tier.release([hold_id, second])
        assert tier.table.statistics().num_held == 0
        assert tier.publish([filled[2]]) == [False]
        assert "held" in tier.dump()
        assert tier.snapshot().blocks == ((HOST, tuple(keys_of(metas[:2]))),)
        assert tier.hot.top()[0][0] == metas[1].key


async def test_leases_end_by_themselves(tmp_path: Path) -> None:
    async with running(tmp_path, with_disk=False) as tier:
        store(tier, chain("a", 2))
        await hold(tier, chain("a", 2), lease_s=0.05)
        kept, _ = await hold(tier, chain("a", 1))
        [grant] = tier.reserve(chain("b", 1), owner="w", lease_s=0.05)
        assert isinstance(grant, Grant)
        await until(lambda: tier.table.statistics().num_expired == 2)
        numbers = tier.table.statistics()
        assert (numbers.num_holds, numbers.num_held, numbers.num_quarantined) == (1, 1, 1)
        # A late writer still may write there, but it does not count.
        assert tier.publish([(grant.ticket, 1)]) == [False]
        assert tier.table.statistics().num_quarantined == 0
        tier.release([kept])


async def test_a_renewed_lease_lasts(tmp_path: Path) -> None:
    async with running(tmp_path, with_disk=False) as tier:
        store(tier, chain("a", 1))
        kept, _ = await hold(tier, chain("a", 1), lease_s=0.05)
        await hold(tier, chain("a", 1), lease_s=0.05)
        tier.renew([kept], LEASE_S)
        await until(lambda: tier.table.statistics().num_expired == 1)
        assert tier.table.statistics().num_holds == 1


async def test_an_owner_is_gone(tmp_path: Path) -> None:
    async with running(tmp_path, with_disk=False) as tier:
        store(tier, chain("a", 2))
        tier.reserve(chain("b", 2), owner="reader", lease_s=LEASE_S)
        await hold(tier, chain("a", 2))
        tier.reserve(chain("c", 1), owner="other", lease_s=LEASE_S)
        tier.release_owner("reader")
        numbers = tier.table.statistics()
        assert (numbers.num_tickets, numbers.num_holds, numbers.num_quarantined) == (1, 0, 0)


async def test_a_tier_without_room_for_a_block() -> None:
    with pytest.raises(ConfigError, match="host_bytes"):
        _ = spec(0).num_slots


# Down to the disk.


async def test_only_what_is_reused_is_written_when_slots_are_short(tmp_path: Path) -> None:
    async with running(tmp_path, num_slots=8) as tier:
        once, reused = chain("once", 4), chain("reused", 3)
        store(tier, once)
        store(tier, reused)
        assert await use(tier, reused) == [HOST] * 3
        await disk_is_idle(tier)
        assert tier.counters.num_demoted == 0, "slots are not short yet"
        store(tier, chain("last", 1))
        await until(lambda: tier.counters.num_demoted == 3)
        await disk_is_idle(tier)
        assert tier.counters.num_demoted == 3
        assert disk_of(tier).match(keys_of(reused)) == 3
        assert not any(disk_of(tier).contains(key) for key in keys_of(once))
        stored = [event for event in events_of(tier) if event.tier is DISK]
        assert {key for event in stored for key in event.keys} == set(keys_of(reused))


async def test_all_of_it_is_written_with_write_back_all(tmp_path: Path) -> None:
    async with running(tmp_path, num_slots=4, write_back="all") as tier:
        store(tier, chain("a", 4))
        await until(lambda: tier.counters.num_demoted == 4)
        # Evicted here, still there; and back when it is asked for.
        store(tier, chain("b", 4))
        assert [e.kind for e in events_of(tier) if e.tier is HOST].count(KVEventKind.DEMOTED) == 1
        await until(lambda: tier.counters.num_demoted == 8)
        assert await use(tier, chain("a", 4)) == [DISK] * 4
        assert tier.counters.num_promoted[DISK] == 4


async def test_what_hangs_on_a_block_that_is_gone_leaves_the_disk(tmp_path: Path) -> None:
    """Children are written before their parents: then the parent turns out to be damaged."""
    async with running(tmp_path, num_slots=3, write_back="all") as tier:
        metas = chain("a", 3)
        store(tier, metas[:2])
        hold_id, slots = await hold(tier, metas[:2])
        tier.arena.blocks.block(slots[0].slot)[0] ^= 1
        tier.release([hold_id])
        tier.publish(
            write(
                tier.arena.blocks,
                metas[2:],
                tier.reserve(metas[2:], owner="writer", lease_s=LEASE_S),
            )
        )
        await until(lambda: tier.counters.num_damaged == 1)
        await until(lambda: not disk_of(tier).snapshot_keys())
        await disk_is_idle(tier)
        assert tier.table.snapshot_keys() == ()
        disk_of(tier).check_integrity()
        told = [event for event in events_of(tier) if event.tier is DISK]
        stored = [key for e in told if e.kind is KVEventKind.STORED for key in e.keys]
        removed = [key for e in told if e.kind is KVEventKind.REMOVED for key in e.keys]
        assert sorted(stored) == sorted(removed) == sorted(keys_of(metas[1:]))


async def test_a_disk_that_drops_what_was_just_written(tmp_path: Path) -> None:
    """A batch that is larger than the disk: blocks go while later ones of it are written."""
    async with running(tmp_path, 40, write_back="all", disk_bytes=4 * (8192 + 3 * 512)) as tier:
        for number in range(40):
            store(tier, chain(f"p{number}", 1))
        # Each of them once, though there is never room for all.
        await until(lambda: tier.counters.num_demoted == 40)
        await disk_is_idle(tier)
        disk, table = disk_of(tier), tier.table
        there = sum(map(disk.contains, table.snapshot_keys()))
        # What is said to be on disk and is not would be lost when it is evicted.
        assert 0 < table.statistics().num_on_disk <= there
        assert tier.counters.num_demoted == 40
        dropped = [e for e in events_of(tier) if (e.tier, e.kind) == (DISK, KVEventKind.REMOVED)]
        assert dropped


async def test_damaged_memory_is_not_written_and_is_found_no_more(tmp_path: Path) -> None:
    async with running(tmp_path, num_slots=4, write_back="all") as tier:
        metas = chain("a", 4)
        store(tier, metas[:3])
        hold_id, slots = await hold(tier, metas[:3])
        tier.arena.blocks.block(slots[2].slot)[0] ^= 1
        tier.release([hold_id])
        store(tier, chain("b", 1))
        await until(lambda: tier.counters.num_damaged == 1)
        store(tier, chain("c", 1))
        await until(lambda: tier.counters.num_demoted == 4)
        assert not disk_of(tier).contains(metas[2].key)
        assert await use(tier, metas) == [HOST] * 2


# Restarts.


async def test_a_stop_brings_all_to_the_disk_and_a_start_finds_it(tmp_path: Path) -> None:
    metas = chain("a", 20)
    async with running(tmp_path, num_slots=24) as tier:
        store(tier, metas)
        assert not tier.adopted
    assert list((tmp_path / "memory").iterdir()) == []
    async with running(tmp_path, num_slots=24) as tier:
        assert not tier.adopted
        assert tier.snapshot().blocks == ((HOST, ()), (DISK, tuple(keys_of(metas))))
        assert await use(tier, metas) == [DISK] * 20
        assert tier.counters.num_promoted[DISK] == 20
        assert await use(tier, metas) == [HOST] * 20
        assert tier.table.statistics().num_on_disk == 20


async def test_another_pool_node_adopts_what_is_left(tmp_path: Path) -> None:
    metas = chain("a", 3)
    async with running(tmp_path, keep=True) as tier:
        store(tier, metas)
        token = tier.arena.blocks.token
        [late] = tier.reserve(chain("b", 1), owner="w", lease_s=LEASE_S)
        assert isinstance(late, Grant)
    async with running(tmp_path) as tier:
        assert tier.adopted
        assert tier.arena.blocks.token == token
        assert tier.publish([(late.ticket, 5)]) == [False]
        assert tier.table.statistics().num_quarantined == 1
        assert await use(tier, metas) == [HOST] * 3


async def test_an_adopted_tier_whose_disk_was_lost(tmp_path: Path) -> None:
    async with running(tmp_path, keep=True) as tier:
        store(tier, chain("a", 3))
    for path in (tmp_path / "disk").glob("segment-*"):
        path.unlink()
    async with running(tmp_path, keep=True) as tier:
        assert tier.adopted
        assert tier.table.statistics().num_on_disk == 0
    async with running(tmp_path) as tier:
        assert tier.table.statistics().num_on_disk == 3


async def test_a_disk_that_cannot_be_used_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "disk").write_text("a file")
    with pytest.raises(ConfigError):
        open_tier(tmp_path)
    assert list((tmp_path / "memory").iterdir()) == []


# Up from the disk.


async def on_disk(path: Path, name: str, count: int) -> None:
    """A machine with these on its disk only."""
    async with running(path, num_slots=24) as tier:
        store(tier, chain(name, count))


async def test_a_damaged_record_is_a_miss_and_counted(tmp_path: Path) -> None:
    await on_disk(tmp_path, "a", 4)
    [segment] = (tmp_path / "disk").glob("segment-*.kv")
    data = bytearray(segment.read_bytes())
    at = data.index(bytes_of(chain("a", 4)[2].key))
    data[at + SLOT_BYTES - 1] ^= 0x10
    segment.write_bytes(data)
    async with running(tmp_path, num_slots=24) as tier:
        assert await use(tier, chain("a", 4)) == [DISK] * 2
        assert tier.counters.num_promoted[DISK] == 2
        assert tier.counters.num_failed[DISK] == 2
        assert disk_of(tier).statistics().num_corrupt == 1
        numbers = tier.table.statistics()
        assert (numbers.num_tickets, numbers.num_filling, numbers.num_ready) == (0, 0, 2)
        assert not disk_of(tier).contains(chain("a", 4)[3].key)


@pytest.mark.parametrize("how", ["late", "cancelled"])
async def test_a_promotion_that_is_given_up_leaves_no_ticket(tmp_path: Path, how: str) -> None:
    await on_disk(tmp_path, "a", 3)
    async with running(tmp_path, num_slots=24) as tier:
        go_on = threading.Event()
        blocked = tier.on_disk_thread(lambda: go_on.wait(10.0))
        try:
            asked = asyncio.ensure_future(
                hold(tier, chain("a", 3), timeout_s=0.05 if how == "late" else 60.0)
            )
            await until(lambda: tier.table.statistics().num_tickets == 3)
            if how == "cancelled":
                asked.cancel()
                await asyncio.wait([asked])
                assert asked.cancelled()
            else:
                assert await asked == (0, [])
            assert tier.table.statistics().num_tickets == 3, "the thread may still write"
        finally:
            go_on.set()
        assert await blocked
        await until(lambda: tier.table.statistics().num_tickets == 0)
        # What it brought counts for the next one.
        assert await use(tier, chain("a", 3)) == [HOST] * 3
        assert tier.counters.num_promoted[DISK] == 3


async def test_many_ask_for_the_same_at_once(tmp_path: Path) -> None:
    await on_disk(tmp_path, "a", 20)
    async with running(tmp_path, num_slots=24) as tier:
        found = await asyncio.gather(*(hold(tier, chain("a", 20)) for _ in range(5)))
        assert [len(slots) for _, slots in found] == [20] * 5
        assert tier.counters.num_promoted[DISK] == 20
        assert tier.counters.num_failed[DISK] == 0
        tier.release([hold_id for hold_id, _ in found])
        assert tier.table.statistics().num_held == 0


async def test_what_has_no_room_is_a_miss(tmp_path: Path) -> None:
    await on_disk(tmp_path, "a", 6)
    async with running(tmp_path, num_slots=4) as tier:
        store(tier, chain("b", 2))
        held, _ = await hold(tier, chain("b", 2))
        assert await use(tier, chain("a", 6)) == [DISK] * 2
        assert tier.table.statistics().num_tickets == 0
        tier.release([held])


async def test_a_stop_during_a_promotion(tmp_path: Path) -> None:
    await on_disk(tmp_path, "a", 3)
    tier = open_tier(tmp_path, 24)
    await tier.start()
    go_on = threading.Event()
    blocked = tier.on_disk_thread(lambda: go_on.wait(10.0))
    asked = asyncio.ensure_future(hold(tier, chain("a", 3)))
    await until(lambda: tier.table.statistics().num_tickets == 3)
    asked.cancel()
    stopping = asyncio.ensure_future(tier.stop())
    await asyncio.wait([asked])
    go_on.set()
    await stopping
    assert await blocked
    # Late words of instances change nothing.
    tier.release_owner("reader")
    assert list((tmp_path / "memory").iterdir()) == []
