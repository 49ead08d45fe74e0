"""Every transport with every fault: an end in time, nothing wrong, the fault counted, all released.

What a cell of ``TABLE`` says: the faults that the pull may be counted under (several where the
system decides how a peer's end looks), that it ``ARRIVES`` all the same, or why it cannot happen.
"""

from __future__ import annotations

import concurrent.futures
import gc
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from baton.core.config import TlsConfig
from kvpool.arena import BlockArena
from kvpool.transport import Receipt, TransferFailed, TransferFault
from kvpool.transports import TransportSet
from kvpool.transports.faulty import Fault, FaultyTransport
from kvpool.transports.shm import ShmTransport
from tests.kvpool.fault_kit import (
    EARLIER,
    LATER,
    UNTOUCHED,
    Bench,
    Trouble,
    blank,
    make_bench,
    released,
)
from tests.kvpool.transport_kit import LAYOUT, copies_of, filled, resources

LATE, STALE = {TransferFault.LATE}, {TransferFault.STALE}
SHORT, CORRUPT, GONE = {TransferFault.SHORT}, {TransferFault.CORRUPT}, {TransferFault.GONE}
ARRIVES: set[TransferFault] = set()

SAME_MEMORY = "both sides see the same memory: what is read is what is there"
NO_CONNECTION = "there is no connection, only memory"
NO_MESSAGES = "a pull is a copy: no message is sent that could come twice or late"

MEMORY: dict[Trouble, set[TransferFault] | str] = {
    Trouble.STALL: LATE,
    Trouble.RESET: NO_CONNECTION,
    Trouble.DEATH_BEFORE: GONE,
    # What is mapped stays, whoever unlinks it; and a process keeps its own objects.
    Trouble.DEATH_DURING: ARRIVES,
    Trouble.DEATH_AFTER: GONE,
    Trouble.DUPLICATE: NO_MESSAGES,
    Trouble.LATE_ANSWER: NO_MESSAGES,
    Trouble.STALE_BEFORE: STALE,
    Trouble.STALE_DURING: STALE,
}
WIRE: dict[Trouble, set[TransferFault] | str] = {
    Trouble.SHORT_READ: SHORT,
    Trouble.FLIPPED_BIT: CORRUPT,
    Trouble.STALL: LATE,
    Trouble.RESET: GONE,
    Trouble.DEATH_BEFORE: GONE,
    Trouble.DEATH_DURING: SHORT | GONE,
    Trouble.DEATH_AFTER: GONE,
    Trouble.DUPLICATE: CORRUPT,
    Trouble.LATE_ANSWER: CORRUPT,
    Trouble.STALE_BEFORE: STALE,
    Trouble.STALE_DURING: STALE,
}
TABLE: dict[str, dict[Trouble, set[TransferFault] | str]] = {
    "loopback": MEMORY | {Trouble.SHORT_READ: SAME_MEMORY, Trouble.FLIPPED_BIT: SAME_MEMORY},
    # Of the file: in the blocks, as for loopback, no bit has a way on which it could flip.
    "shm": MEMORY | {Trouble.SHORT_READ: SHORT, Trouble.FLIPPED_BIT: CORRUPT},
    "tcp": WIRE,
    # To TLS a reset looks like an end.
    "tcp+tls": WIRE | {Trouble.RESET: SHORT | GONE},
    # Connection and group tell of a peer's end in no order, so that is all called gone.
    "collective": WIRE | {Trouble.SHORT_READ: GONE, Trouble.DEATH_DURING: GONE},
    # In the group: it claims that all has arrived, and the checksum tells.
    "collective+fake": WIRE | {Trouble.SHORT_READ: CORRUPT, Trouble.DEATH_DURING: GONE},
    # Of what the exporter says; it cannot be short of the blocks, which the reader fetches itself.
    "mooncake": WIRE,
}
CELLS = [
    pytest.param(name, trouble, what, id=f"{name} {trouble}")
    for name, row in TABLE.items()
    for trouble, what in row.items()
    if not isinstance(what, str)
]


