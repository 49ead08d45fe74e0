"""A few of an instance's recent steps, for the predictors: some of each kind, the newest first."""

from __future__ import annotations

import collections

from baton.core.cluster import StepSample
from baton.core.cost_model import StepShape

_MAX_SAMPLES = 8


class StepSamples:
    """Filled by each step, emptied by each heartbeat. ``max_samples`` at a time."""

    def __init__(self, max_samples: int = _MAX_SAMPLES) -> None:
        self._max_samples = max_samples
        self._kinds: dict[tuple[bool, bool], collections.deque[StepSample]] = {}
        """By whether prompts were computed, and whether sequences decoded."""

    def add(self, shape: StepShape, seconds: float) -> None:
        """A step took so long."""
        kind = (shape.num_prefill_tokens > 0, shape.num_decodes > 0)
        recent = self._kinds.get(kind)
        if recent is None:
            recent = self._kinds[kind] = collections.deque(maxlen=self._max_samples)
        recent.append(StepSample(shape, seconds))

    def take(self) -> tuple[StepSample, ...]:
        """Samples of the steps since the last call: a kind that is rare is not crowded out."""
        taken: list[StepSample] = []
        while len(taken) < self._max_samples and any(self._kinds.values()):
            taken += [recent.pop() for recent in self._kinds.values() if recent]
        self._kinds.clear()
        return tuple(taken[: self._max_samples])
