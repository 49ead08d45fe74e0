"""What ``baton explain`` remembers: placements, their reasons, and how requests ended. Bounded."""

from __future__ import annotations

import collections
import dataclasses

from baton.core.cluster import Placement
from controller.events import AttemptEnded, PlaceQuery, RequestEnded, StageAt

_MAX_ATTEMPTS_PER_REQUEST = 256


@dataclasses.dataclass(slots=True)
class AttemptTrace:
    """One attempt of one submission."""

    request_id: str
    attempt: int
    choice: int
    placement: Placement | None = None
    reason: str = ""
    num_candidates: int = 0
    stages: tuple[StageAt, ...] = ()
    predicted_ttft_s: float | None = None
    """When it was placed; ``None`` where nothing was predicted."""
    predicted_tpot_s: float | None = None


@dataclasses.dataclass(slots=True)
class RequestTrace:
    """A client's request with all attempts of its submissions."""

    request_id: str
    attempts: dict[tuple[str, int], AttemptTrace] = dataclasses.field(default_factory=dict)
    ended: RequestEnded | None = None

    def attempt(self, query: PlaceQuery | AttemptEnded) -> AttemptTrace | None:
        """The attempt's entry, made if need be; ``None`` when there are too many."""
        key = (query.request_id, query.attempt)
        entry = self.attempts.get(key)
        if entry is None and len(self.attempts) < _MAX_ATTEMPTS_PER_REQUEST:
            entry = AttemptTrace(query.request_id, query.attempt, query.choice)
            self.attempts[key] = entry
        return entry


class TraceBook:
    """The last ``capacity`` requests, least recently touched out first."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._traces: collections.OrderedDict[str, RequestTrace] = collections.OrderedDict()

    def __len__(self) -> int:
        return len(self._traces)

    def get(self, request_id: str) -> RequestTrace | None:
        """By the id the client knows; ``None`` if unknown or forgotten."""
        return self._traces.get(request_id)

    def placed(
        self,
        query: PlaceQuery,
        placement: Placement | None,
        reason: str,
        num_candidates: int,
        *,
        predicted_ttft_s: float | None = None,
        predicted_tpot_s: float | None = None,
    ) -> None:
        """Remember a decision; ``placement`` is ``None`` for a refusal."""
        known = self._traces.get(query.client_request_id)
        # The client used the id again: what ended is another request.
        if known is not None and known.ended is not None:
            del self._traces[query.client_request_id]
        entry = self._touch(query.client_request_id).attempt(query)
        if entry is not None:
            entry.placement = placement
            entry.reason = reason
            entry.num_candidates = num_candidates
            entry.predicted_ttft_s = predicted_ttft_s
            entry.predicted_tpot_s = predicted_tpot_s

    def bound(self, query: PlaceQuery, placement: Placement, reason: str) -> None:
        """Remember which decode side an attempt got after its prefill."""
        entry = self._touch(query.client_request_id).attempt(query)
        if entry is not None:
            entry.placement = placement
            entry.reason = f"{entry.reason}; after prefill: {reason}".removeprefix("; ")

    def ended(self, outcome: RequestEnded) -> None:
        """Remember how a request ended, and the stages of its attempts."""
        trace = self._touch(outcome.request_id)
        trace.ended = outcome
        for attempt in outcome.attempts:
            entry = trace.attempt(attempt)
            if entry is not None:
                entry.stages = attempt.stages

    def _touch(self, request_id: str) -> RequestTrace:
        trace = self._traces.setdefault(request_id, RequestTrace(request_id))
        self._traces.move_to_end(request_id)
        while len(self._traces) > self._capacity:
            self._traces.popitem(last=False)
        return trace
