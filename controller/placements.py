"""Placements: decide a batch at once, queue what nothing can take yet, refuse what waited long.

The queue is one list in order of priority, then arrival. It is tried again whenever something
became usable, and each entry has its own deadline. A query is answered when it is decided: one that
must wait holds up no other of its batch.
"""

from __future__ import annotations

import bisect
import dataclasses

from baton.core.cluster import Placement, Target
from baton.core.config import ControllerConfig
from baton.core.errors import Code, Stage
from controller.columns import PlacementView
from controller.events import CallId, Failure, Placed, PlaceQuery, PlaceRequests
from controller.output_lengths import OutputLengths
from controller.policies.base import Choice, NoChoice, PlacementPolicy, choose
from controller.state import ClusterState, OpenPlacement
from controller.traces import TraceBook


@dataclasses.dataclass(slots=True)
class _Batch:
    call_id: CallId
    gateway_id: str
    num_left: int
    """Queries without a result."""
    fresh: dict[int, Placement | Failure] = dataclasses.field(default_factory=dict)
    """Results not answered yet, by index."""

    def decide(self, index: int, result: Placement | Failure) -> None:
        self.num_left -= 1
        self.fresh[index] = result


@dataclasses.dataclass(slots=True)
class _Queued:
    number: int
    query: PlaceQuery
    batch: _Batch
    index: int
    """In the batch."""

    @property
    def order(self) -> tuple[int, int]:
        return (-self.query.priority, self.number)


