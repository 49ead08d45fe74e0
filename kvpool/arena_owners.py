"""The arenas of one machine and the processes that own them.

An arena is removed when its owner ends: a pidfd per owner becomes readable then, so nothing
polls, and a pid that is given away again cannot be mistaken.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
from collections.abc import Callable

from baton.core.errors import ConfigError
from kvpool.arena import BlockArena, cluster_files
from kvpool.arena_header import TEMPORARY_SUFFIX, ArenaHeader, host_arena_prefix, read_header
from kvpool.transport import TransportBroken

log = logging.getLogger(__name__)

ArenaKey = tuple[str, int]
"""(instance_id, nonce): one life of an instance."""


@dataclasses.dataclass(frozen=True, slots=True)
class OwnedArena:
    """An arena file, and the descriptor that tells of its owner's end."""

    header: ArenaHeader
    path: str
    pidfd: int


class ArenaOwners:
    """Makes, adopts and removes the arena files of a cluster on this machine.

    Lives on one event loop; creation runs in a worker thread, since reserving pages takes time.
    """

    def __init__(
        self,
        cluster: str,
        directory: str,
        on_removed: Callable[[ArenaKey], None] = lambda key: None,
    ) -> None:
        """``on_removed``: told of each arena that is gone, and so is its owner or its life."""
        self._on_removed = on_removed
        self._cluster = cluster
        self._directory = directory
        self._arenas: dict[ArenaKey, OwnedArena] = {}
        self._creating: dict[ArenaKey, asyncio.Task[OwnedArena]] = {}

    def arenas(self) -> list[OwnedArena]:
        """A copy of what there is now; from any thread."""
        return list(self._arenas.values())

    def adopt(self) -> int:
        """Take over the files that a former pool node left whose owners still run.

        All others of the cluster are removed: half-made, damaged, or of owners that ended.
        Host tiers' files are no instance's and stay. Returns the number adopted. Call once,
        before the first allocation.
        """
        host = host_arena_prefix(self._cluster)
        for path in cluster_files(self._cluster, self._directory):
            if path.name.startswith(host):
                continue
            try:
                if path.suffix == TEMPORARY_SUFFIX:
                    raise TransportBroken("it was never completed")
                header = read_header(path)
                if not header.owner_alive:
                    raise TransportBroken(f"its owner, process {header.pid}, has ended")
                self._watch(header, str(path))
            except (TransportBroken, OSError) as error:
                log.info("removed arena %s: %s", path, error)
                path.unlink(missing_ok=True)
        return len(self._arenas)

    async def allocate(
        self,
        *,
        instance_id: str,
        nonce: int,
        pid: int,
        num_blocks: int,
        block_bytes: int,
        layout: str,
    ) -> OwnedArena:
        """The arena of one life of an instance, made if there is none.

        Raises ConfigError: no room, no such process, or asked again with other sizes.
        """
        key = (instance_id, nonce)
        for other, arena in list(self._arenas.items()):
            if other[0] == instance_id and other != key and not arena.header.owner_alive:
                self._remove(other, "its owner has ended")
        known = self._arenas.get(key)
        if known is None:
            task = self._creating.get(key)
            if task is None:
                task = asyncio.create_task(
                    self._create(key, pid, num_blocks, block_bytes, layout),
                    name=f"arena of {instance_id}",
                )
                self._creating[key] = task
                task.add_done_callback(lambda _: self._creating.pop(key, None))
            # A caller that gives up must not stop it for one that asks again.
            known = await asyncio.shield(task)
        found = (known.header.num_blocks, known.header.block_bytes, known.header.layout)
        if found != (num_blocks, block_bytes, layout):
            raise ConfigError(
                f"{instance_id} has an arena of other sizes in this life", param="num_blocks"
            )
        return known

    def release(self, instance_id: str, nonce: int) -> bool:
        """Remove an arena; False if there was none."""
        return self._remove((instance_id, nonce), "it was released")

    async def close(self) -> None:
        """Remove all arenas and wait for those being made."""
        if self._creating:
            await asyncio.wait(self._creating.values())
        for key in list(self._arenas):
            self._remove(key, "the pool node stops")

    def detach(self) -> None:
        """Stop watching, but leave the files for another pool node to adopt."""
        for arena in self._arenas.values():
            self._unwatch(arena)
        self._arenas.clear()

    async def _create(
        self, key: ArenaKey, pid: int, num_blocks: int, block_bytes: int, layout: str
    ) -> OwnedArena:
        def create() -> BlockArena:
            return BlockArena.create(
                self._directory, self._cluster, *key, pid, num_blocks, block_bytes, layout
            )

        arena = await asyncio.to_thread(create)
        arena.close()
        assert arena.path is not None
        try:
            return self._watch(arena.header, arena.path)
        except OSError as error:
            arena.unlink()
            raise ConfigError(f"process {pid} ended: {error}", param="pid") from None

    def _watch(self, header: ArenaHeader, path: str) -> OwnedArena:
        """Remember an arena and wait for its owner's end. Raises OSError if it has ended."""
        key = (header.instance_id, header.nonce)
        pidfd = os.pidfd_open(header.pid)
        if not header.owner_alive:
            os.close(pidfd)
            raise ProcessLookupError(f"process {header.pid} has ended")
        arena = OwnedArena(header, path, pidfd)
        self._arenas[key] = arena
        asyncio.get_running_loop().add_reader(pidfd, self._remove, key, "its owner has ended")
        return arena

    def _remove(self, key: ArenaKey, why: str) -> bool:
        arena = self._arenas.pop(key, None)
        if arena is None:
            return False
        self._unwatch(arena)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(arena.path)
        log.info("removed arena %s: %s", arena.path, why)
        self._on_removed(key)
        return True

    @staticmethod
    def _unwatch(arena: OwnedArena) -> None:
        asyncio.get_running_loop().remove_reader(arena.pidfd)
        os.close(arena.pidfd)
