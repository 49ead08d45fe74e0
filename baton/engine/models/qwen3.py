"""Qwen3, dense and mixture-of-experts: the forward pass on one device."""

from __future__ import annotations

import dataclasses

import torch.nn.functional as F
from torch import Tensor

from baton.engine.attention import paged_attention
from baton.engine.kv_cache import KVCache
from baton.engine.layers import Experts, Mlp, RotaryTable, rms_norm, rotate
from baton.engine.linear import Linear
from baton.engine.models.config import ModelConfig
from baton.engine.step_inputs import StepInputs


@dataclasses.dataclass(frozen=True, slots=True)
class Attention:
    """Weights of one attention layer; queries, keys and values are one projection."""

    qkv: Linear
    """hidden → q_size + 2 * kv_size"""
    qk_norm: Tensor
    """[heads + kv_heads, head_dim]: the query norm's weight per query head, then the key norm's."""
    output: Linear
    """q_size → hidden"""


@dataclasses.dataclass(frozen=True, slots=True)
class Layer:
    """Weights of one transformer layer."""

    input_norm: Tensor
    attention: Attention
    mlp_norm: Tensor
    mlp: Mlp | Experts


@dataclasses.dataclass(frozen=True, slots=True)
class Qwen3:
    """A loaded model."""

    config: ModelConfig
    embedding: Tensor
    """[vocab, hidden]"""
    layers: tuple[Layer, ...]
    final_norm: Tensor
    lm_head: Linear
    """hidden → vocab"""
    rotary: RotaryTable

    @property
    def row_quantum(self) -> int:
        """Steps of a multiple of so many tokens give every token the same bits in each of them."""
        quanta = []
        for layer in self.layers:
            products = (layer.attention.qkv, layer.attention.output, layer.mlp)
            quanta += [product.row_quantum for product in products]
        return max(quanta)

    def forward(self, inputs: StepInputs, cache: KVCache) -> Tensor:
        """Run all layers on a step's tokens and write their keys and values.

        Returns the last layer's output [padded tokens, hidden], from which ``logits`` takes the
        rows that are asked for.
        """
        eps = self.config.rms_norm_eps
        hidden_TH = F.embedding(inputs.token_ids_T, self.embedding)
        rotary_T21D = self.rotary.lookup(inputs.positions_T)
        for number, layer in enumerate(self.layers):
            normed = rms_norm(hidden_TH, layer.input_norm, eps)
            hidden_TH = hidden_TH + self._attend(normed, number, inputs, rotary_T21D, cache)
            hidden_TH = hidden_TH + layer.mlp(
                rms_norm(hidden_TH, layer.mlp_norm, eps), inputs.num_tokens
            )
        return hidden_TH

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """[N, hidden] of ``forward`` → [N, vocab], float32."""
        count = len(hidden_NH)
        hidden_NH = F.pad(hidden_NH, (0, 0, 0, -count % self.lm_head.row_quantum))
        normed = rms_norm(hidden_NH, self.final_norm, self.config.rms_norm_eps)
        return self.lm_head(normed)[:count].float()

    def _attend(
        self, x_TH: Tensor, number: int, inputs: StepInputs, rotary_T21D: Tensor, cache: KVCache
    ) -> Tensor:
        config, weights = self.config, self.layers[number].attention
        num_rotated = config.num_heads + config.num_kv_heads
        qkv = weights.qkv(x_TH).view(len(x_TH), -1, config.head_dim)
        normed = rms_norm(qkv[:, :num_rotated], weights.qk_norm, config.rms_norm_eps)
        # Back in place, so that keys and values stay neighbours and are stored by one write.
        rotate(normed, rotary_T21D, out=qkv[:, :num_rotated])
        keys_values = qkv[:, config.num_heads :].view(len(x_TH), 2, config.kv_size)
        cache.write(inputs.rows_LT2[number], keys_values[: inputs.num_tokens])
        attended = paged_attention(qkv[:, : config.num_heads], cache, number, inputs)
        return weights.output(attended)
