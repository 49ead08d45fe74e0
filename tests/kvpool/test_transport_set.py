from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.core.errors import ConfigError
from kvpool.arena import BlockArena
from kvpool.layout import KVLayout
from kvpool.reshard import plan_reshard
from kvpool.transport import (
    BlockCopy,
    Endpoint,
    KVCache,
    Receipt,
    TransferFailed,
    Transport,
    TransportBroken,
)
from kvpool.transports import TransportSet, choose, make_transports
from kvpool.transports.blocks import runs
from kvpool.transports.faulty import Fault, FaultyTransport
from kvpool.transports.shm import ShmTransport
from kvpool.transports.tcp import TcpTransport
from tests.kvpool.transport_kit import LAYOUT, copies_of, filled, resources

HOST = "127.0.0.1"
BLOCK = 64


@pytest.fixture
def peer(tmp_path: Path) -> BlockArena:
    return filled(tmp_path, 8, BLOCK)


def target(layout: str = LAYOUT) -> BlockArena:
    return BlockArena.private(8, BLOCK, layout)


@given(st.lists(st.integers(0, 12)))
def test_runs_give_the_indices_back(indices: list[int]) -> None:
    found = list(runs(indices))
    assert [first + i for first, count in found for i in range(count)] == indices
    assert all(a + n != b for (a, n), (b, _) in itertools.pairwise(found))


def test_names() -> None:
    assert [one.name for one in make_transports(["auto"], HOST)] == ["shm", "tcp"]
    assert [one.name for one in make_transports(["tcp", "auto", "loopback"], HOST)] == [
        "tcp",
        "shm",
        "loopback",
    ]
    for names in ([], ["rdma"]):
        with pytest.raises(ConfigError, match="transport must be"):
            make_transports(names, HOST)


def test_shared_memory_is_preferred_where_it_reaches(peer: BlockArena) -> None:
    exporter, reader = (TransportSet(make_transports(["auto"], HOST)) for _ in range(2))
    endpoints = exporter.endpoints(peer)
    assert [one.transport for one in endpoints] == ["shm", "tcp"]
    cache = target()
    receipt = reader.pull(endpoints, cache, copies_of([(1, 2)]), 5)
    assert receipt.transport == "shm"
    assert cache.block(2) == peer.block(1)
    for one in (exporter, reader):
        one.close()


def test_private_memory_goes_over_tcp() -> None:
    exporter, reader = (TransportSet(make_transports(["auto"], HOST)) for _ in range(2))
    endpoints = exporter.endpoints(target())
    assert [one.transport for one in endpoints] == ["tcp"]
    copies = [BlockCopy(src=0, generation=0, dst=0)]
    assert reader.pull(endpoints, target(), copies, 5).transport == "tcp"
    for one in (exporter, reader):
        one.close()


def test_a_set_that_can_export_nothing() -> None:
    with pytest.raises(TransferFailed, match="cannot be exported"):
        TransportSet([ShmTransport()]).endpoints(target())


def test_a_file_of_another_machine_is_not_reachable(peer: BlockArena, tmp_path: Path) -> None:
    exporter, reader = (TransportSet(make_transports(["auto"], HOST)) for _ in range(2))
    endpoints = exporter.endpoints(peer)
    peer.unlink()
    assert reader.pull(endpoints, target(), copies_of([(0, 0)]), 5).transport == "tcp"
    for one in (exporter, reader):
        one.close()


COUNTED = {
    Fault.FAIL: "gone",
    Fault.SHORT: "short",
    Fault.CORRUPT: "corrupt",
    Fault.STALE: "stale",
    Fault.STALL: "late",
}


@pytest.mark.parametrize("fault", [Fault.FAIL, Fault.SHORT, Fault.CORRUPT])
def test_a_broken_way_is_left_for_another(peer: BlockArena, fault: Fault) -> None:
    exporter = TransportSet(make_transports(["auto"], HOST))
    reader = TransportSet([FaultyTransport(ShmTransport(), [fault]), TcpTransport(HOST)])
    endpoints = exporter.endpoints(peer)
    cache = target()
    pairs = [(i, 7 - i) for i in range(8)]
    assert reader.pull(endpoints, cache, copies_of(pairs), 5).transport == "tcp"
    assert all(cache.block(dst) == peer.block(src) for src, dst in pairs)
    # And it stays with what works.
    assert reader.pull(endpoints, cache, copies_of(pairs), 5).transport == "tcp"
    assert reader.faults == {("shm", COUNTED[fault]): 1}
    for one in (exporter, reader):
        one.close()


