"""What the transport tests share: caches with known bytes, a hook in the middle of a pull."""

from __future__ import annotations

import gc
import os
import secrets
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np

from kvpool.arena import BlockArena
from kvpool.transport import BlockCopy

LAYOUT = "v1:test"


def filled(directory: Path, num_blocks: int, block_bytes: int, layout: str = LAYOUT) -> BlockArena:
    """A peer's arena: random bytes, generation of block i = i + 1."""
    arena = BlockArena.create(
        directory, "t", "peer", secrets.randbits(64), os.getpid(), num_blocks, block_bytes, layout
    )
    arena.buffer[:] = secrets.token_bytes(len(arena.buffer))
    arena.generations[:] = np.arange(1, num_blocks + 1, dtype=np.uint64)
    return arena


def copies_of(pairs: list[tuple[int, int]]) -> list[BlockCopy]:
    return [BlockCopy(src=src, generation=src + 1, dst=dst) for src, dst in pairs]


class HookedCache:
    """A cache that calls ``hook`` once, when the first destination block is asked for."""

    def __init__(self, inner: BlockArena, hook: Callable[[], None]) -> None:
        self._inner = inner
        self._hook: Callable[[], None] | None = hook
        self.layout = inner.layout
        self.num_blocks = inner.num_blocks
        self.block_bytes = inner.block_bytes

    def block(self, index: int) -> memoryview:
        return self.run(index, 1)

    def run(self, start: int, count: int) -> memoryview:
        hook, self._hook = self._hook, None
        if hook is not None:
            hook()
        return self._inner.run(start, count)

    def generation(self, index: int) -> int:
        return self._inner.generation(index)


def resources() -> tuple[int, int]:
    """Open descriptors and threads of this process, without what is garbage already."""
    gc.collect()
    return len(os.listdir("/proc/self/fd")), threading.active_count()
