"""Rotary frequencies and factors, against those of ``transformers``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from baton.engine.models.config import RopeConfig
from baton.engine.models.rope import inverse_frequencies
from tests.engine.test_families import DEEPSEEK_ROPE, LLAMA3_ROPE, LLAMA_8B, parse, tiny
from tests.engine.tiny_models import DEEPSEEK_V2, DEEPSEEK_V3, DENSE, LLAMA, MOE, QWEN2

# Name → (family, its rope section).
ROPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": (LLAMA, {"rope_type": "default", "rope_theta": 500.0}),
    "linear": (LLAMA, {"rope_type": "linear", "factor": 2.5}),
    "dynamic": (QWEN2, {"rope_type": "dynamic", "factor": 3.0}),
    "llama3": (LLAMA | {"head_dim": 64}, LLAMA3_ROPE | {"rope_theta": 500000.0}),
    "llama3, other lengths": (
        DENSE | {"head_dim": 128},
        LLAMA3_ROPE | {"original_max_position_embeddings": 100, "high_freq_factor": 9},
    ),
    "llama3 of the model's length": (
        LLAMA | {"head_dim": 64},
        {k: v for k, v in LLAMA3_ROPE.items() if k != "original_max_position_embeddings"},
    ),
    "yarn": (
        DENSE | {"head_dim": 128},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 176},
    ),
    "yarn of no factor": (
        QWEN2 | {"head_dim": 64},
        {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 100},
    ),
    "yarn, not rounded": (
        MOE | {"head_dim": 64},
        {"rope_type": "yarn", "factor": 1.5, "original_max_position_embeddings": 470}
        | {"beta_fast": 16.0, "beta_slow": 2.0, "truncate": False, "rope_theta": 1e6},
    ),
    "yarn, attention stated": (
        LLAMA | {"head_dim": 64},
        {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 8}
        | {"attention_factor": 0.7, "beta_fast": None, "mscale": 2.0, "mscale_all_dim": 1.0},
    ),
    "yarn with one mscale": (
        LLAMA | {"head_dim": 64},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
        | {"mscale": 2.0},
    ),
    "yarn, no room between": (
        LLAMA | {"head_dim": 4},
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 4}
        | {"rope_theta": 10.0},
    ),
    "V2 yarn": (DEEPSEEK_V2, DEEPSEEK_ROPE),
    "V2 linear": (DEEPSEEK_V2, {"rope_type": "linear", "factor": 4.0, "mscale_all_dim": 0.5}),
    "V3 yarn": (DEEPSEEK_V3 | {"qk_rope_head_dim": 64}, DEEPSEEK_ROPE | {"mscale": 1.3}),
    "V3 yarn without mscale": (
        DEEPSEEK_V3,
        {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 176},
    ),
}


@pytest.mark.parametrize("name", list(ROPES))
@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling"])
def test_rope_is_that_of_transformers(name: str, spelling: str) -> None:
    family, section = ROPES[name]
    raw = tiny(family)
    raw["rope_parameters"] = None
    if spelling == "rope_scaling":
        raw["rope_theta"] = section.get("rope_theta", 10000.0)
        section = {key: value for key, value in section.items() if key != "rope_theta"}
    raw[spelling] = section
    ours = parse(raw)
    reference = AutoConfig.for_model(**raw)
    with torch.device("meta"):
        attention = AutoModelForCausalLM.from_config(reference).model.layers[0].self_attn
    kind = reference.rope_parameters["rope_type"]
    dim = ours.head_dim if ours.mla is None else ours.mla.qk_rope_head_dim
    if kind == "default":
        expected, factor = 1.0 / (500.0 ** (torch.arange(0, dim, 2).float() / dim)), 1.0
    else:
        expected, factor = ROPE_INIT_FUNCTIONS[kind](reference)
    frequencies = inverse_frequencies(ours.rope, dim)
    assert frequencies.dtype == torch.float32
    assert ours.rope.kind == kind
    assert torch.equal(frequencies, expected), (frequencies, expected)
    assert ours.rope.attention_factor == pytest.approx(factor, rel=1e-12)
    scale = ours.head_dim**-0.5 * ours.rope.softmax_factor
    assert attention.scaling == pytest.approx(scale, rel=1e-12)


def test_older_section_wins_as_in_transformers() -> None:
    new = {"rope_type": "default", "rope_theta": 77.0}
    raw = LLAMA_8B | {"rope_parameters": new}
    assert parse(raw).rope.kind == "llama3"
    assert parse(raw | {"rope_scaling": {}}).rope == RopeConfig(theta=77.0)
    assert parse(raw | {"rope_scaling": None}).rope == RopeConfig(theta=77.0)


def test_original_length_outside_the_section_wins() -> None:
    raw = LLAMA_8B | {"original_max_position_embeddings": 1000}
    assert parse(raw).rope.original_max_len == 1000
