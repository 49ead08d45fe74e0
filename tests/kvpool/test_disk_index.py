from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.core.blocks import BlockKey
from kvpool.disk_index import DiskEntry, DiskIndex, Elsewhere
from tests.kvpool.disk_kit import PARENTS, key_of, keys_of, meta_of

NAMES = [root + rest for root in "ab" for rest in ("", "1", "2", "11", "12", "111", "112")]
PLACES = st.dictionaries(st.sampled_from(NAMES), st.integers(1, 3), max_size=len(NAMES))
SOME = st.sets(st.sampled_from(NAMES))


def never(key: BlockKey) -> bool:
    return False


def index_of(
    segment_of: dict[str, int], reads: dict[str, int] | None = None, offline: str = ""
) -> DiskIndex:
    index = DiskIndex()
    for slot, (name, segment) in enumerate(segment_of.items()):
        meta = meta_of(name, priority=-(name in offline.split()))
        index.put(DiskEntry(meta, segment, slot, slot, (reads or {}).get(name, 0)))
    return index


def hangs(key: BlockKey, there: set[BlockKey], elsewhere: Elsewhere) -> bool:
    """Whether all blocks before it can be had, from the first on, or from one elsewhere on."""
    parent = PARENTS[key]
    if parent is None or elsewhere(parent):
        return True
    return parent in there and hangs(parent, there, elsewhere)


@given(PLACES, SOME, SOME, st.lists(st.sampled_from(NAMES)), st.integers(0, 4))
def test_a_drop_leaves_what_can_be_reached_and_no_more(
    places: dict[str, int], host: set[str], offline: set[str], reads: list[str], limit: int
) -> None:
    elsewhere = set(keys_of(*host)).__contains__
    index = index_of(places, {name: reads.count(name) for name in NAMES}, " ".join(offline))
    index.remove(index.unreachable(elsewhere))
    before = set(index.snapshot_keys())
    segment = {key for key in before if places[name_of(key)] == 1}
    drop = index.plan_drop(1, limit, elsewhere)
    survivors = [entry.meta.key for entry in drop.survivors]
    assert len(survivors) == len(set(survivors)) <= limit
    assert set(survivors) <= segment
    assert set(survivors).isdisjoint(keys_of(*offline))
    assert segment - set(survivors) <= drop.removed <= before
    assert drop.removed.isdisjoint(survivors)
    after = before - drop.removed
    stays = (before - segment) | set(survivors)
    assert after == {key for key in stays if hangs(key, stays, elsewhere)}
    order = {key: place for place, key in enumerate(survivors)}
    assert all(order.get(PARENTS[key] or key, 0) <= order[key] for key in survivors)
    chains = index.remove(drop.removed)
    gone: set[BlockKey] = set()
    for chain in chains:
        assert [PARENTS[key] for key in chain[1:]] == list(chain[:-1])
        gone |= set(chain)
        assert not {key for key in drop.removed - gone if PARENTS[key] in gone}
    assert gone == drop.removed
    assert set(index.snapshot_keys()) == after


@given(PLACES, SOME)
def test_orphans_are_what_cannot_be_reached(places: dict[str, int], host: set[str]) -> None:
    elsewhere = set(keys_of(*host)).__contains__
    index = index_of(places)
    there = set(keys_of(*places))
    expected = {key for key in there if not hangs(key, there, elsewhere)}
    assert index.unreachable(elsewhere) == expected


def name_of(key: BlockKey) -> str:
    return next(name for name in NAMES if key_of(name) == key)


def test_the_worthiest_survive() -> None:
    places = dict.fromkeys(["a", "a1", "a2", "b", "b1"], 1) | {"a11": 2, "b2": 2}
    index = index_of(places, {"a2": 3, "b": 1})
    names = [name_of(entry.meta.key) for entry in index.plan_drop(1, 9, never).survivors]
    # a: 4 below it; a2: its reads; b: one read and b2; a1: a11; b1: nothing.
    assert names == ["a", "a2", "b", "a1"]
    drop = index.plan_drop(1, 2, never)
    assert [name_of(entry.meta.key) for entry in drop.survivors] == ["a", "a2"]
    assert drop.removed == set(keys_of("a1", "a11", "b", "b1", "b2"))
    wanted = index.plan_drop(1, 9, never, wanted=key_of("b1")).survivors
    assert key_of("b1") in [entry.meta.key for entry in wanted]


def test_a_survivor_cannot_hang_on_what_is_dropped_by_way_of_another_segment() -> None:
    index = index_of({"a": 1, "a1": 2, "a11": 1}, {"a11": 5}, offline="a")
    drop = index.plan_drop(1, 9, never)
    assert drop.survivors == ()
    assert drop.removed == set(keys_of("a", "a1", "a11"))


def test_below_a_block_elsewhere_a_copy_that_cannot_be_reached_is_no_hindrance() -> None:
    index = index_of({"a1": 1, "a11": 1, "a111": 1})
    assert index.unreachable(set(keys_of("a11")).__contains__) == set(keys_of("a1", "a11"))


def test_disagreement_is_named() -> None:
    index = index_of({"a": 1, "a1": 1})
    index.check(never, {1: 2})
    with pytest.raises(AssertionError, match="lies nowhere"):
        index.check(never, {1: 1})
    index.remove(keys_of("a"))
    with pytest.raises(AssertionError, match="hangs on nothing"):
        index.check(never, {1: 2})
    index.check(lambda key: True, {1: 2})
    index.put(DiskEntry(meta_of("b"), 1, 1, 0))
    with pytest.raises(AssertionError, match="two blocks lie"):
        index.check(lambda key: True, {1: 2})
