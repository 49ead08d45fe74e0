"""What all transports share: checking copies, finding runs, copying memory with verification."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from baton.core.errors import Stage
from kvpool.arena import BlockArena
from kvpool.layout import KVLayout
from kvpool.reshard import ReshardPlan, plan_reshard
from kvpool.transport import (
    BlockCopy,
    KVCache,
    TransferFailed,
    TransferFault,
    TransportBroken,
)

_SLICE_BYTES = 64 << 20
"""Between two looks at the clock."""

Budget = Callable[[], float]
"""Seconds that the next operation may take. Raises TimeoutError when none are left."""


def failed(message: str, fault: TransferFault) -> TransferFailed:
    """A failure that every transport would meet."""
    return TransferFailed(message, stage=Stage.HANDOFF, fault=fault)


def late(timeout_s: float, address: str = "") -> TransferFailed:
    """A pull whose time is over; ``address``: where from, if that is not this machine."""
    where = f" from {address}" if address else ""
    return failed(f"the pull{where} took longer than {timeout_s:g} s", TransferFault.LATE)


def broken(message: str, fault: TransferFault) -> TransportBroken:
    """A failure of this way to the peer."""
    return TransportBroken(message, stage=Stage.HANDOFF, fault=fault)


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
        raise failed(_differ(theirs, ours), TransferFault.LAYOUT)


def plan_between(theirs: str, ours: str) -> ReshardPlan | None:
    """How the peer's blocks become ours; ``None`` where they are alike.

    Raises TransferFailed, with what differs, if there is no way.
    """
    if theirs == ours:
        return None
    try:
        return plan_reshard(KVLayout.parse(theirs), KVLayout.parse(ours))
    except ValueError as error:
        raise failed(
            f"{_differ(theirs, ours)}, and only the number of shards may: {error};"
            " serve the same model with the same dtype and block size on both",
            TransferFault.LAYOUT,
        ) from None


def _differ(theirs: str, ours: str) -> str:
    return f"the KV layouts differ: the peer has {theirs!r}, this side {ours!r}"


def check_targets(cache: KVCache, copies: Sequence[BlockCopy]) -> None:
    """Raise ValueError for copies that the caller must not ask for: a bug, not a failure."""
    targets = [copy.dst for copy in copies]
    if len(set(targets)) != len(targets):
        raise ValueError("two copies have the same destination block")
    if targets and not (min(targets) >= 0 and max(targets) < cache.num_blocks):
        raise ValueError(f"destination blocks must be in [0, {cache.num_blocks})")


def check_generations(cache: KVCache, copies: Sequence[BlockCopy], when: str) -> None:
    """Raise TransferFailed unless every source block still holds what was meant."""
    blocks = np.array([copy.src for copy in copies], dtype=np.int64)
    generations = np.array([copy.generation for copy in copies], dtype=np.uint64)
    check_generation_table(cache, blocks, generations, when)


def check_generation_table(
    cache: KVCache,
    blocks: npt.NDArray[np.int64],
    generations: npt.NDArray[np.uint64],
    when: str,
) -> None:
    """``check_generations`` of columns, each ``[num_copies]``."""
    if not len(blocks):
        return
    # An arena's table is compared as a whole; the loop finds what to say.
    if (
        isinstance(cache, BlockArena)
        and blocks.min() >= 0
        and blocks.max() < cache.num_blocks
        and np.array_equal(cache.generations[blocks], generations)
    ):
        return
    for block, wanted in zip(blocks.tolist(), generations.tolist(), strict=True):
        if not 0 <= block < cache.num_blocks:
            raise failed(
                f"the peer has no block {block}, only {cache.num_blocks}", TransferFault.STALE
            )
        found = cache.generation(block)
        if found != wanted:
            raise failed(
                f"block {block} was given to other content {when}: generation {found}, not"
                f" {wanted}",
                TransferFault.STALE,
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
    if not copies:
        return 0
    sources = np.array([copy.src for copy in copies], dtype=np.int64)
    targets = np.array([copy.dst for copy in copies], dtype=np.int64)
    generations = np.array([copy.generation for copy in copies], dtype=np.uint64)
    check_generation_table(source, sources, generations, "before the pull")
    to, came_from = _bytes(target), _bytes(source)
    step = max(1, _SLICE_BYTES // source.block_bytes)
    for at in range(0, len(copies), step):
        budget()
        part = slice(at, at + step)
        # numpy copies without holding the interpreter lock; memoryview assignment does not.
        for src, dst, end in _joint_runs(sources[part], targets[part], source.block_bytes):
            to[dst : dst + end - src] = came_from[src:end]
    budget()
    check_generation_table(source, sources, generations, "during the pull")
    return len(copies) * source.block_bytes


def _joint_runs(
    sources: npt.NDArray[np.int64], targets: npt.NDArray[np.int64], block_bytes: int
) -> Iterator[tuple[int, int, int]]:
    """Blocks that are neighbours on both sides, as (source, target, end of source) in bytes."""
    breaks = np.flatnonzero((np.diff(sources) != 1) | (np.diff(targets) != 1))
    firsts = np.concatenate(([0], breaks + 1))
    lasts = np.append(breaks, len(sources) - 1)
    return zip(
        (sources[firsts] * block_bytes).tolist(),
        (targets[firsts] * block_bytes).tolist(),
        ((sources[lasts] + 1) * block_bytes).tolist(),
        strict=True,
    )


def _bytes(cache: KVCache) -> npt.NDArray[np.uint8]:
    """All blocks, ``[num_blocks * block_bytes]``."""
    return np.frombuffer(cache.run(0, cache.num_blocks), dtype=np.uint8)
