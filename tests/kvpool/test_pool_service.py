"""A pool node's host tier over real gRPC, as instances use it: through a link."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from kvpool.arena_header import host_arena_name
from kvpool.host_values import Grant
from kvpool.pool_link import PoolLink, tier_owner
from kvpool.pool_node import PoolNode
from kvpool.tiers import Tier
from protos.baton.internal.v1 import pool_pb2, pool_pb2_grpc
from protos.serving import channel_options
from tests.kvpool.tier_kit import (
    LAYOUT,
    LEASE_S,
    SLOT_BYTES,
    WAIT_S,
    bytes_of,
    chain,
    keys_of,
    linked,
    pool_process,
    spec,
    store_at,
    tiers_of,
    until_some,
    write,
)

HOST = Tier.HOST


def make_node(path: Path, **more: Any) -> PoolNode:
    return PoolNode("c", str(path), **{"tier": spec(), "node_id": "n", **more})


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[PoolNode]:
    node = make_node(tmp_path)
    await node.start()
    yield node
    await node.stop()
    assert os.listdir(tmp_path) == []


@pytest.fixture
async def link(node: PoolNode) -> AsyncIterator[PoolLink]:
    async with linked(node.address) as link:
        yield link


@pytest.fixture
async def stub(node: PoolNode) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(node.address, options=channel_options()) as channel:
        yield pool_pb2_grpc.PoolNodeStub(channel)


@pytest.fixture
def owner() -> Iterator[subprocess.Popen[bytes]]:
    # Ends with its standard input, whatever happens to the test.
    code = "import sys; sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


async def numbers(stub: Any, **more: Any) -> dict[str, float]:
    status = await stub.GetPoolStatus(pool_pb2.GetPoolStatusRequest(**more), timeout=WAIT_S)
    return {name.removeprefix("baton_pool_"): value for name, value in status.numbers.items()}


async def until_number(stub: Any, name: str, value: float) -> None:
    async def there() -> bool:
        return (await numbers(stub))[name] == value

    await until_some(there)


async def found_by(link: PoolLink, name: str, count: int) -> list[Tier]:
    """Hold and let go; where the blocks were."""
    found = await link.hold(keys_of(chain(name, count)), skip=0, timeout_s=WAIT_S)
    if found is not None:
        link.release(found.hold_id)
    return tiers_of(found, chain(name, count))


async def test_write_read_release(link: PoolLink, stub: Any, node: PoolNode) -> None:
    metas = chain("a", 3)
    assert not link.endpoints
    assert await link.hold(keys_of(metas), skip=0, timeout_s=1.0) is None
    await store_at(link, metas)
    found = await link.hold(keys_of(metas), skip=1, timeout_s=1.0)
    assert found is not None
    assert tiers_of(found, metas[1:]) == [HOST] * 2
    assert [end.transport for end in found.endpoints] == ["shm", "tcp"]
    assert link.endpoints == found.endpoints
    assert {end.layout for end in found.endpoints} == {LAYOUT.text}
    assert found.endpoints[0].token == found.arena.token
    assert (await numbers(stub))["host_holds"] == 1
    await link.renew([found.hold_id])
    link.release(found.hold_id)
    await until_number(stub, "host_holds", 0)
    counters = link.counters
    assert (counters.num_holds, counters.num_misses, counters.num_failed_calls) == (1, 1, 0)


async def test_why_there_is_no_slot(link: PoolLink) -> None:
    await store_at(link, chain("a", 1))
    reserved = await link.reserve([*chain("a", 1), chain("b", 2)[1]])
    assert reserved is not None
    assert reserved[1] == ["known", "no_parent"]
    assert await link.publish([(12345, 1)], [54321]) == [False]


async def test_transient_blocks_stay_until_their_writer_lets_go(link: PoolLink, stub: Any) -> None:
    """A handoff through the host tier: who takes it is told the slot, and looks nothing up."""
    [meta] = chain("handoff", 1)
    reserved = await link.reserve([meta], transient=True)
    assert reserved is not None
    arena, [grant] = reserved
    assert isinstance(grant, Grant)
    assert await link.publish(write(arena, [meta], [grant])) == [True]
    assert await link.hold([meta.key], skip=0, timeout_s=1.0) is None
    await link.renew([grant.ticket])
    assert (await numbers(stub))["host_tickets"] == 1
    assert arena.generation(grant.slot) == grant.generation
    await link.publish([], [grant.ticket])
    told = await numbers(stub)
    assert (told["host_tickets"], told["host_used"]) == (0, 0)


async def test_status_and_metrics(link: PoolLink, node: PoolNode, stub: Any) -> None:
    await store_at(link, chain("a", 2))
    await found_by(link, "a", 2)
    status = await stub.GetPoolStatus(pool_pb2.GetPoolStatusRequest(dump=True), timeout=WAIT_S)
    assert chain("a", 1)[0].key.hex()[:12] in status.dump
    [top] = status.top_prefixes
    assert (top.key, top.num_blocks, top.num_lookups) == (chain("a", 2)[1].key, 2, 1)
    told = await numbers(stub)
    assert (told["host_published"], told["host_hits"], told["host_bytes"]) == (2, 2, 8 * SLOT_BYTES)

    def scrape() -> str:
        with urllib.request.urlopen(f"http://{node.http_address}/metrics", timeout=5) as reply:
            body: bytes = reply.read()
        return body.decode()

    text = await asyncio.to_thread(scrape)
    assert 'baton_pool_host_blocks{state="free"} 6.0' in text
    assert "baton_pool_host_published_total 2.0" in text


@pytest.mark.parametrize(
    ("call", "request_"),
    [
        ("HoldPrefix", pool_pb2.HoldPrefixRequest(keys=keys_of(chain("a", 1)), owner="x")),
        ("RenewHolds", pool_pb2.RenewHoldsRequest(hold_ids=[1])),
        ("ReserveBlocks", pool_pb2.ReserveBlocksRequest(owner="x")),
        (
            "ReserveBlocks",
            pool_pb2.ReserveBlocksRequest(lease_s=1.0, blocks=[pool_pb2.BlockRecord(key=b"x")]),
        ),
    ],
)
async def test_what_cannot_be_is_refused(
    link: PoolLink, stub: Any, call: str, request_: Any
) -> None:
    await store_at(link, chain("a", 1))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await getattr(stub, call)(request_, timeout=WAIT_S)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    told = await numbers(stub)
    assert (told["host_holds"], told["host_tickets"]) == (0, 0)


async def test_a_killed_instance_holds_nothing(
    node: PoolNode, stub: Any, owner: subprocess.Popen[bytes]
) -> None:
    request = pool_pb2.AllocateArenaRequest(
        instance_id="decode-0", nonce=10, pid=owner.pid, num_blocks=1, block_bytes=8, layout="l"
    )
    await stub.AllocateArena(request, timeout=WAIT_S)

    async def nowhere() -> None:
        return None

    killed = PoolLink(tier_owner("decode-0", 10), node.address, nowhere, lease_s=LEASE_S)
    await store_at(killed, chain("a", 2))
    assert await killed.hold(keys_of(chain("a", 2)), skip=0, timeout_s=1.0) is not None
    assert await killed.reserve(chain("b", 1)) is not None
    told = await numbers(stub)
    assert (told["host_holds"], told["host_tickets"]) == (1, 1)
    owner.kill()
    await until_number(stub, "host_holds", 0)
    await until_number(stub, "host_tickets", 0)
    await killed.close()


# Pool nodes that go away.


async def test_a_killed_pool_node_is_followed_by_one_that_adopts(tmp_path: Path) -> None:
    async with pool_process(str(tmp_path), "c", "n") as (process, address):
        where = address
        async with linked(address, lambda: where) as link:
            await store_at(link, chain("a", 3))
            kept = await link.hold(keys_of(chain("a", 3)), skip=0, timeout_s=1.0)
            assert kept is not None
            process.send_signal(signal.SIGKILL)
            await process.wait()
            assert await link.hold(keys_of(chain("a", 3)), skip=0, timeout_s=1.0) is None
            assert link.counters.num_failed_calls == 1
            node = make_node(tmp_path)
            where = await node.start()
            assert await until_some(lambda: found_by(link, "a", 3)) == [HOST] * 3
            # The bytes are where they were, for those who had the arena mapped too.
            assert link.endpoints[0].token == kept.arena.token
            assert tiers_of(kept, chain("a", 3)) == [HOST] * 3
            await node.stop()


async def test_a_stopped_pool_node_is_followed_by_one_with_another_arena(tmp_path: Path) -> None:
    node = make_node(tmp_path)
    where = await node.start()
    async with linked(where, lambda: where) as link:
        await store_at(link, chain("a", 2))
        old = link.endpoints
        await node.stop()
        assert await link.reserve(chain("b", 1)) is None
        assert await link.publish([(1, 1)]) == [False]
        link.release(1)
        await link.renew([1])
        node = make_node(tmp_path)
        where = await node.start()
        arena, granted = await until_some(lambda: link.reserve(chain("b", 2)))
        await link.publish(write(arena, chain("b", 2), granted))
        assert await found_by(link, "b", 2) == [HOST] * 2
        assert await found_by(link, "a", 2) == []
        assert link.endpoints[0].token != old[0].token
        await node.stop()


async def test_another_arena_under_the_old_address(tmp_path: Path) -> None:
    """The line mends itself before anybody notices; slots of one are not those of the other."""
    node = make_node(tmp_path)
    address = await node.start()
    async with linked(address) as link, linked(address) as other:
        await store_at(link, chain("a", 2))
        await node.stop()
        node = make_node(tmp_path, port=int(address.rpartition(":")[2]))
        assert await node.start() == address
        async with grpc.aio.insecure_channel(address, options=channel_options()) as channel:
            stub: Any = pool_pb2_grpc.PoolNodeStub(channel)
            now = await stub.GetHostTier(pool_pb2.GetHostTierRequest(), timeout=WAIT_S)
        await store_at(other, chain("a", 2))
        # It may take calls, but no answer that there is leads to the old arena.
        found = await until_some(
            lambda: link.hold(keys_of(chain("a", 2)), skip=0, timeout_s=WAIT_S)
        )
        assert found.arena.token == now.token
        assert tiers_of(found, chain("a", 2)) == [HOST] * 2
        arena, _ = await until_some(lambda: link.reserve(chain("b", 1)))
        assert arena.token == now.token
        await node.stop()


async def test_a_pool_node_that_hangs_costs_misses(tmp_path: Path) -> None:
    """One call fails first, and the line goes down under the others: none of them is cancelled."""
    async with (
        pool_process(str(tmp_path), "c", "n") as (process, address),
        linked(address) as link,
    ):
        await store_at(link, chain("a", 2))
        process.send_signal(signal.SIGSTOP)
        keys = keys_of(chain("a", 2))
        answers: Any = await asyncio.gather(
            link.hold(keys, skip=0, timeout_s=30.0),
            link.reserve(chain("b", 1)),
            link.publish([(1, 1)]),
            return_exceptions=True,
        )
        assert answers == [None, None, [False]]
        assert link.counters.num_failed_calls == 3
        # And now nobody waits for it.
        assert await link.hold(keys, skip=0, timeout_s=30.0) is None
        assert link.counters.num_failed_calls == 3
        process.send_signal(signal.SIGCONT)
        assert await until_some(lambda: found_by(link, "a", 2)) == [HOST] * 2


async def test_a_caller_that_gives_up_is_cancelled(tmp_path: Path) -> None:
    async with (
        pool_process(str(tmp_path), "c", "n") as (process, address),
        linked(address) as link,
    ):
        await store_at(link, chain("a", 1))
        process.send_signal(signal.SIGSTOP)
        asked = asyncio.ensure_future(link.hold(keys_of(chain("a", 1)), skip=0, timeout_s=30.0))
        await asyncio.wait([asked], timeout=0.1)
        asked.cancel()
        await asyncio.wait([asked], timeout=WAIT_S)
        assert asked.cancelled()
        process.send_signal(signal.SIGCONT)


async def test_nobody_there_at_all() -> None:
    async with linked("127.0.0.1:1") as link:
        assert await link.hold(keys_of(chain("a", 1)), skip=0, timeout_s=1.0) is None
        assert await link.reserve(chain("a", 1)) is None
        assert link.counters.num_failed_calls == 1


async def test_a_pool_node_without_a_host_tier(tmp_path: Path) -> None:
    left = tmp_path / host_arena_name("c", "pool-n")
    left.write_bytes(b"of a former one")
    node = make_node(tmp_path, tier=None)
    await node.start()
    assert not left.exists(), "its memory would be taken for ever"
    async with linked(node.address) as link:
        assert await link.hold(keys_of(chain("a", 1)), skip=0, timeout_s=1.0) is None
        assert await link.reserve(chain("a", 1)) is None
        assert link.endpoints == ()
        assert link.counters.num_failed_calls == 0
    async with grpc.aio.insecure_channel(node.address, options=channel_options()) as channel:
        stub: Any = pool_pb2_grpc.PoolNodeStub(channel)
        assert await numbers(stub) == {}
        with pytest.raises(grpc.aio.AioRpcError, match="no host tier") as caught:
            await stub.ReleaseHolds(pool_pb2.ReleaseHoldsRequest(hold_ids=[1]), timeout=WAIT_S)
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    await node.stop()


async def test_a_node_that_stops_with_a_disk_serves_from_it(tmp_path: Path) -> None:
    memory, disk = tmp_path / "memory", tmp_path / "disk"
    memory.mkdir()
    node = make_node(memory, tier=spec(disk=disk))
    where = await node.start()
    async with linked(where, lambda: where) as link:
        await store_at(link, chain("a", 3))
        await node.stop()
        assert os.listdir(memory) == []
        node = make_node(memory, tier=spec(disk=disk))
        where = await node.start()
        assert await until_some(lambda: found_by(link, "a", 3)) == [Tier.DISK] * 3
        assert await found_by(link, "a", 3) == [HOST] * 3
        await node.stop()


def test_content_follows_from_keys() -> None:
    """What the tests above compare is not all the same."""
    assert len({bytes_of(key) for key in keys_of(chain("a", 3) + chain("b", 3))}) == 6
