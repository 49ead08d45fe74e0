"""The core that both doors use: a checked request in, text and tokens of its choices out."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import secrets
from collections.abc import AsyncGenerator, Sequence

from baton.core.blocks import BlockKey
from baton.core.errors import (
    Aborted,
    BatonError,
    DeadlineExceeded,
    InvalidRequest,
    Unavailable,
)
from baton.core.request import FinishReason, TokenLogprobs
from baton.gateway.errors import as_baton_error
from baton.gateway.journal import Delta, Journal
from baton.gateway.metrics import GatewayMetrics
from baton.gateway.outcomes import ChoiceRecord, RequestRecord
from baton.gateway.prompt_keys import PromptKeys
from baton.gateway.requests import GatewayRequest
from baton.gateway.stops import StopMatcher
from baton.gateway.submission import SubmissionRun, Surroundings
from baton.gateway.tokenizer import Detokenizer, GatewayTokenizer

SEND_GRACE_S = 60.0
"""How much longer than its request a client may take to read the answer."""


@dataclasses.dataclass(frozen=True, slots=True)
class ChoiceDelta:
    """What is new for one choice."""

    choice: int
    index: int
    """Of ``token_ids[0]`` among the choice's output tokens."""
    token_ids: tuple[int, ...]
    text: str
    """Text that became certain; may lag behind the tokens."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    """``stop`` or ``length``, with the choice's last delta."""
    stop_reason: str | int | None = None
    """The stop string or token id that ended it; ``None`` for the model's own end token."""
    usage: Usage | None = None
    """Of this choice, with its last delta."""


@dataclasses.dataclass(frozen=True, slots=True)
class Usage:
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


class _Open:
    """A request being served: its tasks put deltas, ends and errors into one queue."""

    def __init__(self, request: GatewayRequest, keys: PromptKeys) -> None:
        self.request = request
        self.queue: asyncio.Queue[ChoiceDelta | BatonError] = asyncio.Queue()
        self._keys = keys
        self._keys_of: dict[int, tuple[BlockKey, ...]] = {}

    def block_keys(self, number: int) -> tuple[BlockKey, ...]:
        """Of a prompt's blocks; made once for all its choices."""
        if self.request.sampling.prompt_logprobs is not None:
            return ()  # computes all of its prompt
        if number not in self._keys_of:
            prompt = self.request.prompts[number].token_ids
            self._keys_of[number] = self._keys.of(prompt, self.request.cache_salt)
        return self._keys_of[number]

    def fail(self, error: BatonError) -> None:
        """End the request with an error."""
        self.queue.put_nowait(error)


