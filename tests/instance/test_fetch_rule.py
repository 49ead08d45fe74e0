"""Fetch or compute, from what was measured."""

from __future__ import annotations

import pytest

from baton.core.cluster import StepSample
from baton.core.config import FetchPolicy
from baton.core.cost_model import CostModel, LinkCosts, StepCosts, StepShape, chunk_context
from baton.instance.fetch_rule import ALL_TIERS, FetchRule, Missing
from kvpool.tiers import Tier

BLOCK_SIZE, BLOCK_BYTES, CHUNK = 16, 1_000_000, 512
NOTHING = StepCosts(0.0, 0.0, 0.0)


def rule(policy: FetchPolicy = "auto") -> FetchRule:
    return FetchRule(policy, block_size=BLOCK_SIZE, block_bytes=BLOCK_BYTES, chunk=CHUNK)


def compute_at(
    tested: FetchRule, token_s: float, *, overhead_s: float = 0.0, context_s: float = 0.0
) -> None:
    """Steps of prompts were measured that cost so much."""
    costs = StepCosts(overhead_s, token_s, context_s)
    model = CostModel(costs, NOTHING, LinkCosts(0.0, 1.0), 1.0)
    for index in range(60):
        num_tokens, start = (64, 512, 256)[index % 3], (0, 512, 4096, 16384)[index % 4]
        shape = StepShape(num_tokens, chunk_context(start, num_tokens))
        tested.stepped(StepSample(shape, model.step_s(shape)))


def prefix(num_blocks: int, *, start: int = 0, rest: int = 8, queue_s: float = 0.0) -> Missing:
    return Missing(start, num_blocks, start + num_blocks * BLOCK_SIZE + rest, queue_s)


def asks(tested: FetchRule, num_blocks: int) -> bool:
    return bool(tested.tiers_to_ask(prefix(num_blocks)))


def fetches(tested: FetchRule, num_blocks: int, tier: Tier = Tier.HOST) -> bool:
    return tested.worth_fetching(prefix(num_blocks), {tier: num_blocks})


def test_nothing_is_never_worth_it() -> None:
    for policy in ("auto", "always", "never"):
        tested = rule(policy)
        assert not asks(tested, 0)
        assert not fetches(tested, 0)


@pytest.mark.parametrize(("policy", "answer"), [("always", True), ("never", False)])
def test_a_fixed_policy_asks_no_measurement(policy: FetchPolicy, answer: bool) -> None:
    tested = rule(policy)
    compute_at(tested, 1e-9 if answer else 1.0)
    tested.answered(1, {}, 100.0 if answer else 1e-6)
    tested.fetched({Tier.HOST: 1}, 100.0 if answer else 1e-6)
    assert asks(tested, 1) is fetches(tested, 1) is answer
    assert tested.tiers_to_ask(prefix(1)) == (ALL_TIERS if answer else ())


def test_before_anything_was_computed_a_hit_is_believed_in() -> None:
    assert rule().tiers_to_ask(prefix(1)) == ALL_TIERS
    assert fetches(rule(), 1)


def test_slow_computing_is_worth_a_fetch_and_fast_computing_is_not() -> None:
    slow, fast = rule(), rule()
    compute_at(slow, 1e-2)
    compute_at(fast, 1e-6)
    for num_blocks in (1, 100):
        assert asks(slow, num_blocks)
        assert not asks(fast, num_blocks)
        assert not fetches(fast, num_blocks)


def test_asking_costs_so_much_that_only_long_prefixes_are_worth_it() -> None:
    tested = rule()
    compute_at(tested, 1e-3)
    for _ in range(50):
        tested.answered(10, {Tier.HOST: 10}, 0.5)
    assert not asks(tested, 10)
    assert asks(tested, 100)
    # What is held already costs only the copy.
    assert fetches(tested, 10)


def test_slow_copies_end_fetching() -> None:
    tested = rule()
    compute_at(tested, 1e-3)
    assert fetches(tested, 50)
    for _ in range(50):
        tested.fetched({Tier.HOST: 10}, 10.0)
    assert not fetches(tested, 50)
    assert not asks(tested, 50)


def test_a_slow_disk_is_left_out_and_the_others_are_asked() -> None:
    tested = rule()
    compute_at(tested, 3e-4)
    assert Tier.DISK in tested.tiers_to_ask(prefix(64))
    for num_blocks in (8, 16, 32, 64) * 10:
        tested.answered(64, {Tier.DISK: num_blocks}, 0.002 + 0.01 * num_blocks)
    answer = tested.tiers_to_ask(prefix(64))
    assert Tier.HOST in answer
    assert Tier.REMOTE in answer
    assert Tier.DISK not in answer
    assert fetches(tested, 64, Tier.DISK), "once it is in the host tier, only the copy is left"


