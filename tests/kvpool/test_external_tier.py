"""A pool node's external tier: over the shipped fake with its faults, then over a real store."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path

import grpc.aio
import pytest

from baton.core.config import ExternalConfig
from baton.core.errors import ConfigError
from kvpool import external_tier
from kvpool.external import CheckedStore, ExternalStore
from kvpool.external_memory import MemoryValues, StoreFault
from kvpool.external_tier import ExternalTier
from kvpool.host_tier import HostTier
from kvpool.pool_link import Hold, PoolLink
from kvpool.pool_metrics import tier_numbers
from kvpool.pool_node import PoolNode
from kvpool.tiers import BlockMeta, Tier
from protos.baton.internal.v1 import pool_pb2, pool_pb2_grpc
from tests.kvpool.mooncake_kit import Master, holder
from tests.kvpool.store_kit import COUNTED
from tests.kvpool.tier_kit import (
    LAYOUT,
    WAIT_S,
    chain,
    hold,
    keys_of,
    linked,
    open_tier,
    spec,
    store,
    store_at,
    tiers_of,
    until,
    until_some,
    use,
)

HOST, EXTERNAL = Tier.HOST, Tier.EXTERNAL
SIZES = 1 << 20


class Shared:
    """One store that several machines use; it outlives each of them."""

    def __init__(self) -> None:
        self.values = MemoryValues(SIZES, SIZES)

    def connect(self, timeout_s: float = 5.0) -> CheckedStore:
        return CheckedStore(_Kept(self.values), name="t", layout=LAYOUT.text, timeout_s=timeout_s)


class _Kept(MemoryValues):
    """A client's end: what it closes is not the store."""

    def __init__(self, shared: MemoryValues) -> None:
        super().__init__(SIZES, SIZES)
        self.exist = shared.exist  # type: ignore[method-assign]
        self.load = shared.load  # type: ignore[method-assign]
        self.save = shared.save  # type: ignore[method-assign]
        self.drop = shared.drop  # type: ignore[method-assign]


@pytest.fixture
def shared() -> Iterator[Shared]:
    made = Shared()
    yield made
    made.values.close()


@contextlib.asynccontextmanager
async def machine(
    path: Path, connect: Callable[[], ExternalStore], num_slots: int = 8, **pool: str
) -> AsyncIterator[HostTier]:
    os.makedirs(path, exist_ok=True)
    tier = open_tier(path, num_slots, with_disk=False, **pool)
    external = tier.external = ExternalTier(tier, connect)
    try:
        await tier.start()
        await until(lambda: external.connected)
        yield tier
        assert tier.table.statistics().num_tickets == 0
        tier.table.check_integrity()
    finally:
        await tier.stop()


def external_of(tier: HostTier) -> ExternalTier:
    assert tier.external is not None
    return tier.external


async def written(tier: HostTier, count: int) -> None:
    await until(lambda: external_of(tier).statistics().stored == count)


async def test_what_was_asked_for_reaches_other_machines(tmp_path: Path, shared: Shared) -> None:
    metas = chain("a", 5)
    async with machine(tmp_path / "a", shared.connect) as a:
        store(a, metas)
        assert await use(a, metas) == [HOST] * 5
        await written(a, 5)
        await use(a, metas)
        async with machine(tmp_path / "b", shared.connect) as b:
            assert await use(b, metas[:3]) == [EXTERNAL] * 3
            assert await use(b, metas) == [HOST] * 3 + [EXTERNAL] * 2
            assert await use(b, metas) == [HOST] * 5
            assert b.counters.num_promoted[EXTERNAL] == 5
            assert tier_numbers(b)["baton_pool_external_hits"] == 5
            # It came from there: nobody writes it again.
            await asyncio.sleep(0)
            assert external_of(b).num_queued == 0
            assert external_of(b).statistics().stored == 0
        assert external_of(a).statistics().stored == 5, "each once"


