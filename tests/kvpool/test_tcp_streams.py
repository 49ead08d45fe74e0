"""Pulls over several connections at a time, and what a connection bounds by itself."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvpool.arena import BlockArena
from kvpool.transport import Endpoint, TransferFailed, TransportBroken
from kvpool.transports import tcp_wire as wire
from kvpool.transports.blocks import budget_until
from kvpool.transports.tcp import TcpTransport, divide
from kvpool.transports.tcp_channel import Channel
from kvpool.transports.tcp_server import BlockServer
from tests.kvpool.middle_man import MiddleMan
from tests.kvpool.transport_kit import LAYOUT, HookedCache, copies_of, filled

BLOCK = 100_000
STREAMS = 3


@pytest.fixture
def peer(tmp_path: Path) -> BlockArena:
    return filled(tmp_path, 16, BLOCK)


@pytest.fixture
def server(peer: BlockArena) -> Iterator[BlockServer]:
    server = BlockServer("127.0.0.1", peer)
    yield server
    server.close()


@pytest.fixture
def reader() -> Iterator[TcpTransport]:
    transport = TcpTransport(streams=STREAMS, stream_bytes=BLOCK)
    yield transport
    transport.close()


def endpoint(server: BlockServer) -> Endpoint:
    return Endpoint("tcp", server.address, server.token, LAYOUT)


def target(block_bytes: int = BLOCK) -> BlockArena:
    return BlockArena.private(16, block_bytes, LAYOUT)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 16])
def test_each_stream_brings_its_part(
    server: BlockServer, peer: BlockArena, reader: TcpTransport, count: int
) -> None:
    cache = target()
    for _ in range(2):
        cache.buffer[:] = bytes(len(cache.buffer))
        copies = copies_of([(i, (i + 5) % 16) for i in range(count)])
        receipt = reader.pull(endpoint(server), cache, copies, timeout_s=10)
        assert (receipt.num_blocks, receipt.num_bytes) == (count, count * BLOCK)
        wanted = {copy.dst: bytes(peer.block(copy.src)) for copy in copies}
        for dst in range(16):
            assert bytes(cache.block(dst)) == wanted.get(dst, bytes(BLOCK))
    # The second pull found the connections of the first.
    assert 1 <= len(server._connections) <= min(count, STREAMS)


@pytest.mark.parametrize(
    ("num_blocks", "sizes"),
    [(1, [1]), (5, [5]), (6, [3, 3]), (8, [4, 4]), (9, [3, 3, 3]), (11, [3, 4, 4])],
)
def test_large_pulls_are_divided(num_blocks: int, sizes: list[int]) -> None:
    copies = copies_of([(i, i) for i in range(num_blocks)])
    parts = divide(copies, BLOCK, streams=STREAMS, stream_bytes=3 * BLOCK)
    assert [len(part) for part in parts] == sizes
    assert [copy for part in parts for copy in part] == copies


def test_one_stream_that_fails_ends_the_others(server: BlockServer, reader: TcpTransport) -> None:
    """Two streams stall and one is cut; the pull ends with the cut, not with its time."""
    lock = threading.Lock()
    streams: list[int] = []
    over = threading.Event()
    released: list[bool] = []

    def spoil(offset: int, data: bytes) -> bytes | None:
        if offset + len(data) <= wire.REPLY.size:
            return data
        with lock:
            streams.append(offset)
            number = len(streams)
        if number == STREAMS:
            return None
        released.append(over.wait(20))
        return data

    with contextlib.closing(MiddleMan(server.address, spoil)) as middle:
        there = dataclasses.replace(endpoint(server), address=middle.address)
        copies = copies_of([(i, i) for i in range(16)])
        with pytest.raises(TransportBroken):
            reader.pull(there, target(), copies, timeout_s=60)
        # Whatever still comes goes to nobody: no thread of the pull is left.
        assert not [one for one in threading.enumerate() if one.name == "kv-tcp-stream"]
        over.set()
    assert len(released) >= STREAMS - 1
    assert all(released)


def test_a_stale_block_of_any_stream_is_told(
    server: BlockServer, peer: BlockArena, reader: TcpTransport
) -> None:
    for block in (0, 7, 15):
        peer.generations[block] += 1
        copies = copies_of([(i, i) for i in range(16)])
        with pytest.raises(TransferFailed, match=f"block {block} was given") as caught:
            reader.pull(endpoint(server), target(), copies, timeout_s=10)
        assert not isinstance(caught.value, TransportBroken)
        peer.generations[block] -= 1
    cache = target()
    reader.pull(endpoint(server), cache, copies, timeout_s=10)
    assert cache.buffer == peer.buffer


def test_all_streams_share_the_time(server: BlockServer, reader: TcpTransport) -> None:
    go_on = threading.Event()

    def stall(offset: int, data: bytes) -> bytes:
        go_on.wait(20)
        return data

    with contextlib.closing(MiddleMan(server.address, stall)) as middle:
        there = dataclasses.replace(endpoint(server), address=middle.address)
        with pytest.raises(TransferFailed, match=r"took longer than 0\.2 s"):
            reader.pull(there, target(), copies_of([(i, i) for i in range(16)]), timeout_s=0.2)
        go_on.set()


def test_blocks_that_are_reused_while_they_travel(tmp_path: Path) -> None:
    size = 4 << 20
    peer = filled(tmp_path, 8, size)

    def reuse() -> None:
        peer.generations[:] += 1
        peer.buffer[:] = bytes(len(peer.buffer))

    cache = HookedCache(BlockArena.private(8, size, LAYOUT), reuse)
    reader = TcpTransport(streams=1)
    with (
        contextlib.closing(BlockServer("127.0.0.1", peer)) as server,
        contextlib.closing(reader),
        pytest.raises(TransferFailed, match=r"wrong checksum|other content during the pull"),
    ):
        reader.pull(endpoint(server), cache, copies_of([(i, i) for i in range(8)]), timeout_s=20)


def test_a_drip_does_not_prolong_the_budget() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    ended = threading.Event()
    client = socket.create_connection(listener.getsockname())
    channel = Channel(listener.accept()[0])

    def drip() -> None:
        with contextlib.suppress(OSError):
            while not ended.wait(0.02):
                client.sendall(b"x")

    thread = threading.Thread(target=drip, daemon=True)
    thread.start()
    buffer = memoryview(bytearray(1 << 20))
    with pytest.raises(TimeoutError):
        channel.receive([buffer], budget_until(time.monotonic() + 0.3))
    ended.set()
    thread.join(5)
    assert 0 < bytes(buffer).count(b"x") < 1000
    for closable in (listener, client, channel):
        closable.close()


def test_a_reader_that_does_not_read_is_dropped(server: BlockServer, tmp_path: Path) -> None:
    size = 8 << 20
    peer = filled(tmp_path, 4, size)
    with contextlib.closing(BlockServer("127.0.0.1", peer)) as large:
        host, _, port = large.address.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=5) as lazy:
            copies = copies_of([(i, i) for i in range(4)])
            layout = LAYOUT.encode()
            fixed = wire.REQUEST.pack(
                wire.MAGIC, wire.VERSION, large.token.encode(), 4, size, 200, len(layout), 0
            )
            lazy.sendall(fixed + layout + wire.pack_copies(copies))
            assert lazy.recv(wire.REPLY.size, socket.MSG_WAITALL)[: len(wire.MAGIC)] == wire.MAGIC
            threads = list(large._connections.values())
            for thread in threads:
                thread.join(10)
            assert len(threads) == 1
            assert not threads[0].is_alive()
