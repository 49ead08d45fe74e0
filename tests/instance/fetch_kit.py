"""A pool node of the test's process, and an instance's cache beside it.

The layout has four bytes per token, as the toy model of ``instance_kit`` writes them.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

from baton.core.config import PoolConfig
from baton.engine.events import Reserved
from baton.instance.fetch_rule import FetchRule
from baton.instance.instance import Instance
from baton.instance.pool_side import PoolSide, make_pool_side
from baton.instance.prefix_fetch import FetchHooks, PrefixFetcher
from kvpool.arena import BlockArena
from kvpool.block_io import BlockMover
from kvpool.checksum import checksum
from kvpool.host_arena import HostArena
from kvpool.host_table import HostTable
from kvpool.host_values import Grant, HostStatistics
from kvpool.layout import KVLayout
from kvpool.pool_link import PoolLink
from kvpool.pool_node import PoolNode
from kvpool.tier_spec import HostTierSpec
from kvpool.tiers import BlockMeta
from tests.instance.instance_kit import BLOCK_SIZE, WAIT_S, until
from tests.kvpool.middle_man import MiddleMan

LAYOUT = KVLayout("float32", BLOCK_SIZE, num_layers=1, num_kv_heads=1, head_dim=1, kind="mla").text
BLOCK_BYTES = BLOCK_SIZE * 4
NOWHERE = "127.0.0.1:1"
"""Where no controller listens."""


def keys_of(count: int, name: str = "prompt") -> list[bytes]:
    """Of a prompt's blocks."""
    return [hashlib.blake2b(f"{name} {i}".encode(), digest_size=16).digest() for i in range(count)]


def content(key: bytes) -> bytes:
    """What the block of a key holds."""
    return key[:BLOCK_BYTES].ljust(BLOCK_BYTES, b"\0")


class Pool:
    """A pool node with a host tier, and lines to it."""

    def __init__(
        self,
        directory: Path,
        num_slots: int = 32,
        *,
        lease_s: float = 30.0,
        write_back: str = "all",
    ) -> None:
        self.config = PoolConfig(
            host_bytes=num_slots * BLOCK_BYTES,
            write_back="all",
            fetch="always",
            lease_s=lease_s,
        )
        spec = HostTierSpec(LAYOUT, BLOCK_BYTES, self.config)
        self.node = PoolNode("fetch-kit", str(directory), tier=spec)
        self.serves = True
        self._links: list[PoolLink] = []
        self._writer: PoolLink | None = None

    def link(self, owner: str = "reader", address: str | None = None) -> PoolLink:
        """A new line to it."""

        async def look_up() -> str | None:
            return address or self.node.address

        link = PoolLink(owner, self.node.address, look_up, lease_s=self.config.lease_s)
        self._links.append(link)
        return link

    @property
    def table(self) -> HostTable:
        assert self.node._tier is not None
        return self.node._tier.table

    @property
    def arena(self) -> HostArena:
        assert self.node._tier is not None
        return self.node._tier.arena

    def statistics(self) -> HostStatistics:
        return self.table.statistics()

    def held(self) -> dict[str, int]:
        """What must be zero when nobody reads or writes."""
        now = self.statistics()
        return {
            "tickets": now.num_tickets,
            "holds": now.num_holds,
            "filling": now.num_filling,
            "quarantined": now.num_quarantined,
            "transient": now.num_transient,
        }

    async def idle(self) -> None:
        await until(lambda: not any(self.held().values()), lambda: f"still held: {self.held()}")
        self.table.check_integrity()

    async def put(self, keys: Sequence[bytes], *, digest: int | None = None) -> list[int]:
        """Store a prompt's blocks, as another instance does; the slots. ``digest``: a wrong one."""
        if self._writer is None:
            self._writer = self.link("writer")
        metas = [
            BlockMeta(key, keys[depth - 1] if depth else None, depth, BLOCK_SIZE)
            for depth, key in enumerate(keys)
        ]
        reply = await self._writer.reserve(metas)
        assert reply is not None
        arena, grants = reply
        slots, filled = [], []
        for key, grant in zip(keys, grants, strict=True):
            assert isinstance(grant, Grant), grant
            arena.block(grant.slot)[:] = content(key)
            right = checksum(arena.block(grant.slot))
            filled.append((grant.ticket, right if digest is None else digest))
            slots.append(grant.slot)
        assert all(await self._writer.publish(filled))
        return slots

    async def read(self, keys: Sequence[bytes]) -> list[bytes]:
        """Contents of the longest prefix that is there."""
        if self._writer is None:
            self._writer = self.link("writer")
        hold = await self._writer.hold(keys, skip=0, timeout_s=1.0)
        if hold is None:
            return []
        found = [bytes(hold.arena.block(slot.slot)) for slot in hold.slots]
        self._writer.release(hold.hold_id)
        return found

    async def stop_node(self) -> None:
        """End the pool node, ahead of the others."""
        self.serves = False
        await self.node.stop()

    def forget_owner(self, owner: str) -> None:
        """As the pool node does when it sees that a process has ended."""
        assert self.node._tier is not None
        self.node._tier.release_owner(owner)

    async def close(self) -> None:
        for link in self._links:
            await link.close()
        await self.node.stop()

    def side(self, instance: Instance, cache: BlockArena) -> PoolSide:
        """As an instance makes it."""
        return make_pool_side(
            instance,
            self.link(instance.instance_id),
            NOWHERE,
            config=self.config,
            cache=cache,
            host_layout=LAYOUT,
            block_size=BLOCK_SIZE,
            life=1,
        )


