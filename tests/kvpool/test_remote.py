"""Blocks of one machine's host tier, used on another: two pool nodes and a real controller."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from kvpool.pool_link import PoolLink
from kvpool.pool_node import PoolNode
from kvpool.tiers import BlockMeta, Tier
from kvpool.transport import TransferFault
from protos.baton.internal.v1 import controller_pb2, pool_pb2, pool_pb2_grpc
from protos.serving import channel_options
from tests.controller.service_kit import Cluster, make_service
from tests.controller.service_kit import running as running_controller
from tests.kvpool.tier_kit import (
    LEASE_S,
    WAIT_S,
    chain,
    keys_of,
    linked,
    pool_process,
    spec,
    store_at,
    tiers_of,
    until_some,
)

HOST, REMOTE = Tier.HOST, Tier.REMOTE


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with running_controller(make_service(tmp_path)) as cluster:
        yield cluster


@contextlib.asynccontextmanager
async def machine(
    path: Path, name: str, cluster: Cluster, **more: Any
) -> AsyncIterator[tuple[PoolNode, PoolLink]]:
    """A pool node with memory of its own, known to the controller, and a link of an instance."""
    memory = path / name
    memory.mkdir()
    node = PoolNode(
        "c",
        str(memory),
        controller_address=cluster.service.address,
        node_id=name,
        heartbeat_s=0.1,
        **{"tier": spec(), **more},
    )
    await node.start()
    try:
        async with linked(node.address) as link:
            yield node, link
    finally:
        await node.stop()


async def locate(cluster: Cluster, metas: list[BlockMeta]) -> controller_pb2.LocateBlocksReply:
    request = controller_pb2.LocateBlocksRequest(keys=keys_of(metas))
    reply = await cluster.control.LocateBlocks(request, timeout=WAIT_S)
    assert isinstance(reply, controller_pb2.LocateBlocksReply)
    return reply


async def known(cluster: Cluster, holder: str, metas: list[BlockMeta], nodes: int = 2) -> None:
    """The index knows that a holder has all of it, and all pool nodes are there."""

    async def there() -> bool:
        reply = await locate(cluster, metas)
        found = {match.holder for match in reply.matches if match.num_blocks == len(metas)}
        addresses = [match.address for match in reply.matches]
        return reply.num_pool_nodes == nodes and holder in found and all(addresses)

    await until_some(there)


async def found_by(link: PoolLink, metas: list[BlockMeta], timeout_s: float = WAIT_S) -> list[Tier]:
    """Hold and let go; where the blocks were. Bounded."""
    async with asyncio.timeout(2 * WAIT_S):
        found = await link.hold(keys_of(metas), skip=0, timeout_s=timeout_s)
    if found is not None:
        link.release(found.hold_id)
    return tiers_of(found, metas)


async def numbers(address: str) -> dict[str, float]:
    async with grpc.aio.insecure_channel(address, options=channel_options()) as channel:
        stub: Any = pool_pb2_grpc.PoolNodeStub(channel)
        status = await stub.GetPoolStatus(pool_pb2.GetPoolStatusRequest(), timeout=WAIT_S)
    return {name.removeprefix("baton_pool_"): value for name, value in status.numbers.items()}


async def faults(node: PoolNode) -> dict[str, int]:
    """Those of its metrics that are not zero, by kind; all kinds are there."""

    def read() -> str:
        with urllib.request.urlopen(f"http://{node.http_address}/metrics", timeout=WAIT_S) as reply:
            return bytes(reply.read()).decode()

    found = re.findall(
        r'^baton_pool_remote_faults_total{fault="(\w+)"} (\S+)$',
        await asyncio.to_thread(read),
        re.MULTILINE,
    )
    assert {fault for fault, _ in found} == set(TransferFault)
    return {fault: int(float(count)) for fault, count in found if float(count)}


async def until_number(address: str, name: str, value: float) -> None:
    async def there() -> bool:
        return (await numbers(address))[name] == value

    await until_some(there)


async def test_a_prefix_comes_from_the_other_machine(cluster: Cluster, tmp_path: Path) -> None:
    metas = chain("a", 5)
    async with (
        machine(tmp_path, "a", cluster) as (node_a, link_a),
        machine(tmp_path, "b", cluster) as (node_b, link_b),
    ):
        await store_at(link_a, metas)
        await store_at(link_b, metas[:2])
        await known(cluster, "pool-a", metas)
        assert await found_by(link_b, metas) == [HOST] * 2 + [REMOTE] * 3
        assert await found_by(link_b, metas) == [HOST] * 5
        assert (await numbers(node_b.address))["promoted_remote"] == 3
        await until_number(node_a.address, "host_holds", 0)
        assert await faults(node_b) == {}
        # And now the index knows both.
        await known(cluster, "pool-b", metas)


async def test_only_tiers_that_were_named_are_looked_in(cluster: Cluster, tmp_path: Path) -> None:
    """One who would rather compute than wait for the others."""
    metas, disk = chain("a", 4), tmp_path / "disk"
    async with machine(tmp_path, "first", cluster, tier=spec(disk=disk)) as (_, link):
        await store_at(link, metas[:2])
    async with (
        machine(tmp_path, "a", cluster) as (_, link_a),
        machine(tmp_path, "b", cluster, tier=spec(disk=disk)) as (_, link_b),
    ):
        await store_at(link_a, metas)
        await known(cluster, "pool-a", metas)
        keys = keys_of(metas)
        assert await link_b.hold(keys, skip=0, timeout_s=WAIT_S, tiers=(HOST,)) is None
        found = await link_b.hold(keys, skip=0, timeout_s=WAIT_S, tiers=(HOST, Tier.DISK))
        assert found is not None
        assert [slot.tier for slot in found.slots] == [Tier.DISK] * 2
        link_b.release(found.hold_id)
        assert await found_by(link_b, metas) == [HOST] * 2 + [REMOTE] * 2


async def test_a_disk_of_the_other_machine(cluster: Cluster, tmp_path: Path) -> None:
    metas, disk = chain("a", 4), tmp_path / "disk"
    async with machine(tmp_path, "first", cluster, tier=spec(disk=disk)) as (_, link):
        await store_at(link, metas)
    async with (
        machine(tmp_path, "a", cluster, tier=spec(disk=disk)) as (node_a, _),
        machine(tmp_path, "b", cluster) as (_, link_b),
    ):
        await known(cluster, "pool-a", metas)
        assert await found_by(link_b, metas) == [REMOTE] * 4
        assert (await numbers(node_a.address))["promoted_disk"] == 4


async def test_who_is_asked_by_another_asks_no_third(cluster: Cluster, tmp_path: Path) -> None:
    metas = chain("a", 3)
    async with (
        machine(tmp_path, "a", cluster) as (_, link_a),
        machine(tmp_path, "b", cluster) as (node_b, _),
        grpc.aio.insecure_channel(node_b.address, options=channel_options()) as channel,
    ):
        await store_at(link_a, metas)
        await known(cluster, "pool-a", metas)
        stub: Any = pool_pb2_grpc.PoolNodeStub(channel)
        request = pool_pb2.HoldPrefixRequest(
            keys=keys_of(metas), owner="x", lease_s=LEASE_S, timeout_s=WAIT_S, local_only=True
        )
        assert not (await stub.HoldPrefix(request, timeout=WAIT_S)).hold_id


async def test_an_index_that_is_behind_costs_a_miss(cluster: Cluster, tmp_path: Path) -> None:
    metas = chain("gone", 3)
    async with (
        machine(tmp_path, "a", cluster) as (node_a, link_a),
        machine(tmp_path, "b", cluster) as (node_b, link_b),
    ):
        await store_at(link_a, metas[:1])
        await known(cluster, "pool-a", metas[:1])
        # Of a later life, so that what the holder says itself does not count any more.
        lie = controller_pb2.BlockReport(
            holder="pool-a",
            life=1 << 60,
            snapshot=True,
            blocks=[controller_pb2.TierBlocks(tier="host", keys=keys_of(metas))],
        )
        await cluster.control.ReportBlocks(lie, timeout=WAIT_S)
        await known(cluster, "pool-a", metas)
        assert await found_by(link_b, metas) == [REMOTE]
        assert await found_by(link_b, metas) == [HOST]
        told = await numbers(node_b.address)
        assert (told["promoted_remote"], told["failed_remote"], told["host_tickets"]) == (1, 0, 0)
        assert (await numbers(node_a.address))["host_holds"] == 0


async def test_damaged_bytes_are_not_believed(cluster: Cluster, tmp_path: Path) -> None:
    metas = chain("a", 4)
    async with (
        machine(tmp_path, "a", cluster) as (node_a, link_a),
        machine(tmp_path, "b", cluster) as (node_b, link_b),
    ):
        await store_at(link_a, metas)
        held = await link_a.hold(keys_of(metas), skip=2, timeout_s=1.0)
        assert held is not None
        held.arena.block(held.slots[0].slot)[0] ^= 1
        link_a.release(held.hold_id)
        await known(cluster, "pool-a", metas)
        assert await found_by(link_b, metas) == [REMOTE] * 2
        told = await numbers(node_b.address)
        assert (told["promoted_remote"], told["failed_remote"]) == (2, 2)
        assert (told["host_tickets"], told["host_used"]) == (0, 2)
        assert await faults(node_b) == {"corrupt": 1}
        await until_number(node_a.address, "host_holds", 0)


@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL])
async def test_the_other_machine_goes_away(
    cluster: Cluster, tmp_path: Path, how: signal.Signals
) -> None:
    metas, memory = chain("a", 3), tmp_path / "a"
    memory.mkdir()
    controller = cluster.service.address
    async with (
        pool_process(str(memory), "c", "a", controller) as (process, address),
        machine(tmp_path, "b", cluster) as (node_b, link_b),
    ):
        async with linked(address) as link_a:
            await store_at(link_a, metas)
        await known(cluster, "pool-a", metas)
        process.send_signal(how)
        assert await found_by(link_b, metas, timeout_s=0.3) == []
        # Once is enough: this would last longer than the test allows.
        assert await found_by(link_b, metas, timeout_s=60.0) == []
        told = await numbers(node_b.address)
        assert (told["host_tickets"], told["host_used"]) == (0, 0)
        # One that is frozen may not even be connected to; of one that was killed the controller may
        # know already, and then nobody is sent there.
        counted = await faults(node_b)
        assert counted in [{"gone": 1}, {"late": 1} if how == signal.SIGSTOP else {}]
        await store_at(link_b, metas)
        assert await found_by(link_b, metas) == [HOST] * 3


async def test_a_holder_that_stops_is_forgotten(cluster: Cluster, tmp_path: Path) -> None:
    metas = chain("a", 2)
    async with machine(tmp_path, "b", cluster) as (_, link_b):
        async with machine(tmp_path, "a", cluster) as (_, link_a):
            await store_at(link_a, metas)
            await known(cluster, "pool-a", metas)

        async def alone() -> bool:
            reply = await locate(cluster, metas)
            # There may be an entry still, but nobody is sent there.
            return reply.num_pool_nodes == 1 and not any(m.address for m in reply.matches)

        await until_some(alone)
        # The cluster's next view is without it, and so is the index.
        await cluster.join("mixed-0", "mixed")
        assert not (await locate(cluster, metas)).matches
        assert await found_by(link_b, metas) == []


async def test_without_a_controller_there_are_no_others(tmp_path: Path) -> None:
    node = PoolNode("c", str(tmp_path), controller_address="127.0.0.1:1", tier=spec())
    await node.start()
    async with linked(node.address) as link:
        await store_at(link, chain("a", 2))
        assert await found_by(link, chain("a", 3)) == [HOST] * 2
    await node.stop()
    assert os.listdir(tmp_path) == []
