"""A placement policy of one's own that remembers what it was asked: ``controller.policy`` loads it
by name."""

from __future__ import annotations

from typing import ClassVar

from controller.columns import PlacementView
from controller.events import PlaceQuery
from controller.policies.base import Scores
from controller.policies.least_loaded import LeastLoaded

NAME = f"{__name__}:RecordingPolicy"


class RecordingPolicy(LeastLoaded):
    seen: ClassVar[list[PlaceQuery]] = []

    def score(self, query: PlaceQuery, view: PlacementView, now: float, draw: int) -> Scores:
        self.seen.append(query)
        return super().score(query, view, now, draw)
