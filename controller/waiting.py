"""What the placement desk keeps of calls and of queries that wait. Pure values."""

from __future__ import annotations

import dataclasses

from baton.core.cluster import Placement
from baton.core.errors import Code, Stage
from controller.events import CallId, Failure, PlaceQuery
from controller.policies.base import NoChoice


@dataclasses.dataclass(slots=True)
class Batch:
    """A gateway's call: its queries are answered when they are decided."""

    call_id: CallId
    gateway_id: str
    num_left: int
    """Queries without a result."""
    fresh: dict[int, Placement | Failure] = dataclasses.field(default_factory=dict)
    """Results not answered yet, by index."""


@dataclasses.dataclass(slots=True)
class Waiting:
    """A query that is not decided yet."""

    number: int
    query: PlaceQuery
    batch: Batch
    index: int
    """In the batch."""
    since_s: float
    why: NoChoice
    """As of the last try."""
    risen: bool = False
    """Offline work that must not wait any longer."""

    def as_of(self, now: float) -> PlaceQuery:
        """The query, with the time that it has waited here."""
        return dataclasses.replace(self.query, waited_s=self.query.waited_s + now - self.since_s)


def problem_of(query: PlaceQuery) -> Failure | None:
    """What is wrong with a query whatever the cluster looks like."""
    for name, bad in (
        ("request_id", not query.request_id),
        ("num_prompt_tokens", query.num_prompt_tokens < 1),
        ("max_new_tokens", query.max_new_tokens < 1),
    ):
        if bad:
            message = f"{name} is missing from a placement request"
            return Failure(Code.INVALID_REQUEST, message, Stage.PLACEMENT, param=name)
    return None
