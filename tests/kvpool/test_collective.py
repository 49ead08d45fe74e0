"""The collective transport: what its groups may do to it. On fakes, which need no torch."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.core.errors import ConfigError
from kvpool.arena import BlockArena
from kvpool.transport import Endpoint, TransferFailed, TransferFault, TransportBroken
from kvpool.transports import collective_wire as wire
from kvpool.transports.blocks import budget_until
from kvpool.transports.collective import CollectiveTransport
from kvpool.transports.collective_fake import FakeGroups, GroupFault
from kvpool.transports.collective_pair import gather, scatter, slice_sizes, slices
from tests.kvpool.fault_kit import released
from tests.kvpool.meddler import Meddler
from tests.kvpool.middle_man import MiddleMan
from tests.kvpool.transport_kit import LAYOUT, copies_of, filled

BLOCK = 1000
SLICE = 512
"""So that a pull of four blocks is eight slices, with ends of blocks in the middle."""
FOUR = [(0, 5), (1, 6), (8, 7), (3, 0)]
UNTOUCHED = 0x55

Make = Callable[..., CollectiveTransport]


@pytest.fixture
def peer(tmp_path: Path) -> BlockArena:
    return filled(tmp_path, 16, BLOCK)


@pytest.fixture
def make() -> Iterator[Make]:
    """Transports; when they have closed, every group has, and no thread or socket is left."""
    before = sockets_and_threads()
    made: list[CollectiveTransport] = []
    used: set[FakeGroups] = set()

    def one(groups: FakeGroups, max_pairs: int = 4, end_s: float = 5) -> CollectiveTransport:
        used.add(groups)
        made.append(CollectiveTransport(groups=groups, max_pairs=max_pairs, end_s=end_s))
        return made[-1]

    yield one
    for transport in made:
        transport.close()
    for groups in used:
        assert groups.num_closed == groups.num_made
    assert released(before, sockets_and_threads)


def sockets_and_threads() -> tuple[int, int]:
    kinds = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of this listing
            kinds.append(os.readlink(f"/proc/self/fd/{name}").partition(":")[0])
    return kinds.count("socket"), threading.active_count()


def fake(*script: GroupFault) -> FakeGroups:
    return FakeGroups(script, slice_bytes=SLICE)


def target(num_blocks: int = 16, block_bytes: int = BLOCK, layout: str = LAYOUT) -> BlockArena:
    cache = BlockArena.private(num_blocks, block_bytes, layout)
    cache.buffer[:] = bytes([UNTOUCHED]) * len(cache.buffer)
    return cache


def wrong_bytes(cache: BlockArena, peer: BlockArena, pairs: list[tuple[int, int]]) -> int:
    """Bytes that are neither what was there before nor what the pull should have brought."""
    count = 0
    wanted = {dst: src for src, dst in pairs}
    for dst in range(cache.num_blocks):
        found = np.frombuffer(cache.block(dst), dtype=np.uint8)
        there = np.frombuffer(peer.block(wanted.get(dst, 0)), dtype=np.uint8)
        right = found == there if dst in wanted else np.zeros(BLOCK, dtype=bool)
        count += int(np.count_nonzero(~right & (found != UNTOUCHED)))
    return count


def is_whole(cache: BlockArena, peer: BlockArena, pairs: list[tuple[int, int]]) -> bool:
    return all(cache.block(dst) == peer.block(src) for src, dst in pairs)


@given(st.data())
def test_slices_are_the_blocks_bytes_in_order(data: st.DataObject) -> None:
    block_bytes = data.draw(st.integers(1, 40))
    size = data.draw(st.integers(1, 90))
    indices = data.draw(st.lists(st.integers(0, 7), unique=True, min_size=1))
    source = BlockArena.private(8, block_bytes, LAYOUT)
    source.buffer[:] = bytes(i % 251 for i in range(len(source.buffer)))
    copy = BlockArena.private(8, block_bytes, LAYOUT)
    slot = memoryview(bytearray(size))
    sent = []
    back = slices(copy, indices, size)
    for pieces in slices(source, indices, size):
        count = gather(pieces, slot)
        sent.append(bytes(slot[:count]))
        assert scatter(slot, next(back)) == count
    assert next(back, None) is None
    assert b"".join(sent) == b"".join(bytes(source.block(i)) for i in indices)
    assert [len(one) for one in sent] == slice_sizes(len(indices) * block_bytes, size)
    for index in range(8):
        expected = source.block(index) if index in indices else bytes(block_bytes)
        assert copy.block(index) == expected


class Sliced:
    """The same groups, of which another length is told."""

    def __init__(self, groups: FakeGroups, slice_bytes: int) -> None:
        self.backend = groups.backend
        self.slice_bytes = slice_bytes
        self.open = groups.open
        self.join = groups.join


@pytest.mark.parametrize(("ours", "theirs"), [(7, 512), (512, 300), (512, 512)])
def test_the_smaller_slice_counts(peer: BlockArena, ours: int, theirs: int) -> None:
    groups = fake()
    exporter = CollectiveTransport(groups=Sliced(groups, theirs))
    reader = CollectiveTransport(groups=Sliced(groups, ours))
    cache = target()
    reader.pull(exporter.export(peer), cache, copies_of(FOUR), timeout_s=5)
    assert is_whole(cache, peer, FOUR)
    assert groups.num_received == -(-len(FOUR) * BLOCK // min(ours, theirs))
    reader.close()
    exporter.close()


@pytest.mark.parametrize("fault", [GroupFault.FAIL, GroupFault.SHORT, GroupFault.CORRUPT])
@pytest.mark.parametrize("at", [0, 1, 4, 7])
def test_a_failure_costs_the_pair_and_brings_no_wrong_byte(
    make: Make, peer: BlockArena, fault: GroupFault, at: int
) -> None:
    groups = fake(*[GroupFault.NONE] * at, fault)
    exporter, reader = make(groups), make(groups)
    endpoint = exporter.export(peer)
    cache = target()
    with pytest.raises(TransportBroken, match="failed: "):
        reader.pull(endpoint, cache, copies_of(FOUR), timeout_s=5)
    assert wrong_bytes(cache, peer, FOUR) == 0
    assert not is_whole(cache, peer, FOUR)
    assert groups.num_made == 2
    reader.pull(endpoint, cache, copies_of(FOUR), timeout_s=5)
    assert is_whole(cache, peer, FOUR)
    assert groups.num_made == 4


def test_an_agreement_that_comes_twice_is_not_taken_for_the_end(
    make: Make, peer: BlockArena
) -> None:
    """Which would be believed without the exporter's last word on generations."""
    groups, meddler = fake(), Meddler()
    exporter, reader = make(groups), make(groups)
    one = [(3, 5)]
    real = exporter.export(peer)
    with contextlib.closing(MiddleMan(real.address, meddler)) as middle:
        endpoint = dataclasses.replace(real, address=middle.address)
        reader.pull(endpoint, target(), copies_of(one), timeout_s=5)
        meddler.act(meddler.double(wire.REPLY.size + 2 * wire.CHECKSUM.size))
        with pytest.raises(TransportBroken, match="the answer to another pull") as caught:
            reader.pull(endpoint, target(), copies_of(one), timeout_s=5)
        assert caught.value.fault == TransferFault.CORRUPT
        reader.close()