def test_time_in_two_tiers_is_laid_to_the_slower_one() -> None:
    tested = rule()
    compute_at(tested, 3e-4)
    for num_blocks in (8, 16, 32, 64) * 10:
        found = {Tier.HOST: 5, Tier.DISK: 4, Tier.REMOTE: num_blocks}
        tested.answered(100, found, 0.01 + 0.01 * num_blocks)
    assert Tier.REMOTE not in tested.tiers_to_ask(prefix(64))
    assert Tier.DISK in tested.tiers_to_ask(prefix(64))


def test_the_later_part_of_a_long_prompt_is_dearer_to_compute() -> None:
    tested = rule()
    compute_at(tested, 1e-6, context_s=1e-8)
    here, late = prefix(8), prefix(8, start=20_000)
    assert not tested.worth_fetching(here, {Tier.HOST: 8})
    assert tested.worth_fetching(late, {Tier.HOST: 8})


def test_steps_that_a_fetch_saves_count_with_all_they_cost() -> None:
    """A prompt that needs a step anyway gains little from a shorter one."""
    tested = rule()
    compute_at(tested, 1e-6, overhead_s=0.05)
    assert not tested.tiers_to_ask(prefix(16, rest=64))
    assert tested.tiers_to_ask(prefix(32, rest=64))


def test_a_fetch_goes_on_while_others_are_computed() -> None:
    tested = rule()
    compute_at(tested, 1e-5)
    assert tested.queue_s(4096) == pytest.approx(0.041, rel=0.05)
    assert not tested.worth_fetching(prefix(64), {Tier.HOST: 64})
    waiting = prefix(64, queue_s=tested.queue_s(8192))
    assert tested.worth_fetching(waiting, {Tier.HOST: 64})
    assert tested.tiers_to_ask(waiting)


def test_where_nothing_is_ever_found_short_prefixes_are_not_asked_for() -> None:
    tested = rule()
    compute_at(tested, 1e-4)
    assert asks(tested, 4)
    for _ in range(100):
        tested.answered(4, {}, 0.002)
    assert not asks(tested, 4)
    assert asks(tested, 200)
    for _ in range(100):
        tested.answered(4, {Tier.HOST: 4}, 0.002)
    assert asks(tested, 4)


def test_steps_that_decode_say_nothing_about_prefill() -> None:
    tested = rule()
    compute_at(tested, 1e-6)
    for _ in range(100):
        tested.stepped(StepSample(StepShape(num_decodes=8, decode_context=100), 1.0))
    assert not asks(tested, 10)


def test_one_slow_moment_is_not_for_ever() -> None:
    """Who never fetches measures nothing that would change the answer."""
    tested = rule()
    compute_at(tested, 1e-3)
    assert asks(tested, 20)
    for _ in range(20):
        tested.answered(20, {Tier.HOST: 20}, 7.0)
        tested.fetched({Tier.HOST: 1}, 5.0)
    assert not asks(tested, 20)
    assert any(asks(tested, 20) for _ in range(1000))
    assert any(fetches(tested, 20) for _ in range(1000))


def test_tries_of_what_is_slow_cost_little_on_average() -> None:
    """A copy takes ten times as long as to compute what it saves, and goes on doing so."""
    tested = rule()
    compute_at(tested, 1e-3)
    compute_s, copy_s = 0.32, 3.2
    for _ in range(20):
        tested.fetched({Tier.HOST: 20}, copy_s)
    num_tries = 0
    for _ in range(2000):
        if fetches(tested, 20):
            num_tries += 1
            tested.fetched({Tier.HOST: 20}, copy_s)
    assert num_tries > 0
    assert num_tries * copy_s <= 0.06 * 2000 * compute_s


def test_what_became_fast_again_is_soon_used_again() -> None:
    tested = rule()
    compute_at(tested, 1e-3)
    for _ in range(20):
        tested.fetched({Tier.HOST: 20}, 3.2)
    num_fetched = 0
    for _ in range(400):
        if fetches(tested, 20):
            num_fetched += 1
            tested.fetched({Tier.HOST: 20}, 0.01)
    assert num_fetched > 100


def test_what_would_cost_hundreds_of_times_as_much_is_not_tried() -> None:
    tested = rule()
    compute_at(tested, 1e-7)
    assert not any(asks(tested, 20) for _ in range(1000))
