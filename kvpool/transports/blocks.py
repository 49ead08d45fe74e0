"""What all transports share: checking copies, finding runs, copying memory with verification."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from baton.core.errors import Stage
from kvpool.transport import BlockCopy, KVCache, TransferFailed, TransportBroken

_SLICE_BYTES = 64 << 20
"""Between two looks at the clock."""

Budget = Callable[[], float]
"""Seconds that the next operation may take. Raises TimeoutError when none are left."""


def failed(message: str) -> TransferFailed:
    """A failure that every transport would meet."""
    return TransferFailed(message, stage=Stage.HANDOFF)


def broken(message: str) -> TransportBroken:
    """A failure of this way to the peer."""
    return TransportBroken(message, stage=Stage.HANDOFF)


def budget_until(deadline: float) -> Budget:
    """What is left until ``deadline`` (``time.monotonic`` seconds)."""

    def budget() -> float:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left

    return budget


def check_layouts(theirs: str, ours: str) -> None:
    """Raise TransferFailed unless both sides mean the same bytes."""
    if theirs != ours:
        raise failed(f"the KV layouts differ: the peer has {theirs!r}, this side {ours!r}")


def check_targets(cache: KVCache, copies: Sequence[BlockCopy]) -> None:
    """Raise ValueError for copies that the caller must not ask for: a bug, not a failure."""
    targets = [copy.dst for copy in copies]
    if len(set(targets)) != len(targets):
        raise ValueError("two copies have the same destination block")
    if targets and not (min(targets) >= 0 and max(targets) < cache.num_blocks):
        raise ValueError(f"destination blocks must be in [0, {cache.num_blocks})")


def check_generations(cache: KVCache, copies: Sequence[BlockCopy], when: str) -> None:
    """Raise TransferFailed unless every source block still holds what was meant."""
    for copy in copies:
        if not 0 <= copy.src < cache.num_blocks:
            raise failed(f"the peer has no block {copy.src}, only {cache.num_blocks}")
        found = cache.generation(copy.src)
        if found != copy.generation:
            raise failed(
                f"block {copy.src} was given to other content {when}: generation {found},"
                f" not {copy.generation}"
            )


def runs(indices: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Consecutive indices as (first, count), in order."""
    first = count = 0
    for index in indices:
        if count and index == first + count:
            count += 1
            continue
        if count:
            yield first, count
        first, count = index, 1
    if count:
        yield first, count


def views(cache: KVCache, indices: Sequence[int]) -> list[memoryview]:
    """The bytes of blocks, one view per run."""
    return [cache.run(first, count) for first, count in runs(indices)]


def copy_blocks(
    source: KVCache, target: KVCache, copies: Sequence[BlockCopy], budget: Budget
) -> int:
    """Copy memory to memory, verify, and return the bytes. Raises TransferFailed, TimeoutError.

    Generations are read before the first byte, so that nothing is copied in vain, and after the
    last, so that nothing that changed on the way is believed.
    """
    check_generations(source, copies, "before the pull")
    limit = max(1, _SLICE_BYTES // source.block_bytes)
    at = 0
    while at < len(copies):
        budget()
        src, dst = copies[at].src, copies[at].dst
        count = 1
        while (
            at + count < len(copies)
            and count < limit
            and copies[at + count].src == src + count
            and copies[at + count].dst == dst + count
        ):
            count += 1
        # numpy copies without holding the interpreter lock; memoryview assignment does not.
        np.copyto(
            np.frombuffer(target.run(dst, count), dtype=np.uint8),
            np.frombuffer(source.run(src, count), dtype=np.uint8),
        )
        at += count
    budget()
    check_generations(source, copies, "during the pull")
    return len(copies) * source.block_bytes
