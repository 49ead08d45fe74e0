"""The building blocks of a decoder layer besides attention: rotary table, MLP, experts.

They hold what the loader laid out and bound (see ``ops``) and know neither devices nor ranks: what
crosses ranks is hidden in a ``Linear`` that sums, or in the ``Exchange`` of experts' tokens. Dim
letters as in ``step_inputs``, and H hidden, I intermediate, E experts, K experts per token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from baton.engine.models.config import MoeConfig, RopeConfig
from baton.engine.models.rope import inverse_frequencies
from baton.engine.ops.linear import Linear
from baton.engine.parallel.exchange import Exchange
from baton.engine.step_inputs import StepInputs


class RotaryTable:
    """Cosines and sines of all positions below ``max_len``."""

    def __init__(
        self, rope: RopeConfig, dim: int, max_len: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        positions = torch.arange(max_len, dtype=torch.float32)
        angles = positions.unsqueeze(1) * inverse_frequencies(rope, dim)
        cos, sin = angles.cos() * rope.attention_factor, angles.sin() * rope.attention_factor
        # The sign of the rotated half is folded into the table: rotation is then a roll.
        table = torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)), dim=1)
        self._table = table.to(device=device, dtype=dtype)

    @property
    def nbytes(self) -> int:
        """Memory of the table."""
        return self._table.nbytes

    def lookup(self, positions_T: Tensor) -> Tensor:
        """[T, 2, 1, D]: cosines and signed sines, ready to broadcast over heads."""
        return self._table.index_select(0, positions_T).unsqueeze(2)


@dataclasses.dataclass(frozen=True, slots=True)
class Mlp:
    """SwiGLU."""

    gate_up: Linear
    """hidden → 2 * I, gate before up."""
    down: Linear
    """I → hidden"""
    swiglu: Callable[[Tensor], Tensor]

    @property
    def row_quantum(self) -> int:
        """Of the step's tokens; see ``Linear``."""
        return max(self.gate_up.row_quantum, self.down.row_quantum)

    def __call__(self, x_TH: Tensor, inputs: StepInputs) -> Tensor:
        """[T, H] → [T, H]."""
        return self.down(self.swiglu(self.gate_up(x_TH)))


@dataclasses.dataclass(frozen=True, slots=True)
class LocalExperts:
    """This rank's experts: routed SwiGLU over sorted tokens."""

    first: int
    """Number of the first one."""
    count: int
    total: int
    """Experts on all ranks together."""
    gate_up: Callable[[Tensor, Tensor], Tensor]
    """Grouped: (rows, counts) → rows."""
    down: Callable[[Tensor, Tensor], Tensor]
    swiglu: Callable[[Tensor], Tensor]

    def __call__(
        self, x_NH: Tensor, experts_NK: Tensor, weights_NK: Tensor, num_rows: int
    ) -> Tensor:
        """Per row the weighted sum over those of its experts that are here; [N, H].

        Rows from ``num_rows`` on are padding, visit no expert, and come out as zeros.
        """
        top_k = experts_NK.shape[1]
        local_M = experts_NK[:num_rows].reshape(-1) - self.first
        if self.count < self.total:
            here_M = (local_M >= 0) & (local_M < self.count)
            local_M = torch.where(here_M, local_M, self.count)
        # Tokens are sorted by expert once, strangers' last; each expert then has a slice.
        order_M = local_M.argsort(stable=True)
        # Not bincount, which asks the device for its largest value.
        counts_E = local_M.new_zeros(self.count + 1)
        counts_E = counts_E.scatter_add_(0, local_M, torch.ones_like(local_M))[: self.count]
        sorted_MH = x_NH.index_select(0, order_M // top_k)
        out_MH = self.down(self.swiglu(self.gate_up(sorted_MH, counts_E)), counts_E)
        if self.count < self.total:
            out_MH = torch.where(here_M.index_select(0, order_M).unsqueeze(1), out_MH, 0)
        # Back to token order, so that a token's sum does not depend on the rest of the step.
        out_NH = x_NH.new_zeros(len(x_NH) * top_k, x_NH.shape[1]).index_copy_(0, order_M, out_MH)
        out_NKH = out_NH.view(-1, top_k, x_NH.shape[1])
        return (out_NKH * weights_NK.unsqueeze(-1)).sum(1)


@dataclasses.dataclass(frozen=True, slots=True)
class Moe:
    """A mixture of experts, with or without shared ones that see every token."""

    config: MoeConfig
    router: Linear
    router_dtype: torch.dtype
    correction_E: Tensor | None
    routing: Callable[[Tensor, Tensor | None, MoeConfig], tuple[Tensor, Tensor]]
    experts: LocalExperts
    exchange: Exchange
    shared: Mlp | None

    @property
    def row_quantum(self) -> int:
        """Of the step's tokens; the experts' own products are padded by themselves."""
        return max(self.router.row_quantum, 1 if self.shared is None else self.shared.row_quantum)

    def __call__(self, x_TH: Tensor, inputs: StepInputs) -> Tensor:
        """[T, H] → [T, H]."""
        logits_TE = self.router(x_TH.to(self.router_dtype))
        weights_TK, experts_TK = self.routing(logits_TE, self.correction_E, self.config)
        out_TH = self.exchange(
            x_TH,
            experts_TK,
            weights_TK.to(x_TH.dtype),
            inputs.num_tokens,
            inputs.group_tokens,
            self.experts,
        )
        return out_TH if self.shared is None else out_TH + self.shared(x_TH, inputs)


def embed(token_ids_T: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of a table that may have its file's dtype: cast after the lookup, to the same bits."""
    return F.embedding(token_ids_T, weight).to(dtype)