async def test_what_nobody_asked_for_is_not_written(tmp_path: Path, shared: Shared) -> None:
    async with machine(tmp_path / "a", shared.connect) as a:
        store(a, chain("a", 3))
        store(a, chain("b", 2))
        await use(a, chain("b", 2))
        await written(a, 2)
    assert shared.values.exist(["x"], 1.0) == [False]
    async with machine(tmp_path / "b", shared.connect) as b:
        assert await use(b, chain("a", 3)) == []
        assert await use(b, chain("b", 2)) == [EXTERNAL] * 2


async def test_all_of_it_is_written_with_write_back_all(tmp_path: Path, shared: Shared) -> None:
    async with machine(tmp_path / "a", shared.connect, write_back="all") as a:
        store(a, chain("a", 3))
        await written(a, 3)


async def test_more_than_the_host_tier_holds(tmp_path: Path, shared: Shared) -> None:
    metas = chain("a", 20)
    async with machine(tmp_path / "a", shared.connect, 24, write_back="all") as a:
        store(a, metas)
        await written(a, 20)
    async with machine(tmp_path / "b", shared.connect, 18) as b:
        assert await use(b, metas) == [EXTERNAL] * 18
        assert b.counters.num_failed[EXTERNAL] == 0


@pytest.mark.parametrize(("fault", "counted"), COUNTED.items())
async def test_a_store_that_goes_wrong_is_a_miss(
    tmp_path: Path, shared: Shared, fault: StoreFault, counted: str
) -> None:
    metas = chain("a", 3)
    async with machine(tmp_path / "a", shared.connect, write_back="all") as a:
        store(a, metas)
        await written(a, 3)
    async with machine(tmp_path / "b", lambda: shared.connect(0.2)) as b:
        shared.values.fault = fault
        assert await hold(b, metas) == (0, [])
        assert tier_numbers(b)[f"baton_pool_external_{counted}"] > 0
        assert not b.table.has(metas[0].key)
        shared.values.fault = None
        # Damaged values were removed; whole ones are read again.
        found = await use(b, metas)
        whole = fault in (StoreFault.MISS, StoreFault.FAIL, StoreFault.STALL)
        assert found == ([EXTERNAL] * 3 if whole else [])


async def test_nobody_waits_longer_than_they_want_to(tmp_path: Path, shared: Shared) -> None:
    metas = chain("a", 3)
    async with machine(tmp_path / "a", shared.connect, write_back="all") as a:
        store(a, metas)
        await written(a, 3)
    async with machine(tmp_path / "b", lambda: shared.connect(3.0)) as b:
        shared.values.fault = StoreFault.STALL
        async with asyncio.timeout(2.5):
            assert await hold(b, metas, timeout_s=0.1) == (0, [])
        shared.values.close()  # ends the stall


async def test_another_machine_is_not_sent_on_to_the_store(tmp_path: Path, shared: Shared) -> None:
    metas = chain("a", 3)
    async with machine(tmp_path / "a", shared.connect, write_back="all") as a:
        store(a, metas)
        await written(a, 3)
    async with machine(tmp_path / "b", shared.connect) as b:
        found = await b.hold_prefix(
            keys_of(metas), owner="pool-c", skip=0, lease_s=9.0, timeout_s=1.0, local_only=True
        )
        assert found == (0, [])


