"""Checkpoints with random weights in the shapes of known models, for measuring.

    python benchmarks/shapes.py qwen3-0.6b OUT
    python benchmarks/shapes.py deepseek-v2-lite-small OUT
    python benchmarks/shapes.py qwen3-small OUT
    python benchmarks/shapes.py qwen3-100m OUT

``deepseek-v2-lite-small`` has the proportions of DeepSeek-V2-Lite (MLA with the same head and
latent sizes, one dense layer, 64 experts of which 6 are taken, two shared ones) at half the width
and a quarter of the depth, so that it fits a laptop. ``qwen3-small`` has 42 million parameters: on
a laptop its prefill of some thousand tokens takes seconds. ``qwen3-100m`` has 116 million: in
float32 a decode step on one core takes 50 ms and more.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SHAPES = ("qwen3-0.6b", "deepseek-v2-lite-small", "qwen3-small", "qwen3-100m")
VOCABULARY = 151_936
MLA_VOCABULARY = 102_400
SMALL_VOCABULARY = 8_192


def make(shape: str, folder: Path, *, seed: int = 0) -> None:
    """Write the checkpoint in bfloat16, if it is not there already."""
    if (folder / "config.json").exists():
        return
    import torch

    torch.manual_seed(seed)
    torch.set_default_dtype(torch.bfloat16)
    try:
        makers = {"qwen3-0.6b": _big, "qwen3-small": _small, "qwen3-100m": _medium}
        model = makers.get(shape, _deepseek)()
    finally:
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)


def _qwen3(vocabulary: int, hidden: int, intermediate: int, layers: int, **sizes: int) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        **sizes,
    )
    return Qwen3ForCausalLM(config)


def _big() -> Any:
    return _qwen3(
        VOCABULARY,
        1024,
        3072,
        28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40_960,
    )


def _small() -> Any:
    return _qwen3(
        SMALL_VOCABULARY,
        512,
        1536,
        12,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=16_384,
    )


def _medium() -> Any:
    return _qwen3(
        SMALL_VOCABULARY,
        768,
        2304,
        16,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=16_384,
    )


def _deepseek() -> Any:
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    config = DeepseekV2Config(
        vocab_size=MLA_VOCABULARY,
        hidden_size=1024,
        intermediate_size=5472,
        moe_intermediate_size=704,
        num_hidden_layers=7,
        num_attention_heads=16,
        num_key_value_heads=16,
        n_routed_experts=64,
        num_experts_per_tok=6,
        n_shared_experts=2,
        first_k_dense_replace=1,
        q_lora_rank=None,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        topk_method="greedy",
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.0,
        norm_topk_prob=False,
        max_position_embeddings=8192,
    )
    return DeepseekV2ForCausalLM(config)


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args(argv)
    make(args.shape, args.folder)


if __name__ == "__main__":
    main()
