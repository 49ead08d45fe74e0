"""Attention over paged caches: decode rows, chunks, both in one step, and MLA."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.engine.ops.conformance import Args, Case, Paged

CONTEXTS = (1, 15, 16, 17, 193, 600)
DECODE = tuple((context - 1, 1) for context in CONTEXTS)
PREFILL = ((0, 17), (0, 1), (0, 16))
MIXED = ((0, 1), (40, 1), (599, 1), (0, 15), (15, 5), (190, 13), (1, 16))
STEPS = {
    "decode": DECODE,
    "prefill": PREFILL,
    "mixed": MIXED,
    # More queries than a tile, and more keys than are summed in one go.
    "long-chunk": ((70, 140),),
    "end-of-long": ((530, 70), (0, 3)),
}
_MANY_TOKENS = ("long-chunk", "end-of-long")


def _attention(name: str, steps: str, kv_heads: int, group: int, dim: int, **how: Any) -> Case:
    heads = kv_heads * group
    paged = Paged(STEPS[steps], kv_heads, dim, **how)

    def make(generator: torch.Generator) -> Args:
        # A slice of the projection, before keys and values.
        q = torch.randn(paged.num_padded, heads + 2 * kv_heads, dim, generator=generator)
        return {"q": q, "step": paged}

    def run(attention: Any, args: Args) -> tuple[Tensor, ...]:
        step = args["step"]
        q = args["q"][:, :heads]
        return (attention(q, step.cache, step.layer, step.inputs, dim**-0.5),)

    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": dim}
    return Case("paged_attention", f"{steps}-{name}", shape, make, run)


def _mla(steps: str, name: str, heads: int, nope: int, rope: int, rank: int, value: int) -> Case:
    paged = Paged(STEPS[steps], 1, rank + rope, kind="mla")

    def make(generator: torch.Generator) -> Args:
        def normal(*shape: int, size: float = 1.0) -> Tensor:
            return torch.randn(shape, generator=generator) * size

        return {
            "q_nope": normal(paged.num_padded, heads, nope),
            "q_rope": normal(paged.num_padded, heads, rope),
            "step": paged,
            "w_uk": normal(heads, nope, rank, size=rank**-0.5),
            "w_uv": normal(heads, rank, value, size=rank**-0.5),
        }

    def run(attention: Any, args: Args) -> tuple[Tensor, ...]:
        step = args["step"]
        scale = (nope + rope) ** -0.5
        queries = args["q_nope"], args["q_rope"]
        weights = args["w_uk"], args["w_uv"]
        return (attention(*queries, step.cache, step.layer, step.inputs, scale, *weights),)

    shape = {"heads": heads, "latent_dim": rank + rope, "v_head_dim": value}
    return Case("mla_attention", f"{steps}-{name}", shape, make, run)


_GQA_SHAPES: dict[str, tuple[int, int, int]] = {
    "one-head": (1, 1, 64),
    "group-of-five": (1, 5, 16),
    "two-groups-of-four": (2, 4, 128),
    "each-its-own": (3, 1, 16),
    "wide": (1, 2, 576),
}
_MLA_SHAPES = {"tiny": (1, 12, 8, 20, 10), "real": (2, 128, 64, 512, 128)}
ATTENTION_CASES: tuple[Case, ...] = (
    *(
        _attention(name, steps, *shape)
        for name, shape in _GQA_SHAPES.items()
        for steps in STEPS
        if steps not in _MANY_TOKENS or name in ("group-of-five", "two-groups-of-four")
    ),
    _attention("small-blocks", "mixed", 2, 2, 16, block_size=4, row_quantum=1),
    *(
        _mla(steps, name, *shape)
        for name, shape in _MLA_SHAPES.items()
        for steps in STEPS
        if steps not in _MANY_TOKENS or name == "tiny"
    ),
)
