"""Fetch or compute, from what was measured."""

from __future__ import annotations

import pytest

from baton.core.config import FetchPolicy
from baton.instance.fetch_rule import FetchRule

BLOCK_SIZE, BLOCK_BYTES = 16, 1_000_000


def rule(policy: FetchPolicy = "auto") -> FetchRule:
    return FetchRule(policy, block_size=BLOCK_SIZE, block_bytes=BLOCK_BYTES)


def compute_at(tested: FetchRule, token_s: float) -> None:
    for _ in range(50):
        tested.computed(1000, 1000 * token_s)


def test_nothing_is_never_worth_it() -> None:
    for policy in ("auto", "always", "never"):
        tested = rule(policy)
        assert not tested.worth_asking(0)
        assert not tested.worth_fetching(0)


@pytest.mark.parametrize(("policy", "answer"), [("always", True), ("never", False)])
def test_a_fixed_policy_asks_no_measurement(policy: FetchPolicy, answer: bool) -> None:
    tested = rule(policy)
    compute_at(tested, 1e-9 if answer else 1.0)
    tested.answered(100.0 if answer else 0.0)
    tested.fetched(1, 100.0 if answer else 0.0)
    assert tested.worth_asking(1) is tested.worth_fetching(1) is answer


def test_before_anything_was_computed_a_hit_is_believed_in() -> None:
    assert rule().worth_asking(1)
    assert rule().worth_fetching(1)


def test_slow_computing_is_worth_a_fetch_and_fast_computing_is_not() -> None:
    slow, fast = rule(), rule()
    compute_at(slow, 1e-2)
    compute_at(fast, 1e-6)
    for num_blocks in (1, 100):
        assert slow.worth_asking(num_blocks)
        assert not fast.worth_asking(num_blocks)
        assert not fast.worth_fetching(num_blocks)


def test_asking_costs_so_much_that_only_long_prefixes_are_worth_it() -> None:
    tested = rule()
    compute_at(tested, 1e-3)
    for _ in range(50):
        tested.answered(0.5)
    assert not tested.worth_asking(10)
    assert tested.worth_asking(100)
    # What is held already costs only the copy.
    assert tested.worth_fetching(10)


def test_slow_copies_end_fetching() -> None:
    tested = rule()
    compute_at(tested, 1e-3)
    assert tested.worth_fetching(50)
    for _ in range(50):
        tested.fetched(10, 10.0)
    assert not tested.worth_fetching(50)
    assert not tested.worth_asking(50)


def test_steps_of_a_few_tokens_say_nothing_about_prefill() -> None:
    tested = rule()
    compute_at(tested, 1e-6)
    for _ in range(100):
        tested.computed(8, 1.0)
    assert not tested.worth_asking(10)


def test_one_slow_moment_is_not_for_ever() -> None:
    """Who never fetches measures nothing that would change the answer."""
    tested = rule()
    compute_at(tested, 1e-3)
    assert tested.worth_asking(20)
    tested.answered(7.0)
    tested.fetched(1, 5.0)
    assert not tested.worth_asking(20)
    assert any(tested.worth_asking(20) for _ in range(1000))
    assert any(tested.worth_fetching(20) for _ in range(1000))


def test_what_was_never_worth_it_does_not_become_so_by_itself() -> None:
    tested = rule()
    compute_at(tested, 1e-6)
    assert not any(tested.worth_asking(20) for _ in range(1000))