async def test_damaged_and_evicted_blocks_are_not_written(tmp_path: Path, shared: Shared) -> None:
    metas, gate = chain("a", 4), threading.Event()

    class Gated(CheckedStore):
        def put(self, blocks: Sequence[tuple[BlockMeta, memoryview]]) -> int:
            assert gate.wait(WAIT_S)
            return super().put(blocks)

    def connect() -> ExternalStore:
        return Gated(_Kept(shared.values), name="t", layout=LAYOUT.text)

    async with machine(tmp_path / "a", connect) as a:
        store(a, metas)
        await use(a, metas[:1])
        await until(lambda: external_of(a).num_queued == 0)
        hold_id, slots = await hold(a, metas)
        a.release([hold_id])
        a.arena.blocks.block(slots[1].slot)[0] ^= 1
        # With it goes what hangs on it.
        a.drop(metas[2].key)
        gate.set()
        await until(lambda: external_of(a).counters.num_gone == 2)
        await until(lambda: external_of(a).statistics().stored == 2)
        # A reader that doubts is believed where it is right.
        await a.verify(keys_of(metas[:2]))
        assert [a.table.has(meta.key) for meta in metas] == [True, False, False, False]
        assert a.counters.num_damaged == 2
    async with machine(tmp_path / "b", shared.connect) as b:
        assert await use(b, metas) == [EXTERNAL]


async def test_a_store_that_is_not_there_yet(
    tmp_path: Path, shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(external_tier, "_FIRST_PAUSE_S", 0.05)
    trials = 0

    def connect() -> ExternalStore:
        nonlocal trials
        trials += 1
        if trials < 3:
            raise ConfigError("nobody listens", param="pool.external.master")
        return shared.connect()

    tier = open_tier(tmp_path, with_disk=False)
    external = tier.external = ExternalTier(tier, connect)
    try:
        await tier.start()
        store(tier, chain("a", 2))
        assert await use(tier, chain("a", 2)) == [HOST] * 2
        assert tier_numbers(tier)["baton_pool_external_connected"] == 0
        await until(lambda: external.connected)
        await use(tier, chain("a", 2))
        await written(tier, 2)
        assert trials == 3
    finally:
        await tier.stop()


async def test_a_stop_while_it_cannot_be_reached(tmp_path: Path) -> None:
    def connect() -> ExternalStore:
        raise ConfigError("nobody listens", param="pool.external.master")

    tier = open_tier(tmp_path, with_disk=False)
    tier.external = ExternalTier(tier, connect)
    await tier.start()
    await asyncio.sleep(0)
    await tier.stop()


async def test_two_machines_and_a_real_store(tmp_path: Path) -> None:
    metas = chain("a", 6)
    master = Master(tmp_path)
    try:
        with holder(master.address, 32 << 20):
            config = ExternalConfig(master=master.address, batch_bytes=1 << 20)
            async with pool_node(tmp_path / "a", config) as (node, link):
                assert await link.hold(keys_of(metas), skip=0, timeout_s=5.0) is None
                await store_at(link, metas)
                assert tiers_of(await held(link, metas), metas) == [HOST] * 6
                await until_number(node, "stored", 6)
            async with pool_node(tmp_path / "b", config) as (node, link):
                assert tiers_of(await held(link, metas), metas) == [EXTERNAL] * 6
                assert tiers_of(await held(link, metas), metas) == [HOST] * 6
                await until_number(node, "hits", 6)
    finally:
        master.kill()


async def held(link: PoolLink, metas: Sequence[BlockMeta]) -> Hold | None:
    return await link.hold(keys_of(metas), skip=0, timeout_s=WAIT_S)


@contextlib.asynccontextmanager
async def pool_node(path: Path, config: ExternalConfig) -> AsyncIterator[tuple[PoolNode, PoolLink]]:
    """Of another machine each."""
    os.mkdir(path)
    node = PoolNode("c", str(path), node_id=path.name, tier=spec(external=config))
    try:
        async with linked(await node.start()) as link:
            await until_number(node, "connected", 1)
            yield node, link
    finally:
        await node.stop()


async def until_number(node: PoolNode, name: str, value: float) -> None:
    async def reached() -> bool:
        async with grpc.aio.insecure_channel(node.address) as channel:
            stub: pool_pb2_grpc.PoolNodeAsyncStub = pool_pb2_grpc.PoolNodeStub(channel)
            status = await stub.GetPoolStatus(pool_pb2.GetPoolStatusRequest(), timeout=WAIT_S)
        return status.numbers[f"baton_pool_external_{name}"] == value

    assert await until_some(reached)
