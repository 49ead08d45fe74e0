"""Finished prefills that nobody takes while others wait: their blocks go to the host tier.

Real instances and a real pool node: a block that is pulled from the wrong place, or after it was
given to somebody else, gives a wrong token.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from baton.core.config import HandoffConfig
from baton.core.request import Part
from kvpool.arena import BlockArena
from kvpool.block_io import BlockMover
from kvpool.transport import BlockCopy
from kvpool.transports import TransportSet
from kvpool.transports.shm import ShmTransport
from kvpool.transports.tcp import TcpTransport
from prefill_worker.spill import Spill, Spilled
from tests.instance.fetch_kit import BLOCK_BYTES, LAYOUT, Pool, content, keys_of, pool_of
from tests.instance.instance_kit import WAIT_S, request, until
from tests.prefill_worker.spill_kit import scene

KEYS = keys_of(6)


class Spilling:
    """A cache and its way to the host tier, without a worker."""

    def __init__(self, pool: Pool) -> None:
        self.cache = BlockArena.private(16, BLOCK_BYTES, LAYOUT)
        self.blocks = (7, 2, 3, 11, 0, 9)
        for block, key in zip(self.blocks, KEYS, strict=True):
            self.cache.generations[block] = 5
            self.cache.block(block)[:] = content(key)
        self.spill = Spill(pool.link("instance"), BlockMover(self.cache, LAYOUT))

    async def store(self) -> Spilled | None:
        return await self.spill.store(self.blocks, (5,) * len(self.blocks))


@contextlib.asynccontextmanager
async def spilling(directory: Path, num_slots: int = 16) -> AsyncIterator[tuple[Pool, Spilling]]:
    async with pool_of(directory, num_slots) as pool:
        bench = Spilling(pool)
        try:
            yield pool, bench
        finally:
            await bench.spill.stop()


@pytest.mark.parametrize("name", ["shm", "tcp"])
async def test_the_same_bytes_are_pulled_from_there(tmp_path: Path, name: str) -> None:
    async with spilling(tmp_path) as (pool, bench):
        spilled = await bench.store()
        assert spilled is not None
        bench.cache.generations[:] += 1  # as when they are handed out again
        bench.cache.buffer[:] = b"?" * len(bench.cache.buffer)
        target = BlockArena.private(6, BLOCK_BYTES, LAYOUT)
        transports = TransportSet([ShmTransport() if name == "shm" else TcpTransport("127.0.0.1")])
        copies = [
            BlockCopy(slot, generation, index)
            for index, (slot, generation) in enumerate(
                zip(spilled.slots, spilled.generations, strict=True)
            )
        ]
        receipt = await asyncio.to_thread(
            transports.pull, spilled.endpoints, target, copies, timeout_s=5.0
        )
        assert (receipt.transport, receipt.num_blocks) == (name, 6)
        assert [bytes(target.block(index)) for index in range(6)] == [content(k) for k in KEYS]
        await asyncio.to_thread(transports.close)
        assert pool.held()["tickets"] == pool.held()["transient"] == 6
        assert bench.spill.num_blocks == 6
        bench.spill.drop(spilled.tickets)
        await pool.idle()
        assert pool.statistics().num_free == 16, "one handoff's blocks are of no use to others"


async def test_a_renewal_lasts_for_another_lease(tmp_path: Path) -> None:
    async with spilling(tmp_path) as (pool, bench):
        spilled = await bench.store()
        assert spilled is not None
        leases = pool.table._blocks.leases
        before = [leases.deadline(ticket) for ticket in spilled.tickets]
        bench.spill.renew(spilled)
        await until(
            lambda: all(
                leases.deadline(ticket) > deadline
                for ticket, deadline in zip(spilled.tickets, before, strict=True)
            )
        )
        bench.spill.drop(spilled.tickets)


async def test_all_fit_or_nothing_is_kept(tmp_path: Path) -> None:
    async with spilling(tmp_path, num_slots=5) as (pool, bench):
        assert await bench.store() is None
        await pool.idle()
        assert pool.statistics().num_free == 5
        assert bench.spill.num_blocks == 0


async def test_what_was_given_away_before_the_copy_keeps_nothing(tmp_path: Path) -> None:
    async with spilling(tmp_path) as (pool, bench):
        bench.cache.generations[bench.blocks[4]] += 1
        assert await bench.store() is None
        await pool.idle()
        assert pool.statistics().num_free == 16


async def test_without_a_pool_node_nothing_is_moved(tmp_path: Path) -> None:
    async with spilling(tmp_path) as (pool, bench):
        await pool.stop_node()
        assert await bench.store() is None


async def test_a_stop_waits_for_the_copy_and_what_follows(tmp_path: Path) -> None:
    async with spilling(tmp_path) as (pool, bench):
        gate = threading.Event()
        bench.spill._thread.submit(gate.wait, WAIT_S)
        storing = asyncio.ensure_future(bench.store())
        await until(lambda: pool.held()["tickets"] == 6)
        bench.cache.generations[bench.blocks[0]] += 1
        stopping = asyncio.ensure_future(bench.spill.stop())
        await asyncio.sleep(0)
        gate.set()
        await asyncio.wait_for(stopping, WAIT_S)
        assert storing.done()
        assert storing.result() is None
        assert pool.held()["tickets"] == 0, "the stop left them to their leases"


async def test_a_handoff_that_waits_makes_room_for_others(tmp_path: Path) -> None:
    async with scene(tmp_path) as s:
        big = await s.fill_decode()
        waits, other = (
            request("waits", num_prompt_tokens=30),
            request("other", num_prompt_tokens=40),
        )
        await s.client.hand_over(waits, s.prefill, s.decode)
        await s.held("waits")
        assert s.num_spilled == 0, "nobody needs the room"
        await s.client.hand_over(other, s.prefill, s.decode)
        await s.spilled("waits")
        await s.held("other")
        s.go_on()
        for one in (big, waits, other):
            await s.client.check(one)
        counters = s.decode.parts.decode.counters
        assert counters.num_recomputed == 0
        assert counters.num_pulls["shm"] == 1
        assert s.prefill.parts.prefill.counters.num_handed_off == 3
        await s.prefill.idle()
        await s.pool.idle()


async def test_a_pull_from_the_old_place_that_is_under_way(tmp_path: Path) -> None:
    async with scene(tmp_path, decode_blocks=64) as s:
        s.line.gate.clear()
        moves, other = (
            request("moves", num_prompt_tokens=30),
            request("other", num_prompt_tokens=60),
        )
        await s.client.hand_over(moves, s.prefill, s.decode)
        await until(lambda: s.line.num_waiting == 1)
        await s.held("moves")
        await s.client.hand_over(other, s.prefill, s.decode)
        await s.spilled("moves")
        await s.held("other")  # in blocks that were the first one's
        await until(lambda: s.decode.parts.decode._pulls["moves@0"].moved)
        s.go_on()
        await s.client.check(moves)
        await s.client.check(other)
        counters = s.decode.parts.decode.counters
        assert counters.num_recomputed == 0
        assert counters.num_pulls["shm"] == 1


async def test_a_pull_that_had_not_begun_does_not_take_old_numbers_to_the_new_place(
    tmp_path: Path,
) -> None:
    """The host tier has other blocks under the same numbers, and of the same generation."""
    # Not at once: one that has just come and awaits its first step looks like one without room.
    async with scene(tmp_path, num_blocks=24, decode_blocks=64, spill_after_s=1.0) as s:
        await s.pool.put(keys_of(24, "of somebody else"))
        assert {s.pool.arena.blocks.generation(slot) for slot in range(24)} == {1}
        s.line.gate.clear()
        first = [request(name, num_prompt_tokens=7) for name in ("one", "two")]
        for item in first:
            await s.client.hand_over(item, s.prefill, s.decode)
        await until(lambda: s.line.num_waiting == 2)
        queued = request("queued", num_prompt_tokens=24)
        await s.client.hand_over(queued, s.prefill, s.decode)
        await s.held("one", "two", "queued")
        await until(lambda: s.decode.parts.decode._pulls["queued@0"].pulling)
        assert s.line.num_waiting == 2, "it waits for a thread"
        old = s.prefill.parts.prefill._handoffs["queued@0"]
        assert set(old.generations) == {1}
        assert max(old.blocks) < 24
        other = request("other", num_prompt_tokens=90)  # needs all of them
        await s.client.hand_over(other, s.prefill, s.decode)
        await s.spilled("queued")
        await until(lambda: s.decode.parts.decode._pulls["queued@0"].moved)
        s.go_on()
        for one in (*first, queued, other):
            await s.client.check(one)


async def test_an_abort_drops_the_slots(tmp_path: Path) -> None:
    async with scene(tmp_path) as s:
        big = await s.fill_decode()
        await s.client.hand_over(request("waits", num_prompt_tokens=30), s.prefill, s.decode)
        await s.held("waits")
        await s.client.hand_over(request("other", num_prompt_tokens=40), s.prefill, s.decode)
        await s.spilled("waits")
        await s.client.abort("waits", 0, s.prefill, s.decode)
        await s.pool.idle()
        s.go_on()
        await s.client.check(big)
        await s.client.check(request("other", num_prompt_tokens=40))


async def test_the_end_of_the_lease_drops_the_slots(tmp_path: Path) -> None:
    async with scene(tmp_path, handoff=HandoffConfig(lease_s=0.4, pull_timeout_s=1.0)) as s:
        # Their decode side never asks.
        await s.client.submit(request("waits", num_prompt_tokens=30), Part.PREFILL, s.prefill)
        await s.held("waits")
        await s.client.submit(request("other", num_prompt_tokens=40), Part.PREFILL, s.prefill)
        await s.spilled("waits")
        await s.prefill.idle()
        await s.pool.idle()
        assert s.prefill.parts.prefill.counters.num_expired_leases == 2


async def test_a_decode_side_that_ends_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prefill_worker.worker._ORPHAN_LEASE_S", 0.1)
    async with scene(tmp_path) as s:
        await s.fill_decode()
        for name, length in (("waits", 30), ("other", 40)):
            one = request(name, num_prompt_tokens=length)
            await s.client.hand_over(one, s.prefill, s.decode)
            await until(lambda: s.prefill.instance.num_open > 0)
        await s.spilled("waits")
        for link in s.decode.parts.decode._peers.values():
            await link.close()
        await s.prefill.idle()
        await s.pool.idle()


async def test_where_not_all_fit_nothing_is_moved_and_the_handoff_goes_on(tmp_path: Path) -> None:
    async with scene(tmp_path, num_slots=4) as s:
        big = await s.fill_decode()
        waits, other = (
            request("waits", num_prompt_tokens=30),
            request("other", num_prompt_tokens=40),
        )
        await s.client.hand_over(waits, s.prefill, s.decode)
        await s.held("waits")
        before = s.pool.statistics().num_full
        await s.client.hand_over(other, s.prefill, s.decode)
        await until(lambda: s.pool.statistics().num_full > before)
        await s.held("waits")
        s.go_on()
        for one in (big, waits, other):
            await s.client.check(one)
        assert s.num_spilled == 0
        await s.pool.idle()
