"""Names and shapes of a checkpoint's tensors: what is checked at start-up and what is loaded."""

from __future__ import annotations

from baton.engine.models.config import ModelConfig, MoeConfig

EMBED = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"
CORRECTION_BIAS = "gate.e_score_correction_bias"
"""Behind a layer's ``mlp.``"""
SHARED_EXPERTS = "shared_experts."
"""Behind a layer's ``mlp.``"""

Shape = tuple[int, ...]


def layer_prefix(layer: int) -> str:
    """What the names of a layer's tensors begin with."""
    return f"model.layers.{layer}."


def expert_prefix(layer: int, expert: int) -> str:
    """What the names of an expert's tensors begin with."""
    return f"{layer_prefix(layer)}mlp.experts.{expert}."


def expected_tensors(config: ModelConfig) -> dict[str, Shape]:
    """Name → shape of every tensor that the model needs."""
    hidden = config.hidden_size
    shapes: dict[str, Shape] = {EMBED: (config.vocab_size, hidden), FINAL_NORM: (hidden,)}
    if not config.tie_word_embeddings:
        shapes[LM_HEAD] = (config.vocab_size, hidden)
    attention = _attention if config.mla is None else _latent_attention
    for layer in range(config.num_layers):
        prefix = layer_prefix(layer)
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        shapes |= attention(config, prefix + "self_attn.")
        if config.moe is not None and config.is_moe_layer(layer):
            shapes |= _experts(config, config.moe, layer)
        else:
            shapes |= _mlp(config, config.intermediate_size, prefix + "mlp.", config.mlp_bias)
    return shapes


def ignored(name: str, shape: Shape, config: ModelConfig) -> bool:
    """Whether a tensor that the model does not need may stay in its files.

    Tied checkpoints often carry a copy of the embedding, old ones the rotary frequencies,
    DeepSeek-V3 its layers for the prediction of several tokens. ``transformers`` writes tensors
    without elements for shared experts of size 0.
    """
    extra = range(config.num_layers, config.num_layers + config.num_mtp_layers)
    return (
        0 in shape
        or name.endswith("rotary_emb.inv_freq")
        or (name == LM_HEAD and config.tie_word_embeddings)
        or any(name.startswith(layer_prefix(layer)) for layer in extra)
    )


def _attention(config: ModelConfig, prefix: str) -> dict[str, Shape]:
    hidden = config.hidden_size
    widths = {"q_proj": config.q_size, "k_proj": config.kv_size, "v_proj": config.kv_size}
    shapes: dict[str, Shape] = {}
    for name, width in widths.items():
        shapes |= _linear(prefix + name, width, hidden, config.qkv_bias)
    shapes |= _linear(prefix + "o_proj", hidden, config.q_size, config.output_bias)
    if config.qk_norm:
        shapes[prefix + "q_norm.weight"] = shapes[prefix + "k_norm.weight"] = (config.head_dim,)
    return shapes


def _latent_attention(config: ModelConfig, prefix: str) -> dict[str, Shape]:
    mla, hidden, heads = config.mla, config.hidden_size, config.num_heads
    assert mla is not None
    shapes: dict[str, Shape] = {}
    if mla.q_lora_rank is None:
        shapes |= _linear(prefix + "q_proj", config.q_size, hidden)
    else:
        shapes |= _linear(prefix + "q_a_proj", mla.q_lora_rank, hidden, config.qkv_bias)
        shapes[prefix + "q_a_layernorm.weight"] = (mla.q_lora_rank,)
        shapes |= _linear(prefix + "q_b_proj", config.q_size, mla.q_lora_rank)
    shapes |= _linear(prefix + "kv_a_proj_with_mqa", mla.latent_dim, hidden, config.qkv_bias)
    shapes[prefix + "kv_a_layernorm.weight"] = (mla.kv_lora_rank,)
    expanded = heads * (mla.qk_nope_head_dim + mla.v_head_dim)
    shapes |= _linear(prefix + "kv_b_proj", expanded, mla.kv_lora_rank)
    shapes |= _linear(prefix + "o_proj", hidden, heads * mla.v_head_dim, config.output_bias)
    return shapes


def _experts(config: ModelConfig, moe: MoeConfig, layer: int) -> dict[str, Shape]:
    prefix = layer_prefix(layer) + "mlp."
    shapes: dict[str, Shape] = {prefix + "gate.weight": (moe.num_experts, config.hidden_size)}
    if moe.correction_bias:
        shapes[prefix + CORRECTION_BIAS] = (moe.num_experts,)
    for expert in range(moe.num_experts):
        shapes |= _mlp(config, moe.intermediate_size, expert_prefix(layer, expert))
    if moe.shared_intermediate_size is not None:
        inner = moe.shared_intermediate_size
        shapes |= _mlp(config, inner, prefix + SHARED_EXPERTS, config.mlp_bias)
    return shapes


def _mlp(config: ModelConfig, inner: int, prefix: str, bias: bool = False) -> dict[str, Shape]:
    hidden = config.hidden_size
    return (
        _linear(prefix + "gate_proj", inner, hidden, bias)
        | _linear(prefix + "up_proj", inner, hidden, bias)
        | _linear(prefix + "down_proj", hidden, inner, bias)
    )


def _linear(name: str, rows: int, columns: int, bias: bool = False) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {name + ".weight": (rows, columns)}
    if bias:
        shapes[name + ".bias"] = (rows,)
    return shapes
