"""Sets of places, one object for equal ones: how the index remembers who has a block.

A **place** is a holder's tier. It has a number as long as its holder is known, and a set of places
is an integer with those bits, so that a million blocks whose holders are alike share few sets.
Pure, and owned by ``kvpool.index``.
"""

from __future__ import annotations

import numpy as np

from kvpool.tiers import Tier

TIERS = tuple(Tier)
"""Fastest first."""

_FEW_PLACES = 32
"""Below this, taking bits off one by one is faster than through an array (measured: about 35)."""


class Ladder:
    """The places of one holder, fastest first, and how many blocks lie in each."""

    __slots__ = ("bits", "counts", "mask", "steps", "up_to")

    def __init__(self) -> None:
        self.bits: dict[Tier, int] = {}
        self.up_to: dict[Tier, int] = dict.fromkeys(TIERS, 0)
        """The bits of a tier and of all faster ones."""
        self.counts: dict[Tier, int] = {}
        self.steps: tuple[int, ...] = ()
        self.mask = 0
        """All bits of this holder."""

    def add(self, tier: Tier, bit: int) -> None:
        """From now on the holder has this tier too."""
        self.bits[tier] = bit
        self.counts[tier] = 0
        self.steps = tuple(self.bits[one] for one in TIERS if one in self.bits)
        self.mask |= bit
        for slower in TIERS[TIERS.index(tier) :]:
            self.up_to[slower] |= bit

    def fastest(self, bits: int) -> int:
        """The bit of the fastest place of this holder in a set; 0 if none is in it."""
        for bit in self.steps:
            if bits & bit:
                return bit
        return 0


class Places:
    """The numbers of places, and the ladders of holders."""

    def __init__(self) -> None:
        self.holders: list[str] = []
        """By number; where a number is free, its last holder."""
        self.tiers: list[Tier] = []
        """As ``holders``."""
        self._free: list[int] = []
        self._ladders: dict[str, Ladder] = {}

    def ladder(self, holder: str) -> Ladder:
        """The ladder of a holder; a new one for a new holder."""
        ladder = self._ladders.get(holder)
        if ladder is None:
            ladder = self._ladders[holder] = Ladder()
        return ladder

    def bit(self, holder: str, tier: Tier) -> int:
        """The bit of a place; it gets a number when it is first asked for."""
        ladder = self.ladder(holder)
        bit = ladder.bits.get(tier)
        if bit is None:
            if self._free:
                number = self._free.pop()
                self.holders[number] = holder
                self.tiers[number] = tier
            else:
                number = len(self.holders)
                self.holders.append(holder)
                self.tiers.append(tier)
            bit = 1 << number
            ladder.add(tier, bit)
        return bit

    def release(self, holder: str) -> None:
        """Forget a holder. Its numbers go to others later: no set may have them any more."""
        for bit in self._ladders.pop(holder).steps:
            self._free.append(bit.bit_length() - 1)

    def up_to(self, holder: str, tier: Tier) -> int:
        """The bits of a holder's ``tier`` and faster ones; 0 for an unknown holder."""
        ladder = self._ladders.get(holder)
        return ladder.up_to[tier] if ladder is not None else 0


def numbers(bits: int, limit: int | None = None, turn: int = 0) -> list[int]:
    """The numbers of the places in a set, in no particular order; at most ``limit``.

    With more than that, ``turn`` says which.
    """
    count = bits.bit_count()
    if count >= _FEW_PLACES:
        packed = np.frombuffer(bits.to_bytes(-(-bits.bit_length() // 8), "little"), dtype=np.uint8)
        found = np.unpackbits(packed, bitorder="little").nonzero()[0]
        if limit is not None and limit < count:
            first = turn % count
            found = np.concatenate((found[first : first + limit], found[: first + limit - count]))
            found = found[:limit]
        listed: list[int] = found.tolist()
        return listed
    each = []
    for _ in range(count):
        number = bits.bit_length() - 1
        each.append(number)
        bits ^= 1 << number
    if limit is not None and limit < count:
        first = turn % count
        return (each[first:] + each[:first])[:limit]
    return each


class PlaceSet:
    """Who has certain blocks, and where."""

    __slots__ = ("all", "best", "last_end", "num_blocks")

    def __init__(self, all_: int, best: int) -> None:
        self.all = all_
        self.best = best
        """Of each holder its fastest place only."""
        self.num_blocks = 0
        """How many blocks have this set."""
        self.last_end = 0
        """Where in a prompt blocks with this set ended last time: a guess for the next."""


class PlaceSets:
    """All sets in use. Equal sets are one object, save some that became equal by ``strip``."""

    def __init__(self) -> None:
        self.empty = PlaceSet(0, 0)
        """Stands for blocks that nobody has; never counted."""
        self._by_places: dict[int, PlaceSet] = {}
        self._twins: set[PlaceSet] = set()
        """Sets equal to another one, or empty, since ``strip``. They go with their last block."""

    def __len__(self) -> int:
        return len(self._by_places) + len(self._twins)

    def changed(self, old: PlaceSet, ladder: Ladder, add: int, clear: int) -> PlaceSet:
        """``old`` without the places ``clear`` and then with ``add``, both of one holder."""
        places = (old.all & ~clear) | add
        if places == old.all and places:
            return old
        if not places:
            return self.empty
        new = self._by_places.get(places)
        if new is None:
            best = (old.best & ~ladder.mask) | ladder.fastest(places)
            new = PlaceSet(places, places if best == places else best)
            self._by_places[places] = new
        return new

    def move(self, num_blocks: int, old: PlaceSet, new: PlaceSet) -> None:
        """So many blocks have ``new`` instead of ``old``. A set without blocks is forgotten."""
        if new is not self.empty:
            new.num_blocks += num_blocks
        if old is not self.empty:
            old.num_blocks -= num_blocks
            self.settle(old)

    def settle(self, one: PlaceSet) -> None:
        """Forget a set that no block has."""
        if one.num_blocks == 0 and one is not self.empty:
            if self._by_places.get(one.all) is one:
                del self._by_places[one.all]
            else:
                self._twins.discard(one)

    def strip(self, mask: int) -> int:
        """Take places out of all sets. Returns how many blocks have nobody now.

        It looks at every set but at no block, so it takes time by sets: these are far fewer.
        """
        touched = [one for one in self._by_places.values() if one.all & mask]
        for one in touched:
            del self._by_places[one.all]
        touched += [one for one in self._twins if one.all & mask]
        num_lost = 0
        for one in touched:
            same = one.all == one.best
            one.all &= ~mask
            one.best = one.all if same else one.best & ~mask
            if one.all and one.all not in self._by_places:
                self._by_places[one.all] = one
                self._twins.discard(one)
            else:
                self._twins.add(one)
            if not one.all:
                num_lost += one.num_blocks
        return num_lost

    def forget_empty(self) -> None:
        """The owner has no block any more whose set is empty."""
        self._twins = {one for one in self._twins if one.all}

    def check(self, num_blocks_by_set: dict[PlaceSet, int]) -> None:
        """Assert that exactly these sets are in use, each by so many blocks."""
        interned = set(self._by_places.values())
        assert not interned & self._twins
        assert num_blocks_by_set.keys() == interned | self._twins
        assert all(one.all == places and places for places, one in self._by_places.items())
        assert all(one.num_blocks == num for one, num in num_blocks_by_set.items())
        assert all(one.best & one.all == one.best for one in num_blocks_by_set)
