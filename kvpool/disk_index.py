"""What lies on disk, and what goes together: the disk tier's index. Pure, and of one thread.

A block is of use only as long as the block before it can be had, so whatever is dropped takes
along what hangs below it. The block before may also lie in a faster tier of the machine;
``Elsewhere`` tells.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TypeVar

from baton.core.blocks import BlockKey
from kvpool.tiers import BlockMeta

_Name = TypeVar("_Name")

Elsewhere = Callable[[BlockKey], bool]
"""Whether a faster tier of the machine has the block."""


@dataclasses.dataclass(slots=True)
class DiskEntry:
    """One block on disk."""

    meta: BlockMeta
    segment: int
    slot: int
    checksum: int
    """xxh3-64 of its bytes."""
    num_reads: int = 0
    """Since it was written to this segment."""


@dataclasses.dataclass(frozen=True, slots=True)
class Drop:
    """What becomes of the blocks when a segment goes."""

    survivors: tuple[DiskEntry, ...]
    """To be written again, in this order; parents come before children."""
    removed: frozenset[BlockKey]
    """All others of the segment, and what hangs below them."""


class DiskIndex:
    """Blocks by key, by segment and by parent."""

    def __init__(self) -> None:
        self._entries: dict[BlockKey, DiskEntry] = {}
        self._children: dict[BlockKey, set[BlockKey]] = {}
        self._segments: dict[int, set[BlockKey]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: BlockKey) -> bool:
        return key in self._entries

    def get(self, key: BlockKey) -> DiskEntry | None:
        """The entry of a block; ``None`` if it is not on disk."""
        return self._entries.get(key)

    def match(self, keys: Sequence[BlockKey]) -> int:
        """How many of ``keys``, from the first on, are here without a gap."""
        for count, key in enumerate(keys):
            if key not in self._entries:
                return count
        return len(keys)

    def put(self, entry: DiskEntry) -> None:
        """Add a block; one that is known lies in its new place from now on."""
        self._forget(entry.meta.key)
        self._entries[entry.meta.key] = entry
        self._segments.setdefault(entry.segment, set()).add(entry.meta.key)
        if entry.meta.parent is not None:
            self._children.setdefault(entry.meta.parent, set()).add(entry.meta.key)

    def remove(self, keys: Iterable[BlockKey]) -> list[tuple[BlockKey, ...]]:
        """Forget blocks. Returns them as chains, those below before those they hang on.

        Within a chain each block is the parent of the next.
        """
        left = dict.fromkeys(key for key in keys if key in self._entries)
        chains: list[tuple[BlockKey, ...]] = []
        for key in sorted(left, key=lambda key: self._entries[key].meta.depth, reverse=True):
            chain: list[BlockKey] = []
            at: BlockKey | None = key
            while at is not None and at in left:
                del left[at]
                chain.append(at)
                at = self._entries[at].meta.parent
            if chain:
                chains.append(tuple(reversed(chain)))
        for chain_keys in chains:
            for key in chain_keys:
                self._forget(key)
        # A later chain ends at a block of an earlier one, or at none of these.
        return chains[::-1]

    def below(self, keys: Iterable[BlockKey], elsewhere: Elsewhere) -> frozenset[BlockKey]:
        """``keys``, and all blocks that cannot be reached without them."""
        found = set(keys)
        stack = list(found)
        while stack:
            key = stack.pop()
            new = self._children.get(key, set()) - found
            if new and not elsewhere(key):
                found |= new
                stack.extend(new)
        return frozenset(found)

    def unreachable(self, elsewhere: Elsewhere) -> frozenset[BlockKey]:
        """Blocks that lack one on the way from the first of a prompt to them."""
        firsts = [key for key, entry in self._entries.items() if entry.meta.parent is None]
        left = frozenset(self._entries) - frozenset(self._descend(firsts))
        # Below a block that is elsewhere; whether its copy here can be reached does not matter.
        again = [key for key in left if elsewhere(self._entries[key].meta.parent or key)]
        return left - frozenset(self._descend(again))

    def plan_drop(
        self, segment: int, limit: int, elsewhere: Elsewhere, wanted: BlockKey | None = None
    ) -> Drop:
        """Decide what becomes of a segment's blocks; at most ``limit`` of them survive.

        A block is worth its reads, the blocks of other segments that hang on it, ``wanted`` (the
        parent of a block that is about to be written), and what the blocks below it are worth.
        The worthiest survive, and nothing of negative priority or that hangs on a dropped block.
        """
        keys = self._segments.get(segment, set())
        worth = self._worth(keys, wanted)
        staying: dict[BlockKey, DiskEntry] = {}
        for key in sorted(worth, key=lambda key: (-worth[key], self._entries[key].meta.depth)):
            if len(staying) >= limit or not worth[key]:
                break
            if self._entries[key].meta.priority >= 0:
                staying[key] = self._entries[key]
        # What is worth staying may hang on a dropped block, even by way of another segment.
        removed = self.below(keys - staying.keys(), elsewhere)
        survivors = tuple(entry for key, entry in staying.items() if key not in removed)
        return Drop(survivors, removed)

    def snapshot_keys(self) -> tuple[BlockKey, ...]:
        """All keys, parents before children."""
        roots = [k for k, entry in self._entries.items() if entry.meta.parent not in self._entries]
        return tuple(self._descend(roots))

    def check(self, elsewhere: Elsewhere, used_slots: Mapping[int, int]) -> None:
        """Raise AssertionError, with what is wrong, if the parts do not agree.

        ``used_slots`` is the number of slots in use of each segment that there is.
        """
        places: set[tuple[int, int]] = set()
        for key, entry in self._entries.items():
            parent, place = entry.meta.parent, (entry.segment, entry.slot)
            assert key == entry.meta.key, f"{key.hex()} is filed as {entry}"
            assert entry.slot < used_slots.get(entry.segment, 0), f"{entry} lies nowhere"
            assert place not in places, f"two blocks lie in segment and slot {place}"
            places.add(place)
            assert key in self._segments[entry.segment], f"segment does not list {entry}"
            if parent is not None:
                assert key in self._children[parent], f"its parent does not list {entry}"
                assert parent in self._entries or elsewhere(parent), f"{entry} hangs on nothing"
        listed = sum(len(keys) for keys in self._segments.values())
        assert listed == len(self._entries), f"segments list {listed} of {len(self._entries)}"
        children = sum(len(keys) for keys in self._children.values())
        assert children == sum(e.meta.parent is not None for e in self._entries.values())
        assert len(self.snapshot_keys()) == len(self._entries), "blocks hang in a circle"

    def _worth(self, keys: Collection[BlockKey], wanted: BlockKey | None) -> dict[BlockKey, int]:
        worth = dict.fromkeys(keys, 0)
        for key in sorted(keys, key=lambda key: self._entries[key].meta.depth, reverse=True):
            entry = self._entries[key]
            outside = len(self._children.get(key, set()) - worth.keys())
            worth[key] += entry.num_reads + outside + (key == wanted)
            if entry.meta.parent in worth:
                worth[entry.meta.parent] += worth[key]
        return worth

    def _descend(self, roots: list[BlockKey]) -> list[BlockKey]:
        """``roots`` and all that hangs below them, parents first."""
        order = list(roots)
        for key in order:  # it grows
            order.extend(self._children.get(key, ()))
        return order

    def _forget(self, key: BlockKey) -> None:
        entry = self._entries.pop(key, None)
        if entry is None:
            return
        _discard(self._segments, entry.segment, key)
        if entry.meta.parent is not None:
            _discard(self._children, entry.meta.parent, key)


def _discard(groups: dict[_Name, set[BlockKey]], name: _Name, key: BlockKey) -> None:
    """Take a key out of a group, and the group out if it is empty."""
    groups[name].remove(key)
    if not groups[name]:
        del groups[name]
