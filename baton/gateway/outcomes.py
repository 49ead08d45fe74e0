"""What is known of a request when it ends: the timeline and the numbers that are reported."""

from __future__ import annotations

import collections

from baton.core.errors import BatonError, Code
from baton.core.request import FinishReason
from baton.core.slo import Timing
from baton.gateway.attainment import Verdict, judge
from baton.gateway.journal import Journal, StageMark
from baton.gateway.metrics import GatewayMetrics
from baton.gateway.requests import GatewayRequest
from protos.baton.internal.v1 import controller_pb2
from protos.baton.v1 import cluster_pb2

_ABORT_REASONS = {Code.ABORTED: "abort_call", Code.DEADLINE_EXCEEDED: "deadline"}


class ChoiceRecord:
    """One choice: its journal and when its tokens came (monotonic seconds)."""

    def __init__(self, choice: int, journal: Journal, metrics_itl: list[float]) -> None:
        self.choice = choice
        self.journal = journal
        self.finish_reason: FinishReason | None = None
        self.num_tokens = 0
        self.first_token_s: float | None = None
        self.last_token_s: float | None = None
        self._itl_s = metrics_itl

    def on_tokens(self, count: int, now: float, wall_s: float) -> None:
        """Tokens came for the client."""
        if count == 0:
            return
        self.num_tokens += count
        if self.last_token_s is None:
            self.first_token_s = now
            self.journal.mark("first_token", "gateway", wall_s)
        else:
            self._itl_s.append(now - self.last_token_s)
        self.last_token_s = now

    def timing(self, arrival_s: float) -> Timing | None:
        """``None`` before the first token."""
        if self.first_token_s is None or self.last_token_s is None:
            return None
        return Timing(arrival_s, self.first_token_s, self.last_token_s, self.num_tokens)


class RequestRecord:
    """One request from arrival to end."""

    def __init__(self, request: GatewayRequest, received_s: float, received_wall_s: float) -> None:
        self.request = request
        self.outcome: str | None = None
        self._error = ""
        self.received_s = received_s
        self._received_wall_s = received_wall_s
        self._verdict: Verdict | None = None
        self._choices: list[ChoiceRecord] = []
        self._itl_s: list[float] = []

    def add(self, choice: int, journal: Journal) -> ChoiceRecord:
        """A choice begins."""
        journal.mark("received", "gateway", self._received_wall_s)
        record = ChoiceRecord(choice, journal, self._itl_s)
        self._choices.append(record)
        return record

    @property
    def finish_outcome(self) -> str:
        """Of a request whose choices all ended well: ``length`` if any was cut."""
        cut = any(choice.finish_reason is FinishReason.LENGTH for choice in self._choices)
        return str(FinishReason.LENGTH if cut else FinishReason.STOP)

    def fail(self, error: BatonError) -> None:
        """It ended with an error."""
        self.outcome = str(error.code)
        self._error = error.message

    def close(self, now: float, metrics: GatewayMetrics) -> None:
        """Count it. A record without an outcome is one whose client went away."""
        self._count_abort(metrics)
        if self.outcome is None:
            self.outcome = str(Code.ABORTED)
            self._error = "the client went away"
        for choice in self._choices:
            if choice.last_token_s is not None:
                wall_s = self._received_wall_s + choice.last_token_s - self.received_s
                choice.journal.mark("last_token", "gateway", wall_s)
            state = str(choice.journal.state if choice.finish_reason is None else "finished")
            wall_s = self._received_wall_s + now - self.received_s
            choice.journal.mark(state, "gateway", wall_s)
        self._count(now, metrics)

    def to_outcome(self) -> controller_pb2.Outcome:
        """For ``baton explain``."""
        timings = self._timings
        return controller_pb2.Outcome(
            request_id=self.request.request_id,
            outcome="abort" if self.outcome == Code.ABORTED else self.outcome or "",
            error=self._error,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
            cached_tokens=self._cached_tokens,
            cached_by_tier=self._cached_by_tier,
            service_class=self.request.level.service_class,
            met=None if self._verdict is None else self._verdict.met,
            ttft_s=min((timing.ttft_s for timing in timings), default=0.0),
            tpot_s=max((timing.tpot_s or 0.0 for timing in timings), default=0.0),
            attempts=[
                controller_pb2.AttemptOutcome(
                    request_id=choice.journal.request_id,
                    attempt=log.attempt,
                    choice=choice.choice,
                    stages=[_stage(mark) for mark in log.stages],
                )
                for choice in self._choices
                for log in choice.journal.attempts
            ],
        )

    @property
    def _prompt_tokens(self) -> int:
        return sum(len(prompt.token_ids) for prompt in self.request.prompts)

    @property
    def _completion_tokens(self) -> int:
        return sum(choice.num_tokens for choice in self._choices)

    @property
    def _cached_tokens(self) -> int:
        return sum(choice.journal.num_cached_tokens or 0 for choice in self._choices)

    @property
    def _cached_by_tier(self) -> dict[str, int]:
        found: collections.Counter[str] = collections.Counter()
        for choice in self._choices:
            found.update(dict(choice.journal.cached_by_tier))
        return dict(found)

    @property
    def _timings(self) -> list[Timing]:
        """Of the choices that have a token."""
        found = [choice.timing(self.received_s) for choice in self._choices]
        return [timing for timing in found if timing is not None]

    def _count_abort(self, metrics: GatewayMetrics) -> None:
        if self.outcome in (FinishReason.STOP, FinishReason.LENGTH):
            return
        reason = "disconnect"
        if self.outcome is not None:
            reason = _ABORT_REASONS.get(Code(self.outcome), "error")
        metrics.aborts.labels(reason).inc()

    def _count(self, now: float, metrics: GatewayMetrics) -> None:
        metrics.open.dec()
        metrics.requests.labels(self.request.endpoint, self.outcome).inc()
        metrics.prompt_tokens.inc(self._prompt_tokens)
        metrics.generation_tokens.inc(self._completion_tokens)
        metrics.cached_tokens.inc(self._cached_tokens)
        metrics.e2e.observe(now - self.received_s)
        timings = self._timings
        if timings:
            metrics.ttft.observe(min(timing.ttft_s for timing in timings))
        for timing in timings:
            if timing.tpot_s is not None:
                metrics.tpot.observe(timing.tpot_s)
        for gap_s in self._itl_s:
            metrics.itl.observe(gap_s)
        request, e2e_s = self.request, now - self.received_s
        assert self.outcome is not None
        self._verdict = judge(self.outcome, request.level, timings, request.num_choices, e2e_s)
        metrics.service.ended(request.level.service_class, self._verdict, timings, now)


def _stage(mark: StageMark) -> cluster_pb2.StageTime:
    return cluster_pb2.StageTime(stage=mark.stage, where=mark.where, wall_s=mark.wall_s)
