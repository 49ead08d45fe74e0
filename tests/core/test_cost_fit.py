"""Coefficients come back from steps that were made with them, and are never negative."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.core.cluster import StepSample
from baton.core.cost_fit import fit_step_costs, relative_error
from baton.core.cost_model import CostModel, LinkCosts, StepCosts, StepShape, chunk_context

PREFILLS = [
    StepShape(num_tokens, chunk_context(start, num_tokens))
    for num_tokens in (16, 64, 256, 1024, 2048)
    for start in (0, 1000, 8000)
]
DECODES = [
    StepShape(num_decodes=count, decode_context=count * each)
    for count in (1, 4, 16, 64)
    for each in (10, 200, 4000)
]


def measured(costs: StepCosts, shapes: Sequence[StepShape], noise: float = 0.0) -> list[StepSample]:
    model = CostModel(costs, costs, LinkCosts(0.0, 1.0), 1.0)
    draw = random.Random(4)
    return [
        StepSample(shape, model.step_s(shape) * (1 + draw.uniform(-noise, noise)))
        for shape in shapes
    ]


COEFFICIENT = st.floats(0.0, 1.0)


@settings(max_examples=50, deadline=None)
@given(COEFFICIENT, COEFFICIENT, COEFFICIENT)
def test_exact_steps_are_predicted_exactly(overhead: float, item: float, context: float) -> None:
    true = StepCosts(1e-4 + 0.02 * overhead, 1e-4 * item, 1e-8 * context)
    prefills, decodes = measured(true, PREFILLS), measured(true, DECODES)
    found = fit_step_costs(prefills, "prefill")
    assert relative_error(prefills, "prefill", found) < 1e-6
    found = fit_step_costs(decodes, "decode")
    assert relative_error(decodes, "decode", found) < 1e-6


def test_noise_moves_coefficients_a_little() -> None:
    true = StepCosts(0.01, 9e-5, 2e-9)
    samples = measured(true, PREFILLS * 4, noise=0.1)
    found = fit_step_costs(samples, "prefill")
    assert found.overhead_s == pytest.approx(true.overhead_s, rel=0.15)
    assert found.item_s == pytest.approx(true.item_s, rel=0.15)
    assert relative_error(samples, "prefill", found) < 0.1


def test_what_would_be_negative_is_zero() -> None:
    """Less for more context: noise, which must not become a coefficient."""
    samples = [StepSample(StepShape(n, n * 100), 0.01 + n * 1e-4 - n * 1e-5) for n in (10, 100)]
    samples += [StepSample(StepShape(n, 0), 0.01 + n * 1e-4) for n in (10, 100)]
    found = fit_step_costs(samples, "prefill")
    assert found.context_s == 0.0
    assert found.item_s > 0


def test_steps_of_another_kind_do_not_count() -> None:
    true, other = StepCosts(0.01, 1e-4, 0.0), StepCosts(5.0, 0.0, 0.0)
    mixed = [StepSample(StepShape(100, 5000, 8, 100), 9.0)]
    samples = measured(true, PREFILLS) + measured(other, DECODES) + mixed
    assert fit_step_costs(samples, "prefill").overhead_s == pytest.approx(0.01)
    assert fit_step_costs(samples, "decode").overhead_s == pytest.approx(5.0)
    with pytest.raises(ValueError, match="no sample of a decode step"):
        fit_step_costs(measured(true, PREFILLS), "decode")
