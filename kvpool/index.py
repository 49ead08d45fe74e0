"""Who has which blocks: the controller's index of all holders of the pool. Pure.

Holders (instances, pool nodes) number their events. ``KVIndex.apply`` takes them in order, and says
when a snapshot is needed instead. ``KVIndex.lookup`` answers how long a prefix of a prompt each
holder has.

Eviction is leaf-first, so what a holder has in a tier or in faster ones is closed under prefixes,
and along the keys of a prompt holders only go, or change to slower tiers. So a lookup is a binary
search for where the set of holders changes: about seven probes for a prompt of 64 blocks.

An answer may be stale. That costs a miss, never a wrong block: keys name content, and whoever
fetches asks the holder for the key.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from baton.core.blocks import BlockKey
from kvpool.index_hot import HotPrefixes
from kvpool.index_matches import PrefixMatch, PrefixMatches, TopPrefix
from kvpool.index_sets import Ladder, Places, PlaceSet, PlaceSets
from kvpool.tiers import KVEvent, KVEventBatch, KVEventKind, KVSnapshot, Tier

__all__ = ["KVIndex", "PrefixMatch", "PrefixMatches", "TopPrefix"]

LOOKUPS_PER_SAMPLE = 8
"""One lookup in so many is counted for ``top_prefixes``."""


class _Holder:
    __slots__ = ("ladder", "life", "next_seq", "synced")

    def __init__(self, life: int, ladder: Ladder) -> None:
        self.life = life
        self.next_seq = 0
        self.synced = False
        self.ladder = ladder


class KVIndex:
    """Which holder has which blocks in which tier.

    The caller decides which holders and lives there are: it drops those that are gone, and keeps
    late messages of dropped ones away.
    """

    def __init__(self, *, sweep_min_blocks: int = 4096) -> None:
        """Keys of holders that are gone are swept once they are so many and an eighth of all."""
        self._sweep_min_blocks = sweep_min_blocks
        self._blocks: dict[BlockKey, PlaceSet] = {}
        self._sets = PlaceSets()
        self._places = Places()
        self._holders: dict[str, _Holder] = {}
        self._num_orphans = 0
        """Keys in ``_blocks`` whose set is empty since their holders were stripped."""
        self._hot = HotPrefixes()
        self.num_lookups = 0

    # -- what holders say

    def apply(self, batch: KVEventBatch) -> bool:
        """Take events in. ``False``: they do not follow on what is known; ask for a snapshot.

        So it is for a holder or a life that there was no snapshot of yet, after a gap, and until
        the snapshot comes. What was known before the gap is still answered; what an earlier life
        had is gone at once. Events that were applied already are skipped, those of an earlier life
        ignored (``True``).
        """
        holder = self._holders.get(batch.holder)
        if holder is None:
            return False
        if batch.life < holder.life:
            return True
        if batch.life > holder.life:
            self._begin_life(holder, batch.life)
            self._sweep_if_due()
            return False
        if batch.first_seq > holder.next_seq:
            holder.synced = False
        if not holder.synced:
            return False
        for event in batch.events[holder.next_seq - batch.first_seq :]:
            self._apply_event(batch.holder, holder.ladder, event)
        holder.next_seq = max(holder.next_seq, batch.next_seq)
        return True

    def replace(self, snapshot: KVSnapshot) -> None:
        """Forget what was known of a holder; it has what the snapshot says.

        A snapshot older than what was applied is ignored.
        """
        holder = self._holders.get(snapshot.holder)
        if holder is None:
            holder = _Holder(snapshot.life, self._places.ladder(snapshot.holder))
            self._holders[snapshot.holder] = holder
        elif (snapshot.life, snapshot.next_seq) < (holder.life, holder.next_seq):
            return
        self._begin_life(holder, snapshot.life)
        for tier, keys in snapshot.blocks:
            self._change(holder.ladder, keys, self._places.bit(snapshot.holder, tier), 0)
        holder.next_seq = snapshot.next_seq
        holder.synced = True
        self._sweep_if_due()

    def drop(self, holder: str) -> None:
        """A holder is gone, with all that it had. Unknown ones are none."""
        gone = self._holders.pop(holder, None)
        if gone is None:
            return
        self._begin_life(gone, gone.life)
        self._places.release(holder)
        self._sweep_if_due()

    def position(self, holder: str) -> tuple[int, int] | None:
        """(life, number of the next event) to go on from; ``None``: a snapshot is needed."""
        known = self._holders.get(holder)
        return (known.life, known.next_seq) if known is not None and known.synced else None

    # -- what the controller asks

    def lookup(self, keys: Sequence[BlockKey]) -> PrefixMatches:
        """Who has how long a prefix of a prompt with these keys, first block first.

        Exact as long as what is known of each holder is closed under prefixes. Otherwise (the
        removal of a parent came before that of its child) an answer may be too short or too long.
        Never raises.
        """
        self.num_lookups += 1
        runs: list[tuple[int, int]] = []
        if keys:
            self._find_runs(keys, runs)
        if runs and self.num_lookups % LOOKUPS_PER_SAMPLE == 0:
            depth = runs[-1][0]
            self._hot.count(keys[depth - 1], depth)
        return PrefixMatches(runs, self._places)

    def _find_runs(self, keys: Sequence[BlockKey], runs: list[tuple[int, int]]) -> None:
        """Append (blocks, who has them) for each length at which the set of holders changes.

        ``keys[low]`` has the set ``here`` and ``keys[high]`` the set ``there``; ``later`` has what
        is known of keys behind ``high``. Nobody has the key behind the last one. The first guess is
        that ``here`` ends where it ended when it was last looked up: shared prefixes end where they
        always do, and that halves the probes.
        """
        get = self._blocks.get
        nobody = self._sets.empty
        here, low = get(keys[0], nobody), 0
        there, high = nobody, len(keys)
        later: list[tuple[PlaceSet, int]] = []
        while here.best:
            middle = here.last_end - 1
            if not low < middle < high:
                middle = (low + high) >> 1
            while high - low > 1:
                found = get(keys[middle], nobody)
                if found is here:
                    low = middle
                    middle += 1
                    if middle == here.last_end:
                        continue  # the guess is right so far: is it the end as well?
                elif found is there:
                    high = middle
                else:
                    later.append((there, high))
                    there, high = found, middle
                    if found.best == here.best:
                        break
                middle = (low + high) >> 1
            else:
                if here.best != there.best:
                    runs.append((high, here.best))
                    here.last_end = high
            here, low = there, high
            if later:
                there, high = later.pop()

    def longest(self, keys: Sequence[BlockKey]) -> int:
        """How many leading blocks of a prompt somebody has. As exact as :meth:`lookup`."""
        get = self._blocks.get
        nobody = self._sets.empty
        low, high = -1, len(keys)
        while high - low > 1:
            middle = (low + high) >> 1
            if get(keys[middle], nobody).best:
                low = middle
            else:
                high = middle
        return low + 1

    # -- what people look at

    @property
    def num_blocks(self) -> int:
        """Different blocks that somebody has."""
        return len(self._blocks) - self._num_orphans

    @property
    def num_holders(self) -> int:
        """Holders known, those included that a snapshot is awaited of."""
        return len(self._holders)

    @property
    def num_sets(self) -> int:
        """Different sets of places; with ``num_blocks`` it says how much memory there is in use."""
        return len(self._sets)

    def holders(self) -> list[str]:
        """Their names."""
        return list(self._holders)

    def counts(self, holder: str) -> dict[Tier, int]:
        """Blocks of a holder by tier; tiers that it never used are missing."""
        known = self._holders.get(holder)
        return dict(known.ladder.counts) if known is not None else {}

    def top_prefixes(self, count: int) -> list[TopPrefix]:
        """The prefixes at which most lookups ended, and which somebody has still."""
        top: list[TopPrefix] = []
        for key, depth, weight in self._hot.top():
            if len(top) == count:
                break
            found = self._blocks.get(key)
            if found is not None and found.best:
                top.append(TopPrefix(key, depth, weight, found.best.bit_count()))
        return top

    def check_integrity(self) -> None:
        """Assert that all counts are right. For tests: it looks at every block."""
        users = Counter(self._blocks.values())
        self._sets.check(users)
        assert self._num_orphans == sum(num for one, num in users.items() if not one.all)
        for holder in self._holders.values():
            for tier, bit in holder.ladder.bits.items():
                counted = sum(num for one, num in users.items() if one.all & bit)
                assert holder.ladder.counts[tier] == counted

    # -- inside

    def _begin_life(self, holder: _Holder, life: int) -> None:
        if any(holder.ladder.counts.values()):
            self._num_orphans += self._sets.strip(holder.ladder.mask)
        holder.ladder.counts = dict.fromkeys(holder.ladder.counts, 0)
        holder.life = life
        holder.next_seq = 0
        holder.synced = False

    def _apply_event(self, name: str, ladder: Ladder, event: KVEvent) -> None:
        tier = self._places.bit(name, event.tier)
        to = self._places.bit(name, event.to) if event.to is not None else 0
        if event.kind is KVEventKind.STORED:
            self._change(ladder, event.keys, tier, 0)
        elif event.kind is KVEventKind.REMOVED:
            self._change(ladder, event.keys, 0, tier)
        elif event.kind is KVEventKind.DEMOTED:
            self._change(ladder, event.keys, to, tier)
        else:
            self._change(ladder, event.keys, tier | to, 0)

    def _change(self, ladder: Ladder, keys: Sequence[BlockKey], add: int, clear: int) -> None:
        """Keys lose places and gain others. Neighbours mostly have one set: it is changed once."""
        blocks = self._blocks
        empty = self._sets.empty
        old: PlaceSet | None = None
        new = empty
        moved = 0
        for key in keys:
            found = blocks.get(key, empty)
            if found is not old:
                if old is not None:
                    self._account(ladder, moved, old, new)
                old, moved = found, 0
                new = self._sets.changed(found, ladder, add, clear)
            if new is found:
                continue
            moved += 1
            if new is empty:
                del blocks[key]
            else:
                blocks[key] = new
        if old is not None:
            self._account(ladder, moved, old, new)

    def _account(self, ladder: Ladder, moved: int, old: PlaceSet, new: PlaceSet) -> None:
        if not moved:
            return
        for tier, bit in ladder.bits.items():
            ladder.counts[tier] += moved * (bool(new.all & bit) - bool(old.all & bit))
        if not old.all and old is not self._sets.empty:
            self._num_orphans -= moved
        self._sets.move(moved, old, new)

    def _sweep_if_due(self) -> None:
        """Free the memory of keys that nobody has. Rare, as it looks at every block."""
        num = self._num_orphans
        if num < self._sweep_min_blocks or 8 * num < len(self._blocks):
            return
        for key in [key for key, places in self._blocks.items() if not places.all]:
            del self._blocks[key]
        self._sets.forget_empty()
        self._num_orphans = 0