@pytest.mark.parametrize("at", [0, 5])
def test_a_wait_that_never_returns(make: Make, peer: BlockArena, at: int) -> None:
    groups = fake(*[GroupFault.NONE] * at, GroupFault.STALL)
    exporter, reader = make(groups), make(groups)
    endpoint = exporter.export(peer)
    cache = target()
    with pytest.raises(TransferFailed, match=r"took longer than 1 s") as caught:
        reader.pull(endpoint, cache, copies_of(FOUR), timeout_s=1)
    assert not isinstance(caught.value, TransportBroken)
    # The abort has returned, so that whoever gives the blocks away now is not too early.
    assert groups.num_aborted >= 1
    assert groups.num_closed >= 1
    assert wrong_bytes(cache, peer, FOUR) == 0
    reader.pull(endpoint, cache, copies_of(FOUR), timeout_s=5)
    assert is_whole(cache, peer, FOUR)
    assert groups.num_made == 4


def test_a_wait_that_not_even_an_abort_ends(make: Make, peer: BlockArena) -> None:
    groups = fake(GroupFault.STUCK)
    exporter, reader = make(groups, max_pairs=2), make(groups, max_pairs=1, end_s=0.1)
    endpoint = exporter.export(peer)
    cache = target()
    with pytest.raises(TransferFailed, match=r"took longer than 1 s"):
        reader.pull(endpoint, cache, copies_of(FOUR), timeout_s=1)
    # It keeps its buffers, so it keeps its place.
    with pytest.raises(TransportBroken, match="stuck"):
        reader.pull(endpoint, cache, copies_of(FOUR), timeout_s=5)
    held = [one for one in threading.enumerate() if one.name.endswith(endpoint.address)]
    assert len(held) == 1
    groups.release()
    held[0].join(10)
    assert wrong_bytes(cache, peer, FOUR) == 0
    reader.pull(endpoint, cache, copies_of(FOUR), timeout_s=5)
    assert is_whole(cache, peer, FOUR)


