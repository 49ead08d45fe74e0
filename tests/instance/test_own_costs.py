from __future__ import annotations

from baton.core.cluster import StepSample
from baton.core.cost_model import CostModel, LinkCosts, StepCosts, StepShape
from baton.instance.own_costs import OwnCosts

MODEL = CostModel(
    StepCosts(0.01, 1e-4, 0.0), StepCosts(0.02, 0.0, 1e-7), LinkCosts(0.001, 1e9), 1000.0
)


class Told:
    """An engine, as far as its costs are concerned."""

    def __init__(self) -> None:
        self.models: list[CostModel | None] = []

    def set_cost_model(self, model: CostModel | None) -> None:
        self.models.append(model)


def measured(shape: StepShape, slower: float = 1.0) -> StepSample:
    return StepSample(shape, slower * MODEL.step_s(shape))


PROMPTS = [StepShape(num_prefill_tokens=n, prefill_context=n * n) for n in (64, 128, 256, 512)]
DECODES = [StepShape(num_decodes=n, decode_context=300 * n) for n in (1, 4, 16, 64)]


def test_without_a_profile_nothing_is_told_before_both_kinds_were_measured() -> None:
    told = Told()
    costs = OwnCosts(told)
    costs.observe([measured(shape) for shape in PROMPTS * 8])
    assert told.models == [None]
    costs.observe([measured(shape) for shape in DECODES * 8])
    known = told.models[-1]
    assert known is not None
    for shape in PROMPTS + DECODES:
        assert abs(known.step_s(shape) / MODEL.step_s(shape) - 1) < 0.1


def test_a_profile_is_told_at_once_and_followed_by_what_is_measured() -> None:
    told = Told()
    costs = OwnCosts(told, MODEL)
    assert told.models == [MODEL]
    for _ in range(15):
        costs.observe([measured(shape, slower=2.0) for shape in PROMPTS + DECODES])
    known = told.models[-1]
    assert known is not None
    assert known.step_s(DECODES[2]) > 1.7 * MODEL.step_s(DECODES[2])
