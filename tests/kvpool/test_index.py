from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.core.blocks import BlockKey
from kvpool.index import LOOKUPS_PER_SAMPLE, KVIndex, PrefixMatch, TopPrefix
from kvpool.index_hot import HotPrefixes
from kvpool.index_sets import numbers
from kvpool.tiers import KVEvent, KVEventBatch, KVEventKind, KVSnapshot, Tier
from tests.kvpool.pool_model import (
    CHAINS,
    PARENTS,
    UNKNOWN,
    Content,
    happen,
    matches,
)


def chain(count: int, name: str = "k") -> list[BlockKey]:
    return [f"{name}{number}".encode().ljust(16, b".") for number in range(count)]


def stored(tier: Tier, keys: list[BlockKey]) -> KVEvent:
    return KVEvent(KVEventKind.STORED, tier, tuple(keys))


def removed(tier: Tier, keys: list[BlockKey]) -> KVEvent:
    return KVEvent(KVEventKind.REMOVED, tier, tuple(keys))


def snapshot(holder: str, life: int, next_seq: int, **blocks: list[BlockKey]) -> KVSnapshot:
    by_tier = tuple((Tier(tier), tuple(keys)) for tier, keys in blocks.items())
    return KVSnapshot(holder, life, next_seq, by_tier)


EVENTS = st.lists(
    st.builds(
        lambda kind, tier, keys, to: KVEvent(
            kind,
            tier,
            tuple(keys),
            to if kind in (KVEventKind.DEMOTED, KVEventKind.PROMOTED) else None,
        ),
        st.sampled_from(KVEventKind),
        st.sampled_from(Tier),
        st.lists(st.sampled_from(list(PARENTS)), max_size=6),
        st.sampled_from(Tier),
    ),
    max_size=25,
)


@given(st.lists(st.tuples(st.sampled_from("abc"), EVENTS), max_size=6))
@settings(deadline=None)
def test_whatever_holders_say_nothing_raises_and_single_blocks_are_right(
    said: list[tuple[str, list[KVEvent]]],
) -> None:
    index, contents, seqs = KVIndex(), dict[str, Content](), dict[str, int]()
    for name in "abc":
        index.replace(snapshot(name, 0, 0))
        contents[name], seqs[name] = {}, 0
    for name, events in said:
        assert index.apply(KVEventBatch(name, 0, seqs[name], tuple(events)))
        seqs[name] += len(events)
        for event in events:
            happen(contents[name], event)
    index.check_integrity()
    for key in PARENTS:
        expected = {
            PrefixMatch(name, tier, count)
            for name, content in contents.items()
            for tier, count in matches(content, [key])
        }
        assert set(index.lookup([key])) == expected
    for keys in CHAINS:
        assert all(0 < one.num_blocks <= len(keys) for one in index.lookup(keys))
        assert 0 <= index.longest(keys) <= len(keys)


def test_a_node_answers_for_its_host_tier_and_for_its_disk() -> None:
    index, keys = KVIndex(), chain(8)
    index.replace(snapshot("node", 0, 0, host=keys[:3], disk=keys[2:5]))
    index.replace(snapshot("instance", 0, 0, device=keys[:4]))
    answer = index.lookup(keys)
    assert list(answer) == [
        PrefixMatch("node", Tier.DISK, 5),
        PrefixMatch("instance", Tier.DEVICE, 4),
        PrefixMatch("node", Tier.HOST, 3),
    ]
    assert answer.num_blocks("node", Tier.HOST) == 3
    assert answer.num_blocks("node") == 5
    assert answer.num_blocks("node", Tier.DEVICE) == 0
    assert index.counts("node") == {Tier.HOST: 3, Tier.DISK: 3}
    assert not index.lookup([])
    assert not index.lookup(UNKNOWN)


