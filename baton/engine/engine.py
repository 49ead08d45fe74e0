"""The engine as its driver sees it: submissions in, plans out, results in, events out.

A pure state machine without locks, threads or clocks; it is only ever called from one event loop.
The driver's cycle is ``admit`` → ``schedule`` → (runner) → ``commit``. A sequence's way:

* ``Part.WHOLE``: waits, prefills in chunks, decodes, ends.
* ``Part.PREFILL``: waits, prefills (``PrefillProgress`` after each chunk), draws its first token,
  and is *held* until ``release``. Nothing is held if that token ends the request.
* ``Part.DECODE``: waits for blocks (``Reserved``), then for bytes (``kv_arrived``), and decodes;
  after ``kv_failed`` it computes here what did not come, like ``Part.WHOLE``.

Plans are committed (or failed) in the order in which they were made. With ``async_scheduling``
one plan may be uncommitted while the next is made, so two can be outstanding; without, one.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from baton.core.blocks import BlockKey
from baton.core.cluster import InstanceLoad
from baton.core.config import EngineConfig
from baton.core.cost_model import CostModel
from baton.core.errors import Code, InvalidRequest, Refused, Stage
from baton.core.request import Part, Submission, TokenLogprobs
from baton.engine.block_manager import BlockManager, BlockStatistics
from baton.engine.events import (
    CacheChanged,
    Event,
    Preempted,
    Reserved,
    TokensReady,
)
from baton.engine.interface import check_result
from baton.engine.plan import RowResult, StepPlan, StepResult
from baton.engine.prefixes import completed_prefix, prefix_keys, progress_of, register_blocks
from baton.engine.scheduler import PlannedRow, Scheduler
from baton.engine.sequence import DummyTokens, Sequence
from baton.engine.states import LIVE_STATES, SequenceEvent, SequenceState

_S, _E = SequenceState, SequenceEvent
_FINISHED, _PREFILL = _S.FINISHED, Part.PREFILL  # a member's look-up takes its time, in each row


class Engine:
    """Facade over sequences, blocks and scheduler. See the module's docstring."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        max_model_len: int,
        salt: bytes,
        generations: npt.NDArray[np.uint64] | None = None,
        track_cache: bool = False,
    ) -> None:
        """``salt``: root of all block keys, at most 64 bytes. ``generations``: [num_blocks].

        ``track_cache``: tell of the prefix cache too (``PrefixComplete``, ``CacheChanged``).
        """
        self._track_cache = track_cache and config.enable_prefix_cache
        self.config = config
        self.max_model_len = min(max_model_len, config.kv_blocks * config.block_size)
        self._blocks = BlockManager(
            config.kv_blocks,
            config.block_size,
            salt=salt,
            enable_prefix_cache=config.enable_prefix_cache,
            generations=generations,
            track_changes=self._track_cache,
        )
        self._scheduler = self._make_scheduler()
        self._scheduler.track_cache = self._track_cache
        self._sequences: dict[str, Sequence] = {}
        self._num_submitted = 0
        self._num_steps = 0
        self._num_finished = 0
        self._late_events: list[Event] = []
        """Events of calls that return none; the next ``admit`` or ``commit`` does."""

    def _make_scheduler(self) -> Scheduler:
        return Scheduler(self.config, self._blocks)

    def _tokens_of(self, submission: Submission) -> list[int] | DummyTokens:
        return [*submission.prompt_ids, *submission.output_ids]

    def set_cost_model(self, model: CostModel | None) -> None:
        """With one, steps are no longer than targets of online work allow: see ``limits``."""
        self._scheduler.cost_model = model

    # Submissions.

    def submit(
        self,
        submission: Submission,
        part: Part,
        now: float,
        *,
        keys: Iterable[BlockKey] = (),
        fetch: bool = False,
    ) -> None:
        """Take a submission on. ``keys``: its :meth:`prefix_keys`, if the caller has them.

        ``fetch``: the caller brings a prefix of its KV before it is computed, and then says
        :meth:`fetched`; not for ``Part.DECODE``, which waits for KV anyway.

        Raises Refused for a ``request_id`` that is here already, and InvalidRequest
        (``context_length_exceeded``, ``prompt``) for one that can never run here.
        """
        stage = Stage.DECODE if part is Part.DECODE else Stage.PREFILL
        if submission.request_id in self._sequences:
            raise Refused(f"request {submission.request_id} is already here", stage=stage)
        if submission.num_tokens >= self.max_model_len:
            raise InvalidRequest(
                f"the prompt holds {submission.num_tokens} tokens; with at least one token of "
                f"output a sequence may have at most {self.max_model_len}",
                code=Code.CONTEXT_LENGTH_EXCEEDED,
                param="prompt",
                stage=stage,
            )
        self._num_submitted += 1
        sequence = Sequence(
            submission=submission,
            part=part,
            rank=(-submission.priority, self._num_submitted),
            salt=self._blocks.salt_for(tenant=submission.tenant, adapter=submission.adapter),
            max_num_tokens=min(submission.max_total_tokens, self.max_model_len),
            state=_S.PENDING_BLOCKS if part is Part.DECODE or fetch else _S.WAITING,
            token_ids=self._tokens_of(submission),
            stop_token_ids=frozenset(submission.sampling.stop_token_ids),
            owes_prompt_logprobs=submission.sampling.prompt_logprobs is not None,
            keys=list(keys),
        )
        if submission.rise_after_s is not None:
            sequence.rises_at_s = now + submission.rise_after_s
        self._sequences[submission.request_id] = sequence
        self._scheduler.add(sequence)

    def prefix_keys(self, submission: Submission) -> list[BlockKey]:
        """Keys of the leading blocks that a lookup for ``submission`` may find. Changes nothing."""
        return prefix_keys(submission, self._blocks)

    def num_cached_blocks(self, keys: list[BlockKey]) -> int:
        """Length of the longest cached prefix of ``keys``. Changes nothing."""
        return len(self._blocks.match(keys))

    def cached_keys(self) -> list[BlockKey]:
        """Keys of all cached blocks, a parent before its children."""
        return self._blocks.cached_keys()

    def num_open_tokens(self) -> int:
        """Tokens to compute, or in the context of sequences that run: what a step has to bear."""
        live = self._sequences.values()
        return sum(len(item.token_ids) for item in live if item.state is not _S.HELD)

    def abort(self, request_id: str) -> bool:
        """End a sequence in any state, without an event. False if it is not here.

        Its id is free at once, its blocks as soon as no uncommitted plan contains it. The blocks
        of a ``PENDING_KV`` sequence are free at once: whoever still writes to them must have
        stopped before.
        """
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return False
        self._end(sequence, _E.ABORT)
        return True

    def release(self, request_id: str) -> bool:
        """Let go of a held prefill. False if the sequence is not held here."""
        sequence = self._sequences.get(request_id)
        if sequence is None or sequence.state is not _S.HELD:
            return False
        self._end(sequence, _E.RELEASE)
        self._num_finished += 1
        return True

    def admit(self, now: float) -> list[Event]:
        """Reserve blocks for decode parts, in order of priority and arrival.

        Call it after anything that may have freed blocks. A few blocks stay free for sequences
        that run. ``num_cached_tokens`` tokens (whole blocks) need not be pulled.
        """
        events = self._take_late_events()
        for sequence in self._scheduler.reserve():
            blocks = sequence.block_table(len(sequence.blocks))
            events.append(Reserved(sequence.request_id, blocks, sequence.num_committed))
        return events

    def kv_arrived(self, request_id: str, first_token: int) -> bool:
        """All KV of the submission's tokens is in the reserved blocks, and verified.

        ``first_token`` is the output token that prefill drew; the sequence goes on after it. False
        if the sequence is not waiting for KV. Should ``first_token`` end the request here (prefill
        saw no end, but this engine's ``max_model_len`` may be shorter), the next ``admit`` or
        ``commit`` returns a ``TokensReady`` without tokens that says so.
        """
        sequence = self._sequences.get(request_id)
        if sequence is None or sequence.state is not _S.PENDING_KV:
            return False
        sequence.num_computed = sequence.num_committed = sequence.submission.num_tokens
        register_blocks(sequence, self._blocks)
        self._go_on(sequence, _E.KV_ARRIVED, first_token)
        return True

    def kv_failed(self, request_id: str, num_valid_tokens: int, first_token: int | None) -> bool:
        """The KV will not come (any more): compute here, as ``Part.WHOLE``.

        The first ``num_valid_tokens`` tokens, rounded down to whole blocks, arrived and are
        trusted. ``first_token``, where known, is neither drawn nor reported again. No transfer may
        write to the blocks any more. False if the sequence waits neither for blocks nor for KV.
        """
        sequence = self._sequences.get(request_id)
        if sequence is None or sequence.state not in (_S.PENDING_BLOCKS, _S.PENDING_KV):
            return False
        sequence.part = Part.WHOLE
        if sequence.state is _S.PENDING_KV:
            size = self._blocks.block_size
            num_tokens = sequence.submission.num_tokens
            # Where the token after the last one is still to be drawn, the last one is computed.
            limit = num_tokens - 1 if first_token is None else num_tokens
            trusted = min(num_valid_tokens, limit) // size * size
            if first_token is None and sequence.owes_prompt_logprobs:
                trusted = 0  # the logprobs of all positions must be computed here
            trusted = max(trusted, sequence.num_committed)
            sequence.num_computed = sequence.num_committed = trusted
            register_blocks(sequence, self._blocks)
        self._go_on(sequence, _E.KV_FAILED, first_token)
        return True

    def fetched(self, request_id: str, num_valid_tokens: int) -> bool:
        """The fetch of a prefix is over: compute the rest.

        The first ``num_valid_tokens`` tokens, rounded down to whole blocks, are in the reserved
        blocks and verified; nothing may write to these any more. They count as cached. False if
        the sequence does not wait for a fetch.
        """
        sequence = self._sequences.get(request_id)
        if sequence is None or sequence.state not in (_S.PENDING_BLOCKS, _S.PENDING_KV):
            return False
        assert sequence.part is not Part.DECODE, f"{request_id} waits for a handoff"
        if sequence.state is _S.PENDING_KV:
            size = self._blocks.block_size
            # The last token is always computed: its logits are what is wanted.
            trusted = min(num_valid_tokens, sequence.submission.num_tokens - 1) // size * size
            trusted = max(trusted, sequence.num_committed)
            sequence.num_computed = sequence.num_committed = trusted
            sequence.num_cached_tokens = min(trusted, sequence.num_prompt_tokens)
            register_blocks(sequence, self._blocks)
        self._scheduler.move(sequence, _E.FETCHED)
        return True

    def _go_on(self, sequence: Sequence, event: SequenceEvent, first_token: int | None) -> None:
        """Leave the states of a decode part that waits."""
        if first_token is not None:
            sequence.owes_prompt_logprobs = False  # prefill reported them with this token
            reason, stop_token_id = sequence.append(first_token)
            if reason is not None:
                self._late_events.append(
                    TokensReady(
                        request_id=sequence.request_id,
                        index=sequence.next_output_index,
                        token_ids=(),
                        logprobs=(),
                        finish_reason=reason,
                        stop_token_id=stop_token_id,
                        num_cached_tokens=sequence.num_cached_tokens or 0,
                    )
                )
                self._end(sequence, _E.FINISH)
                self._num_finished += 1
                return
        self._scheduler.move(sequence, event)

    # Steps.

    def schedule(self, now: float) -> StepPlan | None:
        """The next plan, to be executed after all earlier ones.

        None where nothing can run now, or where as many plans are uncommitted as may be (two with
        ``async_scheduling``, else one).
        """
        self._scheduler.rise(now)
        return self._scheduler.schedule()

    def commit(self, plan: StepPlan, result: StepResult, now: float) -> list[Event]:
        """Take in what the runner computed for the oldest uncommitted plan.

        Rows of sequences that have ended meanwhile are dropped. Raises ValueError, and changes
        nothing, for another plan or a result that does not belong to it.
        """
        check_result(plan, result)
        planned = self._scheduler.retire(plan)
        self._num_steps += 1
        events = self._take_late_events()
        for row, outcome in zip(planned, result.rows, strict=True):
            sequence = row.sequence
            if sequence.state is not _FINISHED and row.lineage == sequence.lineage:
                self._commit_row(row, outcome, events)
            if not sequence.num_plans:
                self._scheduler.row_done(row)
        events += self._take_late_events()
        return events

    def fail_plan(self, plan: StepPlan) -> list[str]:
        """The runner raised on the oldest uncommitted plan: drop all of its sequences.

        Returns their request ids, without those that had ended before. Raises ValueError for
        another plan. A later plan must still be committed or failed.
        """
        planned = self._scheduler.retire(plan)
        dropped: list[str] = []
        for row in planned:
            if row.sequence.state is not _S.FINISHED:
                self._end(row.sequence, _E.ABORT)
                dropped.append(row.sequence.request_id)
            else:
                self._scheduler.row_done(row)
        return dropped

    def _commit_row(self, row: PlannedRow, outcome: RowResult, events: list[Event]) -> None:
        sequence, step = row.sequence, row.step
        if sequence.owes_prompt_logprobs:
            sequence.prompt_logprobs += outcome.prompt_logprobs
        token_id, sample = outcome.token_id, step.sample
        if sample and token_id is None:
            sequence.step_back()
            return
        sequence.num_committed = step.start + step.num_tokens
        sequence.num_in_flight -= sample
        if sequence.num_committed // self._blocks.block_size > sequence.num_registered:
            register_blocks(sequence, self._blocks)
            self._scheduler.registered(sequence)
        is_prefill = sequence.part is _PREFILL
        if token_id is None or not sample:
            # One preempted meanwhile gives its blocks back now: there is nothing to publish.
            if is_prefill and sequence.state is not _S.PREEMPTED:
                events.append(progress_of(sequence, self._blocks, final=False))
            return
        index = len(sequence.token_ids) - sequence.num_prompt_tokens
        reason, stop_token_id = sequence.append(token_id)
        if is_prefill and reason is None:
            events.append(progress_of(sequence, self._blocks, final=True))
        logprobs = () if outcome.logprobs is None else (outcome.logprobs,)
        prompt_logprobs: tuple[TokenLogprobs, ...] = ()
        if sequence.owes_prompt_logprobs:
            prompt_logprobs = tuple(sequence.prompt_logprobs)
            sequence.owes_prompt_logprobs = False
            sequence.prompt_logprobs.clear()
        events.append(
            TokensReady(
                sequence.request_id,
                index,
                (token_id,),
                logprobs,
                reason,
                stop_token_id,
                sequence.num_cached_tokens,
                prompt_logprobs,
            )
        )
        sequence.num_cached_tokens = None
        if self._track_cache and sequence.num_registered and (reason is not None or is_prefill):
            events.append(completed_prefix(sequence, self._blocks))
        if reason is not None:
            self._end(sequence, _E.FINISH)
            self._num_finished += 1
        elif is_prefill:
            self._scheduler.move(sequence, _E.HOLD)

    def _end(self, sequence: Sequence, event: SequenceEvent) -> None:
        del self._sequences[sequence.request_id]
        self._scheduler.move(sequence, event)

    def _take_late_events(self) -> list[Event]:
        events, self._late_events = self._late_events, []
        preempted, self._scheduler.preempted = self._scheduler.preempted, []
        events += [Preempted(name) for name in preempted if name in self._sequences]
        events += self._scheduler.offers
        self._scheduler.offers.clear()
        if self._track_cache and (changes := self._blocks.take_changes()):
            events.append(CacheChanged(tuple(changes)))
        return events

    # Accounts.

    @property
    def num_plans(self) -> int:
        """Uncommitted plans."""
        return self._scheduler.num_plans

    def load(self) -> InstanceLoad:
        """A snapshot. Cached blocks are those that nobody references; the rest are held."""
        return self._scheduler.load(num_steps=self._num_steps, num_finished=self._num_finished)

    def block_statistics(self) -> BlockStatistics:
        """An account of every block, for metrics."""
        return self._blocks.statistics()

    def check_integrity(self) -> None:
        """Account for every block, slot and sequence; raises AssertionError with details."""
        self._scheduler.check_integrity()
        queued = {
            sequence.request_id
            for state in LIVE_STATES
            for sequence in self._scheduler.queue(state)
        }
        assert queued == set(self._sequences), f"queues hold {queued}, not {set(self._sequences)}"

    def request_ids(self) -> list[str]:
        """Of all sequences that have not ended."""
        return list(self._sequences)

    def state_of(self, request_id: str) -> SequenceState | None:
        """None for a sequence that is not here, or has ended."""
        sequence = self._sequences.get(request_id)
        return None if sequence is None else sequence.state
