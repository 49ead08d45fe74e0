"""Every transport with something between its two sides that fails as a test wants it."""

from __future__ import annotations

import dataclasses
import enum
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path

from baton.core.config import TlsConfig
from kvpool.arena import BlockArena
from kvpool.transport import Endpoint, KVCache, Receipt, Transport
from kvpool.transports import TransportSet, collective_wire, make_transports, tcp_wire
from kvpool.transports.collective import CollectiveTransport
from kvpool.transports.collective_fake import FakeGroups, GroupFault
from tests.kvpool.meddler import Meddler
from tests.kvpool.middle_man import MiddleMan
from tests.kvpool.transport_kit import LAYOUT, HookedCache, copies_of, filled, resources

HOST = "127.0.0.1"
SIZE = 256 << 10
NUM_BLOCKS = 16
EARLIER = [(i, i) for i in range(8)]
LATER = [(8 + i, 8 + i) for i in range(8)]
"""2 MiB: more than sockets hold, so that an exporter cannot be done before its reader begins."""
UNTOUCHED = b"\x55" * SIZE
TIMEOUT_S = 10.0
GLOO_S = 2.0
"""gloo may keep a thread of a pull that failed until the pull's time is over."""
STALL_S = 0.3
GUARD_S = 30.0
"""Of a pull that should have ended: not a measurement, but so that a hang is a failure."""


class Trouble(enum.StrEnum):
    """What goes wrong, once."""

    SHORT_READ = "short read"
    FLIPPED_BIT = "flipped bit"
    STALL = "stall"
    RESET = "reset"
    DEATH_BEFORE = "death before"
    DEATH_DURING = "death during"
    DEATH_AFTER = "death after"
    DUPLICATE = "duplicate message"
    LATE_ANSWER = "late message"
    STALE_BEFORE = "stale before"
    STALE_DURING = "stale during"


