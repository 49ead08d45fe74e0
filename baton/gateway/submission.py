"""Runs one submission: place, submit, read tokens, and again where an instance fails.

A placement whose decode side is tentative is submitted to its prefill instance alone; once that has
brought the first token, the controller is asked where to decode.

Received, queued, placed, streaming, replaying: the states are those of ``request_states.py``; the
journal knows what the client has. This file does the waiting and the talking.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import math
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence

from baton.core.blocks import BlockKey
from baton.core.clock import Clock
from baton.core.cluster import Placement, Target
from baton.core.config import GatewayConfig
from baton.core.errors import BatonError, Code, InstanceLost, Refused, Stage, Unavailable
from baton.core.request import Part
from baton.gateway.cluster import Cluster
from baton.gateway.journal import Delta, Journal, Loss, LossReason
from baton.gateway.links import Inbox, Links, Output
from baton.gateway.request_states import State, Transition
from protos.baton.internal.v1 import controller_pb2, instance_pb2
from protos.convert import submission_to_record

_LOG = logging.getLogger(__name__)

_MAX_REFUSALS = 8
"""Refused submits in one recovery; each was a stale placement, and the next is fresher."""
_BIND_TIMEOUT_S = 1.0
"""How long the second token waits for a better decode instance than the one that was guessed."""


@dataclasses.dataclass(frozen=True, slots=True)
class Surroundings:
    """What every submission of a gateway uses."""

    cluster: Cluster
    links: Links
    clock: Clock
    limits: GatewayConfig
    queue_timeout_s: float
    """The controller's."""
    place_timeout_s: float
    on_replay: Callable[[LossReason], None]


@dataclasses.dataclass(frozen=True, slots=True)
class _Unbound:
    """An attempt whose decode instance is chosen when prefill is done."""

    placement: Placement
    record: instance_pb2.SubmissionRecord
    """As prefill got it: decode must begin at the same token."""


def patience_s(waited_s: float, *, replay_timeout_s: float, queue_timeout_s: float) -> float:
    """How long a new place may take after a loss; all in seconds.

    A client that waited ``waited_s`` for its last places has less patience left: between two
    tokens it waits no longer than one may for a first place or a new one, however many instances
    die under it.
    """
    longest_s = max(replay_timeout_s, queue_timeout_s)
    return max(0.0, min(replay_timeout_s, longest_s - waited_s))


