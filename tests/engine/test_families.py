"""``config.json`` of every family: what is read and what is refused."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from baton.core.errors import ConfigError
from baton.engine.models.config import MlaConfig, ModelConfig, RopeConfig
from baton.engine.models.families import ARCHITECTURES, parse_config
from baton.engine.models.tensors import expected_tensors, ignored
from tests.engine.tiny_models import VARIANTS

SOURCE = Path("somewhere/config.json")
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
DEEPSEEK_ROPE = {
    "type": "yarn",
    "factor": 40,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
    "beta_fast": 32,
    "beta_slow": 1,
    "original_max_position_embeddings": 4096,
}
LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": LLAMA3_ROPE,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
QWEN25_7B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
V2_LITE: dict[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "attention_bias": False,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": DEEPSEEK_ROPE,
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "greedy",
    "v_head_dim": 128,
    "vocab_size": 102400,
}
V3: dict[str, Any] = V2_LITE | {
    "architectures": ["DeepseekV3ForCausalLM"],
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "rope_scaling": DEEPSEEK_ROPE | {"mscale": 1.0, "mscale_all_dim": 1.0},
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "vocab_size": 129280,
}


def tiny(options: dict[str, Any]) -> dict[str, Any]:
    """What ``transformers`` would write as config.json for a variant."""
    raw: dict[str, Any] = AutoConfig.for_model(**options).to_dict()
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[options["model_type"]]
    return raw | {"architectures": [architecture]}


def parse(raw: dict[str, Any]) -> ModelConfig:
    return parse_config(raw, SOURCE)


def test_llama() -> None:
    config = parse(LLAMA_8B)
    assert (config.head_dim, config.num_kv_heads, config.qk_norm) == (128, 8, False)
    assert (config.qkv_bias, config.output_bias, config.mlp_bias) == (False, False, False)
    assert config.rope == RopeConfig(
        kind="llama3",
        theta=500000.0,
        factor=8.0,
        original_max_len=8192,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
    )
    biased = parse(LLAMA_8B | {"attention_bias": True, "mlp_bias": True})
    assert (biased.qkv_bias, biased.output_bias, biased.mlp_bias) == (True, True, True)


def test_qwen2() -> None:
    config = parse(QWEN25_7B)
    assert (config.qkv_bias, config.output_bias, config.mlp_bias) == (True, False, False)
    assert (config.head_dim, config.rope) == (128, RopeConfig(theta=1000000.0))
    shapes = expected_tensors(config)
    assert shapes["model.layers.0.self_attn.k_proj.bias"] == (512,)
    assert "model.layers.0.self_attn.o_proj.bias" not in shapes


def test_deepseek_v2_lite() -> None:
    config = parse(V2_LITE)
    assert config.mla == MlaConfig(None, 512, 128, 64, 128)
    assert (config.num_kv_heads, config.head_dim) == (1, 192)
    assert config.rope.interleaved
    assert config.rope.attention_factor == 1.0
    mscale = 0.1 * 0.707 * math.log(40) + 1
    assert config.rope.softmax_factor == pytest.approx(mscale**2, rel=1e-12)
    moe = config.moe
    assert moe is not None
    assert moe.layers == tuple(range(1, 27))
    assert (moe.scoring, moe.num_groups, moe.correction_bias) == ("softmax", 1, False)
    assert (moe.norm_topk_prob, moe.shared_intermediate_size) == (False, 2 * 1408)


def test_deepseek_v2_groups() -> None:
    changes = {"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3}
    moe = parse(V2_LITE | changes | {"routed_scaling_factor": 16.0, "q_lora_rank": 1536}).moe
    assert moe is not None
    assert (moe.num_groups, moe.topk_groups, moe.group_score) == (8, 3, "max")
    assert moe.scaling_factor == 16.0


def test_deepseek_v3() -> None:
    config = parse(V3)
    assert config.mla == MlaConfig(1536, 512, 128, 64, 128)
    assert config.rope.interleaved
    assert config.rope.softmax_factor == pytest.approx((0.1 * math.log(40) + 1) ** 2, rel=1e-12)
    moe = config.moe
    assert moe is not None
    assert moe.layers == tuple(range(3, 61))
    assert (moe.scoring, moe.num_groups, moe.topk_groups) == ("sigmoid", 8, 4)
    assert (moe.group_score, moe.correction_bias) == ("top2_sum", True)
    assert (moe.norm_topk_prob, moe.scaling_factor) == (True, 2.5)
    assert moe.shared_intermediate_size == 2048
    assert not parse(V3 | {"rope_interleave": False}).rope.interleaved


@pytest.mark.parametrize("absent", [0, None])
def test_no_shared_experts(absent: int | None) -> None:
    for raw in (V2_LITE, V3):
        config = parse(raw | {"n_shared_experts": absent})
        assert config.moe is not None
        assert config.moe.shared_intermediate_size is None
        assert not [name for name in expected_tensors(config) if "shared" in name]
        empty = "model.layers.5.mlp.shared_experts.up_proj.weight"
        assert ignored(empty, (0, 2048), config)
        assert not ignored(empty, (16, 2048), config)


def test_some_layers_are_dense() -> None:
    moe = parse(V3 | {"moe_layer_freq": 10}).moe
    assert moe is not None
    assert moe.layers == (10, 20, 30, 40, 50, 60)


def test_layers_that_predict_several_tokens_are_ignored() -> None:
    config = parse(V3)
    assert ignored("model.layers.61.eh_proj.weight", (7168, 14336), config)
    assert not ignored("model.layers.6.eh_proj.weight", (7168, 14336), config)
    assert not ignored("model.layers.62.eh_proj.weight", (7168, 14336), config)
    without = parse(V3 | {"num_nextn_predict_layers": 0})
    assert not ignored("model.layers.61.eh_proj.weight", (7168, 14336), without)


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_shapes_of_a_whole_model(variant: str) -> None:
    """As many numbers as the model of ``transformers`` has, which fuses some of the tensors."""
    config = AutoConfig.for_model(**VARIANTS[variant])
    with torch.device("meta"):
        reference = AutoModelForCausalLM.from_config(config)
    raw = tiny(VARIANTS[variant])
    shapes = expected_tensors(parse(raw)).values()
    biases = [b for name, b in reference.named_buffers() if name.endswith("correction_bias")]
    numbers = sum(tensor.numel() for tensor in [*reference.parameters(), *biases])
    assert sum(math.prod(shape) for shape in shapes) == numbers


def yarn(**changes: Any) -> dict[str, Any]:
    section = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
    return {"rope_scaling": {k: v for k, v in (section | changes).items() if v != "absent"}}


# What is asked for, and which words the message must have besides the file.
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]] = {
    "architecture": (LLAMA_8B, {"architectures": ["MistralForCausalLM"]}, ("Mistral", "Llama")),
    "architecture type": (LLAMA_8B, {"architectures": "LlamaForCausalLM"}, ("architectures",)),
    "fp8": (V3, {"quantization_config": {"quant_method": "fp8"}}, ("quantization_config",)),
    "window": (QWEN25_7B, {"use_sliding_window": True}, ("use_sliding_window", "full-attention")),
    "llama window": (LLAMA_8B, {"sliding_window": 4096}, ("sliding_window", "4096")),
    "layer types": (QWEN25_7B, {"layer_types": ["sliding_attention"]}, ("sliding_attention",)),
    "activation": (V2_LITE, {"hidden_act": "gelu"}, ("hidden_act", "'gelu'", "silu")),
    "longrope": (
        LLAMA_8B,
        {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}},
        ("rope_scaling.rope_type", "'longrope'", "yarn"),
    ),
    "old su": (LLAMA_8B, {"rope_scaling": {"type": "su"}}, ("rope_scaling.type", "'su'")),
    "rope per layer type": (
        QWEN25_7B,
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        ("rope_parameters.full_attention",),
    ),
    "partial": (LLAMA_8B, {"partial_rotary_factor": 0.5}, ("partial_rotary_factor 0.5",)),
    "partial section": (
        LLAMA_8B,
        {"rope_scaling": LLAMA3_ROPE | {"partial_rotary_factor": 0.5}},
        ("rope_scaling.partial_rotary_factor 0.5",),
    ),
    "rope list": (LLAMA_8B, {"rope_scaling": [1]}, ("rope_scaling", "[1]")),
    "no factor": (LLAMA_8B, yarn(factor="absent"), ("rope_scaling.factor is missing",)),
    "negative factor": (LLAMA_8B, yarn(factor=-1), ("rope_scaling.factor", "-1")),
    "text factor": (LLAMA_8B, yarn(factor="4"), ("rope_scaling.factor", "'4'")),
    "zero attention": (LLAMA_8B, yarn(attention_factor=0), ("attention_factor", "0")),
    "text mscale": (LLAMA_8B, yarn(mscale="1"), ("rope_scaling.mscale", "'1'")),
    "infinite": (LLAMA_8B, yarn(factor=math.inf), ("rope_scaling.factor", "inf")),
    "truncate": (LLAMA_8B, yarn(truncate=1), ("rope_scaling.truncate", "1")),
    "theta of 1": (LLAMA_8B, yarn(rope_theta=1), ("rope_theta 1",)),
    "linear factor": (LLAMA_8B, {"rope_scaling": {"type": "linear"}}, ("factor is missing",)),
    "llama3 factors": (
        LLAMA_8B,
        {"rope_scaling": LLAMA3_ROPE | {"high_freq_factor": 1.0}},
        ("high_freq_factor 1.0", "low_freq_factor 1.0"),
    ),
    "no length": (LLAMA_8B, {"max_position_embeddings": None}, ("max_position_embeddings",)),
    "v2 method": (V2_LITE, {"topk_method": "noaux_tc"}, ("topk_method", "'noaux_tc'", "greedy")),
    "v2 scoring": (V2_LITE, {"scoring_func": "sigmoid"}, ("scoring_func", "'sigmoid'")),
    "v3 method": (V3, {"topk_method": "greedy"}, ("topk_method", "'greedy'", "noaux_tc")),
    "v3 scoring": (V3, {"scoring_func": "softmax"}, ("scoring_func", "'softmax'")),
    "v3 groups": (V3, {"n_group": None}, ("n_group is missing",)),
    "uneven groups": (V3, {"n_group": 7}, ("n_group 7", "n_routed_experts 256")),
    "groups of one": (V3, {"n_group": 256}, ("n_group 256", "at least 2")),
    "more groups": (V3, {"topk_group": 9}, ("topk_group 9", "n_group 8")),
    "small groups": (V3, {"n_group": 128, "topk_group": 3}, ("topk_group 3", "per_tok 8")),
    "latent heads": (V3, {"num_key_value_heads": 8}, ("num_key_value_heads 8", "128")),
    "odd rope": (V3, {"qk_rope_head_dim": 63}, ("qk_rope_head_dim 63", "odd")),
    "zero rank": (V3, {"q_lora_rank": 0}, ("q_lora_rank", "0")),
    "no rank": (V3, {"kv_lora_rank": None}, ("kv_lora_rank is missing",)),
    "no dense layers": (V3, {"first_k_dense_replace": None}, ("first_k_dense_replace",)),
    "negative dense": (V3, {"first_k_dense_replace": -1}, ("first_k_dense_replace", "-1")),
    "too many": (V2_LITE, {"num_experts_per_tok": 65}, ("num_experts_per_tok 65", "64")),
    "shared": (V2_LITE, {"n_shared_experts": -2}, ("n_shared_experts", "-2")),
    "bias": (LLAMA_8B, {"mlp_bias": "yes"}, ("mlp_bias", "'yes'")),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_refused(name: str) -> None:
    raw, changes, words = REFUSED[name]
    with pytest.raises(ConfigError) as caught:
        parse(raw | changes)
    message = caught.value.message
    assert message.startswith(f"{SOURCE}: ")
    assert "; " in message, "says what to do"
    for word in words:
        assert word in message, message


def test_absent_rank_is_not_null() -> None:
    raw = {key: value for key, value in V3.items() if key != "q_lora_rank"}
    with pytest.raises(ConfigError, match="q_lora_rank is missing"):
        parse(raw)


def test_every_family_has_variants() -> None:
    seen = {parse(tiny(options)).architecture for options in VARIANTS.values()}
    assert seen == set(ARCHITECTURES)


def test_every_field_is_exercised() -> None:
    """Each optional feature is on in one variant at least and off in another."""
    configs = [parse(tiny(options)) for options in VARIANTS.values()]
    for field in ("qkv_bias", "output_bias", "mlp_bias", "qk_norm", "tie_word_embeddings"):
        assert {getattr(config, field) for config in configs} == {True, False}, field
    kinds = {config.rope.kind for config in configs}
    assert kinds == {"default", "linear", "dynamic", "llama3", "yarn"}
    changed = {
        field.name
        for config in configs
        for field in dataclasses.fields(RopeConfig)
        if getattr(config.rope, field.name) != field.default
    }
    assert changed >= {field.name for field in dataclasses.fields(RopeConfig)} - {"beta_slow"}