def test_pulls_from_one_peer_share_its_pair(make: Make, peer: BlockArena) -> None:
    groups = fake()
    exporter, reader = make(groups), make(groups)
    endpoint = exporter.export(peer)
    cache = target()

    def pull(block: int) -> None:
        for _ in range(10):
            reader.pull(endpoint, cache, copies_of([(block, 15 - block)]), timeout_s=20)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(pull, range(16)))
    assert is_whole(cache, peer, [(i, 15 - i) for i in range(16)])
    assert groups.num_made == 2


def test_close_ends_a_pull_and_another_waits_no_longer_than_it_may(
    make: Make, peer: BlockArena
) -> None:
    groups = fake(GroupFault.STALL)
    exporter, reader = make(groups), make(groups)
    endpoint = exporter.export(peer)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        first = pool.submit(reader.pull, endpoint, target(), copies_of(FOUR), timeout_s=60)
        with groups.changed:
            assert groups.changed.wait_for(lambda: groups.num_received == 1, 10)
        with pytest.raises(TransferFailed, match=r"took longer than 0\.1 s"):
            reader.pull(endpoint, target(), copies_of(FOUR), timeout_s=0.1)
        reader.close()
        with pytest.raises(TransportBroken):
            first.result(20)
    with pytest.raises(TransportBroken, match="closed"):
        reader.pull(endpoint, target(), copies_of(FOUR), timeout_s=5)


