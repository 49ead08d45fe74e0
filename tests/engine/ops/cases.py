"""The conformance suite's inputs: shapes of real models, and those at the edges."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from baton.core.request import SamplingParams
from baton.engine.models.config import MoeConfig
from baton.engine.plan import SlotBegin
from baton.engine.slot_state import SlotState
from tests.engine.ops.attention_cases import ATTENTION_CASES
from tests.engine.ops.conformance import Args, Case, Exact, OutDtype
from tests.engine.test_sampler import acceptable, penalised

EPS = 1e-6


def _weight(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=generator) + 0.5


# Norms.


def _norm(name: str, *shape: int, size: float = 1.0, per_head: bool = False) -> Case:
    def make(generator: torch.Generator) -> Args:
        # Wider than needed: the model norms slices of a projection's output.
        x = torch.randn(*shape[:-1], shape[-1] + 8, generator=generator) * size
        return {"x": x, "weight": _weight(generator, *shape[-2 if per_head else -1 :])}

    def run(rms_norm: Any, args: Args) -> tuple[Tensor, ...]:
        return (rms_norm(args["x"][..., :-8], args["weight"], EPS),)

    return Case("rms_norm", name, {"width": shape[-1]}, make, run)


def _add_norm(name: str, rows: int, width: int, size: float = 1.0) -> Case:
    def make(generator: torch.Generator) -> Args:
        x, residual = torch.randn(2, rows, width, generator=generator) * size
        return {"x": x, "residual": residual, "weight": _weight(generator, width)}

    def run(add_rms_norm: Any, args: Args) -> tuple[Tensor, ...]:
        x, residual = args["x"], args["residual"]
        before = x.clone(), residual.clone()
        normed, total = add_rms_norm(x, residual, args["weight"], EPS)
        unchanged = torch.equal(x, before[0]) and torch.equal(residual, before[1])
        # The sum of tiny numbers is compared at the scale of the others.
        return normed, total / size, torch.tensor([float(unchanged)])

    return Case("add_rms_norm", name, {"width": width}, make, run)


_NORMS = [
    _norm("one-row", 1, 64),
    _norm("narrow", 7, 16),
    _norm("latent", 5, 576),
    _norm("wide", 3, 2048),
    _norm("eps-matters", 4, 128, size=1e-3),
    _norm("zeros", 2, 64, size=0.0),
    _norm("one-head", 3, 1, 128, per_head=True),
    _norm("five-heads", 6, 5, 16, per_head=True),
    _add_norm("one-row", 1, 64),
    _add_norm("narrow", 7, 16),
    _add_norm("latent", 5, 576),
    _add_norm("wide", 3, 2048),
    _add_norm("eps-matters", 4, 128, size=1e-3),
]


# Elementwise ones and the cache.


def _rotary(name: str, tokens: int, heads: int, dim: int, *, in_place: bool) -> Case:
    def make(generator: torch.Generator) -> Args:
        angles = torch.rand(tokens, dim // 2, generator=generator) * 6.3
        cos, sin = angles.cos(), angles.sin()
        table = torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)), 1)
        x = torch.randn(tokens, heads + 2, dim, generator=generator)
        return {"x": x, "table": table.unsqueeze(2)}

    def run(rotary: Any, args: Args) -> tuple[Tensor, ...]:
        whole = args["x"]
        x = whole[:, :heads]
        if in_place:
            rotary(x, args["table"], out=x)
            return (whole,)
        out = torch.empty_like(x)
        rotary(x, args["table"], out=out)
        return out, whole

    return Case("rotary", name, {"dim": dim}, make, run)


def _swiglu(name: str, *shape: int, size: float = 1.0) -> Case:
    def make(generator: torch.Generator) -> Args:
        return {"x": torch.randn(*shape, generator=generator) * size}

    return Case("swiglu", name, {}, make, lambda swiglu, args: (swiglu(args["x"]),))


def _cache_write(name: str, tokens: int, planes: int, width: int) -> Case:
    def make(generator: torch.Generator) -> Args:
        rows = torch.randperm(tokens * planes + 9, generator=generator)[: tokens * planes]
        # A slice of a wider projection, as keys and values come.
        values = torch.randn(tokens, planes + 1, width, generator=generator)
        return {"rows": rows.view(tokens, planes), "values": values}

    def run(cache_write: Any, args: Args) -> tuple[Tensor, ...]:
        values = args["values"][:, 1:]
        cache = values.new_full((tokens * planes + 9, width), 7.0)
        cache_write(cache, args["rows"], values)
        return (cache,)

    return Case("cache_write", name, {}, make, run)


_SMALL = [
    _rotary("one-token-one-head", 1, 1, 64, in_place=False),
    _rotary("five-heads", 9, 5, 16, in_place=False),
    _rotary("in-place", 5, 7, 128, in_place=True),
    _rotary("in-place-one-token", 1, 3, 16, in_place=True),
    _swiglu("one-row", 1, 128),
    _swiglu("odd", 7, 14),
    _swiglu("no-rows", 0, 64),
    _swiglu("saturated", 5, 256, size=20.0),
    _cache_write("keys-and-values", 17, 2, 64),
    _cache_write("latent", 5, 1, 576),
    _cache_write("one-token", 1, 2, 16),
    _cache_write("no-tokens", 0, 2, 32),
]


# Products.


def _linear(name: str, rows: int, inner: int, outer: int, *, bias: bool = False) -> Case:
    def make(generator: torch.Generator) -> Args:
        weight = torch.randn(outer, inner, generator=generator) * inner**-0.5
        x = torch.randn(rows, inner, generator=generator)
        return {"x": x, "weight": weight, "bias": _weight(generator, outer) if bias else None}

    def run(make_linear: Any, args: Args) -> tuple[Tensor, ...]:
        return (make_linear(args["weight"], args["bias"])(args["x"]),)

    return Case("linear", name, {"in_features": inner, "out_features": outer}, make, run)


def _grouped(name: str, counts: list[int], inner: int, outer: int, *, strangers: int = 0) -> Case:
    def make(generator: torch.Generator) -> Args:
        weights = torch.randn(len(counts), outer, inner, generator=generator) * inner**-0.5
        x = torch.randn(sum(counts) + strangers, inner, generator=generator)
        return {"x": x, "weights": list(weights), "counts": torch.tensor(counts)}

    def run(make_grouped: Any, args: Args) -> tuple[Tensor, ...]:
        out = make_grouped(iter(args["weights"]))(args["x"], args["counts"])
        # Rows of nobody may hold anything.
        return out[: sum(counts)], torch.tensor(out.shape)

    shape = {"in_features": inner, "out_features": outer}
    return Case("grouped_matmul", name, shape, make, run)


_SEVEN = [3, 0, 5, 1, 0, 0, 2]
_PRODUCTS = [
    _linear("one-row", 1, 64, 96),
    _linear("odd", 3, 20, 7, bias=True),
    _linear("head-dim", 5, 576, 16),
    _linear("packed", 17, 512, 256),
    _linear("packed-one-row-bias", 1, 320, 512, bias=True),
    _linear("packed-long", 130, 384, 400, bias=True),
    _grouped("seven-experts", _SEVEN, 64, 48),
    _grouped("odd-widths", _SEVEN, 20, 14),
    _grouped("strangers", _SEVEN, 64, 48, strangers=6),
    _grouped("one-row", [0, 1, 0], 64, 96),
    _grouped("one-expert", [9], 96, 64),
    _grouped("first-and-last-empty", [0, 4, 4, 0], 64, 48),
    _grouped("all-empty", [0, 0, 0], 64, 48),
    _grouped("only-strangers", [0, 0, 0], 64, 48, strangers=4),
    _grouped("packed", [33, 0, 1, 6], 512, 256),
]


# Routing.


def _routing(name: str, tokens: int, experts: int, top_k: int, **config: Any) -> Case:
    moe = MoeConfig(experts, top_k, 1, config.pop("norm_topk_prob", True), (0,), **config)

    def make(generator: torch.Generator) -> Args:
        # Far enough apart that no rounding makes two of them equal.
        order = torch.stack([torch.randperm(experts, generator=generator) for _ in range(tokens)])
        bias = None
        if moe.correction_bias:
            bias = torch.randn(experts, generator=generator) * 0.3
        return {"logits": (order - experts / 2) / 8, "bias": bias}

    def run(routing: Any, args: Args) -> tuple[Tensor, ...]:
        weights, chosen = routing(args["logits"], args["bias"], moe)
        assert weights.dtype in (torch.float32, torch.float64)
        # By expert: the order of a token's experts is nobody's business.
        dense = torch.zeros(tokens, experts, dtype=torch.float64, device=weights.device)
        return (dense.scatter(1, chosen, weights.double()), torch.tensor(chosen.shape))

    return Case("moe_routing", name, {"experts": experts, "top_k": top_k}, make, run)


_SIGMOID: dict[str, Any] = {"scoring": "sigmoid", "correction_bias": True}
_ROUTINGS = [
    _routing("one-token", 1, 7, 3),
    _routing("seven-experts-raw", 9, 7, 2, norm_topk_prob=False),
    _routing("scaled", 5, 64, 8, norm_topk_prob=False, scaling_factor=2.5),
    _routing("all-experts", 4, 5, 5),
    _routing("groups-by-best", 9, 9, 3, num_groups=3, topk_groups=2, norm_topk_prob=False),
    _routing("sigmoid", 9, 7, 3, **_SIGMOID),
    _routing("sigmoid-unbiased", 3, 7, 1, scoring="sigmoid", norm_topk_prob=False),
    _routing(
        "groups-by-two-best",
        9,
        10,
        3,
        num_groups=5,
        topk_groups=3,
        group_score="top2_sum",
        scaling_factor=1.7,
        **_SIGMOID,
    ),
]


# Sampling: discrete, so the question is whether each token is one that the oracle allows.

_PENALTIES: dict[str, Any] = {
    "repetition_penalty": 1.3,
    "presence_penalty": 0.7,
    "frequency_penalty": 0.4,
}
ROWS: tuple[SamplingParams, ...] = (
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.7),
    SamplingParams(top_k=1),
    SamplingParams(top_k=7),
    SamplingParams(top_p=0.5),
    SamplingParams(top_p=0.999, temperature=2.0),
    SamplingParams(min_p=0.1),
    SamplingParams(top_k=50, top_p=0.9, min_p=0.02, temperature=1.5),
    SamplingParams(temperature=0.0, **_PENALTIES),
    SamplingParams(temperature=1.2, top_k=20, **_PENALTIES),
    SamplingParams(temperature=1e-8),
    SamplingParams(repetition_penalty=0.5, top_p=0.8),
)


def _sample(name: str, vocab_size: int, rows: tuple[SamplingParams, ...], seed: int) -> Case:
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal((len(rows), vocab_size)) * 3).astype(np.float32)
    uniforms = rng.random(len(rows))
    slots = rng.permutation(len(rows) + 2)[: len(rows)]
    begins = []
    for slot, params in zip(slots.tolist(), rows, strict=True):
        prompt, output = rng.integers(0, vocab_size, (2, 9)).tolist()
        begins.append(SlotBegin(slot, params, tuple(prompt), tuple(output)))

    def allowed(_: Args) -> Tensor:
        table = torch.zeros(len(rows), vocab_size)
        for row, begin in enumerate(begins):
            changed = penalised(logits[row], begin.sampling, begin.prompt_ids, begin.output_ids)
            table[row, sorted(acceptable(changed, begin.sampling, uniforms[row]))] = 1.0
        return table

    def make(_: torch.Generator) -> Args:
        return {"logits": Exact(torch.from_numpy(logits)), "allowed": Exact(allowed({}))}

    def run(sample: Any, args: Args) -> tuple[Tensor, ...]:
        state = SlotState(2, vocab_size, args["logits"].device)
        for begin in begins:
            state.begin(begin)
        tokens = sample(args["logits"], slots, uniforms, state)
        unchanged = torch.equal(args["logits"].cpu(), torch.from_numpy(logits))
        return args["allowed"].gather(1, tokens.unsqueeze(1)), torch.tensor([float(unchanged)])

    def expected(_: Args) -> tuple[Tensor, ...]:
        return torch.ones(len(rows), 1), torch.ones(1)

    return Case("sample", name, {}, make, run, expected)


_SAMPLES = [
    _sample("mixed-batch", 300, ROWS, 1),
    _sample("mixed-batch-many-tokens", 1500, ROWS, 2),
    _sample("mixed-batch-few-tokens", 11, ROWS, 3),
    _sample("all-greedy", 97, ROWS[:1] * 3, 4),
    _sample("one-row", 97, ROWS[3:4], 5),
    _sample("all-drawn", 700, tuple(row for row in ROWS if row.temperature > 0), 6),
]


# Quantisation.


def _quantize(name: str, *shape: int) -> Case:
    def make(generator: torch.Generator) -> Args:
        # Integers and a little less than half a step to either side of them, so that rounding must
        # decide; the largest is 127 steps of a power of two, so that both dtypes hold the numbers.
        whole = torch.randint(-127, 128, shape, generator=generator).float()
        whole[..., 0] = 127.0
        side = torch.randint(0, 2, shape, generator=generator) - 0.5
        beside = torch.where(whole.abs() < 16, 0.875, 0.0) * side
        step = 2.0 ** torch.randint(-6, 4, (*shape[:-1], 1), generator=generator)
        return {"x": (whole + beside) * step}

    def run(quantize: Any, args: Args) -> tuple[Tensor, ...]:
        values, scale = quantize(args["x"])
        assert (values.dtype, scale.dtype) == (torch.int8, torch.float32)
        return values, scale

    return Case("quantize", name, {}, make, run)


def _dequantize(name: str, *shape: int) -> Case:
    def make(generator: torch.Generator) -> Args:
        values = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
        scale = torch.rand(*shape[:-1], 1, generator=generator) + 0.01
        return {"values": values, "scale": Exact(scale), "dtype": OutDtype()}

    def run(dequantize: Any, args: Args) -> tuple[Tensor, ...]:
        out = dequantize(args["values"], args["scale"], args["dtype"])
        assert out.dtype == args["dtype"]
        return (out,)

    return Case("dequantize", name, {}, make, run)


def _zero_rows() -> Case:
    def run(quantize: Any, args: Args) -> tuple[Tensor, ...]:
        values, scale = quantize(args["x"])
        return values, torch.isfinite(scale) & (scale > 0)

    return Case("quantize", "zero-rows", {}, lambda _: {"x": torch.zeros(3, 16)}, run)


_QUANTIZED = [
    make(name, *shape)
    for make in (_quantize, _dequantize)
    for name, shape in {"one-row": (1, 64), "odd": (7, 5), "heads": (3, 5, 128)}.items()
] + [_zero_rows()]

CASES: tuple[Case, ...] = (
    *_NORMS,
    *_SMALL,
    *_PRODUCTS,
    *_ROUTINGS,
    *ATTENTION_CASES,
    *_SAMPLES,
    *_QUANTIZED,
)
