"""What the mooncake transport adds to the conformance suite: other processes, that misbehave."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from baton.core.errors import ConfigError
from kvpool.arena import BlockArena
from kvpool.transport import BlockCopy, Endpoint, TransferFailed, TransportBroken
from kvpool.transports import TransportSet, make_transports
from kvpool.transports import tcp_wire as wire
from kvpool.transports.mooncake import MooncakeTransport
from kvpool.transports.mooncake_engine import MAX_SLICES, STAGING_BYTES
from tests.kvpool.middle_man import Filter, MiddleMan
from tests.kvpool.mooncake_kit import HOST, exporter, held_engine
from tests.kvpool.transport_kit import LAYOUT, HookedCache, copies_of, filled

BLOCK = 1000
LARGE = STAGING_BYTES // 2 + 1  # one block per read


@pytest.fixture(scope="module", autouse=True)
def engine() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        # A read of a frozen peer then ends after 5 s instead of 30, the least that there is.
        patch.setenv("MC_TRANSFER_TIMEOUT", "5")
        with held_engine():
            yield


@pytest.fixture
def reader() -> Iterator[MooncakeTransport]:
    transport = MooncakeTransport(HOST)
    yield transport
    transport.close()


class LyingCache:
    """An arena whose bytes, as the checksums see them, differ from what readers read."""

    def __init__(self, inner: BlockArena) -> None:
        self._inner = inner
        self.layout = inner.layout
        self.num_blocks = inner.num_blocks
        self.block_bytes = inner.block_bytes

    def block(self, index: int) -> memoryview:
        return self.run(index, 1)

    def run(self, start: int, count: int) -> memoryview:
        if count == self.num_blocks:
            return self._inner.run(start, count)
        data = bytearray(self._inner.run(start, count))
        data[-1] ^= 1
        return memoryview(data)

    def generation(self, index: int) -> int:
        return self._inner.generation(index)


def target(num_blocks: int = 16, block_bytes: int = BLOCK) -> BlockArena:
    return BlockArena.private(num_blocks, block_bytes, LAYOUT)


def finish_reads() -> None:
    """Wait for reads that nobody waits for."""
    for thread in threading.enumerate():
        if thread.name == "kv-mooncake-read":
            thread.join(30)
            assert not thread.is_alive()


def test_from_another_process(tmp_path: Path, reader: MooncakeTransport) -> None:
    num_blocks = 2 * MAX_SLICES + 3
    arena, cache = filled(tmp_path, num_blocks, BLOCK), target(num_blocks)
    with exporter(arena) as (_, endpoint):
        assert reader.reachable(endpoint)
        pairs = [(i, (7 * i + 1) % num_blocks) for i in range(num_blocks)]
        receipt = reader.pull(endpoint, cache, copies_of(pairs), timeout_s=20)
        assert receipt.num_bytes == num_blocks * BLOCK
        assert all(cache.block(dst) == arena.block(src) for src, dst in pairs)
        arena.generations[3] += 1
        with pytest.raises(TransferFailed, match=r"block 3 .* before the pull"):
            reader.pull(endpoint, cache, copies_of([(3, 0)]), timeout_s=5)


def test_a_peer_that_is_killed_between_two_reads(tmp_path: Path, reader: MooncakeTransport) -> None:
    arena = filled(tmp_path, 2, LARGE)
    with exporter(arena) as (peer, endpoint):
        cache = HookedCache(target(2, LARGE), peer.kill)
        with pytest.raises(TransportBroken):
            reader.pull(endpoint, cache, copies_of([(0, 0), (1, 1)]), timeout_s=20)
        assert not reader.reachable(endpoint)
    finish_reads()
    with exporter(arena) as (_, endpoint):
        fresh = target(2, LARGE)
        reader.pull(endpoint, fresh, copies_of([(0, 1), (1, 0)]), timeout_s=20)
        assert fresh.block(0) == arena.block(1)


def test_a_new_process_at_the_port_of_an_old_one(tmp_path: Path, reader: MooncakeTransport) -> None:
    arena, cache = filled(tmp_path, 2, BLOCK), target(2)
    with contextlib.closing(MiddleMan(f"{HOST}:1", lambda _, data: data)) as port:
        for pairs in ([(0, 0)], [(0, 0), (1, 1)], [(0, 1), (1, 0)]):
            with exporter(arena) as (_, endpoint):
                server, session, base = endpoint.address.split("/")
                port.serve(session)
                moved = dataclasses.replace(endpoint, address=f"{server}/{port.address}/{base}")
                reader.pull(moved, cache, copies_of(pairs), timeout_s=20)
                assert all(cache.block(dst) == arena.block(src) for src, dst in pairs)


def test_a_read_that_does_not_return(tmp_path: Path, reader: MooncakeTransport) -> None:
    arena, inner = filled(tmp_path, 2, LARGE), target(2, LARGE)
    with exporter(arena) as (peer, endpoint):
        cache = HookedCache(inner, peer.freeze)
        # Its second read finds the peer frozen; the pull ends by its own deadline.
        with pytest.raises(TransferFailed, match="took longer than 1 s"):
            reader.pull(endpoint, cache, copies_of([(0, 0), (1, 1)]), timeout_s=1)
        before = bytes(inner.buffer)
        assert not reader.reachable(endpoint)
        with pytest.raises(TransportBroken, match="has not returned"):
            reader.pull(endpoint, inner, copies_of([(0, 0)]), timeout_s=5)
        peer.thaw()
        finish_reads()
        assert inner.buffer == before
        reader.pull(endpoint, inner, copies_of([(0, 0), (1, 1)]), timeout_s=20)
        assert inner.buffer == arena.buffer


def test_a_frozen_peer(tmp_path: Path, reader: MooncakeTransport) -> None:
    arena = filled(tmp_path, 2, BLOCK)
    with exporter(arena) as (peer, endpoint):
        peer.freeze()
        with pytest.raises(TransferFailed, match="took longer"):
            reader.pull(endpoint, target(), copies_of([(0, 0)]), timeout_s=0.3)


def test_bytes_that_are_not_what_the_exporter_vouches_for(
    tmp_path: Path, reader: MooncakeTransport
) -> None:
    arena = filled(tmp_path, 16, BLOCK)
    transport = MooncakeTransport(HOST)
    endpoint = transport.export(LyingCache(arena))
    with pytest.raises(TransportBroken, match="wrong checksum"):
        reader.pull(endpoint, target(), copies_of([(0, 0), (3, 1)]), timeout_s=5)
    cache = HookedCache(target(), lambda: arena.generations.__setitem__(3, 99))
    with pytest.raises(TransferFailed, match=r"block 3 .* during the pull"):
        reader.pull(endpoint, cache, copies_of([(0, 0), (3, 1)]), timeout_s=5)
    transport.close()


TOLD = 2 * wire.REPLY.size + wire.CHECKSUM.size
"""Bytes that the exporter says in a pull of one chunk."""


def flip(at: int) -> Filter:
    def pass_on(offset: int, data: bytes) -> bytes:
        if not offset <= at < offset + len(data):
            return data
        changed = bytearray(data)
        changed[at - offset] ^= 0x04
        return bytes(changed)

    return pass_on


def reset(at: int) -> Filter:
    return lambda offset, data: data if offset + len(data) <= at else None


def cut(at: int) -> Filter:
    return lambda offset, data: data[: max(0, at - offset)]


@pytest.mark.parametrize("fault", [flip, reset, cut])
def test_faults_on_the_way_to_the_server(
    tmp_path: Path, reader: MooncakeTransport, fault: Callable[[int], Filter]
) -> None:
    arena = filled(tmp_path, 4, BLOCK)
    transport = MooncakeTransport(HOST)
    endpoint = transport.export(arena)
    server, rest = endpoint.address.split("/", 1)
    for at in range(TOLD):
        man = MiddleMan(server, fault(at))
        through = dataclasses.replace(endpoint, address=f"{man.address}/{rest}")
        with pytest.raises(TransferFailed):
            reader.pull(through, target(), copies_of([(0, 0), (1, 1)]), timeout_s=0.3)
        man.close()
    cache = target()
    reader.pull(endpoint, cache, copies_of([(0, 1)]), timeout_s=5)
    assert cache.block(1) == arena.block(0)
    transport.close()


def test_a_broken_way_is_left_for_another(tmp_path: Path) -> None:
    arena = filled(tmp_path, 4, BLOCK)
    names = ["mooncake", "tcp"]
    writer, reader = (TransportSet(make_transports(names, HOST)) for _ in range(2))
    endpoints = writer.endpoints(arena)
    assert [one.transport for one in endpoints] == names
    cache = target(4)
    assert reader.pull(endpoints, cache, copies_of([(1, 2)]), 5).transport == "mooncake"
    server, session, base = endpoints[0].address.split("/")
    wrong = Endpoint(
        "mooncake",
        f"{server}/{session}/{int(base, 16) + (1 << 40):x}",
        endpoints[0].token,
        endpoints[0].layout,
    )
    receipt = reader.pull([wrong, endpoints[1]], cache, copies_of([(0, 0), (3, 3)]), 5)
    assert receipt.transport == "tcp"
    assert cache.block(3) == arena.block(3)
    for one in (writer, reader):
        one.close()


@pytest.mark.parametrize("address", ["", "nonsense", "h:1/h:2/zz", "h:1/h:2"])
def test_addresses_that_are_none(reader: MooncakeTransport, address: str) -> None:
    endpoint = Endpoint("mooncake", address, "0" * 32, LAYOUT)
    assert not reader.reachable(endpoint)
    with pytest.raises(TransportBroken, match="server/session/base"):
        reader.pull(endpoint, target(), [BlockCopy(0, 0, 0)], timeout_s=5)
    reader.forget(endpoint)


def test_withdrawn_memory_cannot_be_read(tmp_path: Path, reader: MooncakeTransport) -> None:
    arena = filled(tmp_path, 4, BLOCK)
    first, second = MooncakeTransport(HOST), MooncakeTransport(HOST)
    other = first.export(arena)
    endpoint = second.export(arena)
    # Exported twice: one goes, the other stays.
    first.close()
    reader.pull(endpoint, target(), copies_of([(0, 0)]), timeout_s=5)
    with pytest.raises(TransportBroken):
        reader.pull(other, target(), copies_of([(0, 0)]), timeout_s=5)
    server = endpoint.address.split("/")[0]
    fresh = BlockArena.private(4, BLOCK, LAYOUT)
    third = MooncakeTransport(HOST)
    gone = third.export(fresh).address.split("/")
    third.close()
    # The server vouches, but what it vouches for is not at the address of the one that is gone.
    mixed = Endpoint("mooncake", f"{server}/{gone[1]}/{gone[2]}", endpoint.token, LAYOUT)
    with pytest.raises(TransportBroken, match="could not read"):
        reader.pull(mixed, target(), copies_of([(0, 0)]), timeout_s=5)
    second.close()


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mooncake.engine", None)
    with pytest.raises(ConfigError, match="install mooncake-transfer-engine") as caught:
        make_transports(["mooncake"], HOST)
    assert caught.value.param == "handoff.transport"
