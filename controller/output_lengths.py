"""How many tokens a request will produce, as far as requests like it have told. Pure.

``max_tokens`` is a bound that clients choose generously; what a decode instance has to bear, and
for how long, follows from the outputs that came.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

from controller.events import PlaceQuery, RequestEnded

_all_but_told: Callable[[PlaceQuery], Any] = operator.attrgetter(
    *(f.name for f in dataclasses.fields(PlaceQuery) if f.name != "expected_new_tokens")
)
_WEIGHT = 0.02
"""Of the newest: some fifty requests are remembered."""


class OutputLengths:
    """A smoothed mean by service class."""

    def __init__(self) -> None:
        self._mean: dict[str, float] = {}

    def ended(self, outcome: RequestEnded) -> None:
        """A request's output is complete."""
        if outcome.error or not outcome.completion_tokens:
            return
        number = float(outcome.completion_tokens)
        known = self._mean.get(outcome.service_class, number)
        self._mean[outcome.service_class] = known + _WEIGHT * (number - known)

    def expect(self, query: PlaceQuery) -> float:
        """Tokens still to come; half of what is allowed where nothing is known."""
        mean = self._mean.get(query.service_class)
        most = float(query.max_new_tokens)
        return most / 2 if mean is None else min(most, max(1.0, mean))

    def told(self, query: PlaceQuery) -> PlaceQuery:
        """The query with what is expected of it."""
        # A third of the time of dataclasses.replace; the field is the last.
        return PlaceQuery(*(*_all_but_told(query), self.expect(query)))