def test_the_search_guesses_and_is_right_when_the_guess_is_wrong() -> None:
    index = KVIndex()
    prompts = [chain(64, name) for name in "abcd"]
    lengths = [5, 63, 1, 64]
    own = [key for keys, length in zip(prompts, lengths, strict=True) for key in keys[:length]]
    index.replace(snapshot("x", 0, 0, device=own))
    generator = random.Random(0)
    for _ in range(200):  # one set for all four: each leaves a guess for the others
        number = generator.randrange(4)
        expected = [PrefixMatch("x", Tier.DEVICE, lengths[number])]
        assert list(index.lookup(prompts[number])) == expected


def test_equal_holders_share_one_set_and_sets_go_with_their_blocks() -> None:
    index, keys = KVIndex(), chain(1000)
    for number in range(50):
        index.replace(snapshot(f"h{number}", 0, 0, device=keys))
    assert (index.num_blocks, index.num_sets) == (1000, 1)
    assert len(index.lookup(keys)) == len(set(index.lookup(keys))) == 50
    for number in range(50):
        assert index.apply(KVEventBatch(f"h{number}", 0, 0, (removed(Tier.DEVICE, keys),)))
    assert (index.num_blocks, index.num_sets, index.num_holders) == (0, 0, 50)


def test_what_a_holder_had_is_gone_with_it_and_its_memory_too() -> None:
    index, keys, more = KVIndex(sweep_min_blocks=10), chain(100), chain(100, "m")
    index.replace(snapshot("a", 0, 0, device=keys))
    index.replace(snapshot("b", 0, 0, device=keys[:50] + more))
    index.drop("a")
    assert index.lookup(keys).longest == index.longest(keys) == 50
    assert index.num_blocks == 150
    index.check_integrity()
    index.drop("b")
    assert (index.num_blocks, index.num_sets, index.num_holders) == (0, 0, 0)
    index.drop("b")


def test_a_node_with_both_copies_has_one_match_also_after_another_holder_went() -> None:
    index, keys = KVIndex(), chain(3)
    index.replace(snapshot("node", 0, 0, host=keys, disk=keys))
    index.replace(snapshot("instance", 0, 0, device=keys))
    index.drop("instance")
    assert list(index.lookup(keys)) == [PrefixMatch("node", Tier.HOST, 3)]
    assert index.apply(KVEventBatch("node", 0, 0, (removed(Tier.HOST, keys[2:]),)))
    assert list(index.lookup(keys)) == [
        PrefixMatch("node", Tier.DISK, 3),
        PrefixMatch("node", Tier.HOST, 2),
    ]


def test_sets_that_became_equal_are_one_again() -> None:
    index, one, other, third = KVIndex(), chain(2, "x"), chain(2, "y"), chain(2, "z")
    index.replace(snapshot("a", 0, 0, device=one + other))
    index.replace(snapshot("b", 0, 0, device=one))
    index.replace(snapshot("c", 0, 0, device=one + other))
    index.drop("b")  # now both have the set {a, c}, in two objects
    index.check_integrity()
    for name in "ac":
        assert index.apply(KVEventBatch(name, 0, 0, (removed(Tier.DEVICE, other),)))
    index.drop("c")
    index.check_integrity()
    assert index.apply(KVEventBatch("a", 0, 1, (stored(Tier.DEVICE, third),)))
    index.check_integrity()
    assert (index.num_blocks, index.num_sets) == (4, 1)


def test_a_gap_asks_for_a_snapshot_until_it_comes() -> None:
    index, keys = KVIndex(), chain(4)
    first = KVEventBatch("h", 7, 0, (stored(Tier.DEVICE, keys[:1]),))
    assert not index.apply(first)  # nothing is known of it: it may have blocks from before
    index.replace(snapshot("h", 7, 0))
    assert index.apply(first)
    assert index.apply(first)
    assert index.position("h") == (7, 1)
    assert not index.apply(KVEventBatch("h", 7, 2, (stored(Tier.DEVICE, keys[2:3]),)))
    assert not index.apply(KVEventBatch("h", 7, 1, (stored(Tier.DEVICE, keys[1:2]),)))
    assert index.position("h") is None
    assert index.lookup(keys).longest == 1  # what was known is still answered
    index.replace(snapshot("h", 7, 3, device=keys[:3]))
    assert index.apply(KVEventBatch("h", 7, 1, (removed(Tier.DEVICE, keys),)))
    assert index.lookup(keys).longest == 3
    assert index.position("h") == (7, 3)