@pytest.mark.parametrize(
    ("fault", "message"), [(Fault.STALE, "other content"), (Fault.STALL, "took longer")]
)
def test_what_no_transport_can_mend_is_raised(peer: BlockArena, fault: Fault, message: str) -> None:
    exporter = TransportSet(make_transports(["auto"], HOST))
    reader = TransportSet([FaultyTransport(ShmTransport(), [fault]), TcpTransport(HOST)])
    endpoints = exporter.endpoints(peer)
    with pytest.raises(TransferFailed, match=message):
        reader.pull(endpoints, target(), copies_of([(0, 0)]), 0.2)
    assert reader.pull(endpoints, target(), copies_of([(0, 0)]), 5).transport == "shm"
    assert reader.faults == {("shm", COUNTED[fault]): 1}
    for one in (exporter, reader):
        one.close()


def test_the_last_failure_is_the_one_that_is_told(peer: BlockArena) -> None:
    exporter = TransportSet(make_transports(["shm"], HOST))
    reader = TransportSet([FaultyTransport(ShmTransport(), [Fault.FAIL]), TcpTransport(HOST)])
    endpoints = exporter.endpoints(peer)
    with pytest.raises(TransportBroken, match="connection refused"):
        reader.pull(endpoints, target(), copies_of([(0, 0)]), 5)
    for one in (exporter, reader):
        one.close()


def test_layouts_are_checked_before_any_connection(peer: BlockArena) -> None:
    exporter = TransportSet(make_transports(["auto"], HOST))
    endpoints = exporter.endpoints(peer)
    with pytest.raises(TransferFailed, match=f"'{LAYOUT}', this side 'other'"):
        choose(make_transports(["auto"], HOST), endpoints, "other")
    exporter.close()


def test_nothing_reaches_a_peer_without_endpoints() -> None:
    reader = TransportSet(make_transports(["auto"], HOST))
    with pytest.raises(TransportBroken, match="it offers none, this side has shm, tcp"):
        reader.pull([], target(), copies_of([(0, 0)]), 5)


def test_forgetting_a_peer_frees_its_memory(peer: BlockArena) -> None:
    exporter, reader = (TransportSet(make_transports(["shm"], HOST)) for _ in range(2))
    endpoints = exporter.endpoints(peer)
    name = Path(peer.path or "").name
    peer.close()
    with pytest.raises(TransferFailed, match="other content"):
        reader.pull(endpoints, target(), [BlockCopy(0, 99, 0)], 5)
    assert name in Path("/proc/self/maps").read_text()
    reader.forget(endpoints)
    assert name not in Path("/proc/self/maps").read_text()


def test_mappings_are_bounded(tmp_path: Path) -> None:
    reader = ShmTransport(max_mappings=2)
    peers = [filled(tmp_path, 2, BLOCK) for _ in range(4)]
    endpoints = [ShmTransport().export(one) for one in peers]
    names = [Path(one.path or "").name for one in peers]
    for one in peers:
        one.close()
    for endpoint in (*endpoints, *endpoints):
        reader.pull(
            endpoint, BlockArena.private(2, BLOCK, LAYOUT), copies_of([(1, 0)]), timeout_s=5
        )
    maps = Path("/proc/self/maps").read_text()
    assert [name in maps for name in names] == [False, False, True, True]
    reader.close()
    assert not any(name in Path("/proc/self/maps").read_text() for name in names)


