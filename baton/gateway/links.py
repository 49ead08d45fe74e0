"""Lines to the instances: one per life of an instance, made when first needed.

A link holds one channel and one ``Tokens`` stream, which carries the tokens of all requests that
this gateway has there. Each token record wakes exactly the submission it belongs to. When the
stream ends for whatever reason, tokens may be lost: the link is over, and every submission on it
is told.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections import deque
from collections.abc import Callable, Iterable

import grpc
import grpc.aio

from baton.core.clock import Clock
from baton.core.cluster import Target
from baton.core.errors import BatonError, InstanceLost, Stage
from baton.core.request import TokenOutput
from protos.baton.internal.v1 import controller_pb2, instance_pb2, instance_pb2_grpc
from protos.convert import error_from_info, output_from_record
from protos.serving import channel_options
from protos.status import error_from_rpc

_LOG = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 3.0
CALL_TIMEOUT_S = 5.0
_MAX_BATCH = 64


@dataclasses.dataclass(frozen=True, slots=True)
class Output:
    """Tokens from an instance."""

    output: TokenOutput
    target: Target


@dataclasses.dataclass(frozen=True, slots=True)
class Lost:
    """An instance that this submission is on died, froze, or cannot be heard any more."""

    target: Target
    error: BatonError


class Inbox:
    """What the links have for one submission, in order of arrival. One reader."""

    def __init__(self) -> None:
        self._items: deque[Output | Lost] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def put(self, item: Output | Lost) -> None:
        """Wake the reader."""
        self._items.append(item)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def get(self, timeout_s: float) -> Output | Lost | None:
        """The next item; ``None`` if nothing came within ``timeout_s``."""
        if not self._items:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                async with asyncio.timeout(max(0.0, timeout_s)):
                    await self._waiter
            except TimeoutError:
                pass
            finally:
                self._waiter = None
        return self._items.popleft() if self._items else None


@dataclasses.dataclass(slots=True, eq=False)
class _Submit:
    item: instance_pb2.SubmitItem
    future: asyncio.Future[None]


def _fail_all(submits: Iterable[_Submit], error: BatonError) -> None:
    for submit in submits:
        if not submit.future.done():
            submit.future.set_exception(error)


class InstanceLink:
    """The line to one life of one instance."""

    def __init__(
        self,
        target: Target,
        gateway_id: str,
        clock: Clock,
        on_lost: Callable[[InstanceLink], None],
    ) -> None:
        """``on_lost`` is called once, when the link is over."""
        self.target = target
        self._on_lost = on_lost
        self.last_heard_s = clock.now()
        self._clock = clock
        self._gateway_id = gateway_id
        self._channel = grpc.aio.insecure_channel(target.address, options=channel_options())
        self._stub = instance_pb2_grpc.InstanceStub(self._channel)
        self._inboxes: dict[str, Inbox] = {}
        self._submits: deque[_Submit] = deque()
        self._aborts: dict[str, int] = {}
        self._wake = asyncio.Event()
        self._open: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # Nobody may be waiting when it fails.
        self._open.add_done_callback(lambda future: future.cancelled() or future.exception())
        self._error: BatonError | None = None
        self._reader: asyncio.Task[None] | None = None
        self._sender = asyncio.create_task(self._send())
        self._sender.add_done_callback(self._on_sender_done)

    @property
    def lost(self) -> BatonError | None:
        """Why this link is over; ``None`` while it works."""
        return self._error

    def attach(self, request_id: str, inbox: Inbox) -> None:
        """Deliver this submission's tokens to ``inbox`` until :meth:`detach`."""
        self._inboxes[request_id] = inbox
        if self._reader is None and self._error is None:
            # Not before: an instance takes a second stream of this gateway for a new beginning,
            # and a link that is only there to abort must not cause one.
            self._reader = asyncio.create_task(self._read())

    def detach(self, request_id: str) -> None:
        """Deliver nothing more. Idempotent."""
        self._inboxes.pop(request_id, None)

    async def submit(self, item: instance_pb2.SubmitItem) -> None:
        """Hand over an attached submission, once the token stream stands.

        Raises BatonError if it is refused or the link is lost.
        """
        await asyncio.shield(self._open)
        if self._error is not None:
            raise self._error
        submit = _Submit(item, asyncio.get_running_loop().create_future())
        self._submits.append(submit)
        self._wake.set()
        try:
            await submit.future
        finally:
            # Cancelled before it was sent: it never is.
            submit.future.cancel()

    def abort(self, request_id: str, attempt: int) -> None:
        """End a submission there, in the background, after all submits made before."""
        if self._error is None:
            self._aborts[request_id] = max(attempt, self._aborts.get(request_id, 0))
            self._wake.set()

    def fail(self, error: BatonError) -> None:
        """The link is over: tell everyone on it, once."""
        if self._error is not None:
            return
        self._error = error
        if not self._open.done():
            self._open.set_exception(error)
        _fail_all(self._submits, error)
        self._submits.clear()
        inboxes, self._inboxes = self._inboxes, {}
        for inbox in inboxes.values():
            inbox.put(Lost(self.target, error))
        self._wake.set()
        if self._reader is not None:
            self._reader.cancel()
        self._on_lost(self)

    async def close(self) -> None:
        """Send the aborts that are waiting (bounded), then let go of everything."""
        if self._aborts and self._error is None:
            await self._send_aborts()
        self.fail(InstanceLost("the gateway closed the line"))
        self._sender.cancel()
        tasks = [self._sender] if self._reader is None else [self._reader, self._sender]
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._channel.close(None)

    async def _read(self) -> None:
        error: BatonError = InstanceLost(f"instance {self.target.instance_id} ended its stream")
        try:
            call = self._stub.Tokens(instance_pb2.TokensRequest(gateway_id=self._gateway_id))
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await call.initial_metadata()
            self.last_heard_s = self._clock.now()
            self._open.set_result(None)
            async for batch in call:
                self.last_heard_s = self._clock.now()
                if batch.incarnation != self.target.incarnation:
                    error = InstanceLost(
                        f"instance {self.target.instance_id} is incarnation {batch.incarnation}, "
                        f"not {self.target.incarnation}"
                    )
                    break
                for record in batch.outputs:
                    inbox = self._inboxes.get(record.request_id)
                    if inbox is not None:
                        inbox.put(Output(output_from_record(record), self.target))
        except TimeoutError:
            error = InstanceLost(
                f"instance {self.target.instance_id} did not answer within {CONNECT_TIMEOUT_S:g} s"
            )
        except grpc.aio.AioRpcError as broken:
            error = InstanceLost(
                f"connection to instance {self.target.instance_id} broke: {broken.details()}"
            )
        except ValueError as bad:  # a record that does not convert
            error = InstanceLost(f"instance {self.target.instance_id} sent nonsense: {bad}")
        finally:
            self.fail(error)

    async def _send(self) -> None:
        """One call at a time, so that an abort never overtakes its submit."""
        while self._error is None:
            await self._wake.wait()
            self._wake.clear()
            while self._error is None and (self._submits or self._aborts):
                if self._submits:
                    await self._send_submits()
                else:
                    await self._send_aborts()

    def _on_sender_done(self, sender: asyncio.Task[None]) -> None:
        # Without a sender a submit would wait for ever.
        if not sender.cancelled() and (bug := sender.exception()) is not None:
            _LOG.error("the line to %s broke", self.target.instance_id, exc_info=bug)
            self.fail(InstanceLost(f"the line to instance {self.target.instance_id} broke"))

    async def _send_submits(self) -> None:
        batch: list[_Submit] = []
        while self._submits and len(batch) < _MAX_BATCH:
            submit = self._submits.popleft()
            if not submit.future.done():
                batch.append(submit)
        if not batch:
            return
        message = instance_pb2.SubmitBatch(items=[submit.item for submit in batch])
        try:
            reply = await self._stub.Submit(message, timeout=CALL_TIMEOUT_S)
        except grpc.aio.AioRpcError as broken:
            error = InstanceLost(
                f"submit to instance {self.target.instance_id} failed: {broken.details()}"
            )
            _fail_all(batch, error)
            return
        except asyncio.CancelledError:
            _fail_all(batch, self._error or InstanceLost("the gateway closed the line"))
            raise
        for index, submit in enumerate(batch):
            if submit.future.done():
                continue
            if index >= len(reply.replies):
                submit.future.set_exception(InstanceLost("an instance left a submit unanswered"))
            elif reply.replies[index].HasField("error"):
                submit.future.set_exception(error_from_info(reply.replies[index].error))
            else:
                submit.future.set_result(None)

    async def _send_aborts(self) -> None:
        aborts, self._aborts = self._aborts, {}
        message = instance_pb2.AbortBatch(
            items=[instance_pb2.AbortItem(request_id=r, attempt=a) for r, a in aborts.items()]
        )
        for last in (False, True):
            try:
                await self._stub.Abort(message, timeout=CALL_TIMEOUT_S)
                return
            except grpc.aio.AioRpcError as broken:
                if last:
                    error = error_from_rpc(broken, stage=Stage.CONTROL)
                    _LOG.warning("abort at %s failed: %s", self.target.instance_id, error)
                    if self._reader is None:
                        self.fail(InstanceLost(error.message))


