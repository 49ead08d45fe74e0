"""Which models Baton runs: the ``config.json`` of each family, read into a ``ModelConfig``.

Defaults of absent keys, and what a key means, follow ``transformers``. Only features that the
forward pass implements are accepted; anything else is refused by name, so that a checkpoint either
runs as its authors meant it or does not run. No torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from baton.engine.models.config import MlaConfig, ModelConfig, MoeConfig, RopeConfig, RopeKind
from baton.engine.models.fields import Fields

_ROPE_KINDS: tuple[RopeKind, ...] = ("default", "linear", "dynamic", "llama3", "yarn")


def parse_config(raw: Mapping[str, Any], source: Path) -> ModelConfig:
    """Read a parsed ``config.json``; each refusal is a ``ConfigError`` that names ``source``."""
    fields = Fields(raw, source)
    named = fields.get("architectures")
    supported = ", ".join(ARCHITECTURES)
    if not isinstance(named, list) or not named:
        raise fields.error("architectures is missing", f"supported are {supported}")
    if named[0] not in ARCHITECTURES:
        raise fields.error(f"architecture {named[0]!r} is not supported", f"only {supported} are")
    _refuse_unsupported(fields, named[0])
    return _FAMILIES[named[0]](fields)


def _llama(fields: Fields) -> ModelConfig:
    """Llama 2 and 3."""
    bias = fields.flag("attention_bias")
    return _grouped(
        fields,
        "LlamaForCausalLM",
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=fields.flag("mlp_bias"),
    )


def _qwen2(fields: Fields) -> ModelConfig:
    """Qwen2 and 2.5."""
    return _grouped(fields, "Qwen2ForCausalLM", qkv_bias=True)


def _qwen3(fields: Fields) -> ModelConfig:
    bias = fields.flag("attention_bias")
    return _grouped(
        fields,
        "Qwen3ForCausalLM",
        head_dim=128,
        qkv_bias=bias,
        output_bias=bias,
        qk_norm=True,
    )


def _qwen3_moe(fields: Fields) -> ModelConfig:
    bias = fields.flag("attention_bias")
    name = "num_experts" if fields.get("num_experts") is not None else "num_local_experts"
    num_experts, top_k = _experts(fields, name)
    step = fields.integer("decoder_sparse_step", 1)
    dense = fields.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(isinstance(layer, int) for layer in dense):
        raise fields.error(
            f"mlp_only_layers must be a list of integers, not {dense!r}", "repair it"
        )
    moe = MoeConfig(
        num_experts=num_experts,
        num_experts_per_tok=top_k,
        intermediate_size=fields.integer("moe_intermediate_size"),
        norm_topk_prob=fields.flag("norm_topk_prob"),
        layers=tuple(
            layer
            for layer in range(fields.integer("num_hidden_layers"))
            if layer not in dense and (layer + 1) % step == 0
        ),
    )
    return _grouped(
        fields, "Qwen3MoeForCausalLM", qkv_bias=bias, output_bias=bias, qk_norm=True, moe=moe
    )


def _deepseek_v2(fields: Fields) -> ModelConfig:
    """DeepSeek-V2 and V2-Lite.

    ``norm_topk_prob`` has no effect in ``transformers``, which always scales by
    ``routed_scaling_factor``; the published checkpoints have it false.
    """
    fields.only("scoring_func", ("softmax",), "softmax")
    method = fields.only("topk_method", ("greedy", "group_limited_greedy"), "greedy")
    groups, topk_groups = (1, 1) if method == "greedy" else _groups(fields, smallest=1)
    moe = _deepseek_moe(
        fields,
        scoring="softmax",
        group_score="max",
        num_groups=groups,
        topk_groups=topk_groups,
        norm_topk_prob=False,
        scaling_factor=fields.number("routed_scaling_factor", 1.0),
    )
    return _deepseek(
        fields,
        "DeepseekV2ForCausalLM",
        moe=moe,
        rope=_rope(fields, deepseek=True, interleaved=True),
        mlp_bias=fields.flag("mlp_bias"),
    )


def _deepseek_v3(fields: Fields) -> ModelConfig:
    """DeepSeek-V3 and R1."""
    fields.only("scoring_func", ("sigmoid",), "sigmoid")
    fields.only("topk_method", ("noaux_tc",), "noaux_tc")
    groups, topk_groups = _groups(fields, smallest=2)
    moe = _deepseek_moe(
        fields,
        scoring="sigmoid",
        group_score="top2_sum",
        num_groups=groups,
        topk_groups=topk_groups,
        correction_bias=True,
        norm_topk_prob=fields.flag("norm_topk_prob", default=True),
        scaling_factor=fields.number("routed_scaling_factor", 2.5),
    )
    interleaved = fields.flag("rope_interleave", default=True)
    return _deepseek(
        fields,
        "DeepseekV3ForCausalLM",
        moe=moe,
        rope=_rope(fields, deepseek=True, interleaved=interleaved),
        num_mtp_layers=fields.integer("num_nextn_predict_layers", 0, minimum=0),
    )


_FAMILIES: dict[str, Callable[[Fields], ModelConfig]] = {
    "LlamaForCausalLM": _llama,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
    "Qwen3MoeForCausalLM": _qwen3_moe,
    "DeepseekV2ForCausalLM": _deepseek_v2,
    "DeepseekV3ForCausalLM": _deepseek_v3,
}
ARCHITECTURES = tuple(_FAMILIES)


def _refuse_unsupported(fields: Fields, architecture: str) -> None:
    """What no family may have."""
    if fields.get("quantization_config") is not None:
        raise fields.error("quantization_config is not supported", "use unquantized weights")
    # Qwen's configurations carry a window that only use_sliding_window puts into force.
    windowed = fields.flag("use_sliding_window", default=not architecture.startswith("Qwen"))
    if windowed and fields.get("sliding_window") is not None:
        name = "use_sliding_window" if fields.has("use_sliding_window") else "sliding_window"
        raise fields.unsupported(name, fields.get(name), "use a full-attention model")
    kinds = set(fields.get("layer_types") or ()) - {"full_attention"}
    if kinds:
        raise fields.unsupported(
            "layer_types", sorted(map(str, kinds)), "only full_attention layers are"
        )
    fields.only("hidden_act", ("silu",), "silu")


def _grouped(
    fields: Fields,
    architecture: str,
    *,
    head_dim: int | None = None,
    qkv_bias: bool = False,
    output_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
    moe: MoeConfig | None = None,
) -> ModelConfig:
    """A model with grouped-query attention. ``head_dim``: what applies where the file has none."""
    num_heads = fields.integer("num_attention_heads")
    num_kv_heads = fields.integer("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise fields.error(
            f"num_attention_heads {num_heads} is not a multiple of num_key_value_heads "
            f"{num_kv_heads}",
            "repair the file",
        )
    hidden_size = fields.integer("hidden_size")
    head_dim = fields.integer("head_dim", head_dim or max(1, hidden_size // num_heads))
    _refuse_odd(fields, "head_dim", head_dim)
    return ModelConfig(
        architecture=architecture,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=fields.integer("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope=_rope(fields),
        max_position_embeddings=fields.integer("max_position_embeddings"),
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
        moe=moe,
    )


def _deepseek(
    fields: Fields,
    architecture: str,
    *,
    moe: MoeConfig,
    rope: RopeConfig,
    mlp_bias: bool = False,
    num_mtp_layers: int = 0,
) -> ModelConfig:
    """A model with multi-head latent attention."""
    num_heads = fields.integer("num_attention_heads")
    num_kv_heads = fields.integer("num_key_value_heads", num_heads)
    if num_kv_heads != num_heads:
        raise fields.unsupported(
            "num_key_value_heads",
            num_kv_heads,
            f"latent attention has num_attention_heads {num_heads}",
        )
    # Null is a choice here (V2-Lite): queries without a low rank. Absence is not.
    direct = fields.has("q_lora_rank") and fields.get("q_lora_rank") is None
    mla = MlaConfig(
        q_lora_rank=None if direct else fields.integer("q_lora_rank"),
        kv_lora_rank=fields.integer("kv_lora_rank"),
        qk_nope_head_dim=fields.integer("qk_nope_head_dim"),
        qk_rope_head_dim=fields.integer("qk_rope_head_dim"),
        v_head_dim=fields.integer("v_head_dim"),
    )
    _refuse_odd(fields, "qk_rope_head_dim", mla.qk_rope_head_dim)
    bias = fields.flag("attention_bias")
    return ModelConfig(
        architecture=architecture,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=fields.integer("hidden_size"),
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=fields.integer("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=1,
        head_dim=mla.qk_head_dim,
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope=rope,
        max_position_embeddings=fields.integer("max_position_embeddings"),
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=mlp_bias,
        mla=mla,
        moe=moe,
        num_mtp_layers=num_mtp_layers,
    )


def _deepseek_moe(fields: Fields, **routing: Any) -> MoeConfig:
    """The expert layers, with what differs between the versions as fields of ``MoeConfig``."""
    num_experts, top_k = _experts(fields, "n_routed_experts")
    first = fields.integer("first_k_dense_replace", minimum=0)
    step = fields.integer("moe_layer_freq", 1)
    inner = fields.integer("moe_intermediate_size")
    return MoeConfig(
        num_experts=num_experts,
        num_experts_per_tok=top_k,
        intermediate_size=inner,
        layers=tuple(
            layer
            for layer in range(first, fields.integer("num_hidden_layers"))
            if layer % step == 0
        ),
        shared_intermediate_size=fields.integer("n_shared_experts", 0, minimum=0) * inner or None,
        **routing,
    )


def _experts(fields: Fields, name: str) -> tuple[int, int]:
    """How many experts there are, and how many each token visits."""
    num_experts = fields.integer(name)
    top_k = fields.integer("num_experts_per_tok")
    if top_k > num_experts:
        raise fields.error(
            f"num_experts_per_tok {top_k} is more than {name} {num_experts}", "repair the file"
        )
    return num_experts, top_k


def _groups(fields: Fields, *, smallest: int) -> tuple[int, int]:
    """How many groups of experts there are, and how many are looked at."""
    num_experts, top_k = _experts(fields, "n_routed_experts")
    groups, chosen = fields.integer("n_group"), fields.integer("topk_group")
    size = num_experts // groups
    if num_experts % groups or size < smallest:
        raise fields.error(
            f"n_routed_experts {num_experts} cannot be cut into n_group {groups} equal groups of "
            f"at least {smallest}",
            "repair the file",
        )
    if chosen > groups or chosen * size < top_k:
        raise fields.error(
            f"topk_group {chosen} of n_group {groups} groups of {size} cannot give "
            f"num_experts_per_tok {top_k}",
            "repair the file",
        )
    return groups, chosen


def _refuse_odd(fields: Fields, name: str, dim: int) -> None:
    if dim % 2:
        raise fields.error(f"{name} {dim} is odd, which RoPE cannot halve", "repair it")


def _rope(fields: Fields, *, deepseek: bool = False, interleaved: bool = False) -> RopeConfig:
    """From today's ``rope_parameters`` or the older ``rope_scaling`` and ``rope_theta``.

    The dynamic kind changes the table only beyond ``max_position_embeddings``, where no sequence
    here gets to: a token's rotation must not depend on how long its sequence will be, or cached
    keys would be wrong. So it is accepted, and is the unscaled table.
    """
    old, new = fields.section("rope_scaling"), fields.section("rope_parameters")
    section = old or new or fields.empty("rope_parameters")
    for part in (fields, section):
        if part.get("partial_rotary_factor") not in (None, 1):
            raise part.unsupported(
                "partial_rotary_factor",
                part.get("partial_rotary_factor"),
                "use a model that rotates whole heads",
            )
    name = "rope_type" if section.has("rope_type") else "type"
    kind = section.only(name, _ROPE_KINDS, "default")
    for layers in section.objects():
        raise section.unsupported(layers, section.get(layers), "only one RoPE for all layers is")
    max_len = fields.integer("max_position_embeddings")
    rope = RopeConfig(
        kind=kind,
        theta=section.number("rope_theta", fields.number("rope_theta", 10000.0)),
        interleaved=interleaved,
    )
    if kind in ("linear", "dynamic"):
        rope = dataclasses.replace(rope, factor=section.number("factor"))
    if kind in ("llama3", "yarn"):
        original = section.integer("original_max_position_embeddings", max_len)
        original = fields.integer("original_max_position_embeddings", original)
        scaled = _llama3 if kind == "llama3" else _yarn
        rope = scaled(section, dataclasses.replace(rope, original_max_len=original), max_len)
    if deepseek and kind != "default":
        all_dims = section.optional_number("mscale_all_dim") or 0.0
        softmax_factor = _mscale(rope.factor, all_dims) ** 2
        rope = dataclasses.replace(rope, softmax_factor=softmax_factor)
    return rope


def _llama3(section: Fields, rope: RopeConfig, max_len: int) -> RopeConfig:
    low, high = section.number("low_freq_factor"), section.number("high_freq_factor")
    if high <= low:
        raise section.error(
            f"high_freq_factor {high} is not more than low_freq_factor {low}", "repair the file"
        )
    factor = section.number("factor")
    return dataclasses.replace(rope, factor=factor, low_freq_factor=low, high_freq_factor=high)


def _yarn(section: Fields, rope: RopeConfig, max_len: int) -> RopeConfig:
    if rope.theta <= 1:
        raise section.error(f"rope_theta {rope.theta} is not more than 1", "repair the file")
    assert rope.original_max_len is not None
    derived = section.has("factor") and section.get("factor") is None
    factor = max_len / rope.original_max_len if derived else section.number("factor")
    mscale = section.optional_number("mscale")
    all_dims = section.optional_number("mscale_all_dim")
    if mscale and all_dims:
        implied = _mscale(factor, mscale) / _mscale(factor, all_dims)
    else:
        implied = _mscale(factor, 1.0)
    return dataclasses.replace(
        rope,
        factor=factor,
        beta_fast=section.optional_number("beta_fast") or 32.0,
        beta_slow=section.optional_number("beta_slow") or 1.0,
        attention_factor=section.number("attention_factor", implied),
        truncate=section.flag("truncate", default=True),
    )


def _mscale(factor: float, weight: float) -> float:
    """How much yarn raises attention (arXiv:2309.00071, section 3.4), with DeepSeek's weight."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
