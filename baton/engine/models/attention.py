"""Attention layers: projections, norms, rotation, cache, and the attention operation itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from baton.engine.kv_cache import KVCache
from baton.engine.models.config import MlaConfig
from baton.engine.ops.linear import Linear
from baton.engine.step_inputs import StepInputs


@dataclasses.dataclass(frozen=True, slots=True)
class AttentionOps:
    """The operations of one model's attention layers."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    rotary: Callable[..., None]
    cache_write: Callable[[Tensor, Tensor, Tensor], None]
    attention: Callable[..., Tensor]
    """``paged_attention`` or ``mla_attention``."""


@dataclasses.dataclass(frozen=True, slots=True)
class GroupedQueryAttention:
    """Queries, keys and values are one projection. Head counts are this rank's."""

    ops: AttentionOps
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    eps: float
    qkv: Linear
    """hidden → (heads + 2 * kv_heads) * head_dim"""
    qk_norm: Tensor | None
    """[heads + kv_heads, head_dim]: the query norm's weight per query head, then the key norm's."""
    output: Linear
    """heads * head_dim → hidden"""

    @property
    def row_quantum(self) -> int:
        """See ``Linear``."""
        return max(self.qkv.row_quantum, self.output.row_quantum)

    def __call__(
        self, x_TH: Tensor, layer: int, inputs: StepInputs, rotary_T21D: Tensor, cache: KVCache
    ) -> Tensor:
        """[T, H] → [T, H]; writes the step's keys and values."""
        num_rotated = self.num_heads + self.num_kv_heads
        qkv = self.qkv(x_TH).view(len(x_TH), -1, self.head_dim)
        rotated = qkv[:, :num_rotated]
        normed = rotated
        if self.qk_norm is not None:
            normed = self.ops.rms_norm(rotated, self.qk_norm, self.eps)
        # Back in place, so that keys and values stay neighbours and are stored by one write.
        self.ops.rotary(normed, rotary_T21D, out=rotated)
        planes = qkv[: inputs.num_tokens, self.num_heads :].view(
            inputs.num_tokens, 2, self.num_kv_heads * self.head_dim
        )
        self.ops.cache_write(cache.rows, inputs.rows_LTP[layer], planes)
        attended = self.ops.attention(qkv[:, : self.num_heads], cache, layer, inputs, self.scale)
        return self.output(attended)


@dataclasses.dataclass(frozen=True, slots=True)
class LatentAttention:
    """MLA (DeepSeek-V2, arXiv:2405.04434). What is cached is the latent, not keys and values."""

    ops: AttentionOps
    num_heads: int
    config: MlaConfig
    scale: float
    eps: float
    down: Linear
    """hidden → queries (compressed, or this rank's heads) and compressed KV with the rotated key"""
    q_norm: Tensor | None
    q_up: Linear | None
    """q_lora_rank → heads * qk_head_dim; ``None``: ``down`` gives the queries themselves"""
    kv_norm: Tensor
    w_uk_GNC: Tensor
    """Unfolds keys: [heads, qk_nope_head_dim, kv_lora_rank]."""
    w_uv_GCV: Tensor
    """Unfolds values: [heads, kv_lora_rank, v_head_dim]."""
    output: Linear
    """heads * v_head_dim → hidden"""

    @property
    def row_quantum(self) -> int:
        """See ``Linear``. The products per head are plain ones, which want up to 4."""
        products = [self.down, self.output] + ([] if self.q_up is None else [self.q_up])
        return max([4] + [product.row_quantum for product in products])

    def __call__(
        self, x_TH: Tensor, layer: int, inputs: StepInputs, rotary_T21D: Tensor, cache: KVCache
    ) -> Tensor:
        """[T, H] → [T, H]; writes the step's latents."""
        mla = self.config
        down = self.down(x_TH)
        q = down[:, : -mla.latent_dim]
        if self.q_up is not None and self.q_norm is not None:
            q = self.q_up(self.ops.rms_norm(q, self.q_norm, self.eps))
        q = q.reshape(len(x_TH), self.num_heads, mla.qk_head_dim)
        q_nope, q_rope = q[..., : mla.qk_nope_head_dim], q[..., mla.qk_nope_head_dim :]
        q_rotated = torch.empty_like(q_rope)
        self.ops.rotary(q_rope, rotary_T21D, out=q_rotated)

        latent = torch.empty_like(down[:, -mla.latent_dim :])
        compressed = down[:, -mla.latent_dim : -mla.qk_rope_head_dim]
        latent[:, : mla.kv_lora_rank] = self.ops.rms_norm(compressed, self.kv_norm, self.eps)
        self.ops.rotary(
            down[:, -mla.qk_rope_head_dim :].unsqueeze(1),
            rotary_T21D,
            out=latent[:, mla.kv_lora_rank :].unsqueeze(1),
        )
        self.ops.cache_write(
            cache.rows, inputs.rows_LTP[layer], latent[: inputs.num_tokens].unsqueeze(1)
        )
        attended = self.ops.attention(
            q_nope, q_rotated, cache, layer, inputs, self.scale, self.w_uk_GNC, self.w_uv_GCV
        )
        return self.output(attended)
