"""A request and its parts, as every process of the cluster speaks of them.

One *submission* is one choice of one request: a client's ``n=3`` becomes three submissions that
differ in ``choice`` and ``request_id``. It holds all that a replay needs, so any instance can go
on where another stopped.
"""

from __future__ import annotations

import dataclasses
import enum

from baton.core.slo import NO_TARGETS, Slo

PROTOCOL_VERSION = 1
MAX_LOGPROBS = 20


class FinishReason(enum.StrEnum):
    """Why a request ended. ``stop`` and ``length`` are the ends a client asked for."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class Part(enum.StrEnum):
    """Which part of a request's work a submission asks of an instance."""

    PREFILL = "prefill"
    """Compute the prompt, emit the first token, hold the KV for the decode side."""
    DECODE = "decode"
    """Pull the prompt's KV, repeat the first token, and go on."""
    WHOLE = "whole"
    """Everything on one instance; no handoff."""


@dataclasses.dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn. Values are validated at the gateway and again here."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    """64-bit unsigned; the gateway draws one where the client gave none."""
    max_tokens: int = 16
    """Upper bound on output tokens, counted from the request's first output token."""
    stop_token_ids: tuple[int, ...] = ()
    """Ends the request when drawn; includes the model's own end tokens unless ``ignore_eos``."""
    ignore_eos: bool = False
    logprobs: int | None = None
    """How many top alternatives to report per output token; ``None`` for no logprobs at all."""
    prompt_logprobs: int | None = None
    """The same for every prompt token but the first; such a request reuses no cached prefix."""

    def __post_init__(self) -> None:
        checks = (
            ("temperature", 0.0 <= self.temperature <= 2.0, "between 0 and 2"),
            ("top_k", self.top_k is None or self.top_k >= 1, "at least 1"),
            ("top_p", 0.0 < self.top_p <= 1.0, "above 0 and at most 1"),
            ("min_p", 0.0 <= self.min_p <= 1.0, "between 0 and 1"),
            ("repetition_penalty", 0.0 < self.repetition_penalty <= 2.0, "above 0, at most 2"),
            ("presence_penalty", -2.0 <= self.presence_penalty <= 2.0, "between -2 and 2"),
            ("frequency_penalty", -2.0 <= self.frequency_penalty <= 2.0, "between -2 and 2"),
            ("seed", 0 <= self.seed < 2**64, "between 0 and 2**64 - 1"),
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("logprobs", _logprobs_ok(self.logprobs), f"between 0 and {MAX_LOGPROBS}"),
            ("prompt_logprobs", _logprobs_ok(self.prompt_logprobs), f"0 to {MAX_LOGPROBS}"),
        )
        for name, ok, expected in checks:
            if not ok:
                raise ValueError(f"{name} must be {expected}, got {getattr(self, name)!r}")

    @property
    def greedy(self) -> bool:
        """Temperature 0: take the best token, draw nothing."""
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        """Whether the sampler needs this sequence's token history."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )


def _logprobs_ok(value: int | None) -> bool:
    return value is None or 0 <= value <= MAX_LOGPROBS


@dataclasses.dataclass(frozen=True, slots=True)
class Submission:
    """One choice of a request, with all that is needed to run it or to go on with it."""

    request_id: str
    attempt: int
    """0, then one more for each replay; lower attempts are fenced."""
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    output_ids: tuple[int, ...] = ()
    """Tokens that the client already has; generation goes on after them."""
    choice: int = 0
    """Enters the random draw, so that choices differ under one seed."""
    priority: int = 0
    """Higher goes first."""
    budget_s: float | None = None
    """Time left when the message was sent, as gRPC does it; ``None`` for no deadline."""
    tenant: str = ""
    adapter: str = ""
    gateway_id: str = ""
    """Whose token stream carries the outputs."""
    service_class: str = ""
    slo: Slo = NO_TARGETS
    rise_after_s: float | None = None
    """Offline work (priority below 0) ranks as if it had priority 0 so long after its arrival here:
    in time for its deadline. ``None``: never."""
    protocol_version: int = PROTOCOL_VERSION

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise ValueError("prompt_ids must not be empty")
        if len(self.output_ids) >= self.sampling.max_tokens:
            raise ValueError("output_ids already holds max_tokens tokens: nothing is left to do")

    @property
    def num_tokens(self) -> int:
        """Prompt plus outputs so far: what prefill must compute."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def max_total_tokens(self) -> int:
        """The longest this sequence can become."""
        return len(self.prompt_ids) + self.sampling.max_tokens


@dataclasses.dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities (natural, of the raw distribution) at one position."""

    token_id: int
    logprob: float
    rank: int
    """1 for the most likely token."""
    top: tuple[tuple[int, float], ...] = ()
    """(token id, logprob), most likely first."""


@dataclasses.dataclass(frozen=True, slots=True)
class TokenOutput:
    """Tokens of one submission out of one engine step: the unit of the token stream."""

    request_id: str
    attempt: int
    index: int
    """Position of ``token_ids[0]`` among the request's output tokens."""
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error_code: str | None = None
    error_message: str | None = None
    num_cached_tokens: int | None = None
    """Prompt tokens taken from a cache; with the first output of an instance."""
    cached_by_tier: tuple[tuple[str, int], ...] = ()
    """(tier, tokens), fastest first: where those were."""
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    stages: tuple[tuple[str, float], ...] = ()
    """(stage name, wall-clock seconds): what happened here since the last output."""
