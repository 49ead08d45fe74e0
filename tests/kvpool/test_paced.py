"""Transfers that are to take a while do, and their blocks arrive all the same."""

from __future__ import annotations

import time
from collections.abc import Mapping

import pytest

from kvpool.arena import BlockArena
from kvpool.checksum import checksum
from kvpool.layout import KVLayout
from kvpool.paced import PacedMover, PacedTransport
from kvpool.pool_link import Slot
from kvpool.tiers import Tier
from kvpool.transport import BlockCopy, TransferFailed, TransferFault
from kvpool.transports.loopback import LoopbackTransport

LAYOUT = KVLayout("float32", 4, num_layers=1, num_kv_heads=1, head_dim=1)


def arena(fill: int) -> BlockArena:
    made = BlockArena.private(4, LAYOUT.block_bytes, LAYOUT.text)
    for index in range(4):
        made.block(index)[:] = bytes([fill + index]) * LAYOUT.block_bytes
    return made


def test_a_pull_takes_as_long_as_it_is_to_and_brings_the_bytes() -> None:
    asked: list[int] = []

    def seconds(num_blocks: int) -> float:
        asked.append(num_blocks)
        return 0.05 * num_blocks

    source, target = arena(10), arena(0)
    transport = PacedTransport(LoopbackTransport(), seconds)
    endpoint = transport.export(source)
    assert transport.reachable(endpoint)
    started = time.monotonic()
    receipt = transport.pull(
        endpoint, target, [BlockCopy(1, 0, 2), BlockCopy(3, 0, 0)], timeout_s=5.0
    )
    assert time.monotonic() - started >= 0.1
    assert receipt.seconds >= 0.1
    assert asked == [2]
    assert bytes(target.block(2)) == bytes(source.block(1))
    assert bytes(target.block(0)) == bytes(source.block(3))
    transport.close()


def test_a_pull_that_is_to_take_too_long_is_late() -> None:
    transport = PacedTransport(LoopbackTransport(), lambda num_blocks: 60.0)
    endpoint = transport.export(arena(10))
    with pytest.raises(TransferFailed) as late:
        transport.pull(endpoint, arena(0), [BlockCopy(1, 0, 2)], timeout_s=0.05)
    assert late.value.fault is TransferFault.LATE
    transport.close()


def test_a_load_is_paced_by_what_came_from_which_tier() -> None:
    asked: list[Mapping[str, int]] = []

    def seconds(num_blocks: Mapping[str, int]) -> float:
        asked.append(dict(num_blocks))
        return 0.05

    host, cache = arena(10), arena(0)
    tiers = (Tier.HOST, Tier.DISK, Tier.HOST)
    slots = [Slot(i, 0, checksum(host.block(i)), tier) for i, tier in enumerate(tiers)]
    mover = PacedMover(cache, LAYOUT.text, seconds)
    started = time.monotonic()
    assert mover.load(host, slots, [3, 2, 1], started + 10.0) == 3
    assert time.monotonic() - started >= 0.05
    assert asked == [{"host": 2, "disk": 1}]
    assert bytes(cache.block(3)) == bytes(host.block(0))