def cut(num_shards: int, dtype: Literal["float32", "bfloat16"] = "bfloat16") -> KVLayout:
    return KVLayout(dtype, 4, 2, num_kv_heads=6 // num_shards, head_dim=8, num_shards=num_shards)


SIZE = cut(1).block_bytes
SCRATCH = 3 * SIZE + 1


def sharded(folder: Path, num_shards: int) -> BlockArena:
    return filled(folder, 8, SIZE, cut(num_shards).text)


def own(num_shards: int) -> BlockArena:
    arena = BlockArena.private(8, SIZE, cut(num_shards).text)
    arena.buffer[:] = b"\x55" * len(arena.buffer)
    return arena


def converted(peer: BlockArena, block: int, num_shards: int) -> bytes:
    into = bytearray(SIZE)
    plan = plan_reshard(KVLayout.parse(peer.layout), cut(num_shards))
    plan.apply(peer.block(block), memoryview(into))
    return bytes(into)


def others(cache: BlockArena, pairs: Sequence[tuple[int, int]]) -> set[bytes]:
    """What is in the blocks that no copy goes to."""
    return {bytes(cache.block(i)) for i in range(8) if i not in {dst for _, dst in pairs}}


UNTOUCHED = b"\x55" * SIZE
PAIRS = [(1, 7), (2, 3), (3, 4), (4, 5), (0, 0), (7, 1), (6, 2)]


@pytest.mark.parametrize("ranks", [(1, 2), (2, 1), (2, 3), (3, 2), (6, 1)], ids=str)
@pytest.mark.parametrize("name", ["loopback", "shm", "tcp"])
def test_another_number_of_shards(name: str, ranks: tuple[int, int], tmp_path: Path) -> None:
    peer, cache = sharded(tmp_path, ranks[0]), own(ranks[1])
    exporter = TransportSet(make_transports([name], HOST))
    reader = TransportSet(make_transports([name], HOST), scratch_bytes=SCRATCH)
    endpoints = exporter.endpoints(peer)
    before = resources()
    receipt = reader.pull(endpoints, cache, copies_of(PAIRS), 5)
    reader.forget(endpoints)
    for src, dst in PAIRS:
        assert bytes(cache.block(dst)) == converted(peer, src, ranks[1]) != peer.block(src)
    assert others(cache, PAIRS) == {UNTOUCHED}
    assert (receipt.num_blocks, receipt.num_bytes) == (len(PAIRS), len(PAIRS) * SIZE)
    assert receipt.transport == name
    assert receipt.seconds > 0
    for one in (reader, exporter):
        one.close()
    assert all(now <= then for now, then in zip(resources(), before, strict=True))


@pytest.mark.parametrize("name", ["loopback", "shm", "tcp"])
def test_generations_of_the_peer_are_checked(name: str, tmp_path: Path) -> None:
    """In every slice: blocks of those before it have arrived, those of a failed one are as ever."""
    peer, cache = sharded(tmp_path, 2), own(3)
    exporter = TransportSet(make_transports([name], HOST))
    reader = TransportSet(make_transports([name], HOST), scratch_bytes=SCRATCH)
    endpoints = exporter.endpoints(peer)
    peer.generations[7] += 1
    with pytest.raises(TransferFailed, match="block 7 was given to other content"):
        reader.pull(endpoints, cache, copies_of(PAIRS), 5)
    assert others(cache, PAIRS[:3]) == {UNTOUCHED}
    assert reader.pull(endpoints, cache, copies_of(PAIRS[:5]), 5).num_blocks == 5
    for one in (reader, exporter):
        one.close()


class Sizes:
    """Passes everything on, and notes how large the caches are that are pulled into."""

    def __init__(self, inner: Transport) -> None:
        self.name = inner.name
        self.export, self.reachable = inner.export, inner.reachable
        self.forget, self.close = inner.forget, inner.close
        self._inner = inner
        self.num_bytes: list[int] = []

    def pull(
        self, endpoint: Endpoint, cache: KVCache, copies: Sequence[BlockCopy], *, timeout_s: float
    ) -> Receipt:
        self.num_bytes.append(cache.num_blocks * cache.block_bytes)
        return self._inner.pull(endpoint, cache, copies, timeout_s=timeout_s)


@pytest.mark.parametrize(
    ("scratch_bytes", "expected"),
    [(SCRATCH, [3, 3, 3]), (1, [1] * 7), (7 * SIZE, [7]), (100 * SIZE, [7])],
)
def test_scratch_is_bounded(scratch_bytes: int, expected: list[int], tmp_path: Path) -> None:
    peer, cache, sizes = sharded(tmp_path, 2), own(1), Sizes(ShmTransport())
    exporter = TransportSet(make_transports(["shm"], HOST))
    reader = TransportSet([sizes], scratch_bytes=scratch_bytes)
    reader.pull(exporter.endpoints(peer), cache, copies_of(PAIRS), 5)
    assert sizes.num_bytes == [count * SIZE for count in expected]
    assert all(bytes(cache.block(dst)) == converted(peer, src, 1) for src, dst in PAIRS)
    for one in (reader, exporter):
        one.close()


@pytest.mark.parametrize("fault", [Fault.FAIL, Fault.SHORT, Fault.CORRUPT])
def test_a_broken_way_is_left_in_the_middle(fault: Fault, tmp_path: Path) -> None:
    peer, cache = sharded(tmp_path, 2), own(3)
    exporter = TransportSet(make_transports(["auto"], HOST))
    faulty = FaultyTransport(ShmTransport(), [Fault.NONE, fault])
    reader = TransportSet([faulty, TcpTransport(HOST)], scratch_bytes=SCRATCH)
    endpoints = exporter.endpoints(peer)
    assert reader.pull(endpoints, cache, copies_of(PAIRS), 5).transport == "tcp"
    assert all(bytes(cache.block(dst)) == converted(peer, src, 3) for src, dst in PAIRS)
    assert others(cache, PAIRS) == {UNTOUCHED}
    for one in (reader, exporter):
        one.close()


@pytest.mark.parametrize("fault", [Fault.SHORT, Fault.CORRUPT, Fault.STALE, Fault.STALL])
def test_nothing_unverified_gets_into_the_cache(fault: Fault, tmp_path: Path) -> None:
    peer, cache = sharded(tmp_path, 2), own(1)
    exporter = TransportSet(make_transports(["shm"], HOST))
    reader = TransportSet([FaultyTransport(ShmTransport(), [fault])])
    endpoints = exporter.endpoints(peer)
    with pytest.raises(TransferFailed):
        reader.pull(endpoints, cache, copies_of(PAIRS), 0.2)
    assert reader.faults == {("shm", COUNTED[fault]): 1}
    assert others(cache, []) == {UNTOUCHED}
    reader.pull(endpoints, cache, copies_of(PAIRS), 5)
    for one in (reader, exporter):
        one.close()


def test_no_blocks_of_another_layout(tmp_path: Path) -> None:
    """As between equal layouts: whether the peer is there is told."""
    peer, cache = sharded(tmp_path, 2), own(1)
    exporter, reader = (TransportSet(make_transports(["shm"], HOST)) for _ in range(2))
    endpoints = exporter.endpoints(peer)
    assert reader.pull(endpoints, cache, [], 5).num_blocks == 0
    peer.unlink()
    reader.forget(endpoints)
    with pytest.raises(TransportBroken, match="no transport reaches"):
        reader.pull(endpoints, cache, [], 5)
    for one in (reader, exporter):
        one.close()


def test_two_copies_into_one_block(tmp_path: Path) -> None:
    exporter, reader = (TransportSet(make_transports(["shm"], HOST)) for _ in range(2))
    endpoints = exporter.endpoints(sharded(tmp_path, 2))
    for pairs in ([(0, 1), (1, 1)], [(0, 8)]):
        with pytest.raises(ValueError, match="destination block"):
            reader.pull(endpoints, own(1), copies_of(pairs), 5)
    for one in (reader, exporter):
        one.close()


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        (cut(1, "float32").text, "dtype bfloat16 is not float32; serve the same model"),
        (cut(1).text.replace("heads=6", "heads=4"), "number of KV heads 6 is not 4"),
        (cut(1).text.replace("v2", "v1"), "of version 1, this code knows 2"),
        ("other", "'other' describes no KV layout"),
    ],
)
def test_what_cannot_be_resharded_is_refused(layout: str, reason: str, tmp_path: Path) -> None:
    exporter, reader = (TransportSet(make_transports(["auto"], HOST)) for _ in range(2))
    endpoints = exporter.endpoints(sharded(tmp_path, 2))
    with pytest.raises(TransferFailed, match=f"layouts differ: the peer has .*{reason}"):
        reader.pull(endpoints, BlockArena.private(8, SIZE, layout), copies_of(PAIRS), 5)
    assert reader.faults == {("none", "layout"): 1}
    for one in (reader, exporter):
        one.close()
