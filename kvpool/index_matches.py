"""What the index of holders answers. Pure values, save that matches are made on demand."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

from baton.core.blocks import BlockKey
from kvpool.index_sets import Places, numbers
from kvpool.tiers import Tier


class PrefixMatch(NamedTuple):
    """A holder has the first ``num_blocks`` blocks of a prompt in ``tier`` or faster ones."""

    holder: str
    tier: Tier
    num_blocks: int


_make: Callable[[tuple[str, Tier, int]], PrefixMatch] = functools.partial(
    tuple.__new__, PrefixMatch
)
"""A third of the time of ``PrefixMatch(...)``: a prompt may match hundreds of holders."""


class TopPrefix(NamedTuple):
    """A prefix at which lookups end, and how common that is."""

    key: BlockKey
    """Of its last block."""
    num_blocks: int
    weight: int
    """Lookups that ended here, of those sampled; older ones count less."""
    num_holders: int
    """Who has it now."""


class PrefixMatches:
    """The answer to a lookup: matches, longest first, made up when they are asked for.

    A holder has a match in its fastest tier, and in each slower one that makes the prefix longer: a
    pool node with 3 blocks in its host tier and 2 more on disk has ``(host, 3)`` and
    ``(disk, 5)``. Good until the index changes; later it may name other holders.
    """

    __slots__ = ("_places", "_runs")

    def __init__(self, runs: list[tuple[int, int]], places: Places) -> None:
        """``runs``: (blocks, who has them), each longer than the one before."""
        self._runs = runs
        self._places = places

    @property
    def longest(self) -> int:
        """Blocks of the longest match; 0 without any."""
        return self._runs[-1][0] if self._runs else 0

    def __bool__(self) -> bool:
        return bool(self._runs)

    def __len__(self) -> int:
        return sum(bits.bit_count() for _, bits in self._ends())

    def __iter__(self) -> Iterator[PrefixMatch]:
        for num_blocks, bits in self._ends():
            yield from self._made(num_blocks, numbers(bits))

    def best(self, count: int) -> list[PrefixMatch]:
        """The ``count`` longest, without making the others up."""
        best: list[PrefixMatch] = []
        for num_blocks, bits in self._ends():
            if len(best) >= count:
                break
            best += self._made(num_blocks, numbers(bits, count - len(best)))
        return best

    def best_of(self, count: int, turn: int) -> Iterator[tuple[int, Iterator[str], Iterator[Tier]]]:
        """As :meth:`best`, as (blocks, holders, their tiers) by length, longest first.

        Where more have a length than there is room for, ``turn`` says which: those of a prefix that
        everybody has are not always the same ones.
        """
        for num_blocks, bits in self._ends():
            if count <= 0:
                return
            which = numbers(bits, count, turn)
            count -= len(which)
            yield (
                num_blocks,
                map(self._places.holders.__getitem__, which),
                map(self._places.tiers.__getitem__, which),
            )

    def num_blocks(self, holder: str, tier: Tier = Tier.EXTERNAL) -> int:
        """How many leading blocks ``holder`` has in ``tier`` or faster ones, without iterating."""
        bits = self._places.up_to(holder, tier)
        for num_blocks, has in reversed(self._runs):
            if has & bits:
                return num_blocks
        return 0

    def _made(self, num_blocks: int, which: list[int]) -> Iterator[PrefixMatch]:
        holders = map(self._places.holders.__getitem__, which)
        tiers = map(self._places.tiers.__getitem__, which)
        return map(_make, zip(holders, tiers, itertools.repeat(num_blocks)))

    def _ends(self) -> Iterator[tuple[int, int]]:
        """(blocks, whose prefix ends there), longest first."""
        seen = 0
        for num_blocks, bits in reversed(self._runs):
            yield num_blocks, bits & ~seen
            seen |= bits