TOLD = {
    Trouble.STALE_BEFORE: r"block 12 .* before the pull: generation 14, not 13",
    Trouble.STALE_DURING: r"block 15 .* during the pull: generation 17, not 16",
    Trouble.STALL: r"took longer than 0\.",
}
"""In words, where they are the same for all."""


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> Iterator[None]:
    """What was there before is nobody's leak, and need not be looked through in each test."""
    gc.freeze()
    yield
    gc.unfreeze()


_warm: set[str] = set()


@pytest.fixture
def bench(
    request: pytest.FixtureRequest, tmp_path: Path, tls: TlsConfig, name: str
) -> Iterator[Bench]:
    """Used once; when it has closed, no thread, socket or mapping is left."""
    if name == "mooncake":
        request.getfixturevalue("mooncake")
    if name not in _warm:
        # What a library opens once, with its first use, is no leak.
        _warm.add(name)
        first = make_bench(name, tmp_path, tls)
        first.pull(blank(), EARLIER)
        first.close()
    before = resources()
    made = make_bench(name, tmp_path, tls)
    assert isinstance(made.pull(blank(), EARLIER), Receipt)
    yield made
    made.close()
    assert released(before)


def test_the_table_is_complete() -> None:
    assert {name: set(row) for name, row in TABLE.items()} == {name: set(Trouble) for name in TABLE}


@pytest.mark.parametrize(("name", "trouble", "faults"), CELLS)
def test_a_fault(bench: Bench, trouble: Trouble, faults: set[TransferFault]) -> None:
    cache = blank()
    outcome = bench.meet(trouble, cache)
    name = bench.transport.name
    # All of it may have been on its way when the peer died, its last word included.
    arrived = trouble is Trouble.DEATH_DURING and isinstance(outcome, Receipt)
    if faults and not arrived:
        assert isinstance(outcome, TransferFailed), outcome
        assert outcome.fault in faults, outcome
        assert bench.reader.faults == {(name, outcome.fault): 1}
        assert re.search(TOLD.get(trouble, ""), outcome.message), outcome
    else:
        assert isinstance(outcome, Receipt), outcome
        assert bench.reader.faults == {}
        assert all(cache.block(dst) == bench.peer.block(src) for src, dst in LATER)
    # Nothing but its destinations was written to, whatever came.
    assert all(cache.block(dst) == UNTOUCHED for _, dst in EARLIER)
    if trouble in (Trouble.DEATH_BEFORE, Trouble.DEATH_DURING, Trouble.DEATH_AFTER):
        assert not bench.transport.reachable(bench.endpoint) or trouble is Trouble.DEATH_DURING
        bench.revive()
    bench.calm()
    left = bytes(cache.buffer)
    clean = blank()
    assert isinstance(bench.pull(clean, EARLIER), Receipt)
    assert all(clean.block(dst) == bench.peer.block(src) for src, dst in EARLIER)
    assert all(clean.block(dst) == UNTOUCHED for _, dst in LATER)
    # What the failed pull was waiting for does not come to its blocks any more.
    assert cache.buffer == left


@pytest.mark.parametrize("name", list(TABLE))
def test_a_peer_that_was_never_there_is_counted_too(bench: Bench) -> None:
    """No transport reaches it, so it is nobody's."""
    bench.die()
    bench.reader.forget([bench.endpoint])
    with pytest.raises(TransferFailed, match="no transport reaches the peer"):
        bench.reader.pull([bench.endpoint], blank(), copies_of(LATER), 5)
    assert bench.reader.faults == {("none", TransferFault.GONE): 1}


def test_faults_of_many_threads_are_all_counted(tmp_path: Path) -> None:
    peer = filled(tmp_path, 8, 64)
    exporter = TransportSet([ShmTransport()])
    script = [Fault.FAIL, Fault.STALE] * 200
    reader = TransportSet([FaultyTransport(ShmTransport(), script)])
    endpoints = exporter.endpoints(peer)

    def pull(_: int) -> None:
        with pytest.raises(TransferFailed):
            reader.pull(endpoints, BlockArena.private(8, 64, LAYOUT), copies_of([(0, 0)]), 5)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(pull, range(400)))
    assert reader.faults == {("shm", "gone"): 200, ("shm", "stale"): 200}
    for one in (exporter, reader):
        one.close()
