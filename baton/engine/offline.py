"""One engine without a cluster: prompts in, tokens and timings out, and nothing else in between.

The caller's thread plans and commits, one other thread runs the runner. While it computes step n,
step n+1 is planned and queued behind it, as :mod:`baton.engine.loop` does on an event loop.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from baton.core.blocks import block_salt
from baton.core.clock import Clock, SystemClock
from baton.core.config import EngineConfig
from baton.core.request import FinishReason, Part, SamplingParams, Submission, TokenLogprobs
from baton.engine.checkpoint import Checkpoint
from baton.engine.events import TokensReady
from baton.engine.group import make_engine
from baton.engine.models.config import kv_layout, resolve_max_model_len
from baton.engine.plan import Runner
from baton.engine.runners import Progress, make_runner

MAX_SEQS = 256
"""Sequences of one dp group that run at once; the rest of a larger batch waits."""
_CLOSE_TIMEOUT_S = 5.0


@dataclasses.dataclass(frozen=True, slots=True)
class OfflineRequest:
    """One prompt of a batch."""

    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    """``max_tokens`` bounds the output; ``seed`` and ``stop_token_ids`` are used as they are."""


@dataclasses.dataclass(slots=True)
class OfflineOutput:
    """What one prompt became."""

    token_ids: list[int] = dataclasses.field(default_factory=list)
    """The stop token that ended it included."""
    logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)
    """One per output token where ``SamplingParams.logprobs`` asks for them, else empty."""
    finish_reason: FinishReason | None = None
    """``stop`` or ``length`` in the end."""


@dataclasses.dataclass(frozen=True, slots=True)
class OfflineTimings:
    """Where the time of one batch went. Loading the model is not part of it."""

    prefill_s: float
    """From the start until every prompt had its first token."""
    decode_tokens_per_s: float | None
    """Tokens that came after that moment, per second since then; ``None`` where none came."""
    total_s: float
    """From the start to the last token."""
    num_steps: int
    host_s_per_step: float
    """Mean time that planning and committing a step took beside computing it."""


@dataclasses.dataclass(frozen=True, slots=True)
class OfflineResult:
    """A finished batch; ``outputs`` in the order of the requests."""

    outputs: tuple[OfflineOutput, ...]
    timings: OfflineTimings


def fit_to_batch(
    config: EngineConfig, requests: Sequence[OfflineRequest], *, max_num_blocks: int | None = None
) -> EngineConfig:
    """``config`` with as many sequences and KV blocks (of each dp group) as this batch can use.

    ``requests`` must not be empty. Any cache that holds the longest of them is enough: with at most
    ``max_num_blocks`` sequences wait for each other, or are computed again, and get the same
    tokens.
    """
    num_seqs = min(len(requests), MAX_SEQS, config.max_num_batched_tokens)
    each = sorted(
        (
            -(-(len(request.prompt_ids) + request.sampling.max_tokens) // config.block_size)
            for request in requests
        ),
        reverse=True,
    )
    num_blocks = sum(each[: num_seqs * config.dp])
    if config.dp > 1:
        # Sequences go where the load is least: no group gets more than its share and one of them.
        num_blocks = -(-num_blocks // config.dp) + each[0]
    # A few must stay free when a sequence starts beside others; see Scheduler.
    num_blocks += num_blocks // 100 + 1
    if max_num_blocks is not None:
        num_blocks = min(num_blocks, max_num_blocks)
    return dataclasses.replace(config, max_num_seqs=num_seqs, num_blocks=num_blocks)


class OfflineEngine:
    """An engine and its runner, in this process; ranks are processes that end with it.

    Use it as a context manager, from one thread. After an exception out of :meth:`generate` (also
    KeyboardInterrupt) it can only be closed.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: EngineConfig,
        *,
        progress: Progress | None = None,
        clock: Clock | None = None,
    ) -> None:
        """Load and warm up: ``load_s`` is how long that took.

        ``config`` is used as it is, see :func:`fit_to_batch`. ``progress`` is told (bytes done,
        bytes in all) while weights load. Raises ConfigError for what the model cannot do.
        """
        self._clock = clock or SystemClock()
        started = self._clock.now()
        self._max_in_flight = 2 if config.async_scheduling else 1
        self._engine = make_engine(
            config,
            max_model_len=resolve_max_model_len(checkpoint.config, config),
            salt=block_salt(
                model_fingerprint=checkpoint.fingerprint,
                layout=kv_layout(checkpoint.config, config).canonical.text,
            ),
        )
        self._thread = _RunnerThread(make_runner(checkpoint, config, progress=progress))
        self._numbers = itertools.count()
        self._num_steps = 0
        self._host_s = 0.0
        self._in_flight: collections.deque[tuple[Any, Future[Any]]] = collections.deque()
        self.load_s = self._clock.now() - started

    def __enter__(self) -> OfflineEngine:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def num_preemptions(self) -> int:
        """Sequences that had to be computed again because the cache was too small, so far."""
        return self._engine.load().num_preemptions

    def close(self) -> None:
        """Let the running step end and release the runner. Bounded and idempotent.

        A step that does not end soon is left behind on its thread: see :attr:`is_stuck`.
        """
        self._thread.close()

    @property
    def is_stuck(self) -> bool:
        """Whether a step still runs though the engine is closed.

        The interpreter cannot end well then: leave with ``os._exit``.
        """
        return self._thread.is_stuck

    def generate(
        self,
        requests: Sequence[OfflineRequest],
        *,
        on_tokens: Callable[[int, TokensReady], None] | None = None,
    ) -> OfflineResult:
        """Run all requests to their ends.

        ``on_tokens`` is called with a request's place in ``requests`` for each of its tokens, as
        they come. Raises ValueError for an empty batch, InvalidRequest for a prompt that does not
        fit, and whatever a step raised.
        """
        if not requests:
            raise ValueError("a batch must hold at least one request")
        batch = _Batch(len(requests), on_tokens)
        started = self._clock.now()
        steps_before, host_before = self._num_steps, self._host_s
        for place, request in enumerate(requests):
            request_id = f"offline-{next(self._numbers)}"
            batch.places[request_id] = place
            submission = Submission(request_id, 0, request.prompt_ids, request.sampling)
            self._engine.submit(submission, Part.WHOLE, started)
        while batch.num_open:
            self._fill(batch)
            self._commit_oldest(batch)
        ended = self._clock.now()
        # A plan made ahead may hold rows of sequences that have ended by now.
        while self._in_flight:
            self._commit_oldest(batch)
        num_steps = self._num_steps - steps_before
        prefilled = ended if batch.prefilled_at is None else batch.prefilled_at
        return OfflineResult(
            outputs=tuple(batch.outputs),
            timings=OfflineTimings(
                prefill_s=prefilled - started,
                decode_tokens_per_s=(
                    batch.num_decoded / (ended - prefilled) if batch.num_decoded else None
                ),
                total_s=ended - started,
                num_steps=num_steps,
                host_s_per_step=(self._host_s - host_before) / num_steps,
            ),
        )

    def _fill(self, batch: _Batch) -> None:
        """Plan until the runner has one step behind the one that it runs."""
        while len(self._in_flight) < self._max_in_flight:
            started = self._clock.now()
            batch.take(self._engine.admit(started), started)
            plan: Any = self._engine.schedule(started)
            self._host_s += self._clock.now() - started
            if plan is None:
                return
            self._in_flight.append((plan, self._thread.execute(plan)))

    def _commit_oldest(self, batch: _Batch) -> None:
        assert self._in_flight, "sequences are open, but nothing can run"
        plan, future = self._in_flight[0]
        result = future.result()
        self._in_flight.popleft()
        started = self._clock.now()
        events = self._engine.commit(plan, result, started)
        self._num_steps += 1
        self._host_s += self._clock.now() - started
        batch.take(events, started)


