"""Other machines' pool nodes as a tier: who has a prefix, and its blocks pulled into this arena.

The controller's index says who; it may be behind, and then the other side says so. What is pulled
is kept there meanwhile, verified here against the checksum that it was published with, and counts
only then. Any failure is a miss.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

import grpc
import grpc.aio

from baton.core.blocks import BlockKey
from baton.core.clock import Clock
from baton.core.config import TlsConfig
from baton.core.errors import TransferFailed
from kvpool.checksum import checksum
from kvpool.host_values import Grant
from kvpool.slot_filling import fill
from kvpool.tiers import BlockMeta, Tier
from kvpool.transport import BlockCopy, Endpoint, TransferFault
from kvpool.transports.tcp import TcpTransport
from protos.baton.internal.v1 import controller_pb2, controller_pb2_grpc, pool_pb2, pool_pb2_grpc
from protos.serving import channel_options

if TYPE_CHECKING:
    from kvpool.host_tier import HostTier

log = logging.getLogger(__name__)

T = TypeVar("T")

_LEASE_S = 30.0
_LOCATE_TIMEOUT_S = 1.0
_ALONE_S = 5.0
"""A pool node that is the only one asks again whether it is."""
_AVOID_S = 5.0
"""How long a pool node that failed is not asked."""
_MAX_BLOCKS = 64
"""Of one pull."""


class RemotePools:
    """Fetches for one pool node. ``host``: its own address, as others reach it."""

    def __init__(
        self, controller: str, owner: str, host: str, clock: Clock, tls: TlsConfig | None
    ) -> None:
        self._owner = owner
        self._clock = clock
        self._transport = TcpTransport(host, tls=tls)
        self._controller = grpc.aio.insecure_channel(controller, options=channel_options())
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._avoided: dict[str, float] = {}
        self._alone_until = 0.0
        self._releases: set[asyncio.Task[None]] = set()
        self._closing: set[asyncio.Task[None]] = set()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="kv-remote")
        self._faults: collections.Counter[str] = collections.Counter()
        self._faults_lock = threading.Lock()

    @property
    def faults(self) -> dict[str, int]:
        """Fetches that failed since the start, by ``TransferFault``; a peer that merely does not
        have (all of) a prefix is none. From any thread."""
        with self._faults_lock:
            return {fault: self._faults[fault] for fault in TransferFault}

    def _count(self, fault: str) -> None:
        with self._faults_lock:
            self._faults[fault] += 1

    async def close(self) -> None:
        """Release connections and the thread; a pull that runs fails."""
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, self._transport.close)
        await loop.run_in_executor(None, self._thread.shutdown)
        await self._controller.close(None)
        for address in list(self._channels):
            self._avoid(address)
        if self._closing:
            await asyncio.wait(self._closing)

    async def fetch(
        self, tier: HostTier, keys: Sequence[BlockKey], at: int, deadline: float
    ) -> int:
        """Bring ``keys[at:]`` here from whoever has most of it; how many blocks came."""
        address = await self._find(keys, at)
        if address is None:
            return 0
        try:
            return await self._fetch_from(address, tier, keys, at, deadline)
        except (grpc.aio.AioRpcError, TransferFailed) as error:
            log.info("fetching from the pool node at %s failed: %s", address, error)
            self._avoid(address)
            return 0
        except asyncio.CancelledError:
            # The time is up, if it was not the asker who gave up.
            if self._clock.now() >= deadline:
                self._avoid(address)
            raise

    def _avoid(self, address: str) -> None:
        """It failed, and may be gone for good: nothing is kept for it."""
        now = self._clock.now()
        self._avoided = {other: until for other, until in self._avoided.items() if until > now}
        self._avoided[address] = now + _AVOID_S
        channel = self._channels.pop(address, None)
        if channel is not None:
            _keep(self._closing, asyncio.create_task(self._close(channel)))

    async def _find(self, keys: Sequence[BlockKey], at: int) -> str | None:
        now = self._clock.now()
        if now < self._alone_until:
            return None
        stub: controller_pb2_grpc.ControllerAsyncStub = controller_pb2_grpc.ControllerStub(
            self._controller
        )
        try:
            reply = await stub.LocateBlocks(
                controller_pb2.LocateBlocksRequest(keys=keys), timeout=_LOCATE_TIMEOUT_S
            )
        except grpc.aio.AioRpcError:
            self._alone_until = now + _ALONE_S
            return None
        if reply.num_pool_nodes < 2:
            self._alone_until = now + _ALONE_S
        for match in reply.matches:
            if match.num_blocks <= at:
                break
            elsewhere = match.address and match.holder != self._owner
            if elsewhere and self._avoided.get(match.address, 0.0) <= now:
                return match.address
        return None

    async def _fetch_from(
        self, address: str, tier: HostTier, keys: Sequence[BlockKey], at: int, deadline: float
    ) -> int:
        if address not in self._channels:
            self._channels[address] = grpc.aio.insecure_channel(address, options=channel_options())
        stub: pool_pb2_grpc.PoolNodeAsyncStub = pool_pb2_grpc.PoolNodeStub(self._channels[address])
        left_s = max(0.01, deadline - self._clock.now())
        with self._asking(deadline):
            theirs = await stub.GetHostTier(pool_pb2.GetHostTierRequest(), timeout=left_s)
        if theirs.enabled and theirs.layout != tier.spec.layout:
            self._count(TransferFault.LAYOUT)
        endpoint = _tcp_endpoint(theirs, tier.spec.layout)
        if endpoint is None:
            return 0
        wanted = keys[: at + _MAX_BLOCKS]
        with self._asking(deadline):
            reply = await stub.HoldPrefix(
                pool_pb2.HoldPrefixRequest(
                    owner=self._owner,
                    keys=wanted,
                    skip=at,
                    lease_s=_LEASE_S,
                    # The other half is for the bytes.
                    timeout_s=left_s / 2,
                    local_only=True,
                ),
                timeout=left_s,
            )
        if not reply.hold_id:
            return 0
        try:
            blocks = list(reply.blocks)
            count, good = await self._pull(endpoint, tier, keys, at, blocks, deadline)
        finally:
            self._release(stub, reply.hold_id)
        if not good:
            # It would send them again.
            log.warning("the pool node at %s has blocks that do not verify", address)
            self._avoid(address)
        return count

    @contextlib.contextmanager
    def _asking(self, deadline: float) -> Iterator[None]:
        """Counts a question that gets no answer. Pulls are counted where they end, on their thread:
        that may be after the asker gave up."""
        try:
            yield
        except grpc.aio.AioRpcError as error:
            late = error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            self._count(TransferFault.LATE if late else TransferFault.GONE)
            raise
        except asyncio.CancelledError:
            if self._clock.now() >= deadline:
                self._count(TransferFault.LATE)
            raise

    def _release(self, stub: pool_pb2_grpc.PoolNodeAsyncStub, hold_id: int) -> None:
        """In the background: what has come counts, whether or not the other side still answers."""

        async def release() -> None:
            request = pool_pb2.ReleaseHoldsRequest(hold_ids=[hold_id])
            # Otherwise its lease ends by itself.
            with contextlib.suppress(grpc.aio.AioRpcError):
                await stub.ReleaseHolds(request, timeout=_LOCATE_TIMEOUT_S)

        _keep(self._releases, asyncio.create_task(release(), name="release remote blocks"))

    async def _close(self, channel: grpc.aio.Channel) -> None:
        if self._releases:
            await asyncio.wait(self._releases)
        await channel.close(None)

    async def _pull(
        self,
        endpoint: Endpoint,
        tier: HostTier,
        keys: Sequence[BlockKey],
        at: int,
        blocks: list[pool_pb2.HeldBlock],
        deadline: float,
    ) -> tuple[int, bool]:
        """How many count, and whether all that came verified. Raises TransferFailed."""
        metas = [
            BlockMeta(
                key=keys[at + index],
                parent=keys[at + index - 1] if at + index else None,
                depth=at + index,
                num_tokens=block.num_tokens,
                priority=block.priority,
            )
            for index, block in enumerate(blocks)
        ]
        cache, damaged = tier.arena.blocks, threading.Event()

        def pull(grants: Sequence[Grant]) -> list[tuple[int, int]]:
            pairs = list(zip(blocks, grants, strict=False))
            copies = [BlockCopy(b.slot, b.generation, g.slot) for b, g in pairs]
            timeout_s = max(0.01, deadline - self._clock.now())
            try:
                self._transport.pull(endpoint, cache, copies, timeout_s=timeout_s)
            except TransferFailed as error:
                self._count(error.fault)
                raise
            filled = []
            for block, grant in pairs:
                if checksum(cache.block(grant.slot)) != block.checksum:
                    damaged.set()
                    self._count(TransferFault.CORRUPT)
                    break
                filled.append((grant.ticket, block.checksum))
            return filled

        granted = await fill(tier, Tier.REMOTE, metas, pull, self._on_thread)
        return len(granted), not damaged.is_set()

    def _on_thread(self, work: Callable[[], T]) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self._thread, work)


def _keep(tasks: set[asyncio.Task[None]], task: asyncio.Task[None]) -> None:
    """Until it is done."""
    tasks.add(task)
    task.add_done_callback(tasks.discard)


def _tcp_endpoint(theirs: pool_pb2.HostTier, layout: str) -> Endpoint | None:
    if not theirs.enabled or theirs.layout != layout:
        return None
    for item in theirs.endpoints:
        if item.transport == "tcp":
            return Endpoint(item.transport, item.address, item.token, item.layout)
    return None
