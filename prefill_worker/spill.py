"""A finished prefill's blocks, moved to the host tier while their decode side has no room.

A full decode instance must not keep a prefill instance's memory: what nobody has taken for a
while, when others wait for blocks, goes to slots of the machine's host tier. They are this
handoff's alone, under leases that its decode side renews, and are pulled from there like from here.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import logging
import secrets
from collections.abc import Coroutine, Sequence
from typing import Any

from kvpool.arena import BlockArena
from kvpool.block_io import BlockMover
from kvpool.host_values import Grant
from kvpool.pool_link import PoolLink
from kvpool.tiers import BlockMeta
from kvpool.transport import Endpoint

log = logging.getLogger(__name__)

_KEY_BYTES = 16


@dataclasses.dataclass(frozen=True, slots=True)
class Spilled:
    """Where the blocks are now, in their order."""

    slots: tuple[int, ...]
    generations: tuple[int, ...]
    endpoints: tuple[Endpoint, ...]
    tickets: tuple[int, ...]


class Spill:
    """For one prefill instance. On its event loop; copies run on a thread."""

    def __init__(self, link: PoolLink, mover: BlockMover) -> None:
        self._link = link
        self._mover = mover
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="kv-spill")
        self._tasks: set[asyncio.Task[Any]] = set()
        self.num_blocks = 0
        """Spilled since the start."""

    async def store(
        self, blocks: Sequence[int], generations: Sequence[int], *, priority: int = 0
    ) -> Spilled | None:
        """Copy blocks to the host tier; ``None``, and nothing is kept there, if not all fit."""
        task = asyncio.ensure_future(self._store(blocks, generations, priority))
        self._track(task)
        return await task

    async def _store(
        self, blocks: Sequence[int], generations: Sequence[int], priority: int
    ) -> Spilled | None:
        metas = [
            BlockMeta(key=secrets.token_bytes(_KEY_BYTES), parent=None, priority=priority)
            for _ in blocks
        ]
        reply = await self._link.reserve(metas, transient=True)
        if reply is None:
            return None
        arena, granted = reply
        grants = [item for item in granted if isinstance(item, Grant)]
        tickets = tuple(grant.ticket for grant in grants)
        try:
            if len(grants) == len(blocks) and await self._fill(arena, blocks, generations, grants):
                self.num_blocks += len(blocks)
                return Spilled(
                    slots=tuple(grant.slot for grant in grants),
                    generations=tuple(grant.generation for grant in grants),
                    endpoints=self._link.endpoints,
                    tickets=tickets,
                )
        except Exception:  # the handoff goes on without
            log.exception("moving blocks to the host tier")
        self.drop(tickets)
        return None

    async def _fill(
        self,
        arena: BlockArena,
        blocks: Sequence[int],
        generations: Sequence[int],
        grants: Sequence[Grant],
    ) -> bool:
        filled = await asyncio.get_running_loop().run_in_executor(
            self._thread,
            self._mover.store,
            arena,
            list(zip(blocks, generations, grants, strict=True)),
        )
        good = [item for item in filled if item is not None]
        return len(good) == len(blocks) and all(await self._link.publish(good))

    def renew(self, spilled: Spilled) -> None:
        """The decode side still wants it."""
        self._later(self._link.renew(spilled.tickets))

    def drop(self, tickets: Sequence[int]) -> None:
        """The decode side has them, or never will."""
        if tickets:
            self._later(self._link.publish((), tickets))

    async def stop(self) -> None:
        """Wait for what is under way (each call is bounded), and release the thread."""
        while self._tasks:  # one that fails begins another, which gives back what it has
            await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.get_running_loop().run_in_executor(None, self._thread.shutdown)

    def _later(self, call: Coroutine[Any, Any, object]) -> None:
        self._track(asyncio.ensure_future(call))

    def _track(self, task: asyncio.Task[Any]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
