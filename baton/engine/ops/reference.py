"""Every operation in plain torch: what the overrides are compared with, and what runs elsewhere.

Written to be read and to run on any device. Numbers are widened to float32 where the models'
authors do so; float64 input is computed in float64, which is how the conformance suite gets its
yardstick. Dim letters as in ``step_inputs``, and H hidden, I intermediate, E experts, K experts
per token, N rows, G heads, C compressed KV, R rotated key.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from baton.engine.kv_cache import KVCache
from baton.engine.models.config import MoeConfig
from baton.engine.step_inputs import StepInputs


def wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale the last dim to unit mean square, then by ``weight`` (any shape that broadcasts)."""
    normed = wide(x)
    normed = normed * torch.rsqrt(normed.square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm of ``x + residual``, and that sum, which is the next residual."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def rotary(x_TGD: Tensor, rotary_T21D: Tensor, out: Tensor) -> None:
    """Rotate all heads by their token's angles, into ``out`` (which may be ``x`` itself).

    ``rotary_T21D``: cosines, and sines whose first half is negative, so that the rotated half is
    a roll. Pairs are (i, i + D/2).
    """
    cos, sin = rotary_T21D.unbind(1)
    rolled = x_TGD.roll(x_TGD.shape[-1] // 2, -1)
    torch.addcmul(x_TGD * cos, rolled, sin, out=out)


def swiglu(gate_up: Tensor) -> Tensor:
    """[..., 2 * I], gate before up → [..., I]."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def cache_write(cache_rows: Tensor, rows_TP: Tensor, values_TPW: Tensor) -> None:
    """Store the planes of T tokens in the cache's rows."""
    cache_rows.index_put_((rows_TP,), values_TPW)


def moe_routing(
    logits_TE: Tensor, bias_E: Tensor | None, config: MoeConfig
) -> tuple[Tensor, Tensor]:
    """Weights (float32 or wider) and numbers of each token's experts, both [T, K].

    Sources: Qwen3-MoE (softmax), DeepSeek-V2 (arXiv:2405.04434, section 2.2: groups judged by
    their best expert), DeepSeek-V3 (arXiv:2412.19437, section 2.1.2: sigmoid, correction bias,
    groups judged by their two best).
    """
    logits_TE = wide(logits_TE)
    scores_TE = logits_TE.sigmoid() if config.scoring == "sigmoid" else logits_TE.softmax(-1)
    judged_TE = scores_TE if bias_E is None else scores_TE + bias_E
    if config.num_groups > 1:
        grouped = judged_TE.view(len(judged_TE), config.num_groups, -1)
        if config.group_score == "max":
            group_scores = grouped.amax(-1)
        else:
            group_scores = grouped.topk(2, -1).values.sum(-1)
        chosen = group_scores.topk(config.topk_groups, -1).indices
        outside = torch.ones_like(group_scores, dtype=torch.bool).scatter_(-1, chosen, False)
        # What lies outside must lose to whatever is inside; V2's scores are above zero.
        fill = 0.0 if config.scoring == "softmax" else float("-inf")
        judged_TE = grouped.masked_fill(outside.unsqueeze(-1), fill).flatten(-2)
    experts_TK = judged_TE.topk(config.num_experts_per_tok, -1).indices
    weights_TK = scores_TE.gather(-1, experts_TK)
    if config.norm_topk_prob:
        total = weights_TK.sum(-1, keepdim=True)
        weights_TK = weights_TK / (total + 1e-20 if config.scoring == "sigmoid" else total)
    if config.scaling_factor != 1.0:
        weights_TK = weights_TK * config.scaling_factor
    return weights_TK, experts_TK


class GroupedMatmul:
    """Row group e of x times expert e's weight."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        """``weights``: [out, in] per expert."""
        self._weights = tuple(weights)

    def __call__(self, x_NH: Tensor, counts_E: Tensor) -> Tensor:
        """``counts_E``: rows per expert, in order. Rows beyond their sum belong to nobody: what
        comes out there may be anything (here zeros), and the caller must not use it."""
        sizes = counts_E.tolist()
        parts = torch.split_with_sizes(x_NH[: sum(sizes)], sizes)
        outs = [x @ weight.t() for x, weight in zip(parts, self._weights, strict=True)]
        out = torch.cat(outs)
        return F.pad(out, (0, 0, 0, len(x_NH) - len(out)))


def paged_attention(
    q_TGD: Tensor, cache: KVCache, layer: int, inputs: StepInputs, scale: float
) -> Tensor:
    """Attend from every token of the step to its sequence's cached context, itself included.

    ``q_TGD`` [padded tokens, query heads, head dim], rotated. The step's own keys and values are
    in ``cache`` already. Returns [padded tokens, query heads * head dim], padding zero. With one
    plane per token it is key and value.
    """
    out = torch.zeros_like(q_TGD)
    for token, planes_PSGD in _contexts(cache, layer, inputs):
        keys, values = wide(planes_PSGD[0]), wide(planes_PSGD[-1])
        q = wide(q_TGD[token]).view(keys.shape[1], -1, keys.shape[2])
        scores = torch.einsum("hgd,shd->hgs", q.to(keys.dtype), keys) * scale
        attended = torch.einsum("hgs,shd->hgd", scores.softmax(-1), values)
        out[token] = attended.reshape(out.shape[1:])
    return out.flatten(1)


def mla_attention(
    q_nope_TGN: Tensor,
    q_rope_TGR: Tensor,
    cache: KVCache,
    layer: int,
    inputs: StepInputs,
    scale: float,
    w_uk_GNC: Tensor,
    w_uv_GCV: Tensor,
) -> Tensor:
    """Multi-head latent attention: keys and values are unfolded from the cached latents.

    Source: DeepSeek-V2, arXiv:2405.04434, equations 9 to 19. Returns [padded tokens, heads * V].
    """
    rank = w_uk_GNC.shape[2]
    out = q_nope_TGN.new_zeros(len(q_nope_TGN), w_uv_GCV.shape[0], w_uv_GCV.shape[2])
    w_uk, w_uv = wide(w_uk_GNC), wide(w_uv_GCV)
    for token, planes in _contexts(cache, layer, inputs):
        latent = wide(planes[0, :, 0]).to(w_uk.dtype)
        keys = torch.einsum("sc,gnc->gsn", latent[:, :rank], w_uk)
        values = torch.einsum("sc,gcv->gsv", latent[:, :rank], w_uv)
        scores = torch.einsum("gn,gsn->gs", wide(q_nope_TGN[token]), keys)
        scores = scores + torch.einsum("gr,sr->gs", wide(q_rope_TGR[token]), latent[:, rank:])
        out[token] = torch.einsum("gs,gsv->gv", (scores * scale).softmax(-1), values).to(out.dtype)
    return out.flatten(1)


def _contexts(cache: KVCache, layer: int, inputs: StepInputs) -> Iterator[tuple[int, Tensor]]:
    """Per token of the step: its index and its context's planes [P, S, heads, dim]."""
    for segment in inputs.segments:
        num_rows = 1 if segment.tiles else segment.end - segment.begin
        planes = cache.read(segment.pages_LN[layer], num_rows)
        for token in range(segment.begin, segment.end):
            context = int(inputs.positions_T[token]) + 1
            row = 0 if segment.tiles else token - segment.begin
            yield token, planes[:, row, :context]


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 per row: x ≈ values * scale. Returns int8 [..., K] and float32 [..., 1]."""
    scale = wide(x).abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
    return (wide(x) / scale).round().clamp(-127, 127).to(torch.int8), scale.float()


def dequantize(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of :func:`quantize`, but for its rounding."""
    return (values * wide(scale)).to(dtype)
