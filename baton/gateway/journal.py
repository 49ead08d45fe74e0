"""The journal of one submission: what the client has, what is still to come, how to go on. Pure.

Two instances speak about the same submission (prefill sends token 0, decode repeats it and goes
on), connections break, and older attempts linger. The journal turns all of that into each token
once and in order, and says when the attempt is lost and must be replayed.
"""

from __future__ import annotations

import dataclasses
import enum

from baton.core.errors import BatonError, Code, InstanceLost, Stage, error_from_code
from baton.core.request import (
    FinishReason,
    SamplingParams,
    Submission,
    TokenLogprobs,
    TokenOutput,
)
from baton.core.slo import ServiceLevel
from baton.gateway.request_states import TERMINAL, State, Transition, advance

MAX_EARLY_OUTPUTS = 256
"""Outputs kept while an earlier one is missing."""
_STALL_FACTOR = 6
"""A stream may stand still for so many gap timeouts on an instance that serves others."""
RISE_SHARE = 0.5
"""Offline work yields for this share of the time that is left to its deadline."""
NO_LEVEL = ServiceLevel()


class LossReason(enum.StrEnum):
    """Why an attempt ended early; label of ``baton_replays_total``."""

    INSTANCE_LOST = "instance_lost"
    REFUSED = "refused"
    GAP = "gap"
    MISMATCH = "mismatch"
    ERROR = "error"


@dataclasses.dataclass(frozen=True, slots=True)
class Loss:
    """An attempt is lost. ``instance_id`` is who failed, where that is known."""

    reason: LossReason
    error: BatonError
    instance_id: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Delta:
    """New tokens of a submission, in order; empty only when there is just an end to tell."""

    index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class StageMark:
    """Something happened, somewhere, at a wall-clock time (seconds)."""

    stage: str
    where: str
    wall_s: float


@dataclasses.dataclass(slots=True)
class AttemptLog:
    """The timeline of one attempt."""

    attempt: int
    stages: list[StageMark] = dataclasses.field(default_factory=list)


def _says(output: TokenOutput) -> tuple[int, bool]:
    return len(output.token_ids), output.finish_reason is not None


