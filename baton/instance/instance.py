"""One instance's heart: requests in, engine events out, both role behaviours beside the engine.

No gRPC and no torch here: ``server.py`` puts the wire around it, ``EngineLoop`` the runner behind
it. Everything runs on one event loop.

A request's life here::

    submit ── Part.WHOLE ────────────────────────────► tokens → finished
           ├─ Part.PREFILL → PrefillWorker publishes → token 0 → held → released
           └─ Part.DECODE → DecodeWorker pulls ──────► token 0 again, tokens → finished

It ends by its last token, an abort, its deadline, a newer attempt, its gateway's end, or a failed
step; each of these frees everything it held.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import logging
from collections.abc import Callable, Sequence

from baton.core.blocks import BlockKey
from baton.core.clock import Clock
from baton.core.cluster import InstanceLoad, Target
from baton.core.errors import BatonError, Code, Fenced, InvalidRequest, Refused, Stage
from baton.core.request import FinishReason, Part, Submission, TokenOutput
from baton.engine.events import (
    CacheChanged,
    Event,
    Preempted,
    PrefillProgress,
    PrefixComplete,
    Reserved,
    TokensReady,
)
from baton.engine.interface import SequenceEngine
from baton.instance.fetch_rule import Missing
from baton.instance.hub import TokenHub
from baton.instance.open_requests import InstanceCounters, OpenRequest, by_tier
from baton.instance.pool_side import PoolSide
from baton.instance.roles import RoleSwitch
from decode_worker.worker import DecodeWorker
from kvpool.tiers import Tier
from prefill_worker.worker import PrefillWorker

logger = logging.getLogger(__name__)

_MAX_REMEMBERED_ABORTS = 8192


class Instance:
    """Submissions, their ends, and the way from engine events to token streams."""

    def __init__(
        self,
        instance_id: str,
        *,
        engine: SequenceEngine,
        role: RoleSwitch,
        clock: Clock,
        vocab_size: int | None = None,
    ) -> None:
        """``vocab_size``: token ids are below it; ``None`` trusts whoever submits."""
        self.instance_id = instance_id
        self.engine = engine
        self.role = role
        self.hub = TokenHub(self._on_gateway_lost)
        self.counters = InstanceCounters()
        self.incarnation = 0
        self._clock = clock
        self._vocab_size = vocab_size
        self._open: dict[str, OpenRequest] = {}
        self._newest: dict[str, str] = {}
        """request_id → sequence_id of its open attempt."""
        self._aborted: collections.OrderedDict[str, int] = collections.OrderedDict()
        self._prefill: PrefillWorker
        self._decode: DecodeWorker
        self._pool: PoolSide | None = None
        self._wake: Callable[[], None]
        self._on_empty: Callable[[], None] = lambda: None

    def attach(
        self,
        *,
        prefill: PrefillWorker,
        decode: DecodeWorker,
        wake: Callable[[], None],
        on_empty: Callable[[], None],
        pool: PoolSide | None = None,
    ) -> None:
        """Complete the wiring: the workers need our hooks, and we need them."""
        self._pool = pool
        self._prefill = prefill
        self._decode = decode
        self._wake = wake
        self._on_empty = on_empty

    @property
    def num_open(self) -> int:
        """Submissions not yet ended; held ones count until they are released."""
        return len(self._open)

    def load(self) -> InstanceLoad:
        """What the controller is told."""
        return dataclasses.replace(
            self.engine.load(),
            num_leases=self._prefill.num_leases,
            num_finished=self.counters.num_finished,
            num_preemptions=self.counters.num_preemptions,
        )

    # Submissions.

    def submit(
        self, submission: Submission, part: Part, *, incarnation: int, prefill: Target | None
    ) -> None:
        """Take on one submission. Raises Refused, Fenced or InvalidRequest, then holds nothing."""
        request_id, attempt = submission.request_id, submission.attempt
        try:
            self._check(submission, part, incarnation)
            older = self._newest.get(request_id)
            if older is not None:
                if self._open[older].submission.attempt == attempt:
                    return  # the gateway repeats a call whose answer it did not see
                self._drop(older, "a newer attempt took its place", everywhere=True)
            sequence_id = f"{request_id}@{attempt}"
            named = dataclasses.replace(submission, request_id=sequence_id)
            keys, num_cached, missing = self._prefix(named, part)
            fetch = missing is not None
            self.engine.submit(named, part, self._clock.now(), keys=keys, fetch=fetch)
        except BatonError:
            self.counters.num_refused += 1
            raise
        entry = self._open[sequence_id] = OpenRequest(sequence_id, submission, part)
        self._newest[request_id] = sequence_id
        self._stage(sequence_id, f"{part}_received")
        self.counters.num_submitted += 1
        if missing is not None and self._pool is not None:
            self._pool.fetcher.open(sequence_id, keys, num_cached, missing)
        if submission.budget_s is not None:
            entry.deadline = asyncio.get_running_loop().call_later(
                submission.budget_s, self._on_deadline, sequence_id
            )
        if part is Part.PREFILL:
            self._prefill.open(sequence_id, attempt)
        elif part is Part.DECODE:
            assert prefill is not None
            self._decode.open(sequence_id, attempt, prefill)
        self._wake()

    def _prefix(
        self, submission: Submission, part: Part
    ) -> tuple[list[BlockKey], int, Missing | None]:
        """Keys that a cache may have, how many of their blocks are cached here, and what to ask the
        pool for."""
        engine, num_tokens = self.engine, submission.num_tokens
        if self._pool is None or part is Part.DECODE or num_tokens >= engine.max_model_len:
            return [], 0, None
        keys = engine.prefix_keys(submission)
        num_cached = engine.num_cached_blocks(keys)
        missing = self._pool.fetcher.missing(
            len(keys), num_cached, num_tokens, lambda: engine.load().num_waiting_tokens
        )
        return keys, num_cached, missing

    def _check(self, submission: Submission, part: Part, incarnation: int) -> None:
        if incarnation != self.incarnation:
            raise Fenced(
                f"{self.instance_id} is at incarnation {self.incarnation}, not {incarnation}",
                stage=Stage.PLACEMENT,
            )
        newest_id = self._newest.get(submission.request_id)
        newest = max(
            self._open[newest_id].submission.attempt if newest_id else 0,
            self._aborted.get(submission.request_id, -1) + 1,
        )
        if submission.attempt < newest:
            raise Fenced(
                f"{submission.request_id} attempt {submission.attempt} is over",
                stage=Stage.PLACEMENT,
            )
        if not self.hub.connected(submission.gateway_id):
            raise Refused(
                f"gateway {submission.gateway_id} has no token stream to {self.instance_id}",
                stage=Stage.PLACEMENT,
            )
        older = self._open[newest_id] if newest_id else None
        stays = part is Part.WHOLE and older is not None and older.part is Part.PREFILL
        if not stays:  # decoding where prefill was done is no new work
            self.role.duty.check(part, self.instance_id)
        largest = max((*submission.prompt_ids, *submission.output_ids))
        if self._vocab_size is not None and largest >= self._vocab_size:
            # In a step it would take the others down with it.
            raise InvalidRequest(
                f"token id {largest} is not below the vocabulary's size {self._vocab_size}",
                param="prompt",
                stage=Stage.PLACEMENT,
            )

    def abort(self, request_id: str, attempt: int) -> None:
        """End this attempt and all older ones; remembered, in case the submission comes later."""
        self._aborted[request_id] = max(attempt, self._aborted.get(request_id, -1))
        self._aborted.move_to_end(request_id)
        while len(self._aborted) > _MAX_REMEMBERED_ABORTS:
            self._aborted.popitem(last=False)
        newest = self._newest.get(request_id)
        if newest is not None and self._open[newest].submission.attempt <= attempt:
            self.counters.num_aborted += 1
            self._drop(newest, "aborted", everywhere=True)

    def _drop(self, sequence_id: str, why: str, *, everywhere: bool = False) -> None:
        """Free everything a request holds here, silently towards its gateway.

        ``everywhere``: its gateway ends this attempt on the other side too.
        """
        entry = self._close(sequence_id)
        if entry is None:
            return
        if entry.part is Part.PREFILL:
            self._prefill.close(sequence_id, code=Code.ABORTED, message=why, finished=everywhere)
        quarantined = (entry.part is Part.DECODE and self._decode.abort(sequence_id)) or (
            self._pool is not None and self._pool.fetcher.abort(sequence_id)
        )
        if not quarantined:
            self.engine.abort(sequence_id)
        self._wake()

    def _close(self, sequence_id: str) -> OpenRequest | None:
        entry = self._open.pop(sequence_id, None)
        if entry is None:
            return None
        if entry.deadline is not None:
            entry.deadline.cancel()
        if self._newest.get(entry.submission.request_id) == sequence_id:
            del self._newest[entry.submission.request_id]
        if not self._open:
            self._on_empty()
        return entry

    def _on_deadline(self, sequence_id: str) -> None:
        entry = self._open.get(sequence_id)
        if entry is not None and entry.part is Part.PREFILL and entry.first_output_sent:
            # Its part is done: how the request ends is the decode side's to say.
            self._drop(sequence_id, "the request's time budget ran out")
            return
        self._fail(sequence_id, Code.DEADLINE_EXCEEDED, "the request's time budget ran out")

    def _fail(self, sequence_id: str, code: Code, message: str) -> None:
        """End a request and tell its gateway why."""
        entry = self._open.get(sequence_id)
        if entry is None:
            return
        self.counters.num_failed += 1
        self._put(
            entry,
            TokenOutput(
                request_id=entry.submission.request_id,
                attempt=entry.submission.attempt,
                index=len(entry.submission.output_ids),
                token_ids=(),
                finish_reason=FinishReason.ERROR,
                error_code=code,
                error_message=message,
            ),
        )
        self._drop(sequence_id, message)
        self.hub.flush()

    def _on_gateway_lost(self, gateway_id: str) -> None:
        lost = [s for s, entry in self._open.items() if entry.submission.gateway_id == gateway_id]
        if lost:
            logger.warning("gateway %s went away; ending its %d requests", gateway_id, len(lost))
        for sequence_id in lost:
            self.counters.num_aborted += 1
            self._drop(sequence_id, "its gateway went away")

    # Engine events.

    def on_events(self, events: Sequence[Event]) -> None:
        """Route what a step produced, then send each gateway its one message."""
        for event in events:
            match event:
                case TokensReady():
                    self._on_tokens(event)
                case PrefillProgress():
                    self._stage(event.request_id, "prefilled" if event.final else "chunk")
                    self._prefill.on_progress(event)
                case Reserved():
                    self._decode.on_reserved(event)
                    if self._pool is not None:
                        self._pool.fetcher.on_reserved(event)
                case PrefixComplete():
                    if self._pool is not None and self._pool.write_back is not None:
                        self._pool.write_back.on_complete(event)
                case CacheChanged():
                    if self._pool is not None:
                        self._pool.cache_changed(event)
                case Preempted():
                    self.counters.num_preemptions += 1
                    self._stage(event.request_id, "preempted")
        self.hub.flush()

    def on_failed(self, request_ids: Sequence[str], error: BaseException) -> None:
        """A step failed and took these requests with it."""
        for request_id in request_ids:
            self._fail(
                request_id,
                Code.INSTANCE_LOST,
                f"a step failed on {self.instance_id}: {error}",
            )

    def _on_tokens(self, event: TokensReady) -> None:
        entry = self._open.get(event.request_id)
        if entry is None:
            return
        self.counters.num_generated_tokens += len(event.token_ids)
        tiers: dict[Tier, int] = {}
        if event.num_cached_tokens and self._pool is not None:
            tiers = self._pool.fetcher.take_tiers(event.request_id)
        output = TokenOutput(
            request_id=entry.submission.request_id,
            attempt=entry.submission.attempt,
            index=event.index,
            token_ids=event.token_ids,
            logprobs=event.logprobs,
            finish_reason=event.finish_reason,
            stop_token_id=event.stop_token_id,
            num_cached_tokens=event.num_cached_tokens,
            cached_by_tier=by_tier(event.num_cached_tokens or 0, tiers),
            prompt_logprobs=event.prompt_logprobs,
        )
        if event.num_cached_tokens is not None:
            self.counters.num_cached_tokens += event.num_cached_tokens
            self.counters.num_prompt_tokens += len(entry.submission.prompt_ids)
        if event.finish_reason is not None:
            self._finish(entry, output)
            return
        self._put(entry, output)
        if entry.part is Part.PREFILL:
            self._prefill.on_first_output(entry.sequence_id, output)

    def _finish(self, entry: OpenRequest, output: TokenOutput) -> None:
        self._stage(entry.sequence_id, "finished")
        self._put(entry, output)
        self.counters.num_finished += 1
        if entry.part is Part.PREFILL:
            self._prefill.close(
                entry.sequence_id,
                code=Code.ABORTED,
                message="finished at its first token",
                finished=True,
            )
        self._close(entry.sequence_id)

    def _put(self, entry: OpenRequest, output: TokenOutput) -> None:
        if not entry.first_output_sent:
            entry.first_output_sent = True
            self._stage(entry.sequence_id, "first_output")
        stages, entry.stages = tuple(entry.stages), []
        self.hub.put(entry.submission.gateway_id, dataclasses.replace(output, stages=stages))

    # Hooks of the workers.

    def prefix_fetched(self, sequence_id: str, num_valid_tokens: int) -> bool:
        """What the pool had of a prefix is here; the rest must be computed."""
        known = self.engine.fetched(sequence_id, num_valid_tokens)
        self._wake()
        return known

    def release_held(self, sequence_id: str) -> None:
        """The decode side has a held sequence's blocks, or its lease ended."""
        if self._close(sequence_id) is not None:
            self.counters.num_finished += 1
        self.engine.release(sequence_id)
        self._wake()

    def free_held(self, sequence_id: str) -> None:
        """A held sequence's blocks are elsewhere: they are free here, the handoff goes on."""
        self.engine.release(sequence_id)
        self._wake()

    def repeat_first(self, sequence_id: str, output: TokenOutput) -> None:
        """Send token 0, which prefill drew, from here too."""
        entry = self._open.get(sequence_id)
        if entry is not None:
            self._put(entry, dataclasses.replace(output, stages=()))
            self.hub.flush()

    def kv_arrived(self, sequence_id: str, first_token: int) -> bool:
        """All of a request's KV is here."""
        known = self.engine.kv_arrived(sequence_id, first_token)
        self._wake()
        return known

    def kv_failed(self, sequence_id: str, num_valid_tokens: int, first_token: int | None) -> bool:
        """What is missing of a request's KV must be computed here."""
        known = self.engine.kv_failed(sequence_id, num_valid_tokens, first_token)
        self._wake()
        return known

    def engine_abort(self, sequence_id: str) -> None:
        """A request ended whose blocks were quarantined until its pull returned."""
        self._close(sequence_id)
        self.engine.abort(sequence_id)
        if not self._open:
            self._on_empty()  # its entry may have been closed before, its blocks were not
        self._wake()

    def _stage(self, sequence_id: str, stage: str) -> None:
        entry = self._open.get(sequence_id)
        if entry is not None and (not entry.stages or entry.stages[-1][0] != stage):
            entry.stages.append((stage, self._clock.wall()))

    note_stage = _stage
