"""In turn, whatever the load: prefill and decode sides each have their own turn."""

from __future__ import annotations

import numpy as np

from controller.columns import Bools, PlacementView
from controller.events import PlaceQuery
from controller.policies.base import Costs, Scores


class RoundRobin:
    """Rows after the one that was taken last come first."""

    name = "round-robin"
    colocates = False

    def score(self, query: PlaceQuery, view: PlacementView, now: float, draw: int) -> Scores:
        """See ``PlacementPolicy``."""
        return Scores(
            _turns(view, view.takes_prefill, draw),
            _turns(view, view.takes_decode, draw),
            text="in turn: ",
        )


def _turns(view: PlacementView, takes: Bools, draw: int) -> Costs:
    """0 for the row whose turn it is, 1 for the next."""
    candidates = np.flatnonzero(view.live & view.placeable & takes)
    costs = np.full(len(view.live), float(len(view.live)))
    if len(candidates):
        costs[candidates] = (np.arange(len(candidates)) - draw) % len(candidates)
    return costs
