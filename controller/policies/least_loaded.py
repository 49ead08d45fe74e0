"""The instance with the least to do, in steps and sequences. Knows no latencies."""

from __future__ import annotations

import numpy as np

from controller.columns import PlacementView
from controller.events import PlaceQuery
from controller.policies.base import Costs, Scores

# A step's worth of queued prompt weighs as much as a full batch of sequences; memory pressure
# matters less, because blocks that only cache can be evicted.
_PRESSURE_WEIGHT = 0.5


class LeastLoaded:
    """Load as instances report it, with what was placed since."""

    name = "least-loaded"
    colocates = False

    def score(self, query: PlaceQuery, view: PlacementView, now: float, draw: int) -> Scores:
        """See ``PlacementPolicy``."""
        prefill, decode = load_costs(view)
        return Scores(prefill, decode, text="least loaded: ")


def load_costs(view: PlacementView) -> tuple[Costs, Costs]:
    """Per row: what one more prefill, and one more decode, would meet there."""
    # Rows without an instance divide by one; no filter lets them through.
    max_seqs = np.maximum(view.max_num_seqs, 1)
    free = view.num_available_blocks / np.maximum(view.num_blocks, 1)
    pressure = _PRESSURE_WEIGHT * (1.0 - free)
    queued_steps = (view.num_waiting_tokens + view.fresh_tokens) / np.maximum(
        view.max_num_batched_tokens, 1
    )
    prefill = queued_steps + view.num_sequences / max_seqs + pressure
    decode = np.maximum(view.num_sequences, view.open_decode) / max_seqs + pressure
    return prefill, decode
