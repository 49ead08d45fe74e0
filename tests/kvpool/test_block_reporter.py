"""A holder's events on their way into a real controller's index."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from kvpool.block_reporter import BlockReporter
from kvpool.event_log import KVEventLog
from kvpool.index import KVIndex
from kvpool.tiers import BlockMeta, KVEvent, KVEventKind, KVSnapshot, Tier
from protos.baton.internal.v1 import controller_pb2, controller_pb2_grpc
from protos.serving import channel_options
from tests.controller.service_kit import make_service, within
from tests.controller.service_kit import running as running_controller
from tests.kvpool.tier_kit import WAIT_S, chain, keys_of, until

CONFIRM_S = 0.2


class Holder:
    """Has blocks in memory, and says so."""

    def __init__(self, name: str = "pool-a", *, life: int = 1, capacity: int = 4096) -> None:
        self.log = KVEventLog(name, life, capacity)
        self.has: dict[bytes, None] = {}
        self.num_snapshots = 0

    def snapshot(self) -> KVSnapshot:
        self.num_snapshots += 1
        log = self.log
        return KVSnapshot(log.holder, log.life, log.next_seq, ((Tier.HOST, tuple(self.has)),))

    def stored(self, metas: list[BlockMeta]) -> None:
        self.has |= dict.fromkeys(keys_of(metas))
        self.log.append(KVEvent(KVEventKind.STORED, Tier.HOST, tuple(keys_of(metas))))

    def removed(self, metas: list[BlockMeta]) -> None:
        for key in keys_of(metas):
            del self.has[key]
        self.log.append(KVEvent(KVEventKind.REMOVED, Tier.HOST, tuple(keys_of(metas))))


@contextlib.asynccontextmanager
async def reporting(controller: str, holder: Holder) -> AsyncIterator[BlockReporter]:
    reporter = BlockReporter(controller, holder.log, holder.snapshot, confirm_s=CONFIRM_S)
    task = asyncio.create_task(reporter.run())
    try:
        yield reporter
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.wait([task])


def found(index: KVIndex, metas: list[BlockMeta]) -> list[tuple[str, Tier, int]]:
    return [(match.holder, match.tier, match.num_blocks) for match in index.lookup(keys_of(metas))]


async def test_events_and_snapshots(tmp_path: Path) -> None:
    metas, holder = chain("a", 4), Holder()
    # Known before the log began.
    holder.has |= dict.fromkeys(keys_of(metas[:1]))
    async with running_controller(make_service(tmp_path)) as cluster:
        index = cluster.service.shell.blocks.index
        async with reporting(cluster.service.address, holder) as reporter:
            reporter.restart()
            await until(lambda: found(index, metas) == [("pool-a", Tier.HOST, 1)])
            holder.stored(metas[1:])
            reporter.changed()
            await until(lambda: found(index, metas) == [("pool-a", Tier.HOST, 4)])
            holder.removed(metas[2:])
            reporter.changed()
            await until(lambda: found(index, metas) == [("pool-a", Tier.HOST, 2)])
            assert holder.num_snapshots == 1
            assert index.position("pool-a") == (1, 2)
        index.check_integrity()


async def test_a_gap_is_closed_by_a_snapshot(tmp_path: Path) -> None:
    holder = Holder(capacity=2)
    async with running_controller(make_service(tmp_path)) as cluster:
        index = cluster.service.shell.blocks.index
        async with reporting(cluster.service.address, holder) as reporter:
            reporter.restart()
            await until(lambda: index.position("pool-a") is not None)
            for number in range(6):  # more than the log keeps, before the reporter looks
                holder.stored(chain(f"p{number}", 2))
                holder.removed(chain(f"p{number}", 2)[1:])
            reporter.changed()
            await until(lambda: index.position("pool-a") == (1, 12))
            assert holder.num_snapshots == 2
            assert index.counts("pool-a") == {Tier.HOST: 6}


async def test_a_controller_that_starts_again_is_told_everything(tmp_path: Path) -> None:
    """Though nothing new happens at the holder."""
    metas, holder = chain("a", 3), Holder()
    holder.stored(metas)
    async with running_controller(make_service(tmp_path)) as cluster:
        address = cluster.service.address
        async with reporting(address, holder) as reporter:
            reporter.restart()
            index = cluster.service.shell.blocks.index
            await until(lambda: found(index, metas) == [("pool-a", Tier.HOST, 3)])
            await within(cluster.service.stop())
            port = int(address.rpartition(":")[2])
            async with running_controller(make_service(tmp_path, port=port)) as again:
                index = again.service.shell.blocks.index
                await until(lambda: found(index, metas) == [("pool-a", Tier.HOST, 3)])
                holder.removed(metas[1:])
                reporter.changed()
                await until(lambda: found(index, metas) == [("pool-a", Tier.HOST, 1)])


async def test_a_holder_that_was_forgotten_comes_back(tmp_path: Path) -> None:
    """Its session was broken for a moment, and the controller's view was without it."""
    metas, holder = chain("a", 3), Holder()
    holder.stored(metas)
    async with running_controller(make_service(tmp_path)) as cluster:
        blocks = cluster.service.shell.blocks
        async with reporting(cluster.service.address, holder) as reporter:
            reporter.restart()
            await until(lambda: found(blocks.index, metas) == [("pool-a", Tier.HOST, 3)])
            blocks.keep_only(["somebody else"])
            assert found(blocks.index, metas) == []
            await until(lambda: found(blocks.index, metas) == [("pool-a", Tier.HOST, 3)])


async def test_a_controller_that_is_not_there_yet(tmp_path: Path) -> None:
    metas, holder = chain("a", 2), Holder()
    async with running_controller(make_service(tmp_path)) as cluster:
        address = cluster.service.address
    async with reporting(address, holder) as reporter:
        reporter.restart()
        holder.stored(metas)
        reporter.changed()
        port = int(address.rpartition(":")[2])
        async with running_controller(make_service(tmp_path, port=port)) as cluster:
            index = cluster.service.shell.blocks.index
            await until(lambda: found(index, metas) == [("pool-a", Tier.HOST, 2)])


async def test_what_no_holder_says_is_refused(tmp_path: Path) -> None:
    async with (
        running_controller(make_service(tmp_path)) as cluster,
        grpc.aio.insecure_channel(cluster.service.address, options=channel_options()) as channel,
    ):
        stub: Any = controller_pb2_grpc.ControllerStub(channel)
        event = controller_pb2.BlockEvent(kind="eaten", tier="host", keys=[b"k"])
        request = controller_pb2.BlockReport(holder="pool-a", life=1, events=[event])
        with pytest.raises(grpc.aio.AioRpcError, match="eaten") as caught:
            await stub.ReportBlocks(request, timeout=WAIT_S)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
