"""The seam's conformance suite: what every transport must do; with faults: test_fault_matrix."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from baton.core.config import TlsConfig
from kvpool.arena import BlockArena
from kvpool.transport import BlockCopy, Endpoint, TransferFailed, Transport, TransportBroken
from kvpool.transports import make_transports
from tests.kvpool.transport_kit import LAYOUT, copies_of, filled, resources

BLOCK = 1000
NAMES = ("loopback", "shm", "tcp", "tcp+tls", "collective", "mooncake")


@pytest.fixture(params=NAMES)
def make(request: pytest.FixtureRequest, tls: TlsConfig) -> Iterator[Callable[[], Transport]]:
    if request.param == "mooncake":
        request.getfixturevalue("mooncake")
    made: list[Transport] = []

    def one() -> Transport:
        name, _, secure = request.param.partition("+")
        (transport,) = make_transports([name], "127.0.0.1", tls=tls if secure else None)
        made.append(transport)
        return transport

    yield one
    for transport in made:
        transport.close()
        transport.close()


@pytest.fixture
def peer(tmp_path: Path) -> BlockArena:
    return filled(tmp_path, 16, BLOCK)


def target(num_blocks: int = 32, block_bytes: int = BLOCK, layout: str = LAYOUT) -> BlockArena:
    return BlockArena.private(num_blocks, block_bytes, layout)


@pytest.mark.parametrize(
    "pairs",
    [
        [(3, 7)],
        [(0, 4), (1, 5), (2, 6)],
        [(5, 0), (4, 1), (3, 2)],
        [(0, 9), (1, 3), (2, 4), (8, 5), (15, 31), (2, 0)],
        [(i, 31 - i) for i in range(16)],
        [],
    ],
)
def test_the_right_bytes_arrive_and_no_others(
    make: Callable[[], Transport], peer: BlockArena, pairs: list[tuple[int, int]]
) -> None:
    exporter, reader = make(), make()
    endpoint = exporter.export(peer)
    cache = target()
    cache.buffer[:] = b"\x55" * len(cache.buffer)
    assert reader.reachable(endpoint)
    receipt = reader.pull(endpoint, cache, copies_of(pairs), timeout_s=5)
    wanted = {dst: bytes(peer.block(src)) for src, dst in pairs}
    for dst in range(32):
        assert bytes(cache.block(dst)) == wanted.get(dst, b"\x55" * BLOCK)
    assert receipt.num_blocks == len(pairs)
    assert receipt.num_bytes == len(pairs) * BLOCK
    assert receipt.transport == exporter.name == endpoint.transport
    assert receipt.seconds > 0


def test_large_blocks_in_many_frames(make: Callable[[], Transport], tmp_path: Path) -> None:
    size = (1 << 20) + 3
    peer, cache = filled(tmp_path, 12, size), target(12, size)
    endpoint = make().export(peer)
    pairs = [(i, (i + 5) % 12) for i in range(12)]
    make().pull(endpoint, cache, copies_of(pairs), timeout_s=20)
    assert all(cache.block(dst) == peer.block(src) for src, dst in pairs)


def test_one_reader_many_threads(make: Callable[[], Transport], peer: BlockArena) -> None:
    endpoint, reader = make().export(peer), make()
    cache = target(16)

    def pull(block: int) -> int:
        copies = copies_of([(block, block)])
        return sum(reader.pull(endpoint, cache, copies, timeout_s=10).num_blocks for _ in range(20))

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(pull, range(16))) == [20] * 16
    assert cache.buffer == peer.buffer


def test_other_layouts_are_refused(make: Callable[[], Transport], peer: BlockArena) -> None:
    endpoint, reader = make().export(peer), make()
    with pytest.raises(TransferFailed, match=f"the peer has '{LAYOUT}', this side 'other'"):
        reader.pull(endpoint, target(layout="other"), copies_of([(0, 0)]), timeout_s=5)


def test_blocks_that_the_peer_does_not_have(
    make: Callable[[], Transport], peer: BlockArena
) -> None:
    endpoint = make().export(peer)
    with pytest.raises(TransferFailed, match="no block 16"):
        make().pull(endpoint, target(), copies_of([(16, 0)]), timeout_s=5)


@pytest.mark.parametrize("pairs", [[(0, 1), (1, 1)], [(0, 32)], [(0, -1)]])
def test_bad_destinations_are_bugs(
    make: Callable[[], Transport], peer: BlockArena, pairs: list[tuple[int, int]]
) -> None:
    endpoint = make().export(peer)
    with pytest.raises(ValueError, match="destination"):
        make().pull(endpoint, target(), copies_of(pairs), timeout_s=5)


def test_another_token_is_another_peer(make: Callable[[], Transport], peer: BlockArena) -> None:
    real = make().export(peer)
    reader = make()
    stale = Endpoint(real.transport, real.address, "0" * 32, real.layout)
    assert not reader.reachable(stale)
    with pytest.raises(TransportBroken):
        reader.pull(stale, target(), copies_of([(0, 0)]), timeout_s=5)


def test_no_time_at_all(make: Callable[[], Transport], peer: BlockArena) -> None:
    endpoint, reader = make().export(peer), make()
    with pytest.raises(TransferFailed, match="took longer than 0 s"):
        reader.pull(endpoint, target(), copies_of([(0, 0)]), timeout_s=0)


def test_nothing_is_left_after_close(make: Callable[[], Transport], peer: BlockArena) -> None:
    # What a library opens once, with its first use, is no leak.
    first, other = make(), make()
    other.pull(first.export(peer), target(), copies_of([(0, 0)]), timeout_s=20)
    other.close()
    first.close()
    before = resources()
    exporter, readers = make(), [make() for _ in range(3)]
    endpoint = exporter.export(peer)
    for reader in readers:
        reader.pull(endpoint, target(), copies_of([(0, 0), (1, 1)]), timeout_s=5)
        copy = BlockCopy(src=0, generation=99, dst=0)
        with pytest.raises(TransferFailed):
            reader.pull(endpoint, target(), [copy], timeout_s=5)
    readers[0].forget(endpoint)
    for transport in (*readers[:2], exporter, readers[2]):
        transport.close()
    assert resources() == before
