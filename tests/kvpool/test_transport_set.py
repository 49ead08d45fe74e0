from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.core.errors import ConfigError
from kvpool.arena import BlockArena
from kvpool.transport import BlockCopy, TransferFailed, TransportBroken
from kvpool.transports import TransportSet, choose, make_transports
from kvpool.transports.blocks import runs
from kvpool.transports.faulty import Fault, FaultyTransport
from kvpool.transports.shm import ShmTransport
from kvpool.transports.tcp import TcpTransport
from tests.kvpool.transport_kit import LAYOUT, copies_of, filled

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