class Bench:
    """One exporter, one reader, and the way between them. ``close`` when done."""

    timeout_s = TIMEOUT_S
    """Of a pull that meets a trouble."""

    def __init__(self, make: Callable[[], Transport], directory: Path | None = None) -> None:
        """``directory``: for the exporter's memory, where that has to be a file."""
        self._make = make
        self._directory = directory
        self._made: list[Transport] = []
        self._peers: list[BlockArena] = []
        self.transport = self._one()
        self.reader = TransportSet([self.transport])
        self.revive()

    def revive(self) -> None:
        """Another exporter, of other bytes."""
        self.peer = self._memory()
        self._peers.append(self.peer)
        self.exporter = self._one()
        self.direct = self.exporter.export(self.peer)
        self.endpoint = self._between(self.direct)

    def _memory(self) -> BlockArena:
        if self._directory is not None:
            return filled(self._directory, NUM_BLOCKS, SIZE)
        arena = BlockArena.private(NUM_BLOCKS, SIZE, LAYOUT)
        arena.buffer[:] = secrets.token_bytes(len(arena.buffer))
        arena.generations[:] = range(1, NUM_BLOCKS + 1)
        return arena

    def _one(self) -> Transport:
        self._made.append(self._make())
        return self._made[-1]

    def _between(self, endpoint: Endpoint) -> Endpoint:
        return endpoint

    def pull(
        self,
        cache: KVCache,
        pairs: list[tuple[int, int]],
        timeout_s: float = TIMEOUT_S,
        *,
        direct: bool = False,
    ) -> Receipt | Exception:
        """What a pull ends in; that it ends is checked here. ``direct``: with nothing between."""
        endpoint = self.direct if direct else self.endpoint
        ended: queue.SimpleQueue[Receipt | Exception] = queue.SimpleQueue()

        def run() -> None:
            try:
                ended.put(self.reader.pull([endpoint], cache, copies_of(pairs), timeout_s))
            except Exception as error:
                ended.put(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        outcome = ended.get(timeout=GUARD_S)
        thread.join()
        return outcome

    def die(self) -> None:
        """The exporter ends, and its memory with it."""
        self.exporter.close()
        self.peer.unlink()

    def meet(self, trouble: Trouble, cache: BlockArena) -> Receipt | Exception:
        """Pull ``LATER`` into ``cache`` while it happens; before, ``EARLIER`` was pulled."""
        match trouble:
            case Trouble.DEATH_BEFORE:
                # Nothing is kept of what was pulled before.
                self.transport.forget(self.endpoint)
                self.die()
                return self.pull(cache, LATER, self.timeout_s)
            case Trouble.DEATH_AFTER:
                self.die()
                return self.pull(cache, LATER, self.timeout_s)
            case Trouble.DEATH_DURING:
                return self.pull(HookedCache(cache, self.die), LATER, self.timeout_s)
            case Trouble.STALE_BEFORE:
                self.peer.generations[12] += 1
                return self.pull(cache, LATER)
            case Trouble.STALE_DURING:
                # What lies between would take what the exporter sends off its hands.
                return self.pull(HookedCache(cache, self._reuse), LATER, direct=True)
        return self.interfere(trouble, cache)

    def _reuse(self) -> None:
        self.peer.generations[15] += 1

    def interfere(self, trouble: Trouble, cache: BlockArena) -> Receipt | Exception:
        """Those troubles that are another thing in each transport."""
        raise NotImplementedError

    def calm(self) -> None:
        """What ``meet`` did is over; generations are as the reader was told."""
        self.peer.generations[:] = range(1, NUM_BLOCKS + 1)

    def close(self) -> None:
        for transport in self._made:
            transport.close()
            transport.close()
        for peer in self._peers:
            peer.close()


class MemoryBench(Bench):
    """Both sides see the same memory: only the reader itself, or the file, can fail."""

    def interfere(self, trouble: Trouble, cache: BlockArena) -> Receipt | Exception:
        if trouble is Trouble.STALL:
            hooked = HookedCache(cache, lambda: time.sleep(2 * STALL_S))
            return self.pull(hooked, LATER, STALL_S)
        # A file that is damaged is met when it is mapped.
        self.transport.forget(self.endpoint)
        path = Path(self.endpoint.address)
        whole = path.read_bytes()
        if trouble is Trouble.SHORT_READ:
            os.truncate(path, len(whole) // 2)
        else:
            assert trouble is Trouble.FLIPPED_BIT
            _overwrite(path, bytes([whole[0] ^ 0x04]))
        outcome = self.pull(cache, LATER)
        _overwrite(path, whole)
        return outcome


def _overwrite(path: Path, data: bytes) -> None:
    """In place: others have mapped it."""
    with path.open("r+b") as file:
        file.write(data)


class WireBench(Bench):
    """With a network in between. ``where``: a place in an answer, in bytes: in the middle of its
    blocks or, where these go another way, after its first checksum."""

    def __init__(
        self, make: Callable[[], Transport], where: int, timeout_s: float = TIMEOUT_S
    ) -> None:
        self.timeout_s = timeout_s
        self.meddler = Meddler()
        self._where = where
        # What is before that place passes, even if it comes together with what is after it.
        self._piece_bytes = where if where < 100 else 65536
        self._middle: list[MiddleMan] = []
        super().__init__(make)

    def _between(self, endpoint: Endpoint) -> Endpoint:
        """For mooncake the way to the exporter's word, not that to its memory."""
        address, slash, rest = endpoint.address.partition("/")
        self._middle.append(MiddleMan(address, self.meddler, piece_bytes=self._piece_bytes))
        between = f"{self._middle[-1].address}{slash}{rest}"
        return dataclasses.replace(endpoint, address=between)

    def die(self) -> None:
        super().die()
        self._middle[-1].close()

    def interfere(self, trouble: Trouble, cache: BlockArena) -> Receipt | Exception:
        meddler, where = self.meddler, self._where
        timeout_s = self.timeout_s
        match trouble:
            case Trouble.SHORT_READ:
                meddler.act(meddler.short(where))
            case Trouble.FLIPPED_BIT:
                meddler.act(meddler.flip(where))
            case Trouble.RESET:
                meddler.act(meddler.reset(where))
            case Trouble.DUPLICATE:
                meddler.act(meddler.double(where))
            case Trouble.STALL:
                timeout_s = STALL_S
                meddler.act(meddler.stall(where))
            case Trouble.LATE_ANSWER:
                meddler.act(meddler.record)
                assert isinstance(self.pull(blank(), EARLIER), Receipt)
                meddler.act(meddler.replay)
            case _:
                raise AssertionError(trouble)
        return self.pull(cache, LATER, timeout_s)

    def calm(self) -> None:
        """What was held back comes now: in the middle of the next pull."""
        super().calm()
        self.meddler.act(self.meddler.release)

    def close(self) -> None:
        self.meddler.go_on.set()
        super().close()
        for middle in self._middle:
            middle.close()


class FakeGroupBench(WireBench):
    """The bytes of blocks go through a group of two, past the middle man."""

    def __init__(self) -> None:
        self._groups = groups = FakeGroups(slice_bytes=SIZE)
        where = collective_wire.REPLY.size + collective_wire.CHECKSUM.size
        super().__init__(lambda: CollectiveTransport(HOST, groups=groups), where)

    def interfere(self, trouble: Trouble, cache: BlockArena) -> Receipt | Exception:
        scripted = {
            Trouble.SHORT_READ: GroupFault.SHORT,
            Trouble.FLIPPED_BIT: GroupFault.CORRUPT,
            Trouble.RESET: GroupFault.FAIL,
            Trouble.STALL: GroupFault.STALL,
        }.get(trouble)
        if scripted is None:
            return super().interfere(trouble, cache)
        self._groups._script.extend([GroupFault.NONE, scripted])
        return self.pull(cache, LATER, STALL_S if trouble is Trouble.STALL else TIMEOUT_S)


def make_bench(name: str, directory: Path, tls: TlsConfig) -> Bench:
    """The bench of a transport."""

    def made() -> Transport:
        kind, _, secure = name.partition("+")
        (transport,) = make_transports([kind], HOST, tls=tls if secure else None)
        return transport

    match name:
        case "loopback":
            return MemoryBench(made)
        case "shm":
            return MemoryBench(made, directory)
        case "tcp" | "tcp+tls":
            return WireBench(made, 100_000)
        case "mooncake":
            return WireBench(made, tcp_wire.REPLY.size + tcp_wire.CHECKSUM.size)
        case "collective":
            where = collective_wire.REPLY.size + collective_wire.CHECKSUM.size
            return WireBench(lambda: CollectiveTransport(HOST, slice_bytes=SIZE), where, GLOO_S)
        case "collective+fake":
            return FakeGroupBench()
    raise ValueError(name)


def blank() -> BlockArena:
    """A reader's cache in which nothing has arrived."""
    cache = BlockArena.private(NUM_BLOCKS, SIZE, LAYOUT)
    cache.buffer[:] = UNTOUCHED * NUM_BLOCKS
    return cache


def released(before: tuple[int, int], look: Callable[[], tuple[int, int]] = resources) -> bool:
    """Whether there are no more descriptors and threads than before; libraries take a moment."""
    give_up = time.monotonic() + GUARD_S
    while time.monotonic() < give_up:
        if all(now <= then for now, then in zip(look(), before, strict=True)):
            return True
        time.sleep(0.02)
    return False
