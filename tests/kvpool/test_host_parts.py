"""The parts of the host tier's accounts that stand alone."""

from __future__ import annotations

import hashlib
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from kvpool.frequency import MAX_COUNT, FrequencySketch
from kvpool.host_eviction import EvictionOrder, Usage, rank_of
from kvpool.host_leases import OwnedLeases
from kvpool.host_slots import Entry


def key_of(number: int) -> bytes:
    return hashlib.blake2b(str(number).encode(), digest_size=16).digest()


def entry_of(slot: int, priority: int = 0) -> Entry:
    return Entry(slot, 1, key_of(slot), None, 0, 16, priority, transient=False)


@given(st.lists(st.integers(0, 12), max_size=200))
def test_an_estimate_is_never_too_low(numbers: list[int]) -> None:
    sketch = FrequencySketch(1000)
    for number in numbers:
        sketch.add(key_of(number))
    true = Counter(numbers)
    for number in range(13):
        assert sketch.estimate(key_of(number)) >= min(true[number], MAX_COUNT)
        assert sketch.estimate(key_of(number)) <= MAX_COUNT


def test_estimates_are_good_with_as_many_keys_as_there_is_room_for() -> None:
    sketch = FrequencySketch(1024)
    for number in range(1024):
        for _ in range(1 + number % 3):
            sketch.add(key_of(number))
    wrong = [n for n in range(1024) if sketch.estimate(key_of(n)) != 1 + n % 3]
    assert len(wrong) < 1024 // 8


def test_old_fame_fades() -> None:
    sketch = FrequencySketch(64)
    for _ in range(10):
        sketch.add(key_of(1))
    assert sketch.estimate(key_of(1)) == 10
    for number in range(630):
        sketch.add(key_of(2 + number % 20))
    assert sketch.estimate(key_of(1)) == 5
    for number in range(4 * 640):
        sketch.add(key_of(2 + number % 20))
    assert sketch.estimate(key_of(1)) == 0


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(st.sampled_from(["grant", "extend", "end", "wait"]), st.integers(0, 30)),
        max_size=150,
    )
)
def test_leases_are_a_table_of_deadlines(operations: list[tuple[str, int]]) -> None:
    leases, model, now, number = OwnedLeases(), dict[int, float](), 0.0, 0
    for what, amount in operations:
        known = sorted(model)[amount % len(model)] if model else None
        if what == "wait":
            now += amount / 4
        elif what == "grant":
            number += 1
            leases.grant(number, "ab"[amount % 2], now + amount)
            model[number] = now + amount
        elif known is not None and what == "extend":
            leases.extend(known, now + amount)
            model[known] = max(model[known], now + amount)
        elif known is not None:
            leases.end(known)
            del model[known]
        assert leases.next_deadline() == (min(model.values()) if model else None)
        first = leases.first_due(now)
        due = {lease: deadline for lease, deadline in model.items() if deadline <= now}
        assert (first is None) is (not due)
        assert first is None or due[first] == min(due.values())
        assert sorted(leases.owned_by("a") + leases.owned_by("b")) == sorted(model)
        assert all(leases.deadline(lease) == model[lease] for lease in model)


def test_leases_that_come_and_go_take_no_memory() -> None:
    leases = OwnedLeases()
    for number in range(5000):
        leases.grant(number, "a", 1000.0 + number)
        leases.end(number)
    assert len(leases._heap) < 200
    assert leases.next_deadline() is None
    assert leases.owned_by("a") == []


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["add", "touch", "hide", "show", "discard", "evict"]),
            st.integers(0, 30),
        ),
        max_size=150,
    )
)
def test_the_lowest_comes_first_whatever_changed_meanwhile(
    operations: list[tuple[str, int]],
) -> None:
    usage, hidden, entries = Usage(), set[int](), list[Entry]()
    order = EvictionOrder(lambda entry: entry.slot not in hidden)
    for number, (what, amount) in enumerate(operations):
        one = entries[amount % len(entries)] if entries else None
        if what == "add":
            entries.append(entry_of(number, amount % 3 - 1))
            usage.touch(entries[-1], 0.0)
            order.push(entries[-1])
        elif one is None:
            continue
        elif what == "touch":
            usage.touch(one, 0.0)
        elif what == "hide":
            hidden.add(one.slot)
        elif what == "show":
            hidden.discard(one.slot)
            order.push(one)
        elif what == "discard":
            entries.remove(one)
            order.discard(one)
        elif (victim := order.peek()) is not None:
            usage.evicted(victim)
            entries.remove(victim)
            order.discard(victim)
        able = sorted((e for e in entries if e.slot not in hidden), key=rank_of)
        assert order.peek() is (able[0] if able else None)
        assert order.lowest(3) == able[:3]


def test_blocks_that_come_and_go_take_no_memory() -> None:
    usage, order = Usage(), EvictionOrder(lambda entry: True)
    for slot in range(5000):
        entry = entry_of(slot)
        usage.touch(entry, 0.0)
        order.push(entry)
        order.discard(entry)
    assert len(order._heap) < 200
    assert order.peek() is None


def test_what_was_popular_long_ago_is_overtaken() -> None:
    usage = Usage()
    old, new = entry_of(0), entry_of(1)
    for _ in range(9):
        usage.touch(old, 0.0)
    for slot in range(2, 12):
        passing = entry_of(slot)
        usage.touch(passing, 0.0)
        usage.evicted(passing)
    usage.touch(new, 0.0)
    assert rank_of(old) < rank_of(new)
