"""The building blocks of the models: norm, rotary embedding, MLP, experts. Plain torch.

Casts follow the reference implementation of the models: norms and the router's softmax in float32,
everything else in the model's dtype. Dim letters as in ``step_inputs``, and H hidden, I
intermediate, E experts, K experts per token.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale the last dim to unit mean square, then by ``weight`` (any shape that broadcasts)."""
    if x.dtype == torch.float32:
        return F.rms_norm(x, x.shape[-1:], None, eps) * weight
    return weight * F.rms_norm(x.float(), x.shape[-1:], None, eps).to(x.dtype)


class RotaryTable:
    """Cosines and sines of all positions below ``max_len``."""

    def __init__(
        self, head_dim: int, theta: float, max_len: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        angles = torch.arange(max_len, dtype=torch.float32).unsqueeze(1) / theta**exponents
        cos, sin = angles.cos(), angles.sin()
        # The sign of the rotated half is folded into the table: rotation is then a roll.
        table = torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)), dim=1)
        self._table = table.to(device=device, dtype=dtype)

    def lookup(self, positions_T: Tensor) -> Tensor:
        """[T, 2, 1, D]: cosines and signed sines, ready to broadcast over heads."""
        return self._table.index_select(0, positions_T).unsqueeze(2)


def rotate(x_THD: Tensor, rotary_T21D: Tensor, out: Tensor) -> None:
    """Apply the rotary embedding to all heads of ``x_THD``, into ``out``."""
    cos, sin = rotary_T21D.unbind(1)
    rolled = x_THD.roll(x_THD.shape[-1] // 2, -1)
    torch.addcmul(x_THD * cos, rolled, sin, out=out)


def _silu_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


@dataclasses.dataclass(frozen=True, slots=True)
class Mlp:
    """SwiGLU."""

    gate_up: Tensor
    """[2 * I, H], gate before up."""
    down: Tensor
    """[H, I]"""

    def __call__(self, x_TH: Tensor) -> Tensor:
        """[T, H] → [T, H]."""
        return F.linear(_silu_mul(F.linear(x_TH, self.gate_up)), self.down)


@dataclasses.dataclass(frozen=True, slots=True)
class Experts:
    """Top-k routed SwiGLU experts.

    Tokens are sorted by expert once and each expert that was hit computes its slice. For the sizes
    Baton meets on a CPU this beats both computing all experts in one product and gathering the
    chosen weights, from one token up.
    """

    router: Tensor
    """[E, H]"""
    gate_up: Tensor
    """[E, 2 * I, H]"""
    down: Tensor
    """[E, I, H]: transposed, the faster way round for few tokens."""
    top_k: int
    renormalise: bool

    def __call__(self, x_TH: Tensor) -> Tensor:
        """[T, H] → [T, H]."""
        weights_TK, experts_TK = self.route(x_TH)
        chosen_N = experts_TK.view(-1)
        order_N = chosen_N.argsort(stable=True)
        counts = chosen_N.bincount(minlength=len(self.router)).tolist()
        sorted_NH = x_TH.index_select(0, order_N // self.top_k)
        parts = []
        begin = 0
        for expert, count in enumerate(counts):
            if count:
                x = sorted_NH[begin : begin + count]
                inner = _silu_mul(F.linear(x, self.gate_up[expert]))
                parts.append(inner @ self.down[expert])
                begin += count
        # Back to token order, so that a token's sum does not depend on the rest of the step.
        out_NH = torch.empty_like(sorted_NH).index_copy_(0, order_N, torch.cat(parts))
        out_TKH = out_NH.view(-1, self.top_k, x_TH.shape[-1])
        return (out_TKH * weights_TK.unsqueeze(-1)).sum(1)

    def route(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and numbers of each token's experts, both [T, K], best first."""
        probs_TE = torch.softmax(F.linear(x_TH, self.router), -1, dtype=torch.float32)
        weights_TK, experts_TK = probs_TE.topk(self.top_k, -1)
        if self.renormalise:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        return weights_TK.to(x_TH.dtype), experts_TK
