"""What an instance knows of its own steps, told to its scheduler: chunks then fit targets.

Pure. Nothing is told before steps of both kinds were measured, or a profile said what they take.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from baton.core.cluster import StepSample
from baton.core.cost_model import CostModel, LinkCosts, StepCosts
from baton.core.predictor import InstancePredictor

_NOTHING = StepCosts(0.0, 0.0, 0.0)
_UNTOLD = CostModel(_NOTHING, _NOTHING, LinkCosts(0.0, 1.0), 0.0)
"""Links are nothing to a scheduler."""


class Schedules(Protocol):
    """An engine."""

    def set_cost_model(self, model: CostModel | None) -> None:
        """What its steps cost."""


class OwnCosts:
    """``start``: a profile's model, where there is one."""

    def __init__(self, engine: Schedules, start: CostModel | None = None) -> None:
        self._engine = engine
        self._base = start or _UNTOLD
        self._predictor = (
            InstancePredictor() if start is None else InstancePredictor(start.prefill, start.decode)
        )
        engine.set_cost_model(start)

    def observe(self, samples: Iterable[StepSample]) -> None:
        """Take in steps, in their order."""
        predictor = self._predictor
        for sample in samples:
            predictor.observe(sample)
        if predictor.prefill.learnt and predictor.decode.learnt:
            self._engine.set_cost_model(predictor.cost_model(self._base))
