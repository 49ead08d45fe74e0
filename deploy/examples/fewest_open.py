"""A placement policy of one's own, in one file: the fewest open requests; decode is bound late.

Put the file into a folder that is on PYTHONPATH when `baton serve` starts, and say

    controller:
      policy: fewest_open:FewestOpen

docs/operations.md, "A placement policy of your own", says what there is to score by.
"""

import numpy as np

from controller.columns import PlacementView
from controller.events import PlaceQuery
from controller.policies.base import Scores


class FewestOpen:
    """Counts requests, and knows nothing of their lengths."""

    name = "fewest-open"
    colocates = False  # prefill and decode may be two instances

    def score(self, query: PlaceQuery, view: PlacementView, now: float, draw: int) -> Scores:
        """What one more prefill, and one more decode, costs on each instance: smaller is better.

        One value per row of `view`. Instances that cannot take the request are left out by others.
        """
        prefill = view.open_prefill.astype(np.float64)
        decode = view.open_decode / np.maximum(view.max_num_seqs, 1)
        # The decode side is asked for again, with `query.bind_to`, when the first token is there.
        return Scores(prefill, decode, text="fewest open: ", tentative=query.bind_to is None)