class Links:
    """All links of a gateway."""

    def __init__(self, gateway_id: str, clock: Clock) -> None:
        self._gateway_id = gateway_id
        self._clock = clock
        self._links: dict[tuple[str, int], InstanceLink] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def get(self, target: Target) -> InstanceLink:
        """The link to a target; a fresh one if there is none."""
        key = (target.instance_id, target.incarnation)
        link = self._links.get(key)
        if link is None:
            link = self._links[key] = InstanceLink(
                target, self._gateway_id, self._clock, self._on_lost
            )
        return link

    def abort(self, target: Target, request_id: str, attempt: int) -> None:
        """End an attempt at a target, in the background, and listen no more.

        A link that broke is made again for it: the instance may live and go on computing.
        """
        link = self.get(target)
        link.detach(request_id)
        link.abort(request_id, attempt)

    def detach(self, target: Target, request_id: str) -> None:
        """Listen no more for a submission. Idempotent."""
        link = self._links.get((target.instance_id, target.incarnation))
        if link is not None:
            link.detach(request_id)

    def last_heard_s(self, target: Target) -> float:
        """When a target last sent anything; minus infinity without a line to it."""
        link = self._links.get((target.instance_id, target.incarnation))
        return float("-inf") if link is None else link.last_heard_s

    def on_view(self, view: controller_pb2.ClusterView) -> None:
        """Cut the lines to lives that the controller says are over."""
        for item in view.instances:
            name, incarnation = item.record.instance_id, item.record.incarnation
            for key, link in list(self._links.items()):
                older = key[0] == name and key[1] < incarnation
                dead = key == (name, incarnation) and item.state == "dead"
                if older or dead:
                    link.fail(InstanceLost(f"instance {name} is dead"))

    async def close(self) -> None:
        """Close every link; bounded by the time of two calls each."""
        links = list(self._links.values())
        await asyncio.gather(*(link.close() for link in links))
        await asyncio.gather(*self._closing)

    def _on_lost(self, link: InstanceLink) -> None:
        key = (link.target.instance_id, link.target.incarnation)
        if self._links.get(key) is link:
            del self._links[key]
        task = asyncio.create_task(link.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
