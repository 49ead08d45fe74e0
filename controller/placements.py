"""Placements: decide a batch at once, queue what cannot be placed yet, refuse what waited long.

The queue goes by priority, then tenants in turn (``controller/fairness.py``). It is tried again
whenever something became usable or a request ended, and each entry has its own deadline. A query
is answered when it is decided: one that must wait holds up no other of its batch. Who waits though
there are instances for it, and who is turned away, is said in ``controller/admission.py``.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping

from baton.core.cluster import Placement, Target
from baton.core.config import ControllerConfig
from baton.core.errors import Code, Stage
from controller import admission
from controller.admission import DrainRate, Full, OnlinePressure
from controller.events import CallId, Failure, Placed, PlaceQuery, PlaceRequests, RequestEnded
from controller.fairness import FairQueue, Ticket
from controller.output_lengths import OutputLengths
from controller.policies.base import Choice, NoChoice, PlacementPolicy, choose
from controller.state import ClusterState, OpenPlacement
from controller.traces import TraceBook
from controller.waiting import Batch, Waiting, problem_of

_LOOK_AGAIN = 0
"""Number of no entry: its deadline is for the whole queue. That of ``-n`` is entry n's rise."""
_MAX_TRIED = 64
"""Entries looked at when some requests ended; when instances became usable, all are."""


