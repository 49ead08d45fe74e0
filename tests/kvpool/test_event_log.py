from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.core.blocks import BlockKey
from kvpool.event_log import KEYS_PER_EVENT_KEPT, MAX_KEYS_PER_EVENT, Gap, KVEventLog
from kvpool.tiers import KVEvent, KVEventBatch, KVEventKind, Tier

Change = tuple[KVEventKind, Tier, Tier | None, BlockKey]

SHAPES = [
    (KVEventKind.STORED, Tier.HOST, None),
    (KVEventKind.REMOVED, Tier.HOST, None),
    (KVEventKind.STORED, Tier.DISK, None),
    (KVEventKind.DEMOTED, Tier.HOST, Tier.DISK),
    (KVEventKind.DEMOTED, Tier.HOST, Tier.EXTERNAL),
]


def stored(*numbers: int) -> KVEvent:
    return KVEvent(KVEventKind.STORED, Tier.HOST, tuple(key(number) for number in numbers))


def key(number: int) -> BlockKey:
    return number.to_bytes(16, "big")


def changes(event: KVEvent) -> list[Change]:
    return [(event.kind, event.tier, event.to, one) for one in event.keys]


def read(log: KVEventLog, seq: int, max_events: int = 1000) -> KVEventBatch:
    batch = log.batch_after(seq, max_events)
    assert isinstance(batch, KVEventBatch)
    return batch


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(0, len(SHAPES) - 1), st.integers(0, 40)),
        st.tuples(st.just("read"), st.integers(1, 5), st.just(0)),
        st.tuples(st.just("snapshot"), st.just(0), st.just(0)),
    ),
    max_size=80,
)


@given(STEPS, st.integers(1, 12))
def test_a_reader_sees_every_change_in_order_or_is_told_of_a_gap(
    steps: list[tuple[str, int, int]], capacity: int
) -> None:
    log = KVEventLog("node", 3, capacity)
    happened: list[Change] = []
    seen = 0  # changes the reader knows of, one way or the other
    seq = 0
    for what, number, count in steps:
        if what == "append":
            kind, tier, to = SHAPES[number]
            keys = tuple(key(len(happened) + n) for n in range(count))
            event = KVEvent(kind, tier, keys, to)
            log.append(event)
            happened += changes(event)
        elif what == "snapshot":
            seq, seen = log.next_seq, len(happened)
        else:
            batch = log.batch_after(seq, number)
            if batch is None:
                assert seen == len(happened)
            elif isinstance(batch, Gap):
                assert batch.first_seq > seq
                seq, seen = log.next_seq, len(happened)  # it takes a snapshot
            else:
                assert (batch.holder, batch.life, batch.first_seq) == ("node", 3, seq)
                assert 0 < len(batch.events) <= number
                told = [change for event in batch.events for change in changes(event)]
                assert told == happened[seen : seen + len(told)]
                seen += len(told)
                seq = batch.next_seq


def test_like_events_are_joined() -> None:
    log = KVEventLog("node", 0)
    for number in range(5):
        log.append(stored(number))
    log.append(KVEvent(KVEventKind.REMOVED, Tier.HOST, (key(9),)))
    batch = read(log, 0)
    assert batch.events == (
        stored(0, 1, 2, 3, 4),
        KVEvent(KVEventKind.REMOVED, Tier.HOST, (key(9),)),
    )
    assert batch.next_seq == log.next_seq == 2


def test_joined_events_stay_small_and_large_ones_whole() -> None:
    log = KVEventLog("node", 0)
    for number in range(MAX_KEYS_PER_EVENT + 1):
        log.append(stored(number))
    log.append(stored(*range(3 * MAX_KEYS_PER_EVENT)))
    sizes = [len(event.keys) for event in read(log, 0).events]
    assert sizes == [MAX_KEYS_PER_EVENT, 1, 3 * MAX_KEYS_PER_EVENT]


def test_an_event_that_was_read_does_not_grow() -> None:
    log = KVEventLog("node", 0)
    log.append(stored(1))
    assert read(log, 0).events == (stored(1),)
    log.append(stored(2))
    assert read(log, 1).events == (stored(2),)


def test_an_event_after_a_snapshot_is_not_joined_to_one_before() -> None:
    log = KVEventLog("node", 0)
    log.append(stored(1))
    as_of = log.next_seq
    log.append(stored(2))
    assert read(log, as_of).events == (stored(2),)


def test_memory_is_bounded_by_events_and_by_keys() -> None:
    log = KVEventLog("node", 0, capacity=4)
    for number in range(10):
        log.append(KVEvent(KVEventKind(("stored", "removed")[number % 2]), Tier.HOST, (key(0),)))
    assert log.batch_after(5, 100) == Gap(6)
    assert len(read(log, 6).events) == 4
    log.append(stored(*range(4 * KEYS_PER_EVENT_KEPT)))
    assert log.batch_after(6, 100) == Gap(10)
    assert read(log, 10).events == (stored(*range(4 * KEYS_PER_EVENT_KEPT)),)
    log.append(stored(*range(4 * KEYS_PER_EVENT_KEPT + 1)))
    assert log.batch_after(10, 100) == Gap(12)
    assert log.batch_after(12, 100) is None


def test_numbers_of_another_log_are_a_gap() -> None:
    log = KVEventLog("node", 0)
    log.append(stored(1))
    assert log.batch_after(7, 100) == Gap(0)


def test_nothing_is_no_event() -> None:
    log = KVEventLog("node", 0)
    log.append(stored())
    assert log.next_seq == 0
    assert log.batch_after(0, 10) is None


def test_bounds_are_positive() -> None:
    with pytest.raises(ValueError, match="capacity of 0"):
        KVEventLog("node", 0, capacity=0)
    with pytest.raises(ValueError, match="max_events=0"):
        KVEventLog("node", 0).batch_after(0, 0)
