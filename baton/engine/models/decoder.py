"""The forward pass of all families: one decoder-only transformer, put together by the loader.

It knows no device and no ranks. Where ranks share a product's columns or rows, a ``Linear`` that
gathers or sums hides it (``parallel/layers.py``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from baton.engine.kv_cache import KVCache
from baton.engine.layers import Mlp, Moe, RotaryTable
from baton.engine.models.attention import GroupedQueryAttention, LatentAttention
from baton.engine.models.config import ModelConfig
from baton.engine.ops.linear import Linear
from baton.engine.step_inputs import StepInputs


@dataclasses.dataclass(frozen=True, slots=True)
class Layer:
    """One transformer layer."""

    input_norm: Tensor
    attention: GroupedQueryAttention | LatentAttention
    mlp_norm: Tensor
    mlp: Mlp | Moe


@dataclasses.dataclass(frozen=True, slots=True)
class Decoder:
    """A loaded model: one rank's part of it."""

    config: ModelConfig
    embedding: Callable[[Tensor], Tensor]
    """[T] token ids → [T, hidden]"""
    layers: tuple[Layer, ...]
    final_norm: Tensor
    lm_head: Linear
    """hidden → vocab, whole on every rank"""
    rotary: RotaryTable
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]

    @property
    def row_quantum(self) -> int:
        """Steps of a multiple of so many tokens give every token the same bits in each of them."""
        return max(max(layer.attention.row_quantum, layer.mlp.row_quantum) for layer in self.layers)

    def forward(self, inputs: StepInputs, cache: KVCache) -> Tensor:
        """Run all layers on a step's tokens and write what they cache.

        Returns the last layer's output [padded tokens, hidden], from which ``logits`` takes the
        rows that are asked for.
        """
        eps = self.config.rms_norm_eps
        rotary_T21D = self.rotary.lookup(inputs.positions_T)
        residual = self.embedding(inputs.token_ids_T)
        out: Tensor | None = None
        for number, layer in enumerate(self.layers):
            if out is None:
                normed = self.rms_norm(residual, layer.input_norm, eps)
            else:
                normed, residual = self.add_rms_norm(out, residual, layer.input_norm, eps)
            attended = layer.attention(normed, number, inputs, rotary_T21D, cache)
            normed, residual = self.add_rms_norm(attended, residual, layer.mlp_norm, eps)
            out = layer.mlp(normed, inputs)
        return residual if out is None else residual + out

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """[N, hidden] of ``forward`` → [N, vocab], float32."""
        count = len(hidden_NH)
        hidden_NH = F.pad(hidden_NH, (0, 0, 0, -count % self.lm_head.row_quantum))
        normed = self.rms_norm(hidden_NH, self.final_norm, self.config.rms_norm_eps)
        return self.lm_head(normed)[:count].float()
