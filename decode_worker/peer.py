"""One stream to one prefill instance, for all requests that come from there, and its pulls."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Protocol

import grpc
import grpc.aio

from baton.core.cluster import Target
from baton.core.errors import Stage
from kvpool.transport import Endpoint
from protos.baton.internal.v1 import instance_pb2, instance_pb2_grpc
from protos.serving import channel_options
from protos.status import error_from_rpc

logger = logging.getLogger(__name__)

_WELCOME_TIMEOUT_S = 5.0
_PULL_THREADS = 2
"""Per peer: one that stalls must not stall the others' pulls."""

Key = tuple[str, int]
"""(request_id, attempt)."""


class PeerListener(Protocol):
    """Who hears what a prefill instance says. All calls come on the event loop."""

    def on_chunk(self, chunk: instance_pb2.ChunkReady, endpoints: tuple[Endpoint, ...]) -> None:
        """Blocks were published."""

    def on_failed(self, failed: instance_pb2.HandoffFailed) -> None:
        """The prefill side has nothing (more) for a request."""

    def on_lost(self, peer: PeerLink, reason: str) -> None:
        """The stream ended; nothing more will come for any of its requests."""


class PeerLink:
    """The decode side's end of the handoff stream to one life of a prefill instance."""

    def __init__(
        self,
        target: Target,
        listener: PeerListener,
        *,
        instance_id: str,
        incarnation: int,
        kv_layout: str,
        renew_every_s: float,
        wanted: Callable[[PeerLink], list[Key]],
    ) -> None:
        self.target = target
        self._listener = listener
        self._hello = instance_pb2.HandoffHello(
            instance_id=instance_id, incarnation=incarnation, kv_layout=kv_layout
        )
        self._renew_every_s = renew_every_s
        self._wanted = wanted
        self._outgoing: asyncio.Queue[instance_pb2.HandoffMessage | None] = asyncio.Queue()
        """``None`` ends our half of the stream."""
        self._closed = False
        self.threads = concurrent.futures.ThreadPoolExecutor(
            _PULL_THREADS, thread_name_prefix=f"pull-{target.instance_id}"
        )
        """Where pulls from this peer run; those not begun are cancelled when the link ends."""
        self.endpoints: tuple[Endpoint, ...] = ()
        """Where the peer's cache can be pulled from; known after its welcome."""
        self._task = asyncio.ensure_future(self._run())
        self._renewer: asyncio.TimerHandle | None = None
        """Runs while anything is wanted."""

    def want(self, key: Key) -> None:
        """Ask for what is published of a request, or keep its lease."""
        want = instance_pb2.HandoffWant(request_id=key[0], attempt=key[1])
        self._send(instance_pb2.HandoffMessage(want=want))
        if self._renewer is None and not self._closed:
            loop = asyncio.get_running_loop()
            self._renewer = loop.call_later(self._renew_every_s, self._renew)

    def done(self, key: Key, *, ok: bool) -> None:
        """Let the prefill side release a request's blocks."""
        done = instance_pb2.HandoffDone(request_id=key[0], attempt=key[1], ok=ok)
        self._send(instance_pb2.HandoffMessage(done=done))

    def abandon(self) -> None:
        """Say nothing to the listener any more and begin no more pulls. Idempotent."""
        self._closed = True
        if self._renewer is not None:
            self._renewer.cancel()
            self._renewer = None
        self.threads.shutdown(wait=False, cancel_futures=True)

    async def close(self) -> None:
        """End the stream and the channel. Idempotent; says nothing to the listener."""
        self.abandon()
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def _send(self, message: instance_pb2.HandoffMessage) -> None:
        self._outgoing.put_nowait(message)

    def _renew(self) -> None:
        self._renewer = None
        for key in self._wanted(self):
            self.want(key)

    async def _messages(self) -> AsyncIterator[instance_pb2.HandoffMessage]:
        yield instance_pb2.HandoffMessage(hello=self._hello)
        while (message := await self._outgoing.get()) is not None:
            yield message

    async def _run(self) -> None:
        reason = "the stream ended"
        try:
            async with grpc.aio.insecure_channel(
                self.target.address, options=channel_options()
            ) as channel:
                stub: instance_pb2_grpc.InstanceAsyncStub = instance_pb2_grpc.InstanceStub(channel)
                call = stub.Handoff(self._messages())
                events = aiter(call)
                self.endpoints = await self._welcome(events)
                async for event in events:
                    kind = event.WhichOneof("what")
                    if kind == "chunk":
                        self._listener.on_chunk(event.chunk, self.endpoints)
                    elif kind == "failed":
                        self._listener.on_failed(event.failed)
        except asyncio.CancelledError:
            raise
        except grpc.RpcError as error:
            reason = error_from_rpc(error, stage=Stage.HANDOFF).message
        except (TimeoutError, ValueError) as error:
            reason = str(error)
        except Exception as error:  # a bug must cost a recomputation, not a stuck request
            logger.exception("handoff stream from %s", self.target.instance_id)
            reason = repr(error)
        finally:
            # Also ends the task that writes, which gRPC would leave waiting for a next message.
            self._outgoing.put_nowait(None)
        if not self._closed:
            self.abandon()
            self._listener.on_lost(self, reason)

    async def _welcome(
        self, events: AsyncIterator[instance_pb2.HandoffEvent]
    ) -> tuple[Endpoint, ...]:
        async with asyncio.timeout(_WELCOME_TIMEOUT_S):
            first = await anext(events, None)
        if first is None or not first.HasField("welcome"):
            raise ValueError("the prefill side closed the handoff stream without a welcome")
        welcome = first.welcome
        if welcome.incarnation != self.target.incarnation:
            raise ValueError(
                f"{self.target.instance_id} is at incarnation {welcome.incarnation}, "
                f"not {self.target.incarnation}"
            )
        return endpoints_from(welcome.endpoints)


def endpoints_from(records: Iterable[instance_pb2.EndpointRecord]) -> tuple[Endpoint, ...]:
    """From the wire."""
    return tuple(
        Endpoint(item.transport, item.address, item.token, item.layout) for item in records
    )
