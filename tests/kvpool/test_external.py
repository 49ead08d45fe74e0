"""The external tier's own parts: when it gives up, what it believes, calls that do not return."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvpool.bounded import BoundedCalls, Overloaded, Staging, StagingPool
from kvpool.breaker import Breaker
from kvpool.external_memory import MemoryExternalStore, StoreFault
from kvpool.external_values import (
    HEADER_BYTES,
    WrongChecksum,
    WrongLength,
    pack_header,
    unpack,
)
from kvpool.tiers import BlockMeta
from tests.kvpool.store_kit import COUNTED

KEYS = [bytes([i]) * 16 for i in range(8)]
VALUE = 50


def payload_of(key: bytes) -> memoryview:
    return memoryview(bytes((key[0] + i) % 256 for i in range(VALUE)))


class Never(Breaker):
    """Tries always."""

    def allows(self, now: float) -> bool:
        return True


class StoreUnderFaults(RuleBasedStateMachine):
    """Whatever goes wrong: what is said to have arrived is what was put."""

    def __init__(self) -> None:
        super().__init__()
        room = 5 * (HEADER_BYTES + VALUE)
        self.store = MemoryExternalStore(
            "x", room, batch_bytes=150, timeout_s=0.001, breaker=Never()
        )
        self.put_once: set[bytes] = set()

    @rule(fault=st.sampled_from([None, *StoreFault]))
    def switch(self, fault: StoreFault | None) -> None:
        self.store.fault = fault

    @rule(keys=st.lists(st.sampled_from(KEYS), max_size=5))
    def put(self, keys: list[bytes]) -> None:
        done = self.store.put([(BlockMeta(key, None), payload_of(key)) for key in keys])
        assert 0 <= done <= len(keys)
        self.put_once.update(keys)

    @rule(keys=st.lists(st.sampled_from(KEYS), max_size=5))
    def get(self, keys: list[bytes]) -> None:
        into = [memoryview(bytearray(VALUE)) for _ in keys]
        done = self.store.get(keys, into)
        assert into[:done] == [payload_of(key) for key in keys[:done]]
        assert self.put_once.issuperset(keys[:done])
        if self.store.fault in (StoreFault.FAIL, StoreFault.STALL, StoreFault.FLIP):
            assert done == 0

    @rule(keys=st.lists(st.sampled_from(KEYS), max_size=5))
    def match(self, keys: list[bytes]) -> None:
        assert self.put_once.issuperset(keys[: self.store.match(keys)])

    @invariant()
    def bounded(self) -> None:
        held = self.store.memory._values
        assert len(held) <= 5
        assert self.store.memory._num_bytes == sum(map(len, held.values()))


TestStoreUnderFaults = StoreUnderFaults.TestCase
TestStoreUnderFaults.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


@pytest.mark.parametrize(("fault", "counted"), COUNTED.items())
def test_each_fault_is_counted_and_passes(fault: StoreFault, counted: str) -> None:
    store = MemoryExternalStore("x", 1 << 20, timeout_s=0.05)
    blocks = [(BlockMeta(key, None), payload_of(key)) for key in KEYS]
    assert store.put(blocks) == len(KEYS)
    into = [memoryview(bytearray(VALUE)) for _ in KEYS]
    store.fault = fault
    assert store.get(KEYS, into) == 0
    assert getattr(store.statistics(), counted) >= 1
    store.fault = None
    store.put(blocks)
    assert store.get(KEYS, into) == len(KEYS)
    assert into == [payload for _, payload in blocks]
    store.close()
    assert store.get(KEYS, into) == 0


@given(
    st.binary(max_size=40),
    st.booleans(),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(-(2**31), 2**31 - 1),
)
def test_headers_come_back(
    payload: bytes, root: bool, depth: int, num_tokens: int, priority: int
) -> None:
    meta = BlockMeta(KEYS[1], None if root else KEYS[0], depth, num_tokens, priority)
    value = pack_header(meta, memoryview(payload)) + payload
    into = memoryview(bytearray(len(payload)))
    assert unpack(memoryview(value), KEYS[1], into) == meta
    assert into == payload
    with pytest.raises(WrongChecksum):
        unpack(memoryview(value), KEYS[2], into)
    with pytest.raises(WrongLength):
        unpack(memoryview(value + b"x"), KEYS[1], into)
    for at in range(len(value)):
        changed = bytearray(value)
        changed[at] ^= 0x10
        with pytest.raises((WrongChecksum, WrongLength)):
            unpack(memoryview(changed), KEYS[1], into)


@given(st.lists(st.tuples(st.sampled_from("asf"), st.floats(0, 30)), max_size=60))
def test_the_breaker(steps: list[tuple[str, float]]) -> None:
    """Against the rule as it is told: pauses of 1, 2, 4, ... at most 8 s, one trial after each."""
    breaker = Breaker(max_failures=2, first_pause_s=1.0, max_pause_s=8.0)
    now = until = pause = 0.0
    failures, trying = 0, False
    for step, seconds in steps:
        now += seconds
        if step == "a":
            expected = not pause or now >= until
            assert breaker.allows(now) == expected
            if pause and expected:
                trying, until = True, now + pause
        elif step == "s":
            assert breaker.succeeded() == bool(pause)
            failures, pause, trying = 0, 0.0, False
        else:
            failures += not pause
            begins = not pause and failures >= 2
            if begins:
                pause = 1.0
            elif trying:
                pause = min(2 * pause, 8.0)
            if begins or trying:
                until = now + pause
            trying = False
            assert breaker.failed(now) == begins
        assert breaker.pause_s == pause
        assert breaker.open == bool(pause)


def test_calls_that_do_not_return() -> None:
    calls, go = BoundedCalls("test", max_late=2), threading.Event()
    assert calls.call(lambda: 7, 5) == 7
    with pytest.raises(KeyError):
        calls.call(lambda: {1: 1}[0], 5)
    for _ in range(2):
        with pytest.raises(TimeoutError):
            calls.call(lambda: go.wait(10), 0.01)
    assert calls.num_late == 2
    with pytest.raises(Overloaded, match="2 calls have not returned"):
        calls.call(lambda: 7, 5)
    assert not calls.close(0.01)
    go.set()
    assert calls.close(10)
    assert calls.num_late == 0
    with pytest.raises(Overloaded, match="closed"):
        calls.call(lambda: 7, 5)


class TestStaging:
    def make(self, rest_s: float = 60.0) -> tuple[StagingPool, BoundedCalls, list[int]]:
        known: list[int] = []
        pool = StagingPool(64, 2, lambda address, size: known.append(address), rest_s=rest_s)
        return pool, BoundedCalls("test"), known

    def test_a_buffer_is_used_again_after_success(self) -> None:
        pool, calls, known = self.make()
        for _ in range(5):
            with pool.filled(calls, lambda staging: True, lambda: 5.0) as staging:
                assert staging is not None
        assert len(known) == 1

    def test_a_buffer_rests_after_a_failure(self) -> None:
        pool, calls, known = self.make()
        for _ in range(2):
            with pool.filled(calls, lambda staging: False, lambda: 5.0) as staging:
                assert staging is None
        assert len(known) == 2
        with pytest.raises(TimeoutError, match="no staging buffer"):
            pool.take(0.01)

    def test_a_rested_buffer_is_used_again(self) -> None:
        pool, calls, known = self.make(rest_s=0.01)
        for _ in range(4):
            with pool.filled(calls, lambda staging: False, lambda: 5.0):
                pass
        assert len(known) <= 2

    def test_a_late_call_keeps_its_buffer_until_it_returns(self) -> None:
        pool, calls, _ = self.make()
        go = threading.Event()
        held: list[Staging] = []

        def late(staging: Staging) -> bool:
            held.append(staging)
            return go.wait(10)

        with (
            pytest.raises(TimeoutError),
            pool.filled(calls, late, lambda: 0.05),
        ):
            raise AssertionError
        other = pool.take(1)
        assert other is not held[0]
        with pytest.raises(TimeoutError):
            pool.take(0.01)
        go.set()
        assert pool.take(10) is held[0]

    @pytest.mark.parametrize("where", ["use", "prepare", "body", "overloaded", "budget"])
    def test_errors_leave_no_buffer_behind(self, where: str) -> None:
        pool, calls, _ = self.make(rest_s=0.0)
        budgets = iter([5.0] if where == "budget" else [5.0, 5.0])
        if where == "overloaded":
            calls.close(1)

        def fail(staging: Staging) -> None:
            raise RuntimeError

        def use(staging: Staging) -> bool:
            if where == "use":
                fail(staging)
            return True

        def run() -> None:
            prepare = fail if where == "prepare" else None
            with pool.filled(calls, use, lambda: next(budgets), prepare) as staging:
                assert staging is not None
                if where == "body":
                    fail(staging)

        with pytest.raises((RuntimeError, StopIteration, Overloaded)):
            run()
        assert {id(pool.take(1)), id(pool.take(1))} == {id(one) for one in pool._all}
