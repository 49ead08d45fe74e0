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

from baton.engine.linear import Linear


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

    gate_up: Linear
    """hidden → 2 * I, gate before up."""
    down: Linear
    """I → hidden"""

    @property
    def row_quantum(self) -> int:
        """Of the step's tokens; see ``Linear``."""
        return max(self.gate_up.row_quantum, self.down.row_quantum)

    def __call__(self, x_TH: Tensor, num_tokens: int) -> Tensor:
        """[T, H] → [T, H]."""
        return self.down(_silu_mul(self.gate_up(x_TH)))


@dataclasses.dataclass(frozen=True, slots=True)
class Experts:
    """Top-k routed SwiGLU experts.

    Tokens are sorted by expert once and each expert that was hit computes its slice. For the sizes
    Baton meets on a CPU this beats both computing all experts in one product and gathering the
    chosen weights, from one token up.
    """

    router: Linear
    gate_up: tuple[Linear, ...]
    """Per expert: hidden → 2 * I."""
    down: tuple[Linear, ...]
    """Per expert: I → hidden."""
    top_k: int
    renormalise: bool

    def __call__(self, x_TH: Tensor, num_tokens: int) -> Tensor:
        """[T, H] → [T, H]; tokens from ``num_tokens`` on are padding and visit no expert."""
        weights_TK, experts_TK = self.route(x_TH)
        chosen_N = experts_TK[:num_tokens].reshape(-1)
        order_N = chosen_N.argsort(stable=True)
        counts = chosen_N.bincount(minlength=len(self.gate_up)).tolist()
        quantum = max(self.gate_up[0].row_quantum, self.down[0].row_quantum)
        # Each slice is rounded up to whole quanta: it computes some of its neighbours' rows too,
        # and the last one some rows of token 0.
        sorted_NH = x_TH.index_select(0, F.pad(order_N, (0, quantum)) // self.top_k)
        parts = []
        begin = 0
        for expert, count in enumerate(counts):
            if count:
                x = sorted_NH[begin : begin + -(-count // quantum) * quantum]
                out = self.down[expert](_silu_mul(self.gate_up[expert](x)))
                parts.append(out[:count])
                begin += count
        # Back to token order, so that a token's sum does not depend on the rest of the step.
        out_NH = x_TH.new_zeros(len(x_TH) * self.top_k, x_TH.shape[1])
        out_NH.index_copy_(0, order_N, torch.cat(parts))
        out_TKH = out_NH.view(-1, self.top_k, x_TH.shape[-1])
        return (out_TKH * weights_TK.unsqueeze(-1)).sum(1)

    @property
    def row_quantum(self) -> int:
        """Of the step's tokens; the experts' own products are padded here."""
        return self.router.row_quantum

    def route(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and numbers of each token's experts, both [T, K], best first."""
        probs_TE = torch.softmax(self.router(x_TH), -1, dtype=torch.float32)
        weights_TK, experts_TK = probs_TE.topk(self.top_k, -1)
        if self.renormalise:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        return weights_TK.to(x_TH.dtype), experts_TK
