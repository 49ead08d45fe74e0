"""Where most of the prompt is cached, unless that instance is much busier than the others."""

from __future__ import annotations

import numpy as np

from controller.columns import PlacementView
from controller.events import PlaceQuery
from controller.policies.base import Scores
from controller.policies.least_loaded import load_costs
from controller.policies.prefixes import cached_tokens


class PrefixAffinity:
    """Cached tokens need no step, so they count like queued tokens that are not there."""

    name = "prefix-affinity"
    colocates = False

    def score(self, query: PlaceQuery, view: PlacementView, now: float, draw: int) -> Scores:
        """See ``PlacementPolicy``."""
        prefill, decode = load_costs(view)
        cached = cached_tokens(query, view)
        if cached is not None:
            saved = cached.device / np.maximum(view.max_num_batched_tokens, 1)
            prefill = prefill - saved
            # What is there need not be handed over.
            decode = decode - 0.1 * saved
        return Scores(prefill, decode, text="prefix and load: ")
