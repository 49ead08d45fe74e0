"""Being known to the controller: one stream of heartbeats that is opened again when it ends."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable

import grpc

from protos.baton.internal.v1 import controller_pb2, controller_pb2_grpc
from protos.serving import channel_options

log = logging.getLogger(__name__)

HEARTBEAT_S = 5.0
_FIRST_BACKOFF_S = 0.1
_MAX_BACKOFF_S = 5.0


class Presence:
    """Keeps a ``MemberSession`` open until cancelled. ``heartbeat`` makes each message up."""

    def __init__(
        self,
        controller_address: str,
        heartbeat: Callable[[], controller_pb2.MemberHeartbeat],
        *,
        heartbeat_s: float = HEARTBEAT_S,
    ) -> None:
        self._address = controller_address
        self._heartbeat = heartbeat
        self._heartbeat_s = heartbeat_s
        self._epoch = 0

    async def run(self) -> None:
        """Connect, and again after each loss, with a pause that grows to a bound."""
        backoff_s = _FIRST_BACKOFF_S
        async with grpc.aio.insecure_channel(self._address, options=channel_options()) as channel:
            stub = controller_pb2_grpc.ControllerStub(channel)
            while True:
                why = "it ended"
                try:
                    async for view in stub.MemberSession(self._heartbeats()):
                        self._epoch = max(self._epoch, view.epoch)
                        backoff_s = _FIRST_BACKOFF_S
                except grpc.aio.AioRpcError as error:
                    why = f"{error.code().name}: {error.details()}"
                log.info("session with the controller at %s is over (%s)", self._address, why)
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, _MAX_BACKOFF_S)

    async def _heartbeats(self) -> AsyncIterator[controller_pb2.MemberHeartbeat]:
        while True:
            message = self._heartbeat()
            message.known_epoch = self._epoch
            yield message
            await asyncio.sleep(self._heartbeat_s)
