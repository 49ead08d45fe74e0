"""The tcp transport against peers and networks that misbehave."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from baton.core.errors import ConfigError
from kvpool.arena import BlockArena
from kvpool.transport import Endpoint, TransferFailed, TransferFault, TransportBroken
from kvpool.transports import tcp_wire as wire
from kvpool.transports.tcp import TcpTransport
from kvpool.transports.tcp_server import BlockServer
from tests.kvpool.middle_man import Filter, MiddleMan
from tests.kvpool.transport_kit import LAYOUT, copies_of, filled, resources

BLOCK = 1000


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
    transport = TcpTransport()
    yield transport
    transport.close()


def endpoint(address: str, token: str = "0" * 32) -> Endpoint:
    return Endpoint("tcp", address, token, LAYOUT)


def target() -> BlockArena:
    return BlockArena.private(16, BLOCK, LAYOUT)


def flip(at: int) -> Filter:
    def pass_on(offset: int, data: bytes) -> bytes:
        if offset <= at < offset + len(data):
            changed = bytearray(data)
            changed[at - offset] ^= 0x01
            return bytes(changed)
        return data

    return pass_on


REPLY = wire.REPLY.size
DATA = 4 * BLOCK


@pytest.mark.parametrize(
    ("at", "message"),
    [
        (0, "does not speak"),
        (4, "does not speak"),
        (5, "failed|refused"),
        (REPLY, "wrong checksum"),
        (REPLY + DATA - 1, "wrong checksum"),
        (REPLY + DATA, "wrong checksum"),
        (REPLY + DATA + 8, "does not speak"),
        (8, "the answer to another request"),
        (REPLY + DATA + 8 + 15, "the answer to another request"),
    ],
)
def test_one_wrong_bit_anywhere(
    server: BlockServer, reader: TcpTransport, at: int, message: str
) -> None:
    copies = copies_of([(i, i) for i in range(4)])
    with (
        contextlib.closing(MiddleMan(server.address, flip(at))) as middle,
        pytest.raises(TransferFailed, match=message) as caught,
    ):
        reader.pull(endpoint(middle.address, server.token), target(), copies, timeout_s=2)
    # Of the status, all values have a meaning that one bit may turn into another.
    assert at == 5 or caught.value.fault == TransferFault.CORRUPT


@pytest.mark.parametrize("length", [0, 3, REPLY, REPLY + 1, REPLY + DATA, REPLY + DATA + 8 + 3])
@pytest.mark.parametrize("reset", [False, True])
def test_short_reads_and_resets(
    server: BlockServer, reader: TcpTransport, length: int, reset: bool
) -> None:
    def cut(offset: int, data: bytes) -> bytes | None:
        if offset + len(data) <= length:
            return data
        return None if reset else data[: length - offset]

    copies = copies_of([(i, i) for i in range(4)])
    with (
        contextlib.closing(MiddleMan(server.address, cut)) as middle,
        pytest.raises(TransportBroken, match="failed") as caught,
    ):
        reader.pull(endpoint(middle.address, server.token), target(), copies, timeout_s=5)
    ended = TransferFault.SHORT if length else TransferFault.GONE
    assert caught.value.fault == (TransferFault.GONE if reset else ended)


def test_a_stalled_peer_costs_the_budget_and_no_more(reader: TcpTransport) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(TransferFailed, match=r"took longer than 0\.2 s") as caught:
            reader.pull(endpoint(address), target(), copies_of([(0, 0)]), timeout_s=0.2)
        assert not isinstance(caught.value, TransportBroken)
        assert 0.2 <= time.monotonic() - started < 5


def test_connections_are_reused_and_a_stale_one_is_replaced(
    server: BlockServer, peer: BlockArena, reader: TcpTransport
) -> None:
    connections: list[int] = []

    def count(offset: int, data: bytes) -> bytes:
        if offset == 0:
            connections.append(offset)
        return data

    middle = MiddleMan(server.address, count)
    there = endpoint(middle.address, server.token)
    for _ in range(3):
        reader.pull(there, target(), copies_of([(0, 0)]), timeout_s=5)
    assert len(connections) == 1
    for sock in middle._open:
        # The first one's end may have ended the second already.
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
    cache = target()
    reader.pull(there, cache, copies_of([(5, 6)]), timeout_s=5)
    assert cache.block(6) == peer.block(5)
    assert len(connections) == 2
    middle.close()


def test_a_refusal_leaves_the_server_well(server: BlockServer, reader: TcpTransport) -> None:
    wrong = endpoint(server.address)
    with pytest.raises(TransportBroken, match="the token differs"):
        reader.pull(wrong, target(), copies_of([(0, 0)]), timeout_s=5)
    many = copies_of([(0, i) for i in range(17)])
    large = BlockArena.private(32, BLOCK, LAYOUT)
    here = endpoint(server.address, server.token)
    with pytest.raises(TransferFailed, match="17 blocks of 16"):
        reader.pull(here, large, many, timeout_s=5)
    other_size = BlockArena.private(16, BLOCK + 1, LAYOUT)
    with pytest.raises(TransferFailed, match="layouts differ"):
        reader.pull(here, other_size, copies_of([(0, 0)]), timeout_s=5)
    assert reader.reachable(endpoint(server.address, server.token))


def test_strangers_are_sent_away(server: BlockServer) -> None:
    host, _, port = server.address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=5) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n" + bytes(wire.REQUEST.size))
        with contextlib.suppress(ConnectionResetError):
            assert stranger.recv(100) == b""


def test_too_many_connections_are_refused(peer: BlockArena) -> None:
    server = BlockServer("127.0.0.1", peer, max_connections=1)
    first, second = TcpTransport(), TcpTransport()
    there = endpoint(server.address, server.token)
    first.pull(there, target(), copies_of([(0, 0)]), timeout_s=5)
    with pytest.raises(TransportBroken):
        second.pull(there, target(), copies_of([(0, 0)]), timeout_s=5)
    first.pull(there, target(), copies_of([(0, 0)]), timeout_s=5)
    for closable in (first, second, server):
        closable.close()


def test_an_idle_connection_ends_and_the_reader_does_not_notice(peer: BlockArena) -> None:
    server = BlockServer("127.0.0.1", peer, idle_s=0.05)
    reader = TcpTransport()
    there = endpoint(server.address, server.token)
    reader.pull(there, target(), copies_of([(0, 0)]), timeout_s=5)
    ended = time.monotonic() + 5
    while server._connections and time.monotonic() < ended:
        time.sleep(0.01)
    reader.pull(there, target(), copies_of([(0, 0)]), timeout_s=5)
    reader.close()
    server.close()


def test_close_wakes_threads_that_are_blocked(peer: BlockArena) -> None:
    before = resources()
    server = BlockServer("127.0.0.1", peer)
    host, _, port = server.address.rpartition(":")
    idle = [socket.create_connection((host, int(port))) for _ in range(3)]
    silent = socket.create_server(("127.0.0.1", 0))
    reader = TcpTransport()
    address = f"127.0.0.1:{silent.getsockname()[1]}"
    outcome: list[str] = []

    def pull() -> None:
        try:
            reader.pull(endpoint(address), target(), copies_of([(0, 0)]), timeout_s=60)
        except TransferFailed as error:
            outcome.append(error.message)

    thread = threading.Thread(target=pull, daemon=True)
    thread.start()
    silent.accept()[0].recv(wire.REQUEST.size)
    started = time.monotonic()
    reader.close()
    server.close()
    thread.join(10)
    assert time.monotonic() - started < 5
    assert len(outcome) == 1
    for sock in (*idle, silent):
        sock.close()
    assert resources() == before


@pytest.mark.parametrize("host", ["", "0.0.0.0", "::", "192.0.2.1", "not a host"])
def test_hosts_that_cannot_serve(host: str, peer: BlockArena) -> None:
    with pytest.raises(ConfigError):
        BlockServer(host, peer)


@pytest.mark.parametrize("address", ["", "host", "127.0.0.1:x", "127.0.0.1:1"])
def test_addresses_that_lead_nowhere(address: str, reader: TcpTransport) -> None:
    assert not reader.reachable(endpoint(address))
    with pytest.raises(TransportBroken):
        reader.pull(endpoint(address), target(), copies_of([(0, 0)]), timeout_s=5)


def test_ipv6(peer: BlockArena, reader: TcpTransport) -> None:
    try:
        server = BlockServer("::1", peer)
    except ConfigError:
        pytest.skip("no IPv6 here")
    cache = target()
    reader.pull(endpoint(server.address, server.token), cache, copies_of([(1, 2)]), timeout_s=5)
    assert cache.block(2) == peer.block(1)
    server.close()
