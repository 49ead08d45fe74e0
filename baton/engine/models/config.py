"""What a model is (``families`` reads it). No torch here: drivers and the CLI need this."""

from __future__ import annotations

import dataclasses
from typing import Literal

from baton.core.config import EngineConfig
from baton.core.errors import ConfigError
from kvpool.layout import KVLayout

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn"]


@dataclasses.dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding. Scaling parameters are ``None`` where the kind has none."""

    kind: RopeKind = "default"
    """``dynamic`` is the unscaled table: it differs beyond ``max_position_embeddings`` only, and
    no sequence gets there."""
    theta: float = 10000.0
    factor: float = 1.0
    original_max_len: int | None = None
    """Positions that the unscaled model was trained for (llama3, yarn)."""
    low_freq_factor: float | None = None
    """llama3"""
    high_freq_factor: float | None = None
    """llama3"""
    beta_fast: float = 32.0
    """yarn"""
    beta_slow: float = 1.0
    """yarn"""
    attention_factor: float = 1.0
    """What cosines and sines are multiplied with (yarn)."""
    softmax_factor: float = 1.0
    """What the scale of attention is multiplied with (yarn with ``mscale_all_dim``, DeepSeek)."""
    truncate: bool = True
    """yarn: round the range of corrected dims to whole ones."""
    interleaved: bool = False
    """Checkpoint pairs neighbouring dims (DeepSeek); undone at load by reordering rows."""


@dataclasses.dataclass(frozen=True, slots=True)
class MlaConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1)."""

    q_lora_rank: int | None
    """``None``: queries are projected directly."""
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int

    @property
    def qk_head_dim(self) -> int:
        """Width of one query head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """What the cache holds per token and layer: the compressed KV and the rotated key."""
        return self.kv_lora_rank + self.qk_rope_head_dim


@dataclasses.dataclass(frozen=True, slots=True)
class MoeConfig:
    """The expert layers of a mixture-of-experts model."""

    num_experts: int
    num_experts_per_tok: int
    intermediate_size: int
    norm_topk_prob: bool
    """Whether the chosen experts' weights are scaled to sum to 1."""
    layers: tuple[int, ...]
    """Which layers are expert layers; the others have a dense MLP."""
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    num_groups: int = 1
    """Experts are cut into so many groups, of which ``topk_groups`` are looked at."""
    topk_groups: int = 1
    group_score: Literal["max", "top2_sum"] = "max"
    """What a group is judged by."""
    correction_bias: bool = False
    """A bias per expert that counts for the choice and not for the weight (DeepSeek-V3)."""
    scaling_factor: float = 1.0
    """What the weights are multiplied with in the end."""
    shared_intermediate_size: int | None = None
    """Inner size of the experts that see every token, together; ``None``: there are none."""


@dataclasses.dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shapes and constants of a decoder-only transformer."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    """1 with MLA: all heads share the latent."""
    head_dim: int
    """With MLA: the width of a query head."""
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool = False
    """With MLA: on the two down-projections."""
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """Norms per head on queries and keys (Qwen3)."""
    mla: MlaConfig | None = None
    moe: MoeConfig | None = None
    num_mtp_layers: int = 0
    """Layers for the prediction of several tokens (DeepSeek-V3), which a checkpoint may carry
    behind its last layer and which are not used."""

    @property
    def q_size(self) -> int:
        """Width of all query heads."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key (or value) heads."""
        return self.num_kv_heads * self.head_dim

    def is_moe_layer(self, layer: int) -> bool:
        """Whether ``layer`` has experts."""
        return self.moe is not None and layer in self.moe.layers


def kv_layout(model: ModelConfig, engine: EngineConfig) -> KVLayout:
    """The KV blocks that an engine with these settings reads and writes."""
    if engine.device == "emulated":
        # A word for a token's id, and one for its fingerprint; see baton/engine/emulated.py.
        return KVLayout("float32", engine.block_size, num_layers=1, num_kv_heads=1, head_dim=1)
    if model.mla is not None:
        return KVLayout(
            dtype=engine.dtype,
            block_size=engine.block_size,
            num_layers=model.num_layers,
            num_kv_heads=1,
            head_dim=model.mla.latent_dim,
            kind="mla",
        )
    shards = min(engine.tp, model.num_kv_heads)
    return KVLayout(
        dtype=engine.dtype,
        block_size=engine.block_size,
        num_layers=model.num_layers,
        num_kv_heads=model.num_kv_heads // shards,
        head_dim=model.head_dim,
        num_shards=shards,
    )


def kv_shard(layout: KVLayout, tp_rank: int, tp_size: int) -> int:
    """Which shard of every block a rank reads and writes; ranks with equal heads share one."""
    return tp_rank * layout.num_shards // tp_size


def resolve_max_model_len(model: ModelConfig, engine: EngineConfig) -> int:
    """Longest sequence in tokens: the model's limit, the user's, and what the cache can hold.

    A cache whose size is still to be measured bounds nothing.
    Raises ``ConfigError`` where the user asks for more than the model was made for.
    """
    wanted = engine.max_model_len
    emulated = engine.device == "emulated"  # then the profile's model counts, not this one
    if wanted is not None and not emulated and wanted > model.max_position_embeddings:
        raise ConfigError(
            f"max_model_len {wanted} is more than the model's max_position_embeddings "
            f"{model.max_position_embeddings}: lower max_model_len",
            param="max_model_len",
        )
    limit = model.max_position_embeddings if wanted is None else wanted
    return limit if engine.num_blocks is None else min(limit, engine.kv_blocks * engine.block_size)