class Journal:
    """All that is known of one submission. Times are monotonic seconds given by the caller."""

    def __init__(
        self,
        request_id: str,
        prompt_ids: tuple[int, ...],
        sampling: SamplingParams,
        *,
        choice: int = 0,
        level: ServiceLevel = NO_LEVEL,
        received_s: float = 0.0,
        tenant: str = "",
        gateway_id: str = "",
        gap_timeout_s: float = 20.0,
    ) -> None:
        self.request_id = request_id
        self.prompt_ids = prompt_ids
        self.sampling = sampling
        self.choice = choice
        self.level = level
        self.received_s = received_s
        """When the request arrived: its deadline counts from here."""
        self.tenant = tenant
        self.gateway_id = gateway_id
        self.state = State.RECEIVED
        self.attempt = 0
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.num_cached_tokens: int | None = None
        self.cached_by_tier: tuple[tuple[str, int], ...] = ()
        self.attempts = [AttemptLog(0)]
        self._gap_timeout_s = gap_timeout_s
        self._early: dict[int, TokenOutput] = {}
        self._hole_since_s: float | None = None
        self._progress_s = 0.0
        self._prefill_lost_s: float | None = None
        self._has_prompt_logprobs = False

    def step(self, transition: Transition) -> None:
        """Follow the table of states. Raises IllegalTransition."""
        self.state = advance(self.state, transition)

    @property
    def over(self) -> bool:
        """Whether it ended, one way or another."""
        return self.state in TERMINAL

    def mark(self, stage: str, where: str, wall_s: float) -> None:
        """Add to the timeline of the current attempt."""
        self.attempts[-1].stages.append(StageMark(stage, where, wall_s))

    def place(self, now: float) -> None:
        """A placement for the current attempt has come."""
        self.step(Transition.PLACE)
        self._progress_s = now
        self._prefill_lost_s = None

    def bound(self, now: float) -> None:
        """Only now does somebody decode the current attempt: its silence counts from here."""
        self._progress_s = now

    def lose(self) -> None:
        """The current attempt is lost: the next one begins, unplaced. Its outputs are fenced."""
        self.step(Transition.LOSE)
        self.next_attempt()

    def next_attempt(self) -> None:
        """Number the next attempt; what came early in the old one is forgotten."""
        self.attempt += 1
        self.attempts.append(AttemptLog(self.attempt))
        self._early.clear()
        self._hole_since_s = None

    def deadline_left_s(self, now: float) -> float | None:
        """Time left to finish offline work; ``None`` without a deadline."""
        deadline_s = self.level.deadline_s
        return None if deadline_s is None else max(0.0, self.received_s + deadline_s - now)

    def submission(self, budget_s: float | None, now: float) -> Submission:
        """What instances must know to go on from here."""
        left_s = self.deadline_left_s(now)
        sampling = self.sampling
        if self._has_prompt_logprobs and sampling.prompt_logprobs is not None:
            # The client has them: a replay may use the prefix cache.
            sampling = dataclasses.replace(sampling, prompt_logprobs=None)
        return Submission(
            request_id=self.request_id,
            attempt=self.attempt,
            prompt_ids=self.prompt_ids,
            sampling=sampling,
            output_ids=tuple(self.token_ids),
            choice=self.choice,
            priority=self.level.priority,
            tenant=self.tenant,
            budget_s=budget_s,
            gateway_id=self.gateway_id,
            service_class=self.level.service_class,
            slo=self.level.slo,
            rise_after_s=None if left_s is None else left_s * RISE_SHARE,
        )

    def accept(
        self, output: TokenOutput, instance_id: str, now: float
    ) -> tuple[list[Delta], Loss | None]:
        """Take one output off the wire: what is new for the client, and whether to replay.

        Outputs of other attempts, and everything after the end, are dropped. Raises BatonError
        for an error output that a replay cannot cure.
        """
        for stage, wall_s in output.stages:
            self._mark_attempt(output.attempt, stage, instance_id, wall_s)
        if self.over or output.attempt != self.attempt:
            return [], None
        loss = self._error_of(output, instance_id)
        if loss is not None:
            return [], loss
        if output.index > len(self.token_ids):
            return [], self._keep_early(output, instance_id, now)
        deltas, loss = self._consume(output, instance_id, now)
        while loss is None and not self.over and (early := self._next_early()) is not None:
            more, loss = self._consume(early, instance_id, now)
            deltas += more
        if not self._early:
            self._hole_since_s = None
        return deltas, loss

    def finish_if_complete(self) -> Delta | None:
        """The end, if a lost attempt had already brought the last token but not said so."""
        finish: FinishReason | None = None
        stop_token_id: int | None = None
        if self.token_ids and self.token_ids[-1] in self.sampling.stop_token_ids:
            finish, stop_token_id = FinishReason.STOP, self.token_ids[-1]
        elif len(self.token_ids) >= self.sampling.max_tokens:
            finish = FinishReason.LENGTH
        if finish is None:
            return None
        self.step(Transition.FINISH)
        self.finish_reason = finish
        return Delta(len(self.token_ids), (), finish_reason=finish, stop_token_id=stop_token_id)

    def prefill_lost(self, now: float) -> None:
        """The prefill instance died; the decode instance recomputes by itself, in bounded time."""
        if self._prefill_lost_s is None:
            self._prefill_lost_s = now

    def gap_due_s(self, last_heard_s: float) -> float:
        """When :meth:`gap` will be true, should nothing happen until then.

        ``last_heard_s`` is when the placed instances last sent anything at all. An instance that
        sends other requests' tokens is busy, not broken: a submission that waits in its queue
        is not replayed, unless a token is known to be missing.
        """
        due = max(self._progress_s, last_heard_s) + self._gap_timeout_s
        if self.state is State.STREAMING:
            due = min(due, self._progress_s + _STALL_FACTOR * self._gap_timeout_s)
        if self._hole_since_s is not None:
            due = min(due, self._hole_since_s + self._gap_timeout_s)
        if self._prefill_lost_s is not None:
            since = max(self._progress_s, self._prefill_lost_s)
            due = min(due, since + self._gap_timeout_s)
        return due

    def gap(self, last_heard_s: float, now: float) -> Loss | None:
        """Whether the attempt has been silent for too long."""
        if now < self.gap_due_s(last_heard_s):
            return None
        text = f"no token {len(self.token_ids)} within {self._gap_timeout_s:g} s"
        return Loss(LossReason.GAP, InstanceLost(text, stage=Stage.DECODE))

    def _consume(
        self, output: TokenOutput, instance_id: str, now: float
    ) -> tuple[list[Delta], Loss | None]:
        """Take an output that begins at or before the first missing token."""
        num_have = len(self.token_ids)
        num_known = min(num_have - output.index, len(output.token_ids))
        known = tuple(self.token_ids[output.index : output.index + num_known])
        if known != output.token_ids[:num_known]:
            error = InstanceLost(
                f"{instance_id} sent tokens that differ from those already sent",
                stage=Stage.DECODE,
            )
            return [], Loss(LossReason.MISMATCH, error, instance_id)
        end = output.index + len(output.token_ids)
        if output.finish_reason is not None and end < num_have:
            error = InstanceLost(
                f"{instance_id} ended the request before tokens already sent", stage=Stage.DECODE
            )
            return [], Loss(LossReason.MISMATCH, error, instance_id)
        new = output.token_ids[num_known:]
        prompt_logprobs = () if self._has_prompt_logprobs else output.prompt_logprobs
        ends = output.finish_reason is not None
        if not new and not ends and not prompt_logprobs:
            return [], None
        self._has_prompt_logprobs |= bool(prompt_logprobs)
        if new:
            self.step(Transition.OUTPUT)
            self._progress_s = now
            self.token_ids.extend(new)
            if self.num_cached_tokens is None:
                self.num_cached_tokens = output.num_cached_tokens
                self.cached_by_tier = output.cached_by_tier
        delta = Delta(
            index=num_have,
            token_ids=new,
            logprobs=output.logprobs[num_known:],
            prompt_logprobs=prompt_logprobs,
            finish_reason=output.finish_reason if ends else None,
            stop_token_id=output.stop_token_id if ends else None,
        )
        if ends:
            self.step(Transition.FINISH)
            self.finish_reason = output.finish_reason
            self._early.clear()
        return [delta], None

    def _keep_early(self, output: TokenOutput, instance_id: str, now: float) -> Loss | None:
        if self._hole_since_s is None:
            self._hole_since_s = now
        kept = self._early.get(output.index)
        # Of two that begin alike, the one that says more.
        if kept is None or _says(kept) < _says(output):
            self._early[output.index] = output
        if len(self._early) <= MAX_EARLY_OUTPUTS:
            return None
        text = f"token {len(self.token_ids)} is missing, later ones keep coming"
        return Loss(LossReason.GAP, InstanceLost(text, stage=Stage.DECODE), instance_id)

    def _next_early(self) -> TokenOutput | None:
        due = [index for index in self._early if index <= len(self.token_ids)]
        return self._early.pop(min(due)) if due else None

    def _error_of(self, output: TokenOutput, instance_id: str) -> Loss | None:
        if output.error_code is None:
            if output.finish_reason not in (FinishReason.ABORT, FinishReason.ERROR):
                return None
            # The gateway did not ask for this end: the instance let the request go.
            text = f"{instance_id} ended the request by itself ({output.finish_reason})"
            return Loss(LossReason.ERROR, InstanceLost(text, stage=Stage.DECODE), instance_id)
        error = error_from_code(
            output.error_code, output.error_message or output.error_code, stage=Stage.DECODE
        )
        if error.retryable or error.code in (Code.FENCED, Code.ABORTED):
            return Loss(LossReason.ERROR, error, instance_id)
        raise error

    def _mark_attempt(self, attempt: int, stage: str, where: str, wall_s: float) -> None:
        if attempt < len(self.attempts):
            self.attempts[attempt].stages.append(StageMark(stage, where, wall_s))