@contextlib.asynccontextmanager
async def pool_of(
    directory: Path, num_slots: int = 32, *, lease_s: float = 30.0
) -> AsyncIterator[Pool]:
    """A pool node that serves; afterwards everything has come back to it."""
    pool = Pool(directory, num_slots, lease_s=lease_s)
    await pool.node.start()
    try:
        yield pool
        if pool.serves:
            await pool.idle()
    finally:
        await pool.close()
    assert os.listdir(directory) == []


class Fetching:
    """A fetcher beside a cache, and what it tells its instance."""

    def __init__(self, pool: Pool, *, num_blocks: int = 16, address: str | None = None) -> None:
        self.cache = BlockArena.private(num_blocks, BLOCK_BYTES, LAYOUT)
        self.cache.buffer[:] = b"x" * len(self.cache.buffer)
        self.fetched: dict[str, int] = {}
        self.aborted: list[str] = []
        self.stages: list[tuple[str, str]] = []
        self.missing: list[bytes] = []
        self.link = pool.link(address=address)
        hooks = FetchHooks(
            fetched=self._fetched,
            engine_abort=self.aborted.append,
            stage=lambda name, stage: self.stages.append((name, stage)),
            missing=self.missing.extend,
        )
        self.rule = FetchRule("always", block_size=BLOCK_SIZE, block_bytes=BLOCK_BYTES)
        self.fetcher = PrefixFetcher(
            hooks,
            self.link,
            BlockMover(self.cache, LAYOUT),
            self.rule,
            block_size=BLOCK_SIZE,
            timeout_s=1.0,
        )

    def _fetched(self, name: str, num_tokens: int) -> bool:
        assert name not in self.fetched, "told twice"
        self.fetched[name] = num_tokens
        return True

    def reserved(self, blocks: Sequence[int], num_cached: int = 0, name: str = "r") -> None:
        event = Reserved(name, tuple(blocks), num_cached * BLOCK_SIZE)
        self.fetcher.on_reserved(event)

    async def until_stage(self, stage: str, name: str = "r") -> None:
        await until(lambda: (name, stage) in self.stages, lambda: f"{stage}: {self.stages}")

    async def ended(self, name: str = "r") -> int:
        """Valid tokens, once the fetch is over."""
        await until(lambda: name in self.fetched, lambda: f"{name} waits for ever")
        assert not self.fetcher.num_open
        return self.fetched[name]

    def blocks(self, blocks: Sequence[int]) -> list[bytes]:
        return [bytes(self.cache.block(block)) for block in blocks]

    @contextlib.contextmanager
    def copies_wait(self) -> Iterator[None]:
        """Within it no copy begins."""
        gate = threading.Event()
        self.fetcher._thread.submit(gate.wait, WAIT_S)
        try:
            yield
        finally:
            gate.set()


@contextlib.asynccontextmanager
async def fetching(
    directory: Path, *, num_slots: int = 32, lease_s: float = 30.0
) -> AsyncIterator[tuple[Pool, Fetching]]:
    """Both, and afterwards nothing is held by either."""
    async with pool_of(directory, num_slots, lease_s=lease_s) as pool:
        bench = Fetching(pool)
        try:
            yield pool, bench
            assert not bench.fetcher.num_open
        finally:
            await bench.fetcher.stop()


class Line:
    """A way to a server that can be held up, or broken, in the direction of the answers."""

    def __init__(self, address: str) -> None:
        self._flows = threading.Event()
        self._flows.set()
        self._cut = False
        self._man = MiddleMan(address, self._pass_on)
        self.address = self._man.address

    def _pass_on(self, offset: int, data: bytes) -> bytes | None:
        self._flows.wait(WAIT_S)
        return None if self._cut else data

    def hold_up(self) -> None:
        """No answer comes until it is cut or flows again."""
        self._flows.clear()

    def flow(self) -> None:
        self._flows.set()

    def cut(self) -> None:
        """The next answer is a reset connection."""
        self._cut = True
        self._flows.set()

    async def close(self) -> None:
        self.cut()
        await asyncio.to_thread(self._man.close)
