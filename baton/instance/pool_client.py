"""An instance's arena: asked of the machine's pool node, and given back."""

from __future__ import annotations

import logging
import os

import grpc
import grpc.aio

from baton.core.errors import ConfigError, Stage, Unavailable
from baton.instance.spec import InstanceSpec
from kvpool.arena import BlockArena
from protos.baton.internal.v1 import pool_pb2, pool_pb2_grpc
from protos.baton.v1 import cluster_pb2, cluster_pb2_grpc
from protos.serving import channel_options

logger = logging.getLogger(__name__)

_ALLOCATE_TIMEOUT_S = 10.0
_RELEASE_TIMEOUT_S = 1.0
_LOOKUP_TIMEOUT_S = 2.0


class PoolClient:
    """Speaks to the pool node of this machine for one life of an instance.

    Args:
        spec: names the pool node as it was when the cluster started.
        nonce: of this process; a new process gets a new arena.
    """

    def __init__(self, spec: InstanceSpec, nonce: int) -> None:
        assert spec.pool_address is not None
        self._spec = spec
        self._nonce = nonce
        self._address = spec.pool_address

    async def allocate(self, *, block_bytes: int, layout: str) -> BlockArena:
        """A shared arena for the blocks of all of the instance's dp groups.

        Raises ConfigError where the machine has no room for it, Unavailable where the pool node
        does not answer: a later start may find it.
        """
        # A restarted pool node may have another port; the controller knows it by its machine.
        spec = self._spec
        self._address = await find_pool(spec.controller_address, spec.node_id) or self._address
        request = pool_pb2.AllocateArenaRequest(
            instance_id=self._spec.instance_id,
            nonce=self._nonce,
            pid=os.getpid(),
            num_blocks=self._spec.num_blocks,
            block_bytes=block_bytes,
            layout=layout,
        )
        async with grpc.aio.insecure_channel(self._address, options=channel_options()) as channel:
            stub: pool_pb2_grpc.PoolNodeAsyncStub = pool_pb2_grpc.PoolNodeStub(channel)
            try:
                reply = await stub.AllocateArena(
                    request, timeout=_ALLOCATE_TIMEOUT_S, wait_for_ready=True
                )
            except grpc.aio.AioRpcError as error:
                text = f"the pool node at {self._address} gave no KV arena: {error.details()}"
                if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
                    raise ConfigError(text, param="engine.num_blocks") from error
                raise Unavailable(text, stage=Stage.CONTROL) from error
        return BlockArena.open(reply.path, reply.token, writable=True)

    async def release(self) -> None:
        """Let go of the arena, also where an answer never came. Bounded; never raises."""
        request = pool_pb2.ReleaseArenaRequest(
            instance_id=self._spec.instance_id, nonce=self._nonce
        )
        async with grpc.aio.insecure_channel(self._address, options=channel_options()) as channel:
            stub: pool_pb2_grpc.PoolNodeAsyncStub = pool_pb2_grpc.PoolNodeStub(channel)
            try:
                await stub.ReleaseArena(request, timeout=_RELEASE_TIMEOUT_S)
            except grpc.aio.AioRpcError:
                logger.info("the pool node is gone already; it releases arenas by itself")


async def find_pool(controller_address: str, node_id: str) -> str | None:
    """Where a machine's pool node is now, as the controller knows; ``None`` if it does not."""
    async with grpc.aio.insecure_channel(controller_address, options=channel_options()) as channel:
        stub: cluster_pb2_grpc.ClusterAsyncStub = cluster_pb2_grpc.ClusterStub(channel)
        try:
            status = await stub.GetStatus(cluster_pb2.GetStatusRequest(), timeout=_LOOKUP_TIMEOUT_S)
        except grpc.aio.AioRpcError:
            return None
    for member in status.members:
        if member.kind == "pool" and member.node_id == node_id:
            return member.address
    return None
