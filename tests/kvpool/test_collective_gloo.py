"""The collective transport on gloo: its own process group, peers that freeze and die."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from baton.core.errors import ConfigError
from kvpool.arena import BlockArena
from kvpool.transport import Endpoint, TransferFailed, TransportBroken
from kvpool.transports import collective_wire as wire
from kvpool.transports.blocks import budget_until
from kvpool.transports.collective import CollectiveTransport
from kvpool.transports.collective_group import TorchGroups, TorchPairGroup
from kvpool.transports.collective_pair import GroupBroken
from tests.kvpool.transport_kit import LAYOUT, HookedCache, copies_of, filled

HOST = "127.0.0.1"
BLOCK = 1 << 20
BLOCKS = 32
ALL = [(i, (i + 5) % BLOCKS) for i in range(BLOCKS)]

EXPORTER = f"""
import sys
from kvpool.arena import BlockArena
from kvpool.transports import collective_wire as wire
from kvpool.transports.blocks import budget_until
from kvpool.transports.collective import CollectiveTransport
cache = BlockArena.open(sys.argv[1], sys.argv[2], writable=False)
endpoint = CollectiveTransport({HOST!r}).export(cache)
print(endpoint.address, endpoint.token, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def peer(tmp_path: Path) -> BlockArena:
    return filled(tmp_path, BLOCKS, BLOCK)


def target() -> BlockArena:
    return BlockArena.private(BLOCKS, BLOCK, LAYOUT)


def half_right(cache: BlockArena, peer: BlockArena) -> bool:
    """Every byte is the right one, or still zero."""
    for src, dst in ALL:
        found = np.frombuffer(cache.block(dst), dtype=np.uint8)
        if np.any((found != 0) & (found != np.frombuffer(peer.block(src), dtype=np.uint8))):
            return False
    return True


def test_an_exporter_that_freezes_and_one_that_is_killed_in_the_middle(
    peer: BlockArena, tmp_path: Path
) -> None:
    (path,) = tmp_path.iterdir()
    process = subprocess.Popen(
        [sys.executable, "-c", EXPORTER, str(path), peer.header.token],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    reader = CollectiveTransport(HOST)
    try:
        address, token = process.stdout.readline().split()
        endpoint = Endpoint("collective", address, token, LAYOUT)
        cache = target()
        reader.pull(endpoint, cache, copies_of(ALL), timeout_s=60)
        assert all(cache.block(dst) == peer.block(src) for src, dst in ALL)

        cache = target()
        frozen = HookedCache(cache, lambda: os.kill(process.pid, signal.SIGSTOP))
        with pytest.raises(TransferFailed, match=r"took longer than 0\.5 s") as caught:
            reader.pull(endpoint, frozen, copies_of(ALL), timeout_s=0.5)
        assert not isinstance(caught.value, TransportBroken)
        assert half_right(cache, peer)
        os.kill(process.pid, signal.SIGCONT)
        reader.pull(endpoint, cache, copies_of(ALL), timeout_s=60)
        assert all(cache.block(dst) == peer.block(src) for src, dst in ALL)

        cache = target()
        killed = HookedCache(cache, lambda: os.kill(process.pid, signal.SIGKILL))
        with pytest.raises(TransportBroken):
            reader.pull(endpoint, killed, copies_of(ALL), timeout_s=5)
        assert half_right(cache, peer)
        assert not reader.reachable(endpoint)

        other = CollectiveTransport(HOST)
        reader.pull(other.export(peer), cache, copies_of(ALL), timeout_s=60)
        assert all(cache.block(dst) == peer.block(src) for src, dst in ALL)
        other.close()
    finally:
        process.kill()
        process.wait(30)
        process.stdin.close()
        process.stdout.close()
        reader.close()
        # gloo may hold a thread until the pull's time is over: it is not to meet the end of this
        # process, which C++ does not survive.
        for thread in threading.enumerate():
            if thread.name.startswith("kv-collective"):
                thread.join(20)


def two_sides() -> tuple[TorchPairGroup, TorchPairGroup]:
    groups = TorchGroups(HOST, "gloo", slice_bytes=1 << 20)
    pending = groups.open(20)
    made: list[TorchPairGroup] = []
    other = threading.Thread(target=lambda: made.append(groups.join(pending.address, 20)))
    other.start()
    exporter = pending.join(20)
    other.join(30)
    pending.close()
    return exporter, made[0]


@pytest.mark.parametrize("operation", ["send", "receive"])
def test_an_abort_wakes_both_sides(operation: str) -> None:
    exporter, reader = two_sides()
    ended: list[str] = []

    def work(name: str, side: TorchPairGroup) -> None:
        try:
            getattr(side, operation)(0, 1 << 20, 120)
        except (GroupBroken, TimeoutError):
            ended.append(name)

    threads = [
        threading.Thread(target=work, args=one)
        for one in (("exporter", exporter), ("reader", reader))
    ]
    for thread in threads:
        thread.start()
    # Whether they wait already or come later: both end.
    reader.abort()
    for thread in threads:
        thread.join(30)
    assert sorted(ended) == ["exporter", "reader"]
    with pytest.raises(GroupBroken):
        reader.receive(0, 1, 5)
    for side in (exporter, reader):
        side.abort()
        side.close()
        side.close()


def test_a_receive_is_late_when_nothing_is_sent() -> None:
    exporter, reader = two_sides()
    with pytest.raises(TimeoutError):
        reader.receive(0, 100, 0.1)
    exporter.close()
    reader.close()


def test_nobody_comes_to_the_group() -> None:
    groups = TorchGroups(HOST, "gloo", slice_bytes=1 << 10)
    pending = groups.open(0.3)
    with pytest.raises(TimeoutError):
        pending.join(0.3)
    pending.close()
    with pytest.raises(GroupBroken):
        pending.join(0.3)
    with pytest.raises(GroupBroken, match="not an address"):
        groups.join("nowhere", 0.3)


def test_a_store_that_does_not_answer() -> None:
    """torch waits for one without a limit; the pull does not."""
    reader = CollectiveTransport(HOST, end_s=0.1)
    with socket.create_server((HOST, 0)) as control, socket.create_server((HOST, 0)) as silent:

        def answer() -> None:
            budget = budget_until(time.monotonic() + 20)
            with control.accept()[0] as sock:
                wire.receive_hello(sock, budget)
                message = f"{1 << 20} abc@{HOST}:{silent.getsockname()[1]}"
                wire.send_reply(sock, wire.Status.OK, message, budget)
                sock.recv(1)

        thread = threading.Thread(target=answer)
        thread.start()
        address = f"{HOST}:{control.getsockname()[1]}"
        endpoint = Endpoint("collective", address, "0" * 32, LAYOUT)
        with pytest.raises(TransferFailed, match=r"took longer than 0\.3 s"):
            reader.pull(endpoint, target(), copies_of(ALL), timeout_s=0.3)
        thread.join(20)
        (held,) = [one for one in threading.enumerate() if one.name.endswith(address)]
    held.join(20)
    assert not held.is_alive()
    reader.close()


@pytest.fixture(params=[True, False])
def stand_in(request: pytest.FixtureRequest) -> Iterator[str]:
    """A back end that is registered with torch, as those of devices are, and is gloo."""

    def make(store: Any, rank: int, size: int) -> Any:
        gloo: Any = dist.ProcessGroupGloo
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=HOST)]
        return gloo(store, rank, size, options)

    def extended(described: Any, options: object) -> Any:
        return make(described.store, described.group_rank, described.group_size)

    def plain(store: Any, rank: int, size: int, timeout: object) -> Any:
        return make(store, rank, size)

    name = f"standin{request.param}".lower()
    creator = extended if request.param else plain
    dist.Backend.register_backend(name, creator, extended_api=request.param, devices=["cpu"])
    yield name
    del dist.Backend._plugins[name.upper()]


def test_back_ends_that_registered_themselves(stand_in: str, peer: BlockArena) -> None:
    exporter = CollectiveTransport(HOST, backend=stand_in)
    reader = CollectiveTransport(HOST, backend=stand_in)
    endpoint = exporter.export(peer)
    cache = target()
    for _ in range(2):
        reader.pull(endpoint, cache, copies_of(ALL), timeout_s=60)
    assert all(cache.block(dst) == peer.block(src) for src, dst in ALL)
    plain = CollectiveTransport(HOST)
    assert not plain.reachable(endpoint)
    for transport in (plain, reader, exporter):
        transport.close()


def test_a_back_end_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="no back end 'hccl'"):
        CollectiveTransport(HOST, backend="hccl")