class PlacementDesk:
    """Owns the queue; counts and traces what it places."""

    def __init__(
        self,
        state: ClusterState,
        config: ControllerConfig,
        traces: TraceBook,
        policy: PlacementPolicy,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        """``weights``: of service classes, for their tenants' shares; 1 where not named."""
        self._policy = policy
        self.lengths = OutputLengths()
        self._state = state
        self._config = config
        self._traces = traces
        self._weights = dict(weights or {})
        self._queue = FairQueue()
        self._entries: dict[int, Waiting] = {}
        self._by_request: dict[str, Waiting] = {}
        self._touched: dict[CallId, Batch] = {}
        """Batches with results to answer at the end of this event."""
        self._num_entries = 0
        self._num_full = 0
        """Entries that wait though there are instances for them."""
        self._num_decisions = 0
        self._offline_open: set[str] = set()
        self._pressure = OnlinePressure(config.admission)
        self._drain = DrainRate()
        self._only_freed = False
        """The queue is tried again because something ended, and for nothing else."""

    @property
    def num_queued(self) -> int:
        """Queries that wait for a pair."""
        return len(self._queue)

    def place(self, event: PlaceRequests, now: float) -> None:
        """Decide a batch; what nothing can take yet is queued."""
        batch = Batch(event.call_id, event.gateway_id, len(event.queries))
        self._touched[batch.call_id] = batch
        order = sorted(range(len(event.queries)), key=lambda i: (-event.queries[i].priority, i))
        for index in order:
            query = event.queries[index]
            problem = problem_of(query)
            if problem is None:
                query = self.lengths.told(query)
            result = problem or self._arrive(query, batch.gateway_id, now)
            if isinstance(result, NoChoice):
                self._enqueue(query, batch, index, result, now)
            else:
                self._decided(batch, index, result)
        self._flush()

    def retry(self, now: float) -> None:
        """Something became usable, or ended: try the queue again, in order."""
        only_freed, self._only_freed = self._only_freed, False
        limit = _MAX_TRIED if only_freed else None
        while self._try(limit, now) and only_freed:
            pass
        self._flush()

    def _try(self, limit: int | None, now: float) -> bool:
        """Decide the first of the queue; whether all of them were, and there are more."""
        # Filters know a query by few things; what fails for one fails for those that ask for more.
        failed: dict[tuple[bool, bool, bool], int] = {}
        for number in list(itertools.islice(self._queue, limit)):
            entry = self._entries[number]
            query = entry.query
            offline = query.priority < 0 and not entry.risen
            kind = (query.max_new_tokens <= 1, admission.is_bound(query), offline)
            if query.num_total_tokens >= failed.get(kind, query.num_total_tokens + 1):
                continue
            result = self._decide(entry.as_of(now), entry.batch.gateway_id, now, offline=offline)
            if isinstance(result, NoChoice):
                failed[kind] = query.num_total_tokens
                self._waits(entry, result)
                continue
            self._dequeue(entry, served=isinstance(result, Placement))
            self._decided(entry.batch, entry.index, result)
        return not failed and len(self._queue) > 0

    def expire(self, number: int, now: float) -> None:
        """An entry waited as long as it may; or one of the other deadlines of the queue."""
        if number > 0:
            entry = self._entries[number]
            self._dequeue(entry)
            if not isinstance(entry.why, Full):
                query = entry.as_of(now)
                result = choose(self._policy, query, self._state.columns.view, now, 0)
                late = NoChoice("it waited too long")
                entry.why = result if isinstance(result, NoChoice) else late
            self._decided(entry.batch, entry.index, self._refuse(entry.query, entry.why, now))
            self._flush()
        elif number < _LOOK_AGAIN:
            entry = self._entries[-number]
            entry.risen = True
            self._queue.raise_priority(entry.number, 0)
        self._try_again()

    def call_gone(self, call_id: CallId) -> None:
        """Nobody waits for this batch any more: what is left of it is not placed."""
        for entry in [e for e in self._entries.values() if e.batch.call_id == call_id]:
            self._dequeue(entry)
        self._try_again()

    def reported(self, outcome: RequestEnded, now: float) -> None:
        """A client's request ended; :meth:`ended` follows for each of its attempts."""
        names = [item.request_id for item in outcome.attempts]
        if any(name in self._state.open for name in names):
            self._drain.ended(now)
        offline = any(name in self._offline_open for name in names)
        if outcome.met is not None and not offline:
            self._pressure.ended(outcome.met, now)

    def ended(self, request_id: str, attempt: int) -> None:
        """An attempt is over; a newer one, if there is, is not.

        It may wait here still: its client gave up, while the batch it came in goes on.
        """
        entry = self._by_request.get(request_id)
        if entry is not None and entry.query.attempt <= attempt:
            self._dequeue(entry)
            reason = "the request ended while it waited"
            failure = Failure(Code.ABORTED, reason, Stage.PLACEMENT)
            self._decided(entry.batch, entry.index, failure)
            self._flush()
        placement = self._state.open.get(request_id)
        if placement is not None and placement.attempt <= attempt:
            self._forget(request_id)
        self._try_again()

    def gateway_gone(self, gateway_id: str) -> None:
        """Its requests end by lease; nobody will report them."""
        for key, placement in list(self._state.open.items()):
            if placement.gateway_id == gateway_id:
                self._forget(key)
        self._try_again()

    def shut(self) -> None:
        """Refuse everything that still waits."""
        for entry in list(self._entries.values()):
            self._dequeue(entry)
            failure = self._refuse(entry.query, NoChoice("the controller stops"), 0.0)
            self._decided(entry.batch, entry.index, failure)
        self._flush()

    # Deciding

    def _arrive(
        self, query: PlaceQuery, gateway_id: str, now: float
    ) -> Placement | Failure | NoChoice:
        """Decide a new query, unless others have waited longer for the same."""
        first = self._queue.highest_priority
        behind = self._num_full > 0 and first is not None and first >= query.priority
        if behind and not admission.is_bound(query):
            return Full("others wait for their turn too")
        return self._decide(query, gateway_id, now, offline=query.priority < 0)

    def _decide(
        self, query: PlaceQuery, gateway_id: str, now: float, *, offline: bool
    ) -> Placement | Failure | NoChoice:
        choice = self._choose(query, now, offline=offline)
        if isinstance(choice, NoChoice):
            if query.bind_to is not None:
                # Its gateway has a guess to go on with.
                return Failure(Code.UNAVAILABLE, choice.reason, Stage.PLACEMENT)
            if not choice.hopeless:
                return choice
            self._traces.placed(query, None, choice.reason, 0)
            return Failure(Code.CONTEXT_LENGTH_EXCEEDED, choice.reason, Stage.PLACEMENT)
        known = self._state.open.get(query.request_id)
        if query.bind_to is not None and known is not None and known.attempt > query.attempt:
            return Failure(Code.ABORTED, "a newer attempt is under way", Stage.PLACEMENT)
        late_s = admission.late_by_s(query, choice, self._config.admission)
        if late_s is not None:
            return self._shed_late(query, choice, late_s)
        self._num_decisions += 1
        placement = self._placement(query, choice)
        if query.bind_to is not None and known is not None and known.attempt == query.attempt:
            self._state.rebind(query.request_id, placement.decode, now)
            self._traces.bound(query, placement, choice.reason)
            return placement
        # A new attempt means that the older one is over; the same one asked again is moved.
        self._forget(query.request_id)
        open_ = OpenPlacement(
            gateway_id,
            query.attempt,
            placement.prefill,
            placement.decode,
            query.num_prompt_tokens,
            query.num_prompt_tokens + int(query.num_expected_tokens / 2),
            choice.prefill_s,
        )
        self._state.count_open(query.request_id, open_, now)
        if query.priority < 0:
            self._offline_open.add(query.request_id)
        else:
            self._pressure.placed(query, choice, now)
        self._traces.placed(
            query,
            placement,
            choice.reason,
            choice.num_candidates,
            predicted_ttft_s=choice.predicted_ttft_s,
            predicted_tpot_s=choice.predicted_tpot_s,
        )
        return placement

    def _choose(self, query: PlaceQuery, now: float, *, offline: bool) -> Choice | NoChoice:
        view = self._state.columns.view
        if offline and not admission.is_bound(query):
            why = self._must_yield(now)
            if why is not None:
                return why
        limit = None
        if not admission.is_bound(query):
            limit = admission.limit_of(self._config.admission, view, offline=offline)
        seen = view if limit is None else admission.limited(view, limit)
        choice = choose(self._policy, query, seen, now, self._num_decisions)
        if limit is None or isinstance(choice, Choice) or choice.hopeless:
            return choice
        if isinstance(choose(self._policy, query, view, now, self._num_decisions), Choice):
            return Full("every instance that could take it has as many open requests as it may")
        return choice

    def _must_yield(self, now: float) -> Full | None:
        """Why offline work may not be placed now."""
        first = self._queue.highest_priority
        if first is not None and first >= 0:
            return Full("online requests wait")
        if self._offline_open and (over_at := self._pressure.over_at_s(now)) is not None:
            self._state.deadlines.set(("queue", _LOOK_AGAIN), over_at)
            return Full("online requests are close to missing their targets, or miss them")
        return None

    def _placement(self, query: PlaceQuery, choice: Choice) -> Placement:
        view = self._state.columns.view

        def target(row: int) -> Target:
            return self._state.instances[view.names[row]].target

        first, second = choice.fallback or (None, None)
        return Placement(
            query.request_id,
            query.attempt,
            target(choice.prefill),
            target(choice.decode),
            None if first is None else target(first),
            None if second is None else target(second),
            choice.tentative,
        )

    # Turning away

    def _shed_late(self, query: PlaceQuery, choice: Choice, late_s: float) -> Failure:
        reason = (
            f"its first token is expected after {choice.predicted_ttft_s:.3f} s, "
            f"its target is {query.slo.ttft_s:g} s"
        )
        self._traces.placed(query, None, f"shed: {reason}", 0)
        return _overloaded(reason, admission.retry_after_s(late_s))

    def _refuse(self, query: PlaceQuery, why: NoChoice, now: float) -> Failure:
        self._traces.placed(query, None, f"refused: {why.reason}", 0)
        if isinstance(why, Full):
            backlog_s = self._drain.seconds_for(len(self._queue) + 1, now)
            return _overloaded(why.reason, admission.retry_after_s(backlog_s))
        retry_after_s = max(1.0, self._config.heartbeat_s)
        return Failure(Code.UNAVAILABLE, why.reason, Stage.PLACEMENT, retry_after_s=retry_after_s)

    # The queue

    def _enqueue(
        self, query: PlaceQuery, batch: Batch, index: int, why: NoChoice, now: float
    ) -> None:
        wait_s = self._wait_s(query)
        if wait_s <= 0:
            self._decided(batch, index, self._refuse(query, why, now))
            return
        self._num_entries += 1
        entry = Waiting(self._num_entries, query, batch, index, now, why)
        self._num_full += isinstance(why, Full)
        self._entries[entry.number] = self._by_request[query.request_id] = entry
        weight = self._weights.get(query.service_class, 1.0)
        tokens = query.num_prompt_tokens + query.num_expected_tokens
        self._queue.push(Ticket(entry.number, query.priority, query.tenant, tokens, weight))
        self._state.deadlines.set(("queue", entry.number), now + wait_s)
        rises_s = admission.rises_after_s(query) if query.priority < 0 else None
        if rises_s is not None and rises_s < wait_s:
            self._state.deadlines.set(("queue", -entry.number), now + rises_s)
        if len(self._queue) > self._config.max_queued_placements:
            self._drop_last(now)

    def _wait_s(self, query: PlaceQuery) -> float:
        budget_s = math.inf if query.budget_s is None else query.budget_s
        offline = query.priority < 0 and not admission.is_bound(query)
        config = self._config
        return min(budget_s, config.admission.offline_wait_s if offline else config.queue_timeout_s)

    def _drop_last(self, now: float) -> None:
        """Turn away whose turn is least near: of the lowest priority, the greediest tenant's."""
        number = self._queue.last()
        assert number is not None
        entry = self._entries[number]
        self._dequeue(entry)
        reason = f"{entry.why.reason}, and too many wait already"
        why = dataclasses.replace(entry.why, reason=reason)
        self._decided(entry.batch, entry.index, self._refuse(entry.query, why, now))

    def _waits(self, entry: Waiting, why: NoChoice) -> None:
        self._num_full += isinstance(why, Full) - isinstance(entry.why, Full)
        entry.why = why

    def _dequeue(self, entry: Waiting, *, served: bool = False) -> None:
        del self._entries[entry.number]
        self._num_full -= isinstance(entry.why, Full)
        if self._by_request.get(entry.query.request_id) is entry:
            del self._by_request[entry.query.request_id]
        self._queue.remove(entry.number, served=served)
        for number in (entry.number, -entry.number):
            self._state.deadlines.clear(("queue", number))

    def _try_again(self) -> None:
        """Have the queue tried at the end of this event."""
        if len(self._queue) and not self._state.more_usable:
            self._only_freed = self._state.more_usable = True

    def _forget(self, request_id: str) -> None:
        self._state.forget_open(request_id)
        self._offline_open.discard(request_id)

    # Answers

    def _decided(self, batch: Batch, index: int, result: Placement | Failure) -> None:
        batch.num_left -= 1
        batch.fresh[index] = result
        self._touched[batch.call_id] = batch

    def _flush(self) -> None:
        """Answer what was decided during this event."""
        touched, self._touched = self._touched, {}
        for batch in touched.values():
            if batch.fresh or not batch.num_left:
                self._state.emit(Placed(batch.call_id, batch.fresh, last=not batch.num_left))
                batch.fresh = {}


def _overloaded(reason: str, retry_after_s: float) -> Failure:
    return Failure(Code.OVERLOADED, reason, Stage.PLACEMENT, retry_after_s=retry_after_s)
