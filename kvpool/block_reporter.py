"""Tells the controller what a holder has: its events in order, or everything after a gap."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

import grpc
import grpc.aio

from kvpool.event_log import Gap, KVEventLog
from kvpool.tiers import KVEventBatch, KVSnapshot
from protos.baton.internal.v1 import controller_pb2, controller_pb2_grpc
from protos.serving import channel_options

log = logging.getLogger(__name__)

_COALESCE_S = 0.1
"""Changes come in bursts; the index may be so much behind."""
_MAX_EVENTS = 1024
_TIMEOUT_S = 5.0
_MAX_PAUSE_S = 5.0
CONFIRM_S = 5.0
"""A holder without news makes sure so often that the controller knows it, which forgets all when
it starts again, and holders whose session breaks."""


class BlockReporter:
    """Reports one holder's log until cancelled.

    Args:
        controller: its address.
        events: the holder's log.
        snapshot: everything it has now.
        confirm_s: pause between reports at most.
    """

    def __init__(
        self,
        controller: str,
        events: KVEventLog,
        snapshot: Callable[[], KVSnapshot],
        *,
        confirm_s: float = CONFIRM_S,
    ) -> None:
        self._controller = controller
        self._events = events
        self._snapshot = snapshot
        self._changed = asyncio.Event()
        self._next_seq = 0
        self._confirm_s = confirm_s
        self._answered_at = 0.0

    def changed(self) -> None:
        """There are new events. On the event loop."""
        self._changed.set()

    def restart(self) -> None:
        """Begin with a snapshot: what was there before the log began has no events."""
        self._next_seq = -1
        self._changed.set()

    async def run(self) -> None:
        """Report for ever; a controller that is away is tried again, less and less often."""
        pause_s = _COALESCE_S
        async with grpc.aio.insecure_channel(
            self._controller, options=channel_options()
        ) as channel:
            stub: controller_pb2_grpc.ControllerAsyncStub = controller_pb2_grpc.ControllerStub(
                channel
            )
            while True:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._confirm_s):
                        await self._changed.wait()
                await asyncio.sleep(pause_s)
                self._changed.clear()
                try:
                    await self._report(stub)
                except grpc.aio.AioRpcError as error:
                    log.info("the controller was not told of KV blocks: %s", error.details())
                    self._changed.set()
                    pause_s = min(2 * pause_s, _MAX_PAUSE_S)
                else:
                    pause_s = _COALESCE_S

    async def _report(self, stub: controller_pb2_grpc.ControllerAsyncStub) -> None:
        now = asyncio.get_running_loop().time
        batch = self._events.batch_after(self._next_seq, _MAX_EVENTS)
        if batch is None and now() - self._answered_at >= self._confirm_s:
            batch = KVEventBatch(self._events.holder, self._events.life, self._next_seq, ())
        while batch is not None:
            if isinstance(batch, Gap):
                await self._send_snapshot(stub)
            else:
                reply = await stub.ReportBlocks(_batch_to_record(batch), timeout=_TIMEOUT_S)
                if reply.need_snapshot:
                    await self._send_snapshot(stub)
                else:
                    self._next_seq = batch.next_seq
            self._answered_at = now()
            batch = self._events.batch_after(self._next_seq, _MAX_EVENTS)

    async def _send_snapshot(self, stub: controller_pb2_grpc.ControllerAsyncStub) -> None:
        snapshot = self._snapshot()
        await stub.ReportBlocks(_snapshot_to_record(snapshot), timeout=_TIMEOUT_S)
        self._next_seq = snapshot.next_seq


def _batch_to_record(batch: KVEventBatch) -> controller_pb2.BlockReport:
    return controller_pb2.BlockReport(
        holder=batch.holder,
        life=batch.life,
        first_seq=batch.first_seq,
        events=[
            controller_pb2.BlockEvent(
                kind=event.kind, tier=event.tier, to=event.to or "", keys=event.keys
            )
            for event in batch.events
        ],
    )


def _snapshot_to_record(snapshot: KVSnapshot) -> controller_pb2.BlockReport:
    return controller_pb2.BlockReport(
        holder=snapshot.holder,
        life=snapshot.life,
        first_seq=snapshot.next_seq,
        snapshot=True,
        blocks=[controller_pb2.TierBlocks(tier=tier, keys=keys) for tier, keys in snapshot.blocks],
    )
