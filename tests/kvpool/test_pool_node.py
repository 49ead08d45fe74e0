"""The pool node over real gRPC, with real processes as owners."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from baton.core.errors import ConfigError
from kvpool.arena import BlockArena, cluster_files, remove_cluster_files
from kvpool.pool_node import PoolNode
from protos.baton.internal.v1 import controller_pb2, controller_pb2_grpc, pool_pb2, pool_pb2_grpc
from protos.serving import channel_options, server_options

WAIT_S = 10.0
BLOCKS, BLOCK_BYTES = 4, 1000


async def until(condition: Callable[[], bool]) -> None:
    ended = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < ended, "it did not happen"
        await asyncio.sleep(0.01)


@pytest.fixture
def cluster() -> Iterator[str]:
    name = f"test-{uuid.uuid4().hex[:8]}"
    yield name
    assert remove_cluster_files(name) == [], "a test left files in shared memory"


@pytest.fixture
async def node(cluster: str) -> AsyncIterator[PoolNode]:
    node = PoolNode(cluster)
    await node.start()
    yield node
    await node.stop()


@pytest.fixture
async def stub(node: PoolNode) -> AsyncIterator[pool_pb2_grpc.PoolNodeAsyncStub]:
    async with grpc.aio.insecure_channel(node.address, options=channel_options()) as channel:
        yield stub_of(channel)


def stub_of(channel: grpc.aio.Channel) -> pool_pb2_grpc.PoolNodeAsyncStub:
    stub: Any = pool_pb2_grpc.PoolNodeStub(channel)
    return stub  # type: ignore[no-any-return]


@pytest.fixture
def owner() -> Iterator[subprocess.Popen[bytes]]:
    # Ends with its standard input, whatever happens to the test.
    code = "import sys; sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def request(
    instance_id: str = "prefill-0", nonce: int = 1, pid: int | None = None, blocks: int = BLOCKS
) -> pool_pb2.AllocateArenaRequest:
    return pool_pb2.AllocateArenaRequest(
        instance_id=instance_id,
        nonce=nonce,
        pid=os.getpid() if pid is None else pid,
        num_blocks=blocks,
        block_bytes=BLOCK_BYTES,
        layout="layout",
    )


async def test_allocate_use_release(stub: pool_pb2_grpc.PoolNodeAsyncStub, cluster: str) -> None:
    reply = await stub.AllocateArena(request())
    arena = BlockArena.open(reply.path, reply.token, writable=True)
    assert (arena.num_blocks, arena.block_bytes, arena.layout) == (BLOCKS, BLOCK_BYTES, "layout")
    arena.block(3)[:] = b"z" * BLOCK_BYTES
    again = await stub.AllocateArena(request())
    assert again == reply
    status = await stub.GetPoolStatus(pool_pb2.GetPoolStatusRequest())
    (known,) = status.arenas
    assert (known.instance_id, known.nonce, known.pid) == ("prefill-0", 1, os.getpid())
    assert known.path == reply.path
    assert known.num_bytes == os.stat(reply.path).st_size
    release = pool_pb2.ReleaseArenaRequest(instance_id="prefill-0", nonce=1)
    await stub.ReleaseArena(release)
    await stub.ReleaseArena(release)
    assert cluster_files(cluster, "/dev/shm") == []
    assert bytes(arena.block(3)) == b"z" * BLOCK_BYTES
    arena.close()


async def test_many_ask_for_the_same_at_once(
    stub: pool_pb2_grpc.PoolNodeAsyncStub, cluster: str
) -> None:
    replies = await asyncio.gather(*(stub.AllocateArena(request()) for _ in range(8)))
    assert len({reply.token for reply in replies}) == 1
    others = await asyncio.gather(*(stub.AllocateArena(request(nonce=2 + i)) for i in range(4)))
    assert len({reply.path for reply in others}) == 4
    assert len(cluster_files(cluster, "/dev/shm")) == 5


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (request(blocks=0), "needs blocks"),
        (request(pid=2**22 + 1), "no process"),
        (request(blocks=2**32 - 1), "bytes free of"),
    ],
)
async def test_what_cannot_be_made_says_why(
    stub: pool_pb2_grpc.PoolNodeAsyncStub,
    cluster: str,
    bad: pool_pb2.AllocateArenaRequest,
    message: str,
) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match=message) as caught:
        await stub.AllocateArena(bad)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert cluster_files(cluster, "/dev/shm") == []


async def test_other_sizes_in_the_same_life_are_refused(
    stub: pool_pb2_grpc.PoolNodeAsyncStub,
) -> None:
    await stub.AllocateArena(request())
    with pytest.raises(grpc.aio.AioRpcError, match="other sizes"):
        await stub.AllocateArena(request(blocks=BLOCKS + 1))


async def test_a_killed_owner_leaves_nothing(
    stub: pool_pb2_grpc.PoolNodeAsyncStub, cluster: str, owner: subprocess.Popen[bytes]
) -> None:
    mine = await stub.AllocateArena(request("decode-0"))
    await stub.AllocateArena(request(pid=owner.pid))
    assert len(cluster_files(cluster, "/dev/shm")) == 2
    owner.kill()
    # Not reaped: a zombie is dead enough.
    await until(lambda: cluster_files(cluster, "/dev/shm") == [Path(mine.path)])
    status = await stub.GetPoolStatus(pool_pb2.GetPoolStatusRequest())
    assert [arena.instance_id for arena in status.arenas] == ["decode-0"]


async def test_a_new_life_gets_a_new_arena(
    stub: pool_pb2_grpc.PoolNodeAsyncStub, cluster: str, owner: subprocess.Popen[bytes]
) -> None:
    old = await stub.AllocateArena(request(nonce=1, pid=owner.pid))
    owner.kill()
    owner.wait()
    new = await stub.AllocateArena(request(nonce=2))
    assert new.path != old.path
    assert cluster_files(cluster, "/dev/shm") == [Path(new.path)]


async def test_a_restarted_node_adopts_the_living(
    cluster: str, owner: subprocess.Popen[bytes]
) -> None:
    def create(instance_id: str, pid: int) -> BlockArena:
        return BlockArena.create(
            "/dev/shm", cluster, instance_id, 1, pid, BLOCKS, BLOCK_BYTES, "layout"
        )

    gone = await asyncio.create_subprocess_exec("sleep", "60")
    create("gone", gone.pid).close()
    gone.kill()
    await gone.wait()
    alive, mine = create("alive", owner.pid), create("prefill-0", os.getpid())
    alive.block(2)[:] = b"k" * BLOCK_BYTES
    for leftover in (f"{mine.path}0", f"{mine.path}.tmp"):
        os.close(os.open(leftover, os.O_CREAT | os.O_WRONLY))
    node = PoolNode(cluster)
    await node.start()
    assert alive.path is not None
    assert mine.path is not None
    assert cluster_files(cluster, "/dev/shm") == [Path(alive.path), Path(mine.path)]
    async with grpc.aio.insecure_channel(node.address) as channel:
        reply = await stub_of(channel).AllocateArena(request("alive", pid=owner.pid))
    assert (reply.path, reply.token) == (alive.path, alive.token)
    assert bytes(alive.block(2)) == b"k" * BLOCK_BYTES
    owner.kill()
    await until(lambda: cluster_files(cluster, "/dev/shm") == [Path(str(mine.path))])
    await node.stop()
    assert cluster_files(cluster, "/dev/shm") == []


async def test_a_failed_start_leaves_arenas_alone(node: PoolNode, cluster: str) -> None:
    other = f"{cluster}x"
    arena = BlockArena.create("/dev/shm", other, "i", 1, os.getpid(), 1, 1, "l")
    before = len(os.listdir("/proc/self/fd"))
    port = int(node.address.rpartition(":")[2])
    with pytest.raises(ConfigError, match=f"cannot serve on 127.0.0.1:{port}"):
        await PoolNode(other, port=port).start()
    http_port = int(node.http_address.rpartition(":")[2])
    with pytest.raises(ConfigError, match=r"metrics_port \d+ on .* cannot be used"):
        await PoolNode(other, metrics_port=http_port).start()
    assert len(os.listdir("/proc/self/fd")) <= before + 2
    assert [str(path) for path in remove_cluster_files(other)] == [arena.path]


async def test_metrics(node: PoolNode, stub: pool_pb2_grpc.PoolNodeAsyncStub) -> None:
    def scrape() -> str:
        with urllib.request.urlopen(f"http://{node.http_address}/metrics", timeout=5) as reply:
            body: bytes = reply.read()
        return body.decode()

    assert "baton_pool_arenas 0.0" in await asyncio.to_thread(scrape)
    reply = await stub.AllocateArena(request())
    text = await asyncio.to_thread(scrape)
    assert "baton_pool_arenas 1.0" in text
    assert f"baton_pool_arena_bytes {float(os.stat(reply.path).st_size)}" in text
    assert "process_resident_memory_bytes" in text


class Members(controller_pb2_grpc.ControllerServicer):
    """A controller that only listens to presence."""

    def __init__(self) -> None:
        self.sessions: list[list[controller_pb2.MemberHeartbeat]] = []
        self.ended = 0

    async def MemberSession(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        seen: list[controller_pb2.MemberHeartbeat] = []
        self.sessions.append(seen)
        try:
            yield controller_pb2.ClusterView(epoch=3)
            async for message in requests:
                seen.append(message)
        finally:
            self.ended += 1


async def serve_members(port: int) -> tuple[grpc.aio.Server, Members, int]:
    server, members = grpc.aio.server(options=server_options()), Members()  # type: ignore[abstract]
    controller_pb2_grpc.add_ControllerServicer_to_server(members, server)
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    return server, members, port


async def test_presence_survives_the_controller(cluster: str) -> None:
    server, members, port = await serve_members(0)
    node = PoolNode(cluster, controller_address=f"127.0.0.1:{port}", node_id="n1", heartbeat_s=0.02)
    await node.start()
    await until(lambda: any(len(seen) > 3 for seen in members.sessions))
    message = members.sessions[-1][-1]
    assert (message.kind, message.member_id, message.node_id) == ("pool", "pool-n1", "n1")
    assert (message.address, message.http_address) == (node.address, node.http_address)
    assert (message.pid, message.known_epoch) == (os.getpid(), 3)
    assert message.rss_bytes > 1 << 20
    await server.stop(None)
    server, members, _ = await serve_members(port)
    await until(lambda: any(members.sessions))
    await node.stop()
    await until(lambda: members.ended == len(members.sessions))
    await server.stop(None)


async def test_without_a_controller_it_serves_and_stops(cluster: str) -> None:
    node = PoolNode(cluster, controller_address="127.0.0.1:1", heartbeat_s=0.02)
    await node.start()
    async with grpc.aio.insecure_channel(node.address) as channel:
        await stub_of(channel).AllocateArena(request())
    await node.stop()
    await node.stop()
    assert cluster_files(cluster, "/dev/shm") == []
