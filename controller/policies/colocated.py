"""No disaggregation: each request stays on the mixed instance with the least to do."""

from __future__ import annotations

from controller.columns import PlacementView
from controller.events import PlaceQuery
from controller.policies.base import Scores
from controller.policies.least_loaded import load_costs


class Colocated:
    """Chunked prefill beside decodes, everywhere. For comparison, and for small clusters."""

    name = "colocated"
    colocates = True

    def score(self, query: PlaceQuery, view: PlacementView, now: float, draw: int) -> Scores:
        """See ``PlacementPolicy``."""
        prefill, decode = load_costs(view)
        return Scores(prefill, decode, text="one instance, least loaded: ")
