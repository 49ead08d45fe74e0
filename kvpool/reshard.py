"""Blocks of one number of ranks turned into blocks of another: a plan of copies, and its run.

A shard holds neighbouring heads, and shards follow each other in the order of their heads. So
every boundary between shards, of either side, cuts the row of all heads into pieces that lie in
one shard here and in one shard there, whatever the two numbers are.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import numpy.typing as npt

from kvpool.layout import KVLayout

Bytes = memoryview | npt.NDArray[np.uint8]

# Numbers are moved as they are: a float's way through a register may change its bits.
_UNITS: dict[str, npt.DTypeLike] = {"float32": np.uint32, "bfloat16": np.uint16}


@dataclasses.dataclass(frozen=True, slots=True)
class HeadMove:
    """Neighbouring heads that lie in one shard of the source and in one of the target."""

    source_shard: int
    source_head: int
    """Within the shard."""
    target_shard: int
    target_head: int
    """Within the shard."""
    num_heads: int


@dataclasses.dataclass(frozen=True, slots=True)
class ReshardPlan:
    """How blocks of ``source`` become blocks of ``target``. Every head is moved once."""

    source: KVLayout
    target: KVLayout
    moves: tuple[HeadMove, ...]

    @property
    def is_identity(self) -> bool:
        """Whether the bytes stay as they are."""
        return self.source == self.target

    def apply(self, source: Bytes, target: Bytes) -> None:
        """Fill ``target`` from ``source``; both hold the same number of whole blocks, contiguous.

        The two must not overlap. Raises ValueError for sizes that do not fit, and for a target
        that cannot be written.
        """
        count = source.nbytes // self.source.block_bytes
        theirs, ours = _shards(self.source, source, count), _shards(self.target, target, count)
        for move in self.moves:
            start, end = move.source_head, move.source_head + move.num_heads
            to = slice(move.target_head, move.target_head + move.num_heads)
            ours[:, move.target_shard, ..., to, :] = theirs[:, move.source_shard, ..., start:end, :]


def plan_reshard(source: KVLayout, target: KVLayout) -> ReshardPlan:
    """The copies that turn ``source`` into ``target``. Raises ValueError, with what differs, if
    nothing can. Pure."""
    why_not = source.convertible_to(target)
    if why_not is not None:
        raise ValueError(why_not)
    total, theirs, ours = source.total_kv_heads, source.num_kv_heads, target.num_kv_heads
    cuts = sorted({*range(0, total + 1, theirs), *range(0, total + 1, ours)})
    moves = tuple(
        HeadMove(
            source_shard=first // theirs,
            source_head=first % theirs,
            target_shard=first // ours,
            target_head=first % ours,
            num_heads=end - first,
        )
        for first, end in itertools.pairwise(cuts)
    )
    return ReshardPlan(source, target, moves)


def _shards(layout: KVLayout, data: Bytes, count: int) -> npt.NDArray[np.unsignedinteger]:
    """A view ``[blocks, shards, layers, planes, tokens, heads, head_dim]`` of ``count`` blocks."""
    shape = (
        count,
        layout.num_shards,
        layout.num_layers,
        layout.num_planes,
        layout.block_size,
        layout.num_kv_heads,
        layout.head_dim,
    )
    if data.nbytes != count * layout.block_bytes:
        raise ValueError(
            f"{count} blocks of {layout.text} are {count * layout.block_bytes} bytes,"
            f" not {data.nbytes}"
        )
    return np.frombuffer(data, dtype=_UNITS[layout.dtype]).reshape(shape)
