"""Host tiers and pool nodes as their tests use them: small blocks whose bytes follow from keys."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from baton.core.blocks import BlockKey
from baton.core.config import PoolConfig
from kvpool.arena import BlockArena
from kvpool.checksum import checksum
from kvpool.host_tier import HostTier
from kvpool.host_values import Grant, HeldSlot
from kvpool.layout import KVLayout
from kvpool.pool_link import Hold, PoolLink
from kvpool.tier_spec import HostTierSpec
from kvpool.tiers import BlockMeta, Tier

WAIT_S = 10.0
LEASE_S = 60.0
LAYOUT = KVLayout(dtype="float32", block_size=4, num_layers=2, num_kv_heads=2, head_dim=2)
SLOT_BYTES = LAYOUT.block_bytes


async def until(condition: Callable[[], bool]) -> None:
    """Bounded."""
    ended = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < ended, "it did not happen"
        await asyncio.sleep(0.01)


async def until_some(ask: Callable[[], Awaitable[Any]]) -> Any:
    """The first answer that is not ``None`` or empty; bounded."""
    ended = time.monotonic() + WAIT_S
    while not (answer := await ask()):
        assert time.monotonic() < ended, "there was no answer"
        await asyncio.sleep(0.02)
    return answer


def chain(name: str, count: int, *, num_tokens: int = 4) -> list[BlockMeta]:
    """The blocks of a prompt."""
    keys = [hashlib.blake2b(f"{name}{i}".encode(), digest_size=16).digest() for i in range(count)]
    parents = [None, *keys]
    return [
        BlockMeta(key, parent, depth, num_tokens)
        for depth, (key, parent) in enumerate(zip(keys, parents, strict=False))
    ]


def keys_of(metas: Sequence[BlockMeta]) -> list[BlockKey]:
    return [meta.key for meta in metas]


def bytes_of(key: BlockKey) -> bytes:
    return hashlib.shake_128(key).digest(SLOT_BYTES)


def spec(num_slots: int = 8, *, disk: Path | None = None, **pool: Any) -> HostTierSpec:
    config = PoolConfig(
        host_bytes=num_slots * SLOT_BYTES, disk_path=None if disk is None else str(disk), **pool
    )
    return HostTierSpec(LAYOUT.text, SLOT_BYTES, config)


# A host tier without a pool node.


def open_tier(path: Path, num_slots: int = 8, *, with_disk: bool = True, **pool: Any) -> HostTier:
    """Of the machine that ``path`` stands for."""
    memory = path / "memory"
    memory.mkdir(exist_ok=True)
    return HostTier.open(
        spec(num_slots, disk=path / "disk" if with_disk else None, **pool),
        directory=str(memory),
        cluster="c",
        holder="pool-a",
        on_changed=lambda: None,
    )


@contextlib.asynccontextmanager
async def running(
    path: Path, num_slots: int = 8, *, keep: bool = False, **more: Any
) -> AsyncIterator[HostTier]:
    tier = open_tier(path, num_slots, **more)
    try:
        await tier.start()
        yield tier
        tier.table.check_integrity()
    finally:
        await tier.stop(keep=keep)


def write(arena: BlockArena, metas: Sequence[BlockMeta], granted: Sequence[Any]) -> list[Any]:
    """Fill what was granted; (ticket, checksum) of each."""
    filled = []
    for meta, grant in zip(metas, granted, strict=True):
        if isinstance(grant, Grant):
            target = arena.block(grant.slot)
            target[:] = bytes_of(meta.key)
            filled.append((grant.ticket, checksum(target)))
    return filled


def store(tier: HostTier, metas: Sequence[BlockMeta]) -> None:
    """All of them are new."""
    granted = tier.reserve(metas, owner="writer", lease_s=LEASE_S)
    filled = write(tier.arena.blocks, metas, granted)
    assert tier.publish(filled) == [True] * len(metas)


async def hold(
    tier: HostTier,
    metas: Sequence[BlockMeta],
    *,
    skip: int = 0,
    timeout_s: float = WAIT_S,
    lease_s: float = LEASE_S,
) -> tuple[int, list[HeldSlot]]:
    """What is held has the right bytes."""
    hold_id, slots = await tier.hold_prefix(
        keys_of(metas), owner="reader", skip=skip, lease_s=lease_s, timeout_s=timeout_s
    )
    arena = tier.arena.blocks
    for meta, slot in zip(metas[skip:], slots, strict=False):
        assert arena.generation(slot.slot) == slot.generation
        assert bytes(arena.block(slot.slot)) == bytes_of(meta.key)
        assert checksum(arena.block(slot.slot)) == slot.checksum
        assert slot.num_tokens == meta.num_tokens
    return hold_id, slots


async def use(tier: HostTier, metas: Sequence[BlockMeta]) -> list[Tier]:
    """Hold and let go; where the blocks were."""
    hold_id, slots = await hold(tier, metas)
    tier.release([hold_id])
    return [slot.tier for slot in slots]


# Pool nodes, over their links.


async def store_at(link: PoolLink, metas: Sequence[BlockMeta]) -> None:
    """All of them are new."""
    reserved = await link.reserve(metas)
    assert reserved is not None
    arena, granted = reserved
    assert await link.publish(write(arena, metas, granted)) == [True] * len(metas)


def tiers_of(found: Hold | None, metas: Sequence[BlockMeta]) -> list[Tier]:
    """Where the blocks were; what is held has the right bytes."""
    if found is None:
        return []
    for meta, slot in zip(metas, found.slots, strict=False):
        assert found.arena.generation(slot.slot) == slot.generation
        assert bytes(found.arena.block(slot.slot)) == bytes_of(meta.key)
        assert checksum(found.arena.block(slot.slot)) == slot.checksum
    return [slot.tier for slot in found.slots]


@contextlib.asynccontextmanager
async def linked(address: str, look_up: Callable[[], str] | None = None) -> AsyncIterator[PoolLink]:
    async def find() -> str | None:
        return None if look_up is None else look_up()

    link = PoolLink("prefill-0-1", address, find, lease_s=LEASE_S)
    try:
        yield link
    finally:
        await link.close()


@contextlib.asynccontextmanager
async def pool_process(*args: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """A pool node in a process of its own (``pool_process``), and its address."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "tests.kvpool.pool_process", *args),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        line = await asyncio.wait_for(process.stdout.readline(), 2 * WAIT_S)
        assert line, "the pool node did not start"
        yield process, line.decode().strip()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
