"""Names and shapes of a checkpoint's tensors: what is checked at start-up and what is loaded."""

from __future__ import annotations

from baton.engine.models.config import ModelConfig

EMBED = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"

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
    for layer in range(config.num_layers):
        prefix = layer_prefix(layer)
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        shapes |= _attention(config, prefix + "self_attn.")
        if config.moe is not None and config.is_moe_layer(layer):
            shapes[prefix + "mlp.gate.weight"] = (config.moe.num_experts, hidden)
            for expert in range(config.moe.num_experts):
                name = expert_prefix(layer, expert)
                shapes |= _mlp(hidden, config.moe.intermediate_size, name)
        else:
            shapes |= _mlp(hidden, config.intermediate_size, prefix + "mlp.")
    return shapes


def ignored(name: str, config: ModelConfig) -> bool:
    """Whether a tensor that the model does not need may stay in its files.

    Tied checkpoints often carry a copy of the embedding, old ones the rotary frequencies.
    """
    return name.endswith("rotary_emb.inv_freq") or (name == LM_HEAD and config.tie_word_embeddings)


def _attention(config: ModelConfig, prefix: str) -> dict[str, Shape]:
    hidden = config.hidden_size
    widths = {"q_proj": config.q_size, "k_proj": config.kv_size, "v_proj": config.kv_size}
    shapes: dict[str, Shape] = {}
    for name, width in widths.items():
        shapes[f"{prefix}{name}.weight"] = (width, hidden)
    shapes[prefix + "o_proj.weight"] = (hidden, config.q_size)
    shapes[prefix + "q_norm.weight"] = shapes[prefix + "k_norm.weight"] = (config.head_dim,)
    if config.attention_bias:
        for name, width in widths.items():
            shapes[f"{prefix}{name}.bias"] = (width,)
        shapes[prefix + "o_proj.bias"] = (hidden,)
    return shapes


def _mlp(hidden: int, intermediate: int, prefix: str) -> dict[str, Shape]:
    return {
        prefix + "gate_proj.weight": (intermediate, hidden),
        prefix + "up_proj.weight": (intermediate, hidden),
        prefix + "down_proj.weight": (hidden, intermediate),
    }