class _Batch:
    """What has come so far."""

    def __init__(
        self, num_requests: int, on_tokens: Callable[[int, TokensReady], None] | None
    ) -> None:
        self.places: dict[str, int] = {}
        self.outputs = [OfflineOutput() for _ in range(num_requests)]
        self.num_open = num_requests
        self.prefilled_at: float | None = None
        self.num_decoded = 0
        """Tokens since ``prefilled_at``."""
        self._num_prefilling = num_requests
        self._on_tokens = on_tokens

    def take(self, events: Sequence[object], now: float) -> None:
        for event in events:
            if isinstance(event, TokensReady):
                self._take_tokens(event)
        if self.prefilled_at is None and not self._num_prefilling:
            self.prefilled_at = now

    def _take_tokens(self, event: TokensReady) -> None:
        place = self.places[event.request_id]
        output = self.outputs[place]
        if self.prefilled_at is not None:
            self.num_decoded += len(event.token_ids)
        if not output.token_ids and event.token_ids:
            self._num_prefilling -= 1
        output.token_ids += event.token_ids
        output.logprobs += event.logprobs
        if event.finish_reason is not None:
            output.finish_reason = event.finish_reason
            self.num_open -= 1
        if self._on_tokens is not None:
            self._on_tokens(place, event)


class _RunnerThread:
    """A runner and the one thread that calls it.

    Not a ThreadPoolExecutor: the interpreter waits without a bound for that one's threads.
    """

    def __init__(self, runner: Runner[Any, Any]) -> None:
        self._runner = runner
        self._work: queue.SimpleQueue[tuple[Any, Future[Any]] | None] = queue.SimpleQueue()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="runner", daemon=True)
        self._thread.start()

    def execute(self, plan: Any) -> Future[Any]:
        """The result of ``plan``, once those before it are done."""
        future: Future[Any] = Future()
        self._work.put((plan, future))
        return future

    def close(self) -> None:
        """End the thread after the step that runs, then close the runner. Bounded, idempotent."""
        if self._closing:
            return
        self._closing = True
        self._work.put(None)
        self._thread.join(_CLOSE_TIMEOUT_S)
        self._runner.close()

    @property
    def is_stuck(self) -> bool:
        return self._closing and self._thread.is_alive()

    def _run(self) -> None:
        while (item := self._work.get()) is not None:
            plan, future = item
            if self._closing:
                future.cancel()
                continue
            try:
                result = self._runner.execute(plan)
            except BaseException as error:  # it belongs to whoever waits for the step
                future.set_exception(error)
            else:
                future.set_result(result)