class PlacementDesk:
    """Owns the queue; counts and traces what it places."""

    def __init__(
        self,
        state: ClusterState,
        config: ControllerConfig,
        traces: TraceBook,
        policy: PlacementPolicy,
    ) -> None:
        self._policy = policy
        self.lengths = OutputLengths()
        self._state = state
        self._config = config
        self._traces = traces
        self._queue: list[_Queued] = []
        self._by_number: dict[int, _Queued] = {}
        self._by_request: dict[str, _Queued] = {}
        self._num_entries = 0
        self._num_decisions = 0

    @property
    def num_queued(self) -> int:
        """Queries that wait for a pair."""
        return len(self._queue)

    def place(self, event: PlaceRequests, now: float) -> None:
        """Decide a batch; what nothing can take yet is queued."""
        batch = _Batch(event.call_id, event.gateway_id, len(event.queries))
        order = sorted(range(len(event.queries)), key=lambda i: (-event.queries[i].priority, i))
        for index in order:
            query = event.queries[index]
            problem = _problem(query)
            if problem is None:
                query = self.lengths.told(query)
            result = problem or self._decide(query, batch.gateway_id, now)
            if isinstance(result, NoChoice):
                self._enqueue(query, batch, index, result, now)
            else:
                batch.decide(index, result)
        self._answer(batch)

    def retry(self, now: float) -> None:
        """Something became usable: try the queue again, in order."""
        touched: dict[CallId, _Batch] = {}
        for entry in list(self._queue):
            result = self._decide(entry.query, entry.batch.gateway_id, now)
            if isinstance(result, NoChoice):
                continue
            self._dequeue(entry)
            entry.batch.decide(entry.index, result)
            touched[entry.batch.call_id] = entry.batch
        for batch in touched.values():
            self._answer(batch)

    def expire(self, number: int, now: float) -> None:
        """An entry waited as long as it may."""
        entry = self._by_number[number]
        self._dequeue(entry)
        why = self._choose(entry.query, self._state.columns.view, now)
        reason = why.reason if isinstance(why, NoChoice) else "it waited too long"
        entry.batch.decide(entry.index, self._refuse(entry.query, reason))
        self._answer(entry.batch)

    def call_gone(self, call_id: CallId) -> None:
        """Nobody waits for this batch any more: what is left of it is not placed."""
        for entry in [e for e in self._queue if e.batch.call_id == call_id]:
            self._dequeue(entry)

    def ended(self, request_id: str, attempt: int) -> None:
        """An attempt is over; a newer one, if there is, is not.

        It may wait here still: its client gave up, while the batch it came in goes on.
        """
        entry = self._by_request.get(request_id)
        if entry is not None and entry.query.attempt <= attempt:
            self._dequeue(entry)
            reason = "the request ended while it waited"
            entry.batch.decide(entry.index, Failure(Code.ABORTED, reason, Stage.PLACEMENT))
            self._answer(entry.batch)
        placement = self._state.open.get(request_id)
        if placement is not None and placement.attempt <= attempt:
            self._state.forget_open(request_id)

    def gateway_gone(self, gateway_id: str) -> None:
        """Its requests end by lease; nobody will report them."""
        for key, placement in list(self._state.open.items()):
            if placement.gateway_id == gateway_id:
                self._state.forget_open(key)

    def shut(self) -> None:
        """Refuse everything that still waits."""
        for entry in list(self._queue):
            self._dequeue(entry)
            entry.batch.decide(entry.index, self._refuse(entry.query, "the controller stops"))
            self._answer(entry.batch)

    def _decide(
        self, query: PlaceQuery, gateway_id: str, now: float
    ) -> Placement | Failure | NoChoice:
        choice = self._choose(query, self._state.columns.view, now)
        if isinstance(choice, NoChoice):
            if not choice.hopeless:
                return choice
            self._traces.placed(query, None, choice.reason, 0)
            return Failure(Code.CONTEXT_LENGTH_EXCEEDED, choice.reason, Stage.PLACEMENT)
        self._num_decisions += 1
        prefill, decode = self._target(choice.prefill), self._target(choice.decode)
        placement = Placement(
            query.request_id, query.attempt, prefill, decode, tentative=choice.tentative
        )
        if choice.fallback is not None:
            first, second = map(self._target, choice.fallback)
            placement = dataclasses.replace(
                placement, fallback_prefill=first, fallback_decode=second
            )
        known = self._state.open.get(query.request_id)
        if query.bind_to is not None and known is not None and known.attempt == query.attempt:
            self._state.rebind(query.request_id, decode, now)
            return placement
        # A new attempt means that the older one is over; the same one asked again is moved.
        self._state.forget_open(query.request_id)
        open_ = OpenPlacement(
            gateway_id,
            query.attempt,
            prefill,
            decode,
            query.num_prompt_tokens,
            query.num_prompt_tokens + int(query.num_expected_tokens / 2),
            choice.prefill_s,
        )
        self._state.count_open(query.request_id, open_, now)
        self._traces.placed(query, placement, choice.reason, choice.num_candidates)
        return placement

    def _choose(self, query: PlaceQuery, view: PlacementView, now: float) -> Choice | NoChoice:
        return choose(self._policy, query, view, now, self._num_decisions)

    def _target(self, row: int) -> Target:
        return self._state.instances[self._state.columns.view.names[row]].target

    def _enqueue(
        self, query: PlaceQuery, batch: _Batch, index: int, why: NoChoice, now: float
    ) -> None:
        limit_s = self._config.queue_timeout_s
        wait_s = limit_s if query.budget_s is None else min(query.budget_s, limit_s)
        if wait_s <= 0 or len(self._queue) >= self._config.max_queued_placements:
            full = wait_s > 0
            reason = f"{why.reason}, and too many wait already" if full else why.reason
            batch.decide(index, self._refuse(query, reason))
            return
        self._num_entries += 1
        entry = _Queued(self._num_entries, query, batch, index)
        bisect.insort(self._queue, entry, key=lambda e: e.order)
        self._by_number[entry.number] = self._by_request[query.request_id] = entry
        self._state.deadlines.set(("queue", entry.number), now + wait_s)

    def _dequeue(self, entry: _Queued) -> None:
        del self._by_number[entry.number]
        if self._by_request.get(entry.query.request_id) is entry:
            del self._by_request[entry.query.request_id]
        del self._queue[bisect.bisect_left(self._queue, entry.order, key=lambda e: e.order)]
        self._state.deadlines.clear(("queue", entry.number))

    def _refuse(self, query: PlaceQuery, reason: str) -> Failure:
        self._traces.placed(query, None, f"refused: {reason}", 0)
        retry_after_s = max(1.0, self._config.heartbeat_s)
        return Failure(Code.UNAVAILABLE, reason, Stage.PLACEMENT, retry_after_s=retry_after_s)

    def _answer(self, batch: _Batch) -> None:
        if batch.fresh or not batch.num_left:
            self._state.emit(Placed(batch.call_id, batch.fresh, last=not batch.num_left))
            batch.fresh = {}


def _problem(query: PlaceQuery) -> Failure | None:
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