class InferenceService:
    """Serves requests. One per gateway, on one event loop."""

    def __init__(
        self,
        surroundings: Surroundings,
        *,
        gateway_id: str,
        model: str,
        tokenizer: GatewayTokenizer | None,
        eos_token_ids: tuple[int, ...],
        metrics: GatewayMetrics,
        keys: PromptKeys,
    ) -> None:
        self._around = surroundings
        self._keys = keys
        self._gateway_id = gateway_id
        self._model = model
        self._tokenizer = tokenizer
        self._eos_token_ids = frozenset(eos_token_ids)
        self._metrics = metrics
        self._open: dict[str, _Open] = {}
        self._ending: set[asyncio.Task[None]] = set()
        self._closed = False

    def check_free(self, request_id: str, *, param: str) -> None:
        """Raises InvalidRequest while another open request has this id."""
        if request_id in self._open:
            raise InvalidRequest(f"request {request_id} is still open", param=param)

    def abort(self, request_id: str) -> bool:
        """End an open request with Aborted; whether there was one."""
        found = self._open.get(request_id)
        if found is not None:
            found.fail(Aborted("aborted by request"))
        return found is not None

    def close(self) -> None:
        """Take nothing new, and end what is open with a retryable error."""
        self._closed = True
        for item in self._open.values():
            item.fail(Unavailable("the gateway is stopping", retry_after_s=1.0))

    async def generate(
        self, request: GatewayRequest, *, received_s: float
    ) -> AsyncGenerator[ChoiceDelta, None]:
        """Deltas of all choices as they come; choices interleave, each in order.

        ``received_s`` is when the request arrived (monotonic). Raises BatonError. Closing the
        iterator, or cancelling its reader, ends the work in the cluster.
        """
        if self._closed:
            raise Unavailable("the gateway is stopping", retry_after_s=1.0)
        self.check_free(request.request_id, param="request_id")
        clock = self._around.clock
        opened = self._open[request.request_id] = _Open(request, self._keys)
        record = RequestRecord(request, received_s, clock.wall() - (clock.now() - received_s))
        self._metrics.open.inc()
        deadline_s = received_s + request.timeout_s
        seed = secrets.randbits(64) if request.seed is None else request.seed
        tasks = [
            asyncio.create_task(self._run_choice(opened, record, choice, seed, deadline_s))
            for choice in range(request.num_choices)
        ]
        num_running = len(tasks)
        try:
            while num_running:
                item = await self._next(opened, deadline_s)
                if isinstance(item, BatonError):
                    raise item
                if item.finish_reason is not None:
                    num_running -= 1
                yield item
            record.outcome = record.finish_outcome
        except BatonError as error:
            record.fail(error)
            raise
        finally:
            ending = asyncio.create_task(self._end(record, tasks))
            self._ending.add(ending)
            ending.add_done_callback(self._ending.discard)
            # A client that goes away at its last token cancels this wait, but not the end itself.
            await asyncio.shield(ending)

    async def _end(self, record: RequestRecord, tasks: Sequence[asyncio.Task[None]]) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        del self._open[record.request.request_id]
        record.close(self._around.clock.now(), self._metrics)
        self._around.cluster.report(record.to_outcome())

    async def _next(self, opened: _Open, deadline_s: float) -> ChoiceDelta | BatonError:
        try:
            return opened.queue.get_nowait()
        except asyncio.QueueEmpty:
            pass
        try:
            async with asyncio.timeout(max(0.0, deadline_s - self._around.clock.now())):
                return await opened.queue.get()
        except TimeoutError:
            raise DeadlineExceeded(
                f"not finished within {opened.request.timeout_s:g} s", param="timeout"
            ) from None

    async def _run_choice(
        self, opened: _Open, record: RequestRecord, choice: int, seed: int, deadline_s: float
    ) -> None:
        """One choice from start to end; everything goes to the queue, errors too."""
        request = opened.request
        prompt = request.prompts[choice // request.n]
        sampling = dataclasses.replace(request.sampling, seed=seed, max_tokens=prompt.max_tokens)
        journal = Journal(
            # Unlike what the client calls it, never used twice: instances remember what is over.
            f"{request.request_id}-{secrets.token_hex(4)}-{choice}",
            prompt.token_ids,
            sampling,
            choice=choice % request.n,
            level=request.level,
            received_s=record.received_s,
            tenant=request.cache_salt,
            gateway_id=self._gateway_id,
            gap_timeout_s=self._around.limits.gap_timeout_s,
        )
        entry = record.add(choice, journal)
        run = SubmissionRun(
            journal,
            self._around,
            parent_request_id=request.request_id,
            choice=choice,
            deadline_s=deadline_s,
            model=self._model,
            tenant=request.tenant,
            block_keys=opened.block_keys(choice // request.n),
        )
        text = ChoiceText(request, self._tokenizer)
        try:
            async with contextlib.aclosing(run.deltas()) as deltas:
                async for delta in deltas:
                    now = self._around.clock.now()
                    entry.on_tokens(len(delta.token_ids), now, self._around.clock.wall())
                    out = self._choice_delta(delta, choice, text, entry)
                    opened.queue.put_nowait(out)
                    if out.finish_reason is not None:
                        return
        except Exception as error:
            opened.fail(as_baton_error(error))

    def _choice_delta(
        self, delta: Delta, choice: int, text: ChoiceText, entry: ChoiceRecord
    ) -> ChoiceDelta:
        piece = text.push(delta)
        finish = delta.finish_reason
        stop_reason: str | int | None = None
        if text.stopped_by is not None:
            finish, stop_reason = FinishReason.STOP, text.stopped_by
        elif delta.stop_token_id is not None and delta.stop_token_id not in self._eos_token_ids:
            stop_reason = delta.stop_token_id
        usage = None
        if finish is not None:
            entry.finish_reason = finish
            usage = Usage(
                prompt_tokens=len(entry.journal.prompt_ids),
                completion_tokens=entry.num_tokens,
                cached_tokens=entry.journal.num_cached_tokens or 0,
            )
        return ChoiceDelta(
            choice=choice,
            index=delta.index,
            token_ids=delta.token_ids,
            text=piece,
            logprobs=delta.logprobs,
            prompt_logprobs=delta.prompt_logprobs,
            finish_reason=finish,
            stop_reason=stop_reason,
            usage=usage,
        )


class ChoiceText:
    """The text of one choice: detokenized, and cut at a stop string."""

    def __init__(self, request: GatewayRequest, tokenizer: GatewayTokenizer | None) -> None:
        self._include_stop = request.include_stop
        self._detokenizer = (
            None
            if tokenizer is None
            else Detokenizer(tokenizer, skip_special_tokens=request.skip_special_tokens)
        )
        self._stops = StopMatcher(request.stops, include_stop=request.include_stop)

    @property
    def stopped_by(self) -> str | None:
        """The stop string that ended the text."""
        return self._stops.matched

    def push(self, delta: Delta) -> str:
        """Text that became certain with these tokens, and all of the rest with the last ones."""
        if self._detokenizer is None:
            return ""
        ids = delta.token_ids
        if delta.stop_token_id is not None and not self._include_stop:
            # The token that ended it is not part of the text.
            ids = ids[:-1]
        text = self._stops.push(self._detokenizer.push(ids))
        if delta.finish_reason is not None and self.stopped_by is None:
            text += self._stops.push(self._detokenizer.flush())
            if self.stopped_by is None:
                text += self._stops.flush()
        return text
