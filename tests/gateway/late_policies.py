"""Policies that guess one decode instance and bind another."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from controller.columns import PlacementView
from controller.events import PlaceQuery
from controller.policies.base import Scores


class _GuessThenBind:
    name = "guess-then-bind"
    colocates = False
    guess = "decode-0"
    bound = "decode-1"

    def score(self, query: PlaceQuery, view: PlacementView, now: float, draw: int) -> Scores:
        """See ``PlacementPolicy``."""
        prefill, decode = np.ones(len(view.live)), np.ones(len(view.live))
        wanted = self.guess if query.bind_to is None else self.bound
        for name, costs in (("prefill-0", prefill), (wanted, decode)):
            if (row := view.row_of.get(name)) is not None:
                costs[row] = 0.0
        return Scores(prefill, decode, tentative=True)


class GuessThenBind(_GuessThenBind):
    """Guesses decode-0, binds decode-1."""


class GuessThenStay(_GuessThenBind):
    """Guesses decode-0, binds where prefill was: it takes decode too by then."""

    bound = "prefill-0"


class InOrder:
    """The instance whose name comes first; remembers what it was asked."""

    name = "in-order"
    colocates = False
    seen: ClassVar[list[PlaceQuery]] = []

    def score(self, query: PlaceQuery, view: PlacementView, now: float, draw: int) -> Scores:
        """See ``PlacementPolicy``."""
        self.seen.append(query)
        costs = np.zeros(len(view.live))
        for place, name in enumerate(sorted(view.row_of)):
            costs[view.row_of[name]] = place
        return Scores(costs, costs)
