"""What a predictor learns: the true costs, in spite of strays, and no slower than they change."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.core.cluster import StepSample
from baton.core.cost_model import (
    CostModel,
    LinkCosts,
    StepCosts,
    StepShape,
    chunk_context,
    decode_features,
    prefill_features,
)
from baton.core.predictor import InstancePredictor, OnlineCosts, PredictionError

TRUE = StepCosts(0.010, 6e-5, 4e-9)
DECODE = StepCosts(0.015, 1e-4, 5e-8)
BASE = CostModel(TRUE, DECODE, LinkCosts(1e-3, 20e9), 57344.0)
WRONG = (None, StepCosts(0.005, 15e-5, 1e-9), StepCosts(0.03, 3e-5, 8e-9))
"""Starts: none, and a profile of another machine."""
SEEDS = st.integers(0, 10_000)
NOISES = st.sampled_from([0.0, 0.05, 0.15])


def prompt_chunk(chance: random.Random) -> StepShape:
    num_tokens = chance.choice([16, 64, 256, 512, 1000, 2048])
    start = chance.choice([0, 0, 512, 4096, 30_000])
    return StepShape(num_tokens, chunk_context(start, num_tokens))


def batch(chance: random.Random) -> StepShape:
    count = chance.randint(1, 200)
    return StepShape(num_decodes=count, decode_context=count * chance.randint(100, 4000))


def both(chance: random.Random) -> StepShape:
    prompt, others = prompt_chunk(chance), batch(chance)
    return StepShape(
        prompt.num_prefill_tokens,
        prompt.prefill_context,
        others.num_decodes,
        others.decode_context,
    )


def samples(
    chance: random.Random,
    count: int,
    *,
    make: Callable[[random.Random], StepShape] = prompt_chunk,
    noise: float = 0.0,
    slower: float = 1.0,
    strays: float = 0.0,
) -> list[StepSample]:
    found = []
    for _ in range(count):
        shape = make(chance)
        seconds = BASE.step_s(shape) * slower * max(0.2, chance.gauss(1.0, noise))
        found.append(StepSample(shape, seconds * (20.0 if chance.random() < strays else 1.0)))
    return found


def learn(online: OnlineCosts, measured: list[StepSample]) -> None:
    for sample in measured:
        online.observe(prefill_features(sample.shape), sample.seconds)


def mean_error(online: OnlineCosts, *, slower: float = 1.0) -> float:
    """Over the shapes that there are."""
    errors = [
        abs(online.predict(prefill_features(sample.shape)) / sample.seconds - 1.0)
        for sample in samples(random.Random("others"), 200, slower=slower)
    ]
    return statistics.mean(errors)


@settings(max_examples=40)
@given(SEEDS, NOISES, st.sampled_from(WRONG))
def test_the_true_costs_are_found_in_noise(
    seed: int, noise: float, start: StepCosts | None
) -> None:
    online = OnlineCosts(start)
    learn(online, samples(random.Random(seed), 400, noise=noise))
    assert mean_error(online) <= 0.005 + noise / 2
    if noise == 0.0:
        assert online.costs.overhead_s == pytest.approx(TRUE.overhead_s, rel=0.02)
        assert online.costs.item_s == pytest.approx(TRUE.item_s, rel=0.02)
        assert online.costs.context_s == pytest.approx(TRUE.context_s, rel=0.02)


@settings(max_examples=40)
@given(SEEDS, NOISES, st.sampled_from(WRONG))
def test_one_stray_in_twenty_of_twenty_times_changes_little(
    seed: int, noise: float, start: StepCosts | None
) -> None:
    chance, online = random.Random(seed), OnlineCosts(start)
    learn(online, samples(chance, 100, noise=noise))
    for _ in range(30):
        # In every twenty, wherever: not two thirds of some.
        for stray in (0.0, 1.0):
            learn(online, samples(chance, 1 if stray else 19, noise=noise, strays=stray))
    assert mean_error(online) <= 0.02 + noise / 2


@settings(max_examples=40)
@given(SEEDS, NOISES, st.sampled_from([0.5, 2.0, 10.0]), st.sampled_from(WRONG))
def test_a_change_of_speed_is_followed_within_fifty_steps(
    seed: int, noise: float, slower: float, start: StepCosts | None
) -> None:
    chance, online = random.Random(seed), OnlineCosts(start)
    learn(online, samples(chance, 200, noise=noise))
    learn(online, samples(chance, 50, noise=noise, slower=slower))
    assert mean_error(online, slower=slower) <= 0.06 + noise / 2


def test_one_moment_of_slowness_is_no_change() -> None:
    online, chance = OnlineCosts(TRUE), random.Random(1)
    learn(online, samples(chance, 100, noise=0.05))
    learn(online, samples(chance, 3, slower=20.0))
    assert mean_error(online) < 0.1


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 5000),
            st.integers(0, 10**8),
            st.floats(allow_nan=True, allow_infinity=True),
        ),
        max_size=60,
    ),
    st.sampled_from(WRONG),
)
def test_whatever_is_measured_costs_are_finite_and_not_negative(
    measured: list[tuple[int, int, float]], start: StepCosts | None
) -> None:
    online = OnlineCosts(start)
    for num_tokens, context, seconds in measured:
        online.observe(prefill_features(StepShape(num_tokens, context)), seconds)
        costs = online.costs  # StepCosts refuses what is negative, or not a number
        assert max(costs.overhead_s, costs.item_s, costs.context_s) < float("inf")


@given(SEEDS)
def test_the_same_measurements_give_the_same_costs(seed: int) -> None:
    measured = samples(random.Random(seed), 60, noise=0.3, strays=0.1)
    one, other = OnlineCosts(TRUE), OnlineCosts(TRUE)
    learn(one, measured)
    learn(other, measured)
    assert one.costs == other.costs


def test_steps_of_one_shape_leave_the_rest_of_a_profile_in_proportion() -> None:
    """A machine that is twice as slow in what was seen is believed to be so in the rest."""
    online = OnlineCosts(TRUE)
    shape = StepShape(100, chunk_context(0, 100))
    for _ in range(60):
        online.observe(prefill_features(shape), 2 * BASE.step_s(shape))
    long = StepShape(2000, chunk_context(0, 2000))
    assert online.predict(prefill_features(long)) == pytest.approx(2 * BASE.step_s(long), rel=0.3)


def test_an_instance_learns_both_kinds_of_steps() -> None:
    predictor, chance = InstancePredictor(), random.Random(7)
    assert predictor.cost_model(BASE) == BASE
    for sample in samples(chance, 100) + samples(chance, 100, make=batch):
        predictor.observe(sample)
    learnt = predictor.cost_model(BASE)
    assert (learnt.handoff, learnt.kv_bytes_per_token) == (BASE.handoff, BASE.kv_bytes_per_token)
    for sample in samples(chance, 50) + samples(chance, 50, make=batch):
        assert learnt.step_s(sample.shape) == pytest.approx(sample.seconds, rel=0.01)
    assert set(predictor.errors) == {"prefill_step", "decode_step"}
    assert max(predictor.errors.values()) < 0.05


def test_of_steps_that_an_instance_never_made_the_base_says_all() -> None:
    predictor = InstancePredictor()
    for sample in samples(random.Random(7), 100, slower=2.0):
        predictor.observe(sample)
    learnt = predictor.cost_model(BASE)
    assert learnt.decode == BASE.decode
    assert learnt.prefill.item_s == pytest.approx(2 * BASE.prefill.item_s, rel=0.05)


@pytest.mark.parametrize("overhead_s", [0.010, 0.030])
def test_prefill_is_learnt_from_steps_that_also_decode(overhead_s: float) -> None:
    """The constant of the larger kind is in them once: also where it is not that of prefill."""
    true = CostModel(StepCosts(overhead_s, 6e-5, 4e-9), DECODE, BASE.handoff, 57344.0)
    predictor, chance = InstancePredictor(StepCosts(overhead_s, 2e-4, 1e-8)), random.Random(3)
    for _ in range(100):
        decode = batch(chance)
        predictor.observe(StepSample(decode, true.step_s(decode)))
    for _ in range(300):
        mixed = both(chance)
        predictor.observe(StepSample(mixed, true.step_s(mixed) * chance.gauss(1.0, 0.03)))
    learnt = predictor.cost_model(BASE)
    for _ in range(50):
        mixed = both(chance)
        assert learnt.step_s(mixed) == pytest.approx(true.step_s(mixed), rel=0.08)
    assert learnt.prefill.item_s == pytest.approx(true.prefill.item_s, rel=0.15)
    assert predictor.errors["mixed_step"] < 0.1


def test_mixed_steps_say_nothing_where_decoding_is_not_known() -> None:
    predictor = InstancePredictor()
    for sample in samples(random.Random(3), 50, make=both):
        predictor.observe(sample)
    assert not predictor.prefill.known
    assert not predictor.errors


def test_the_error_is_relative_to_what_came() -> None:
    error = PredictionError()
    assert error.observe(1.0, 0.0) is None
    assert error.mean is None
    assert error.observe(1.5, 1.0) == pytest.approx(0.5)
    assert error.mean == pytest.approx(0.5)
    for _ in range(200):
        error.observe(1.0, 2.0)
    assert error.mean == pytest.approx(0.5)
    assert error.observe(1e9, 1.0) == 10.0, "one nonsense does not hide all others"


def test_decode_features_are_those_of_the_model() -> None:
    shape = batch(random.Random(1))
    online = OnlineCosts(DECODE)
    assert online.predict(decode_features(shape)) == pytest.approx(BASE.step_s(shape))
