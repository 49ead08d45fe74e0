"""Roles under a steady load, and after a shift (short form of acceptance 5.5)."""

from __future__ import annotations

import pytest

from baton.core.slo import Slo
from tests.simulator import planner_runs as runs


@pytest.mark.parametrize(
    ("rate", "prompt", "output"), [(20.0, 2000, 30), (20.0, 1000, 200), (35.0, 1000, 200)]
)
def test_a_steady_load_brings_roles_to_rest(rate: float, prompt: int, output: int) -> None:
    trace = runs.poisson(rate, 150.0, prompt, output, seed=3)
    fleet = runs.run(trace, Slo(1.0, 0.05))
    flips = runs.flips_of(fleet)
    assert runs.shortest_gap_s(flips) >= runs.COOLDOWN_S / 2
    assert runs.returns(flips, runs.start_roles()) == []
    assert runs.attained(fleet) > 0.9


def test_a_queue_that_grows_unseen_is_answered() -> None:
    """Finished requests look fine at first; frozen roles never recover."""
    trace = runs.hidden_shift(9.0)
    frozen = runs.run(trace, runs.SHIFT_SLO, frozen=True, cooldown_s=5.0)
    moving = runs.run(trace, runs.SHIFT_SLO, cooldown_s=5.0)
    for fleet in (frozen, moving):
        assert runs.attained(fleet, runs.ended_soon_after) > 0.95
    assert runs.flips_of(frozen) == []
    assert runs.attained(frozen, runs.late) < 0.7
    assert runs.attained(moving, runs.late) > 0.85
    after = [flip for flip in runs.flips_of(moving) if flip[0] > runs.SHIFT_AT_S]
    assert after, "the planner acted"
    assert after[0][0] < runs.SHIFT_AT_S + 10.0


def test_equal_histories_have_equal_flips() -> None:
    trace = runs.hidden_shift(8.0, seed=7)[:1200]
    first, second = (runs.run(trace, runs.SHIFT_SLO, cooldown_s=5.0) for _ in range(2))
    assert runs.flips_of(first) == runs.flips_of(second)
    assert first.outcomes == second.outcomes
