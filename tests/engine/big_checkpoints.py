"""Checkpoints whose size matters and whose content does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

MEDIUM: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 16000,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
"""About 250 MB in float32."""
LARGE: dict[str, Any] = MEDIUM | {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 64000,
}
"""About 1.7 GB in bfloat16; 1.5 GB with tied embeddings."""


def save_big(folder: Path, options: dict[str, Any], dtype: str = "float32") -> int:
    """Save a model without drawing its weights one by one; the bytes of its tensors."""
    config = AutoConfig.for_model(**options)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.to_empty(device="cpu")
    model.tie_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.linspace(-0.02, 0.02, parameter.shape[-1]))
    model.save_pretrained(folder)
    return sum(parameter.nbytes for parameter in model.parameters())
