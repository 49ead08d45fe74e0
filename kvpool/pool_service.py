"""gRPC to a pool node's arenas and host tier, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc

from baton.core.errors import ConfigError
from kvpool.arena_owners import ArenaOwners
from kvpool.host_tier import HostTier
from kvpool.host_values import Grant, Skip
from kvpool.pool_link import ARENA_METADATA
from kvpool.pool_metrics import tier_numbers
from kvpool.tiers import BlockMeta, Tier
from kvpool.transport import Endpoint
from protos.baton.internal.v1 import pool_pb2, pool_pb2_grpc

_TOP = 10


class PoolServicer(pool_pb2_grpc.PoolNodeServicer):
    """One machine's. ``endpoints``: from where other machines pull slots of the host tier."""

    def __init__(
        self, owners: ArenaOwners, tier: HostTier | None, endpoints: Sequence[Endpoint]
    ) -> None:
        self._owners = owners
        self._tier = tier
        self._endpoints = endpoints

    async def AllocateArena(
        self, request: pool_pb2.AllocateArenaRequest, context: Any
    ) -> pool_pb2.AllocateArenaReply:
        """FAILED_PRECONDITION with the numbers if the arena cannot be made."""
        try:
            arena = await self._owners.allocate(
                instance_id=request.instance_id,
                nonce=request.nonce,
                pid=request.pid,
                num_blocks=request.num_blocks,
                block_bytes=request.block_bytes,
                layout=request.layout,
            )
        except ConfigError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, error.message)
            raise
        return pool_pb2.AllocateArenaReply(path=arena.path, token=arena.header.token)

    async def ReleaseArena(
        self, request: pool_pb2.ReleaseArenaRequest, context: Any
    ) -> pool_pb2.ReleaseArenaReply:
        """Idempotent."""
        self._owners.release(request.instance_id, request.nonce)
        return pool_pb2.ReleaseArenaReply()

    async def GetPoolStatus(
        self, request: pool_pb2.GetPoolStatusRequest, context: Any
    ) -> pool_pb2.PoolStatus:
        """All arenas, and the tiers in numbers."""
        tier = self._tier
        return pool_pb2.PoolStatus(
            arenas=[
                pool_pb2.ArenaStatus(
                    instance_id=arena.header.instance_id,
                    nonce=arena.header.nonce,
                    pid=arena.header.pid,
                    path=arena.path,
                    num_bytes=arena.header.num_bytes,
                    layout=arena.header.layout,
                )
                for arena in self._owners.arenas()
            ],
            numbers={} if tier is None else tier_numbers(tier),
            top_prefixes=[] if tier is None else _top_prefixes(tier),
            dump="" if tier is None or not request.dump else tier.dump(),
        )

    async def GetHostTier(
        self, request: pool_pb2.GetHostTierRequest, context: Any
    ) -> pool_pb2.HostTier:
        """Where the arena is, for those who map it or pull from it."""
        if self._tier is None:
            return pool_pb2.HostTier(enabled=False)
        blocks = self._tier.arena.blocks
        return pool_pb2.HostTier(
            enabled=True,
            path=blocks.path or "",
            token=blocks.token,
            layout=blocks.layout,
            num_slots=blocks.num_blocks,
            slot_bytes=blocks.block_bytes,
            endpoints=[
                pool_pb2.EndpointInfo(
                    transport=item.transport,
                    address=item.address,
                    token=item.token,
                    layout=item.layout,
                )
                for item in self._endpoints
            ],
        )

    async def ReserveBlocks(
        self, request: pool_pb2.ReserveBlocksRequest, context: Any
    ) -> pool_pb2.ReserveBlocksReply:
        """INVALID_ARGUMENT for blocks or leases that cannot be."""
        tier = await self._need_tier(context)
        metas = [
            BlockMeta(
                key=block.key,
                parent=block.parent or None,
                depth=block.depth,
                num_tokens=block.num_tokens,
                priority=block.priority,
            )
            for block in request.blocks
        ]
        try:
            granted = tier.reserve(
                metas,
                owner=request.owner,
                lease_s=request.lease_s,
                transient=request.transient,
            )
        except ValueError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
            raise
        return pool_pb2.ReserveBlocksReply(grants=[_grant(item) for item in granted])

    async def PublishBlocks(
        self, request: pool_pb2.PublishBlocksRequest, context: Any
    ) -> pool_pb2.PublishBlocksReply:
        """Tickets that are over do not count; that is no error."""
        tier = await self._need_tier(context)
        filled = [(item.ticket, item.checksum) for item in request.filled]
        return pool_pb2.PublishBlocksReply(published=tier.publish(filled, request.abandoned))

    async def HoldPrefix(
        self, request: pool_pb2.HoldPrefixRequest, context: Any
    ) -> pool_pb2.HoldPrefixReply:
        """Waits for lower tiers, bounded by the request."""
        tier = await self._need_tier(context)
        try:
            hold_id, slots = await tier.hold_prefix(
                list(request.keys),
                owner=request.owner,
                skip=request.skip,
                lease_s=request.lease_s,
                timeout_s=request.timeout_s,
                local_only=request.local_only,
                tiers=frozenset(map(Tier, request.tiers)) or None,
            )
        except ValueError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
            raise
        return pool_pb2.HoldPrefixReply(
            hold_id=hold_id,
            blocks=[
                pool_pb2.HeldBlock(
                    slot=slot.slot,
                    generation=slot.generation,
                    checksum=slot.checksum,
                    tier=slot.tier,
                    num_tokens=slot.num_tokens,
                    priority=slot.priority,
                )
                for slot in slots
            ],
        )

    async def RenewHolds(
        self, request: pool_pb2.RenewHoldsRequest, context: Any
    ) -> pool_pb2.RenewHoldsReply:
        """Holds that are over stay so."""
        tier = await self._need_tier(context)
        try:
            tier.renew(request.hold_ids, request.lease_s)
        except ValueError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
            raise
        return pool_pb2.RenewHoldsReply()

    async def ReleaseHolds(
        self, request: pool_pb2.ReleaseHoldsRequest, context: Any
    ) -> pool_pb2.ReleaseHoldsReply:
        """Idempotent. What was read wrongly is looked at before it is let go."""
        tier = await self._need_tier(context)
        if request.doubtful:
            await tier.verify(request.doubtful)
        tier.release(request.hold_ids)
        return pool_pb2.ReleaseHoldsReply()

    async def _need_tier(self, context: Any) -> HostTier:
        if self._tier is None:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION, "this machine has no host tier"
            )
        assert self._tier is not None
        known = dict(context.invocation_metadata() or ()).get(ARENA_METADATA)
        if known is not None and known != self._tier.arena.blocks.token:
            # Slots of this one would be looked for in that one.
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION, "the host tier is another one: ask for it anew"
            )
        return self._tier


def _top_prefixes(tier: HostTier) -> list[pool_pb2.PrefixUse]:
    return [
        pool_pb2.PrefixUse(key=key, num_blocks=num_blocks, num_lookups=count)
        for key, num_blocks, count in tier.hot.top()[:_TOP]
    ]


def _grant(item: Grant | Skip) -> pool_pb2.BlockGrant:
    if isinstance(item, Skip):
        return pool_pb2.BlockGrant(skipped=item.reason)
    return pool_pb2.BlockGrant(ticket=item.ticket, slot=item.slot, generation=item.generation)