def test_an_empty_batch_shows_a_gap() -> None:
    index = KVIndex()
    index.replace(snapshot("h", 0, 4))
    assert index.apply(KVEventBatch("h", 0, 4, ()))
    assert not index.apply(KVEventBatch("h", 0, 5, ()))


def test_a_new_life_begins_with_nothing_and_the_old_one_is_silent() -> None:
    index, keys = KVIndex(), chain(3)
    index.replace(snapshot("h", 1, 5, device=keys))
    assert not index.apply(KVEventBatch("h", 2, 0, (stored(Tier.DEVICE, keys[:1]),)))
    assert not index.lookup(keys)
    assert index.apply(KVEventBatch("h", 1, 5, (stored(Tier.DEVICE, keys),)))
    index.replace(snapshot("h", 1, 6, device=keys))
    assert not index.lookup(keys)
    index.replace(snapshot("h", 2, 1, device=keys[:1]))
    assert list(index.lookup(keys)) == [PrefixMatch("h", Tier.DEVICE, 1)]


def test_a_late_snapshot_does_not_take_events_back() -> None:
    index, keys = KVIndex(), chain(2)
    old = snapshot("h", 0, 0)
    index.replace(old)
    assert index.apply(KVEventBatch("h", 0, 0, (stored(Tier.DEVICE, keys),)))
    index.replace(old)
    assert index.lookup(keys).longest == 2


def test_top_prefixes_are_those_that_lookups_end_at() -> None:
    index, popular, rare = KVIndex(), chain(4, "p"), chain(6, "r")
    index.replace(snapshot("a", 0, 0, device=popular + rare))
    index.replace(snapshot("b", 0, 0, device=popular))
    for number in range(5 * LOOKUPS_PER_SAMPLE):  # 3 of the 5 samples are popular
        index.lookup([*(popular if number % (2 * LOOKUPS_PER_SAMPLE) == 7 else rare), *UNKNOWN])
    top = index.top_prefixes(5)
    assert top == [TopPrefix(popular[-1], 4, 3, 2), TopPrefix(rare[-1], 6, 2, 1)]
    assert index.top_prefixes(1) == top[:1]
    index.drop("a")
    assert [one.key for one in index.top_prefixes(5)] == [popular[-1]]
    assert index.num_lookups == 5 * LOOKUPS_PER_SAMPLE


def test_hot_prefixes_outlive_a_flood_of_cold_ones() -> None:
    hot = HotPrefixes(capacity=16)
    for number in range(1000):
        hot.count(b"hot", 3)
        hot.count(str(number).encode(), 1)
        assert len(hot) <= 16
    key, depth, weight = hot.top()[0]
    assert (key, depth) == (b"hot", 3)
    assert 1 < weight < 1000
    for number in range(1000):  # all hot: still bounded
        for _ in range(2):
            hot.count(f"h{number}".encode(), 1)
    assert len(hot) <= 16
    with pytest.raises(ValueError, match="at least"):
        HotPrefixes(1)


@given(st.sets(st.integers(0, 300)), st.integers(0, 200))
def test_numbers_of_a_set(members: set[int], limit: int) -> None:
    bits = sum(1 << number for number in members)
    assert sorted(numbers(bits)) == sorted(members)
    some = numbers(bits, limit)
    assert len(some) == len(set(some)) == min(len(members), limit)
    assert set(some) <= members
