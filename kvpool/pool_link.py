"""The way to a machine's pool node, for those who read and write its host tier.

Nothing here raises into serving: without an answer there is no hit, no slot, nothing to release.
A pool node that does not answer is left alone for a moment, then looked up again (it may be back
under another address), and its arena is mapped again if it is another one.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import grpc
import grpc.aio

from baton.core.blocks import BlockKey
from kvpool.arena import BlockArena
from kvpool.host_values import Grant
from kvpool.tiers import BlockMeta, Tier
from kvpool.transport import Endpoint, TransportBroken
from protos.baton.internal.v1 import pool_pb2, pool_pb2_grpc
from protos.serving import channel_options

log = logging.getLogger(__name__)

T = TypeVar("T")

ARENA_METADATA = "baton-arena"
"""With a call about slots: the token of the arena in which the caller will look for them. A pool
node that came back under its old address may have another one."""
CALL_TIMEOUT_S = 2.0
_PAUSE_S = 1.0
"""After a call that failed: how long the pool node is not asked again."""


@dataclasses.dataclass(frozen=True, slots=True)
class Slot:
    """A block of the host tier that its reader may read."""

    slot: int
    generation: int
    checksum: int
    tier: Tier
    """Where it was when it was asked for."""


@dataclasses.dataclass(frozen=True, slots=True)
class Hold:
    """Blocks that stay where they are until released, or until the lease ends."""

    hold_id: int
    arena: BlockArena
    endpoints: tuple[Endpoint, ...]
    slots: tuple[Slot, ...]


@dataclasses.dataclass(slots=True)
class LinkCounters:
    """Totals since the start."""

    num_failed_calls: int = 0
    num_holds: int = 0
    num_misses: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class _Host:
    arena: BlockArena
    endpoints: tuple[Endpoint, ...]


def tier_owner(instance_id: str, nonce: int) -> str:
    """What the pool node calls one life of an instance."""
    return f"{instance_id}-{nonce:x}"


class PoolLink:
    """One user's line to one pool node. On one event loop.

    Args:
        owner: who we are; what we hold ends with our process or our leases.
        address: of the pool node, as last known.
        look_up: asks where it is now; ``None`` if nobody knows.
        lease_s: of holds and of slots being filled.
    """

    def __init__(
        self,
        owner: str,
        address: str,
        look_up: Callable[[], Awaitable[str | None]],
        *,
        lease_s: float,
    ) -> None:
        self.owner = owner
        self.counters = LinkCounters()
        self._address = address
        self._look_up = look_up
        self._lease_s = lease_s
        self._channel: grpc.aio.Channel | None = None
        self._host: _Host | None = None
        self._asked = False
        """Whether this life of the pool node has said what its host tier is."""
        self._quiet_until = 0.0
        self._connecting = asyncio.Lock()
        self._releases: set[int] = set()
        self._doubtful: set[BlockKey] = set()
        self._releasing: asyncio.Task[None] | None = None

    async def close(self) -> None:
        """Let go of everything. Bounded."""
        if self._releasing is not None:
            await asyncio.wait([self._releasing], timeout=CALL_TIMEOUT_S)
        await self._disconnect()
        # Unmapped with its last reader.
        self._host = None

    async def hold(
        self,
        keys: Sequence[BlockKey],
        *,
        skip: int,
        timeout_s: float,
        tiers: Sequence[Tier] = (),
    ) -> Hold | None:
        """The pool's longest prefix of ``keys`` without its first ``skip`` blocks; ``None`` for
        nothing beyond these.

        Blocks of lower tiers (of ``tiers``, where any are named) and other machines are brought to
        the host tier first, as far as ``timeout_s`` reaches.
        """
        stub = await self._connect()
        host = self._host
        if stub is None or host is None:
            return None
        request = pool_pb2.HoldPrefixRequest(
            owner=self.owner,
            keys=keys,
            skip=skip,
            lease_s=self._lease_s,
            timeout_s=timeout_s,
            tiers=tiers,
        )
        reply = await self._answer(
            stub.HoldPrefix(
                request, timeout=timeout_s + CALL_TIMEOUT_S, metadata=_metadata(host.arena)
            )
        )
        if reply is None:
            return None
        if not reply.hold_id:
            self.counters.num_misses += 1
            return None
        self.counters.num_holds += 1
        slots = tuple(
            Slot(item.slot, item.generation, item.checksum, Tier(item.tier))
            for item in reply.blocks
        )
        return Hold(reply.hold_id, host.arena, host.endpoints, slots)

    async def renew(self, hold_ids: Sequence[int]) -> None:
        """Make these holds, or tickets, last for another lease."""
        stub = await self._connect()
        if stub is None:
            return
        request = pool_pb2.RenewHoldsRequest(hold_ids=hold_ids, lease_s=self._lease_s)
        await self._answer(stub.RenewHolds(request, timeout=CALL_TIMEOUT_S))

    def release(self, hold_id: int, doubtful: BlockKey | None = None) -> None:
        """Let go of a hold; in the background, with others in one call.

        ``doubtful``: a block of it that did not verify. The pool node looks for itself.
        """
        self._releases.add(hold_id)
        if doubtful is not None:
            self._doubtful.add(doubtful)
        if self._releasing is None or self._releasing.done():
            self._releasing = asyncio.ensure_future(self._release())

    async def reserve(
        self, blocks: Sequence[BlockMeta], *, transient: bool = False
    ) -> tuple[BlockArena, list[Grant | str]] | None:
        """Slots to fill, in the order of ``blocks``, or why the pool does not take one; and the
        arena. Each grant must be published or abandoned.
        """
        stub = await self._connect()
        host = self._host
        if stub is None or host is None:
            return None
        request = pool_pb2.ReserveBlocksRequest(
            owner=self.owner,
            blocks=[
                pool_pb2.BlockRecord(
                    key=block.key,
                    parent=block.parent or b"",
                    depth=block.depth,
                    num_tokens=block.num_tokens,
                    priority=block.priority,
                )
                for block in blocks
            ],
            transient=transient,
            lease_s=self._lease_s,
        )
        reply = await self._answer(
            stub.ReserveBlocks(request, timeout=CALL_TIMEOUT_S, metadata=_metadata(host.arena))
        )
        if reply is None:
            return None
        grants = [
            Grant(item.ticket, item.slot, item.generation) if item.ticket else item.skipped
            for item in reply.grants
        ]
        return host.arena, grants

    async def publish(
        self, filled: Sequence[tuple[int, int]], abandoned: Sequence[int] = ()
    ) -> list[bool]:
        """Say which slots are filled, (ticket, checksum), and which will not be, or are of no use
        any more. Returns which of the filled count."""
        stub = await self._connect()
        if stub is None:
            return [False] * len(filled)
        request = pool_pb2.PublishBlocksRequest(
            filled=[
                pool_pb2.FilledBlock(ticket=ticket, checksum=checksum)
                for ticket, checksum in filled
            ],
            abandoned=abandoned,
        )
        reply = await self._answer(stub.PublishBlocks(request, timeout=CALL_TIMEOUT_S))
        return [False] * len(filled) if reply is None else list(reply.published)

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """From where others pull slots of the host tier; none before the first call."""
        return () if self._host is None else self._host.endpoints

    # The line.

    async def _connect(self) -> pool_pb2_grpc.PoolNodeAsyncStub | None:
        """A stub; ``None`` while the pool node is left alone."""
        if self._channel is not None and self._asked:
            return pool_pb2_grpc.PoolNodeStub(self._channel)
        if time.monotonic() < self._quiet_until:
            return None
        async with self._connecting:
            if self._channel is not None and self._asked:
                return pool_pb2_grpc.PoolNodeStub(self._channel)
            if time.monotonic() < self._quiet_until:
                return None
            await self._disconnect()  # what a caller left that was cancelled below
            self._address = await self._look_up() or self._address
            self._channel = grpc.aio.insecure_channel(self._address, options=channel_options())
            stub: pool_pb2_grpc.PoolNodeAsyncStub = pool_pb2_grpc.PoolNodeStub(self._channel)
            try:
                tier = await stub.GetHostTier(pool_pb2.GetHostTierRequest(), timeout=CALL_TIMEOUT_S)
                self._take_host(tier)
            except (grpc.aio.AioRpcError, TransportBroken) as error:
                await self._failed(error)
                return None
            self._asked = True
            return stub

    def _take_host(self, tier: pool_pb2.HostTier) -> None:
        """Map the arena, unless it is the one that is mapped already. Raises TransportBroken."""
        if not tier.enabled:
            self._host = None
            return
        arena = None if self._host is None else self._host.arena
        if arena is None or arena.token != tier.token:
            # The old one is unmapped with its last reader.
            arena = BlockArena.open(tier.path, tier.token, writable=True)
        endpoints = (
            Endpoint("shm", tier.path, tier.token, tier.layout),
            *(
                Endpoint(item.transport, item.address, item.token, item.layout)
                for item in tier.endpoints
            ),
        )
        self._host = _Host(arena, endpoints)

    async def _answer(self, call: Awaitable[T]) -> T | None:
        """What a call brings; ``None`` after one that failed."""
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            await self._failed(error)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # Not we: the line was ended under this call, because another one failed.
            self.counters.num_failed_calls += 1
        return None

    async def _failed(self, error: Exception) -> None:
        """A call got no answer: leave the pool node alone, then ask for it anew."""
        self.counters.num_failed_calls += 1
        if isinstance(error, grpc.aio.AioRpcError) and (
            error.code() is grpc.StatusCode.FAILED_PRECONDITION
        ):
            # It is there, with another arena.
            await self._disconnect()
            return
        if time.monotonic() >= self._quiet_until:
            log.warning("the pool node at %s does not answer: %s", self._address, error)
        self._quiet_until = time.monotonic() + _PAUSE_S
        await self._disconnect()

    async def _disconnect(self) -> None:
        channel, self._channel, self._asked = self._channel, None, False
        if channel is not None:
            await channel.close(None)

    async def _release(self) -> None:
        while self._releases:
            hold_ids, doubtful = list(self._releases), list(self._doubtful)
            self._releases.clear()
            self._doubtful.clear()
            stub = await self._connect()
            if stub is None:
                return  # their leases end by themselves
            request = pool_pb2.ReleaseHoldsRequest(hold_ids=hold_ids, doubtful=doubtful)
            await self._answer(stub.ReleaseHolds(request, timeout=CALL_TIMEOUT_S))


def _metadata(arena: BlockArena) -> tuple[tuple[str, str], ...]:
    return ((ARENA_METADATA, arena.token),)