class SubmissionRun:
    """One run of one journal. Iterate :meth:`deltas` once, and close it."""

    def __init__(
        self,
        journal: Journal,
        surroundings: Surroundings,
        *,
        parent_request_id: str,
        choice: int,
        deadline_s: float,
        model: str,
        tenant: str = "",
        block_keys: Sequence[BlockKey] = (),
    ) -> None:
        """``tenant``: who it competes for. ``block_keys``: of the prompt, as far as known."""
        self._journal = journal
        self._around = surroundings
        self._parent_request_id = parent_request_id
        self._choice = choice
        self._deadline_s = deadline_s
        self._model = model
        self._tenant = tenant
        self._block_keys = block_keys
        self._inbox = Inbox()
        self._excluded: dict[str, None] = {}
        self._num_replays = 0
        self._num_refusals = 0
        self._waited_s = 0.0
        """For a place, since the last token."""
        self._patient_until_s: float | None = None
        """Set by a loss, cleared by a token."""
        self._parts: dict[Target, Part] = {}
        self._asked = controller_pb2.PlaceRequest()
        """The last question for a place."""
        self._unbound: _Unbound | None = None
        """Prefill is under way, or done, and nobody was asked to decode yet."""

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """New tokens in order; the last one carries the finish reason.

        Raises BatonError when it cannot go on. Whatever ends the iteration early, also closing it,
        ends the work in the cluster.
        """
        journal = self._journal
        try:
            journal.step(Transition.ENQUEUE)
            # Offline work may wait for its place as long as it may take.
            offline = journal.level.is_offline
            placement = await self._place(math.inf if offline else self._around.place_timeout_s)
            while True:
                loss = await self._submit(placement)
                while loss is None:
                    deltas, loss = await self._next()
                    for delta in deltas:
                        yield delta
                    if journal.over:
                        return
                    if loss is None and deltas and self._unbound is not None:
                        # The client has the first token; that the next one waits is no loss.
                        loss = await self._bind(self._unbound)
                end = self._lose(loss)
                if end is not None:
                    yield end
                    return
                placement = await self._recover(placement, loss)
        except BatonError:
            if not journal.over:
                journal.step(Transition.FAIL)
            raise
        finally:
            if not journal.over:
                journal.step(Transition.ABORT)
            self._release()

    # --- placing

    async def _place(self, timeout_s: float) -> Placement:
        journal, now = self._journal, self._around.clock.now()
        request = controller_pb2.PlaceRequest(
            request_id=journal.request_id,
            attempt=journal.attempt,
            num_prompt_tokens=len(journal.prompt_ids) + len(journal.token_ids),
            max_new_tokens=journal.sampling.max_tokens - len(journal.token_ids),
            priority=journal.level.priority,
            exclude=list(self._excluded),
            model=self._model,
            choice=self._choice,
            parent_request_id=self._parent_request_id,
            service_class=journal.level.service_class,
            ttft_s=journal.level.slo.ttft_s,
            tpot_s=journal.level.slo.tpot_s,
            deadline_s=journal.deadline_left_s(now),
            tenant=self._tenant,
            waited_s=max(0.0, now - journal.received_s),
            block_keys=self._block_keys,
        )
        self._asked = request
        return await self._ask(request, timeout_s)

    async def _ask(self, request: controller_pb2.PlaceRequest, timeout_s: float) -> Placement:
        now = self._around.clock.now()
        timeout_s = min(timeout_s, max(0.0, self._deadline_s - now))
        try:
            return await self._around.cluster.place(request, timeout_s=timeout_s)
        finally:
            if not self._journal.level.is_offline:
                self._waited_s += self._around.clock.now() - now

    def _lose(self, loss: Loss) -> Delta | None:
        """Give the attempt up everywhere; the end, if all tokens had come already."""
        journal = self._journal
        self._end_attempt()
        self._unbound = None
        journal.mark(f"lost_{loss.reason}", "gateway", self._around.clock.wall())
        journal.lose()
        if loss.instance_id is not None:
            self._excluded[loss.instance_id] = None
        return journal.finish_if_complete()

    async def _recover(self, placement: Placement, loss: Loss) -> Placement:
        """The next placement: the fallback for a refused submit, else a fresh one."""
        if loss.reason is LossReason.REFUSED:
            self._num_refusals += 1
            fallback = self._fallback(placement)
            if fallback is not None:
                return fallback
        else:
            self._num_replays += 1
        self._around.on_replay(loss.reason)
        _LOG.warning(
            "%s: attempt %d lost (%s): %s",
            self._journal.request_id,
            self._journal.attempt - 1,
            loss.reason,
            loss.error.message,
        )
        limits, now = self._around.limits, self._around.clock.now()
        if self._patient_until_s is None:
            self._patient_until_s = now + patience_s(
                self._waited_s,
                replay_timeout_s=limits.replay_timeout_s,
                queue_timeout_s=self._around.queue_timeout_s,
            )
        left_s = self._patient_until_s - now
        if self._num_replays > limits.max_replays or self._num_refusals > _MAX_REFUSALS:
            raise self._gave_up(loss, f"given up after {self._journal.attempt} attempts")
        if left_s <= 0:
            raise self._gave_up(loss, "no other instance in time (gateway.replay_timeout_s)")
        try:
            return await self._place(left_s)
        except BatonError as error:
            if not error.retryable:
                raise
            raise self._gave_up(loss, f"no other instance took over: {error.message}") from error

    def _fallback(self, placement: Placement) -> Placement | None:
        prefill = placement.fallback_prefill or placement.prefill
        decode = placement.fallback_decode or placement.decode
        if (prefill, decode) == (placement.prefill, placement.decode):
            return None
        return Placement(placement.request_id, self._journal.attempt, prefill, decode)

    @staticmethod
    def _gave_up(loss: Loss, text: str) -> BatonError:
        message = f"{loss.error.message}; {text}"
        kind = Unavailable if loss.reason is LossReason.REFUSED else InstanceLost
        return kind(message, stage=loss.error.stage, retry_after_s=1.0)

    # --- submitting

    async def _submit(self, placement: Placement) -> Loss | None:
        """Hand the attempt to its instances; the loss, if one of them would not have it."""
        journal, clock = self._journal, self._around.clock
        journal.place(clock.now())
        journal.mark("placed", "gateway", clock.wall())
        # What an older attempt still has to say goes nowhere.
        self._inbox = Inbox()
        record = self._record()
        parts = self._divide(placement)
        if placement.tentative and placement.decode in parts:
            del parts[placement.decode]
            self._unbound = _Unbound(placement, record)
        loss = await self._hand_over(parts, record, placement.prefill)
        if loss is None:
            journal.mark("submitted", "gateway", clock.wall())
        return loss

    def _record(self) -> instance_pb2.SubmissionRecord:
        now = self._around.clock.now()
        budget_s = max(0.0, self._deadline_s - now)
        return submission_to_record(self._journal.submission(budget_s, now))

    async def _hand_over(
        self,
        parts: Mapping[Target, Part],
        record: instance_pb2.SubmissionRecord,
        prefill: Target,
    ) -> Loss | None:
        """Submit to all at once, and listen to them; the loss, if one would not have it."""
        links = self._around.links
        self._parts.update(parts)
        for target in parts:
            links.get(target).attach(self._journal.request_id, self._inbox)
        results = await asyncio.gather(
            *(
                links.get(target).submit(_submit_item(record, part, target, prefill))
                for target, part in parts.items()
            ),
            return_exceptions=True,
        )
        for target, result in zip(parts, results, strict=True):
            if isinstance(result, BatonError):
                return self._refusal(result, target)
            if isinstance(result, BaseException):
                raise result
        return None

    async def _bind(self, unbound: _Unbound) -> Loss | None:
        """Prefill is done: have a decode instance go on, the best one as of now.

        Where the controller has no answer in time, it is the one that was guessed.
        """
        self._unbound = None
        journal, clock = self._journal, self._around.clock
        prefill, guess = unbound.placement.prefill, unbound.placement.decode
        bound = await self._ask_decode(prefill, guess)
        journal.bound(clock.now())
        journal.mark("bound", "gateway", clock.wall())
        if bound == prefill:
            return await self._stay(prefill)
        record = unbound.record
        record.budget_s = max(0.0, self._deadline_s - clock.now())
        loss: Loss | None = None
        for target in dict.fromkeys((bound, guess)):
            if loss is not None and loss.instance_id is not None:
                self._excluded[loss.instance_id] = None
            loss = await self._hand_over({target: Part.DECODE}, record, prefill)
            if loss is None:
                break
            # Its answer may be what was lost, not the submission.
            self._around.links.abort(target, journal.request_id, journal.attempt)
            del self._parts[target]
        return loss

    async def _ask_decode(self, prefill: Target, guess: Target) -> Target:
        request = controller_pb2.PlaceRequest()
        request.CopyFrom(self._asked)
        request.bind_to = prefill.instance_id
        try:
            async with asyncio.timeout(_BIND_TIMEOUT_S):
                return (await self._ask(request, _BIND_TIMEOUT_S)).decode
        except (BatonError, TimeoutError) as error:
            name = guess.instance_id
            _LOG.info("%s decodes on %s, as guessed: %s", request.request_id, name, error)
            return guess

    async def _stay(self, target: Target) -> Loss | None:
        """Go on where the prompt's KV is: a new attempt there, which takes the place of the older
        one and finds its blocks in the cache."""
        journal, clock = self._journal, self._around.clock
        journal.next_attempt()
        self._parts = {}
        loss = await self._hand_over({target: Part.WHOLE}, self._record(), target)
        if loss is None:
            journal.mark("submitted", "gateway", clock.wall())
        return loss

    def _divide(self, placement: Placement) -> dict[Target, Part]:
        remaining = self._journal.sampling.max_tokens - len(self._journal.token_ids)
        if remaining == 1 or not placement.disaggregated:
            return {placement.prefill: Part.WHOLE}
        return {placement.decode: Part.DECODE, placement.prefill: Part.PREFILL}

    @staticmethod
    def _refusal(error: BatonError, target: Target) -> Loss:
        """Raises what another instance would refuse as well."""
        if not error.retryable and error.code is not Code.FENCED:
            raise error
        refused = Refused(
            f"instance {target.instance_id} did not take it: {error.message}",
            stage=Stage.PLACEMENT,
        )
        return Loss(LossReason.REFUSED, refused, target.instance_id)

    # --- reading

    async def _next(self) -> tuple[list[Delta], Loss | None]:
        journal, clock = self._journal, self._around.clock
        item = await self._inbox.get(journal.gap_due_s(self._last_heard_s()) - clock.now())
        now = clock.now()
        if item is None:
            loss = journal.gap(self._last_heard_s(), now)
            if loss is not None and journal.state is State.STREAMING:
                # Prefill did its part.
                silent = [t.instance_id for t, p in self._parts.items() if p is not Part.PREFILL]
                loss = dataclasses.replace(loss, instance_id=next(iter(silent), None))
            return [], loss
        if isinstance(item, Output):
            deltas, loss = journal.accept(item.output, item.target.instance_id, now)
            if any(delta.token_ids for delta in deltas):
                self._patient_until_s, self._waited_s = None, 0.0
            return deltas, loss
        part = self._parts.get(item.target)
        if part is None:
            return [], None  # it would not have it, and is not asked any more
        if part is Part.PREFILL and self._unbound is None:
            # The decode side recomputes what it did not get; it is only watched more closely.
            journal.prefill_lost(now)
            return [], None
        return [], Loss(LossReason.INSTANCE_LOST, item.error, item.target.instance_id)

    def _last_heard_s(self) -> float:
        return max(self._around.links.last_heard_s(target) for target in self._parts)

    # --- ending

    def _end_attempt(self) -> None:
        for target in self._parts:
            self._around.links.abort(target, self._journal.request_id, self._journal.attempt)
        self._parts = {}

    def _release(self) -> None:
        """Nothing of this submission stays behind, here or there."""
        if self._journal.state is not State.FINISHED:
            self._end_attempt()
        for target in self._parts:
            self._around.links.detach(target, self._journal.request_id)


def _submit_item(
    record: instance_pb2.SubmissionRecord, part: Part, target: Target, prefill: Target
) -> instance_pb2.SubmitItem:
    item = instance_pb2.SubmitItem(submission=record, part=part, incarnation=target.incarnation)
    if part is Part.DECODE:
        item.prefill_instance_id = prefill.instance_id
        item.prefill_incarnation = prefill.incarnation
        item.prefill_address = prefill.address
    return item