def test_the_pair_that_idles_longest_makes_room(make: Make, tmp_path: Path) -> None:
    groups = fake()
    reader = make(groups, max_pairs=2)
    peers = [filled(tmp_path, 4, BLOCK) for _ in range(3)]
    endpoints = [make(groups).export(one) for one in peers]
    made = []
    for which in (0, 1, 0, 2, 0, 2, 1):
        cache = target()
        reader.pull(endpoints[which], cache, copies_of([(1, 2)]), timeout_s=5)
        assert is_whole(cache, peers[which], [(1, 2)])
        made.append(groups.num_made // 2)
    assert made == [1, 2, 2, 3, 3, 3, 4]
    reader.forget(endpoints[1])
    reader.forget(endpoints[1])
    reader.pull(endpoints[1], target(), copies_of([(1, 2)]), timeout_s=5)
    assert groups.num_made == 10


def test_an_exporter_with_too_many_readers(make: Make, peer: BlockArena) -> None:
    groups = fake()
    exporter, first, second = make(groups, max_pairs=1), make(groups), make(groups)
    endpoint = exporter.export(peer)
    for reader in (first, second, first, second):
        cache = target()
        reader.pull(endpoint, cache, copies_of(FOUR), timeout_s=5)
        assert is_whole(cache, peer, FOUR)
    assert groups.num_made == 8


def test_an_exporter_that_is_busy_refuses(make: Make, peer: BlockArena) -> None:
    groups = fake(GroupFault.STALL)
    exporter, first, second = make(groups, max_pairs=1), make(groups), make(groups)
    endpoint = exporter.export(peer)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        stalled = pool.submit(first.pull, endpoint, target(), copies_of(FOUR), timeout_s=60)
        with groups.changed:
            assert groups.changed.wait_for(lambda: groups.num_received == 1, 10)
        with pytest.raises(TransportBroken, match="all 1 pairs are in use"):
            second.pull(endpoint, target(), copies_of(FOUR), timeout_s=5)
        first.close()
        with pytest.raises(TransportBroken):
            stalled.result(20)
    second.pull(endpoint, target(), copies_of(FOUR), timeout_s=5)


def test_what_the_exporter_refuses(make: Make, peer: BlockArena) -> None:
    groups = fake()
    exporter, reader = make(groups), make(groups)
    real = exporter.export(peer)
    lying = Endpoint(real.transport, real.address, real.token, "other")
    assert not reader.reachable(lying)
    with pytest.raises(TransferFailed, match="layouts differ"):
        reader.pull(lying, target(layout="other"), copies_of(FOUR), timeout_s=5)
    with pytest.raises(TransferFailed, match=f"blocks of {BLOCK} bytes here, not {BLOCK + 1}"):
        reader.pull(real, target(block_bytes=BLOCK + 1), copies_of(FOUR), timeout_s=5)
    many = copies_of([(0, i) for i in range(17)])
    with pytest.raises(TransferFailed, match="17 blocks of 16"):
        reader.pull(real, target(num_blocks=32), many, timeout_s=5)
    others = fake()
    others.backend = "other"
    stranger = make(others)
    assert not stranger.reachable(real)
    with pytest.raises(TransportBroken, match="back ends differ: fake here, not other"):
        stranger.pull(real, target(), copies_of(FOUR), timeout_s=5)
    cache = target()
    reader.pull(real, cache, copies_of(FOUR), timeout_s=5)
    assert is_whole(cache, peer, FOUR)


def test_strangers_are_sent_away(make: Make, peer: BlockArena) -> None:
    groups = fake()
    exporter, reader = make(groups), make(groups)
    endpoint = exporter.export(peer)
    host, _, port = endpoint.address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=5) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n" + bytes(wire.HELLO.size))
        with contextlib.suppress(ConnectionResetError):
            assert stranger.recv(100) == b""
    # One that has the token, but does not come to the group.
    budget = budget_until(time.monotonic() + 0.3)
    with socket.create_connection((host, int(port)), timeout=5) as stranger:
        wire.send_hello(stranger, endpoint.token, "fake", SLICE, LAYOUT, budget)
        assert wire.receive_reply(stranger, budget)[0] is wire.Status.OK
    reader.pull(endpoint, target(), copies_of(FOUR), timeout_s=5)


def test_an_exporter_that_restarted_is_met_again(make: Make, peer: BlockArena) -> None:
    groups = fake()
    first, reader = make(groups), make(groups)
    gone = first.export(peer)
    reader.pull(gone, target(), copies_of(FOUR), timeout_s=5)
    first.close()
    with pytest.raises(TransportBroken):
        reader.pull(gone, target(), copies_of(FOUR), timeout_s=5)
    cache = target()
    reader.pull(make(groups).export(peer), cache, copies_of(FOUR), timeout_s=5)
    assert is_whole(cache, peer, FOUR)


@pytest.mark.parametrize("host", ["", "0.0.0.0", "192.0.2.1", "not a host"])
def test_hosts_that_cannot_serve(host: str, peer: BlockArena) -> None:
    with pytest.raises(ConfigError):
        CollectiveTransport(host, groups=fake()).export(peer)


@pytest.mark.parametrize("address", ["", "host", "127.0.0.1:x", "127.0.0.1:1"])
def test_addresses_that_lead_nowhere(make: Make, address: str) -> None:
    reader = make(fake())
    nowhere = Endpoint("collective", address, "0" * 32, LAYOUT)
    assert not reader.reachable(nowhere)
    with pytest.raises(TransportBroken):
        reader.pull(nowhere, target(), copies_of(FOUR), timeout_s=5)


def test_nothing_of_this_imports_torch() -> None:
    script = (
        "import sys, kvpool.transports\n"
        "from kvpool.transports.collective import CollectiveTransport\n"
        "from kvpool.transports.collective_fake import FakeGroups\n"
        "CollectiveTransport(groups=FakeGroups())\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=60, check=False).returncode == 0
