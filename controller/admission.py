"""Who may be placed now, who has to wait, and who is turned away. Pure.

*Online* work (priority 0 and above) with a TTFT target is shed where the prediction is beyond
hope; without predictions it waits while instances are full. *Offline* work (priority below 0) has
no TTFT target: it waits while online requests suffer, and rises in time for its deadline.
"""

from __future__ import annotations

import collections
import dataclasses
import math

import numpy as np

from baton.core.policy_config import AdmissionConfig
from controller.columns import Ints, Memo, PlacementView
from controller.events import PlaceQuery
from controller.policies.base import Choice, NoChoice

RISE_SHARE = 0.5
"""Offline work yields for this share of the time to its deadline, as it does in the instances."""
_MIN_RETRY_S, _MAX_RETRY_S = 1.0, 60.0
_UNKNOWN_RETRY_S = 5.0
_WINDOW_S = 10.0
"""Ends of requests count for so long."""
_MIN_ENDS = 5
"""Fewer say nothing about attainment."""
_NEAR = 0.8
"""A prediction is near its target from this share of it."""
_NEAR_FOR_S = 1.0
_LOOK_AGAIN_S = 0.2


@dataclasses.dataclass(frozen=True, slots=True)
class Full(NoChoice):
    """There are instances for it, and it is not its time."""


def is_bound(query: PlaceQuery) -> bool:
    """Whether it was admitted before: what the client has a part of is not held back."""
    return query.attempt > 0 or query.bind_to is not None


def limited(view: PlacementView, limit: Ints | int) -> PlacementView:
    """``view`` without the sides of instances that have ``limit`` open requests on that side."""
    return dataclasses.replace(
        view,
        takes_prefill=view.takes_prefill & (view.open_prefill < limit),
        takes_decode=view.takes_decode & (view.open_decode < limit),
        memo=Memo(),
    )


def limit_of(config: AdmissionConfig, view: PlacementView, *, offline: bool) -> Ints | int | None:
    """How many open requests each instance may have; ``None`` where nothing limits them.

    Offline work never makes a queue inside an instance: it takes free places in its batch.
    """
    limit = config.max_open_per_instance
    if not offline:
        return limit
    return view.max_num_seqs if limit is None else np.minimum(view.max_num_seqs, limit)


def late_by_s(query: PlaceQuery, choice: Choice, config: AdmissionConfig) -> float | None:
    """How far a request's queue is above what its target bears, where it is to be shed."""
    factor, target_s = config.max_ttft_factor, query.slo.ttft_s
    predicted_s = choice.predicted_ttft_s
    if factor is None or target_s is None or predicted_s is None:
        return None
    if query.priority < 0 or is_bound(query):
        return None
    if predicted_s <= factor * target_s:
        return None
    # A new request has not waited yet; queues get shorter by a second each second.
    return max(0.0, predicted_s - query.waited_s - target_s)


def retry_after_s(backlog_s: float | None) -> float:
    """When to come again, if the backlog is gone in so many seconds; ``None``: nobody knows."""
    if backlog_s is None:
        return _UNKNOWN_RETRY_S
    return float(math.ceil(min(max(backlog_s, _MIN_RETRY_S), _MAX_RETRY_S)))


def rises_after_s(query: PlaceQuery) -> float | None:
    """When offline work stops to yield, from its arrival here; ``None``: never."""
    return None if query.deadline_s is None else RISE_SHARE * query.deadline_s


class DrainRate:
    """How fast requests end, over the last seconds."""

    def __init__(self) -> None:
        self._ends: collections.deque[float] = collections.deque(maxlen=10_000)

    def ended(self, now: float) -> None:
        """One did."""
        self._ends.append(now)

    def seconds_for(self, num_requests: int, now: float) -> float | None:
        """Until so many more have ended; ``None`` where nothing ended lately."""
        while self._ends and self._ends[0] < now - _WINDOW_S:
            self._ends.popleft()
        if not self._ends:
            return None
        # A whole window, or since the first of them where that is not long ago.
        seconds = max(_MIN_RETRY_S, now - self._ends[0])
        return num_requests * seconds / len(self._ends)


class OnlinePressure:
    """Whether online requests suffer: by what is predicted for them, and by what they got."""

    def __init__(self, config: AdmissionConfig) -> None:
        self._config = config
        self._near_until_s = -math.inf
        self._ends: collections.deque[tuple[float, bool]] = collections.deque(maxlen=10_000)
        self._num_met = 0

    def placed(self, query: PlaceQuery, choice: Choice, now: float) -> None:
        """An online request has its place."""
        target_s, predicted_s = query.slo.ttft_s, choice.predicted_ttft_s
        if target_s is not None and predicted_s is not None and predicted_s > _NEAR * target_s:
            self._near_until_s = now + _NEAR_FOR_S

    def ended(self, met: bool, now: float) -> None:
        """An online request with targets ended, one that was shed included."""
        if len(self._ends) == self._ends.maxlen:
            self._num_met -= self._ends.popleft()[1]
        self._ends.append((now, met))
        self._num_met += met

    def over_at_s(self, now: float) -> float | None:
        """When they do not suffer any more, should nothing happen; ``None``: they do not now."""
        while self._ends and self._ends[0][0] <= now - _WINDOW_S:
            self._num_met -= self._ends.popleft()[1]
        over_at = self._near_until_s
        num = len(self._ends)
        if num >= _MIN_ENDS and self._num_met < self._config.online_attainment * num:
            over_at = max(over_at, self._ends[0][0] + _WINDOW_S, now + _LOOK_AGAIN_S)
        return over_at if over_at > now else None
