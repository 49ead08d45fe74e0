"""The gateway's line to the controller: the cluster's view, placements, outcomes.

The session stream tells the controller that this gateway exists and brings a new view at each
change. While the controller is away, what is placed goes on, and what is not waits within its
budget. Everything here runs on one event loop.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
from collections import deque
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
import grpc.aio

from baton.core.clock import Clock
from baton.core.cluster import Placement
from baton.core.errors import BatonError, Stage, Unavailable
from baton.gateway.backoff import Backoff
from protos.baton.internal.v1 import controller_pb2, controller_pb2_grpc
from protos.convert import error_from_info, target_from_record
from protos.serving import channel_options
from protos.status import error_from_rpc

_LOG = logging.getLogger(__name__)

HEARTBEAT_S = 5.0
MAX_CALLS = 256
"""Of a lane, under way at once; the controller may hold each for as long as it queues."""
MAX_PENDING_OUTCOMES = 10_000
_CALL_SPACING_S = 0.005
_FEW_CALLS = 32
"""With so many more held, the next batch forms for as long again: it is to be larger."""
_PLACE_SLACK_S = 2.0
_REPORT_TIMEOUT_S = 5.0
_MAX_BATCH = 256


@dataclasses.dataclass(frozen=True, slots=True)
class Member:
    """How this gateway introduces itself."""

    gateway_id: str
    address: str
    http_address: str
    node_id: str


@dataclasses.dataclass(slots=True, eq=False)
class _Pending:
    request: controller_pb2.PlaceRequest
    due_s: float
    future: asyncio.Future[Placement]


class _Lane:
    """Requests for places that may wait equally long: what one lane holds never delays another."""

    def __init__(self) -> None:
        self.pending: deque[_Pending] = deque()
        self.wake = asyncio.Event()
        self.calls: set[asyncio.Task[None]] = set()


class Cluster:
    """One controller, seen from one gateway. ``start``, then use, then ``stop``."""

    def __init__(
        self,
        address: str,
        clock: Clock,
        *,
        on_view: Callable[[controller_pb2.ClusterView], None],
    ) -> None:
        """``on_view`` is called on the loop with each new view, and once more at a disconnect."""
        self._address = address
        self._clock = clock
        self._on_view = on_view
        self._view: controller_pb2.ClusterView | None = None
        self._connected = asyncio.Event()
        self._online, self._offline = self._lanes = (_Lane(), _Lane())
        self._outcomes: deque[controller_pb2.Outcome] = deque(maxlen=MAX_PENDING_OUTCOMES)
        self._wake_report = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._channel: grpc.aio.Channel | None = None
        self._member: Member | None = None

    def start(self, member: Member) -> None:
        """Begin to connect; returns at once. Called on the loop."""
        self._member = member
        self._channel = grpc.aio.insecure_channel(self._address, options=channel_options())
        self._stub = controller_pb2_grpc.ControllerStub(self._channel)
        placing = [self._keep_placing(lane) for lane in self._lanes]
        loops = (self._keep_session(), *placing, self._keep_reporting())
        self._tasks = [asyncio.create_task(loop) for loop in loops]

    async def stop(self) -> None:
        """Deliver the outcomes that are waiting (bounded), then leave the cluster."""
        if self._connected.is_set() and self._outcomes:
            await self._report()
        tasks = [*self._tasks, *self._online.calls, *self._offline.calls]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for lane in self._lanes:
            while lane.pending:
                self._fail(lane.pending.popleft(), Unavailable("the gateway is stopping"))
        if self._channel is not None:
            await self._channel.close(None)

    async def wait_failed(self) -> BaseException:
        """Return why one of the background loops ended: none ever should."""
        done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        return done.pop().exception() or RuntimeError("a loop of the gateway ended")

    @property
    def view(self) -> controller_pb2.ClusterView | None:
        """The last view received, also while the controller is away."""
        return self._view

    @property
    def why_not_ready(self) -> str | None:
        """Why a new request could not be placed now; ``None`` when it could."""
        if not self._connected.is_set() or self._view is None:
            return "no connection to the controller"
        if not self._view.ready:
            return "no usable prefill and decode path"
        return None

    @property
    def max_model_len(self) -> int | None:
        """The longest sequence that every instance can hold; ``None`` before any is known."""
        if self._view is None:
            return None
        lengths = [
            item.record.max_model_len
            for item in self._view.instances
            if item.state != "dead" and item.record.max_model_len
        ]
        return min(lengths, default=None)

    async def place(self, request: controller_pb2.PlaceRequest, *, timeout_s: float) -> Placement:
        """Ask where a submission shall run. ``budget_s`` is filled in when the call is made.

        Raises Unavailable (retryable) when no placement came in time, or the controller's error.
        """
        future: asyncio.Future[Placement] = asyncio.get_running_loop().create_future()
        pending = _Pending(request, self._clock.now() + timeout_s, future)
        lane = self._offline if request.priority < 0 else self._online
        lane.pending.append(pending)
        lane.wake.set()
        try:
            async with asyncio.timeout(timeout_s + _PLACE_SLACK_S):
                return await future
        except TimeoutError:
            raise self._no_placement() from None
        finally:
            if not future.done():
                future.cancel()

    def report(self, outcome: controller_pb2.Outcome) -> None:
        """Tell the controller how a request ended; in the background, oldest dropped if many."""
        self._outcomes.append(outcome)
        self._wake_report.set()

    def _no_placement(self) -> Unavailable:
        reason = self.why_not_ready or "the controller did not answer in time"
        return Unavailable(f"no placement: {reason}", stage=Stage.PLACEMENT, retry_after_s=1.0)

    # --- the session

    async def _keep_session(self) -> None:
        backoff = Backoff()
        while True:
            try:
                async for view in self._stub.MemberSession(self._heartbeats()):
                    backoff.reset()
                    self._view = view
                    self._connected.set()
                    self._on_view(view)
            except grpc.aio.AioRpcError as error:
                _LOG.info("controller session ended: %s", error.details())
            if self._connected.is_set():
                self._connected.clear()
                if self._view is not None:
                    self._on_view(self._view)
            await backoff.wait()

    async def _heartbeats(self) -> AsyncIterator[controller_pb2.MemberHeartbeat]:
        assert self._member is not None
        while True:
            yield controller_pb2.MemberHeartbeat(
                kind="gateway",
                member_id=self._member.gateway_id,
                address=self._member.address,
                http_address=self._member.http_address,
                node_id=self._member.node_id,
                pid=os.getpid(),
                rss_bytes=rss_bytes(),
                known_epoch=self._view.epoch if self._view is not None else 0,
            )
            await asyncio.sleep(HEARTBEAT_S)

    # --- placements

    async def _keep_placing(self, lane: _Lane) -> None:
        while True:
            await lane.wake.wait()
            lane.wake.clear()
            while lane.pending:
                if not await self._until_connected(lane):
                    continue
                batch = self._take_batch(lane)
                if not batch:
                    continue
                call = asyncio.create_task(self._place_batch(lane, batch))
                lane.calls.add(call)
                call.add_done_callback(lane.calls.discard)
                # The next batch forms while this call is under way; but the controller may hold
                # the call (it queues), and that must not hold up those who come later.
                spacing_s = _CALL_SPACING_S * (1 + len(lane.calls) // _FEW_CALLS)
                await asyncio.wait({call}, timeout=spacing_s)
                if len(lane.calls) >= MAX_CALLS:
                    await asyncio.wait(lane.calls, return_when=asyncio.FIRST_COMPLETED)

    async def _until_connected(self, lane: _Lane) -> bool:
        """Wait for the controller until the first pending request is overdue, and fail those."""
        first_due_s = min(item.due_s for item in lane.pending)
        try:
            async with asyncio.timeout(max(0.0, first_due_s - self._clock.now())):
                await self._connected.wait()
        except TimeoutError:
            now = self._clock.now()
            for item in [item for item in lane.pending if item.due_s <= now]:
                lane.pending.remove(item)
                self._fail(item, self._no_placement())
            return False
        return True

    def _take_batch(self, lane: _Lane) -> list[_Pending]:
        batch: list[_Pending] = []
        now = self._clock.now()
        while lane.pending and len(batch) < _MAX_BATCH:
            item = lane.pending.popleft()
            if item.future.done():
                continue
            if item.due_s <= now:
                self._fail(item, self._no_placement())
                continue
            item.request.budget_s = item.due_s - now
            batch.append(item)
        return batch

    async def _place_batch(self, lane: _Lane, batch: list[_Pending]) -> None:
        assert self._member is not None
        message = controller_pb2.PlaceBatch(
            gateway_id=self._member.gateway_id, requests=[item.request for item in batch]
        )
        timeout_s = max(item.request.budget_s for item in batch) + _PLACE_SLACK_S / 2
        left = {(item.request.request_id, item.request.attempt): item for item in batch}
        try:
            async for reply in self._stub.Place(message, timeout=timeout_s):
                for answer in reply.replies:
                    item = left.pop((answer.request_id, answer.attempt))
                    if item.future.done():
                        continue
                    if answer.HasField("error"):
                        self._fail(item, error_from_info(answer.error))
                    else:
                        item.future.set_result(_placement(answer))
        except grpc.aio.AioRpcError as error:
            self._retry_or_fail(lane, list(left.values()), error)
            return
        for item in left.values():
            self._fail(item, self._no_placement())

    def _retry_or_fail(
        self, lane: _Lane, batch: list[_Pending], error: grpc.aio.AioRpcError
    ) -> None:
        """The controller went away in the middle: those with time left wait for its return."""
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            for item in batch:
                self._fail(item, self._no_placement())
            return
        # A controller that stops cancels the calls it holds.
        if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
            for item in batch:
                self._fail(item, error_from_rpc(error, stage=Stage.PLACEMENT))
            return
        if self._connected.is_set():
            # The session will notice by itself; until then do not call again and again.
            asyncio.get_running_loop().call_later(0.1, self._requeue, lane, batch)
        else:
            self._requeue(lane, batch)

    @staticmethod
    def _requeue(lane: _Lane, batch: list[_Pending]) -> None:
        lane.pending.extendleft(item for item in reversed(batch) if not item.future.done())
        lane.wake.set()

    @staticmethod
    def _fail(item: _Pending, error: BatonError) -> None:
        if not item.future.done():
            item.future.set_exception(error)

    # --- outcomes

    async def _keep_reporting(self) -> None:
        backoff = Backoff()
        while True:
            await self._wake_report.wait()
            self._wake_report.clear()
            while self._outcomes:
                await self._connected.wait()
                if await self._report():
                    backoff.reset()
                else:
                    await backoff.wait()

    async def _report(self) -> bool:
        assert self._member is not None
        batch = [self._outcomes.popleft() for _ in range(min(_MAX_BATCH, len(self._outcomes)))]
        message = controller_pb2.OutcomeBatch(gateway_id=self._member.gateway_id, outcomes=batch)
        try:
            await self._stub.ReportOutcomes(message, timeout=_REPORT_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            _LOG.info("outcomes not delivered yet: %s", error.details())
            self._outcomes.extendleft(reversed(batch))
            return False
        return True


def _placement(reply: controller_pb2.PlaceReply) -> Placement:
    return Placement(
        request_id=reply.request_id,
        attempt=reply.attempt,
        prefill=target_from_record(reply.prefill),
        decode=target_from_record(reply.decode),
        fallback_prefill=(
            target_from_record(reply.fallback_prefill)
            if reply.HasField("fallback_prefill")
            else None
        ),
        fallback_decode=(
            target_from_record(reply.fallback_decode) if reply.HasField("fallback_decode") else None
        ),
        tentative=reply.tentative,
    )


def rss_bytes() -> int:
    """Resident memory of this process; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
