"""A policy that guesses another decode instance, and then stays where prefill was."""

from __future__ import annotations

import numpy as np

from controller.columns import PlacementView
from controller.events import PlaceQuery
from controller.policies.base import Scores


class StayWithPrefill:
    """Prefill on the first instance by name, decode guessed on the last."""

    name = "stay-with-prefill"
    colocates = False

    def score(self, query: PlaceQuery, view: PlacementView, now: float, draw: int) -> Scores:
        """See ``PlacementPolicy``."""
        prefill = np.zeros(len(view.live))
        for place, name in enumerate(sorted(view.row_of)):
            prefill[view.row_of[name]] = place
        decode = -prefill
        if query.bind_to is not None:
            decode[view.row_of[query.bind_to]] = -1e3
        return Scores(prefill, decode, tentative=True)
