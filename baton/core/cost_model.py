"""How long steps and transfers take: one cost model for placement, planner, pool and emulation.

A step is two linear models (design, "Cost model"): of the prompt chunks in it, and of the decodes.
A step with both reads the weights once, so the larger of the two constants counts, and both sets of
marginal costs. The same :func:`prefill_features` and :func:`decode_features` serve the fit, the
online update and the prediction. Seconds, tokens and bytes throughout.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True, slots=True)
class StepShape:
    """What one step computes, as far as its time depends on it."""

    num_prefill_tokens: int = 0
    """Tokens of prompt chunks."""
    prefill_context: int = 0
    """Sum over those tokens of the tokens before them: what their attention reads."""
    num_decodes: int = 0
    """Sequences that get one token."""
    decode_context: int = 0
    """Sum over these of the tokens in their cache."""


def chunk_context(start: int, num_tokens: int) -> int:
    """``prefill_context`` of one chunk: tokens [start, start + num_tokens) of a sequence."""
    return num_tokens * start + num_tokens * (num_tokens - 1) // 2


def prefill_features(shape: StepShape) -> tuple[float, float, float]:
    """Constant, tokens, tokens times their context."""
    return (1.0, float(shape.num_prefill_tokens), float(shape.prefill_context))


def decode_features(shape: StepShape) -> tuple[float, float, float]:
    """Constant, batch, total context."""
    return (1.0, float(shape.num_decodes), float(shape.decode_context))


@dataclasses.dataclass(frozen=True, slots=True)
class StepCosts:
    """Coefficients, in the order of the features."""

    overhead_s: float
    """Of a step whatever is in it: launches, and for decode the weights."""
    item_s: float
    """Per prompt token, or per decoding sequence."""
    context_s: float
    """Per token of context that is read."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if not getattr(self, field.name) >= 0.0:
                raise ValueError(
                    f"{field.name} must not be negative, got {getattr(self, field.name)}"
                )

    def dilated(self, factor: float) -> StepCosts:
        """Everything takes so many times as long."""
        return StepCosts(self.overhead_s * factor, self.item_s * factor, self.context_s * factor)


@dataclasses.dataclass(frozen=True, slots=True)
class LinkCosts:
    """A way that KV blocks take."""

    latency_s: float
    bytes_per_s: float

    def __post_init__(self) -> None:
        if not (self.latency_s >= 0.0 and self.bytes_per_s > 0.0):
            raise ValueError(f"a link needs latency_s >= 0 and bytes_per_s > 0, got {self}")

    def seconds(self, num_bytes: float) -> float:
        """For one transfer."""
        return self.latency_s + num_bytes / self.bytes_per_s

    def dilated(self, factor: float) -> LinkCosts:
        """Everything takes so many times as long."""
        return LinkCosts(self.latency_s * factor, self.bytes_per_s / factor)


@dataclasses.dataclass(frozen=True, slots=True)
class CostModel:
    """One kind of instance: how fast it is, and what its KV costs."""

    prefill: StepCosts
    decode: StepCosts
    handoff: LinkCosts
    """From a prefill instance to a decode instance."""
    kv_bytes_per_token: float
    tiers: Mapping[str, LinkCosts] = dataclasses.field(default_factory=dict)
    """Into the device, from ``host``, ``disk``, ``remote``; a tier that is missing costs what
    ``handoff`` does."""

    def step_s(self, shape: StepShape) -> float:
        """Seconds of one step."""
        overhead = seconds = 0.0
        if shape.num_prefill_tokens:
            costs = self.prefill
            overhead = costs.overhead_s
            seconds = shape.num_prefill_tokens * costs.item_s
            seconds += shape.prefill_context * costs.context_s
        if shape.num_decodes:
            costs = self.decode
            overhead = max(overhead, costs.overhead_s)
            seconds += shape.num_decodes * costs.item_s + shape.decode_context * costs.context_s
        return overhead + seconds

    def prefill_s(self, num_tokens: int, num_cached: int = 0, *, chunk: int | None = None) -> float:
        """Seconds to compute a prompt alone, of which ``num_cached`` tokens are cached."""
        new = max(1, num_tokens - num_cached)
        steps = 1 if chunk is None else -(-new // chunk)
        costs = self.prefill
        context = chunk_context(num_cached, new)
        return steps * costs.overhead_s + new * costs.item_s + context * costs.context_s

    def decode_s(self, num_decodes: float, context: float) -> float:
        """Seconds of a step of decodes alone: what each of them gets as its TPOT."""
        costs = self.decode
        return costs.overhead_s + num_decodes * costs.item_s + context * costs.context_s

    def handoff_s(self, num_tokens: float) -> float:
        """Seconds to move the KV of so many tokens to another instance."""
        return self.handoff.seconds(num_tokens * self.kv_bytes_per_token)

    def fetch_s(self, tier: str, num_tokens: float) -> float:
        """Seconds to bring so many tokens from a tier into the device; nothing from ``device``."""
        if tier == "device" or num_tokens <= 0:
            return 0.0
        return self.tiers.get(tier, self.handoff).seconds(num_tokens * self.kv_bytes_per_token)

    def dilated(self, factor: float) -> CostModel:
        """Everything takes so many times as long."""
        return dataclasses.replace(
            self,
            prefill=self.prefill.dilated(factor),
            decode=self.decode.dilated(factor),
            handoff=self.handoff.dilated(factor),
            tiers={name: link.dilated(factor) for name, link in self.tiers.items()},
        )

    def chunk_for(self, limit_s: float, num_decodes: int, decode_context: int, start: int) -> int:
        """The most prompt tokens, after ``start`` others, that a step beside these decodes may
        compute so that it stays within ``limit_s``; may be 0."""
        costs = self.prefill
        overhead = max(costs.overhead_s, self.decode.overhead_s if num_decodes else 0.0)
        marginal = num_decodes * self.decode.item_s + decode_context * self.decode.context_s
        left = limit_s - overhead - marginal
        return max(0, int(left / max(1e-12, costs.item_s + start * costs.context_s)))


@dataclasses.dataclass(frozen=True, slots=True)
class Profile:
    """A cost model with the sizes of the instances that it was made for: one YAML file."""

    name: str
    source: str
    """Where the numbers come from: ``fitted`` (what was measured, and where) or ``derived`` (from
    data sheets), with details."""
    cost: CostModel
    kv_capacity_tokens: int
    """What the device's memory holds besides the weights."""
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int = 128

    def __post_init__(self) -> None:
        for name in ("kv_capacity_tokens", "max_model_len", "max_num_seqs", "block_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError("max_num_batched_tokens must be at least max_num_seqs")

    @property
    def num_blocks(self) -> int:
        """KV blocks of one instance."""
        return max(1, self.kv_capacity_tokens // self.block_size)
