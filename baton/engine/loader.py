"""From safetensors files to a model in memory.

Files are memory-mapped and every tensor is copied (and cast) once, straight into its place in the
fused parameter: the peak is one model, not two.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from baton.engine.checkpoint import Checkpoint
from baton.engine.layers import Experts, Mlp, RotaryTable
from baton.engine.models.config import MoeConfig
from baton.engine.models.qwen3 import Attention, Layer, Qwen3
from baton.engine.models.tensors import (
    EMBED,
    FINAL_NORM,
    LM_HEAD,
    Shape,
    expected_tensors,
    expert_prefix,
    layer_prefix,
)


def load_model(
    checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device, max_len: int
) -> Qwen3:
    """Load all weights. ``max_len``: how many positions will ever be asked for."""
    with _Source(checkpoint, dtype, device) as source:
        config = checkpoint.config
        embedding = source.load(EMBED)
        return Qwen3(
            config=config,
            embedding=embedding,
            layers=tuple(_layer(source, number) for number in range(config.num_layers)),
            final_norm=source.load(FINAL_NORM),
            lm_head=embedding if config.tie_word_embeddings else source.load(LM_HEAD),
            rotary=RotaryTable(config.head_dim, config.rope_theta, max_len, device, dtype),
        )


class _Source(contextlib.AbstractContextManager["_Source"]):
    """Open files, and how parameters are made of their tensors."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        self.config = checkpoint.config
        self.shapes = expected_tensors(checkpoint.config)
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._device = device
        self._stack = contextlib.ExitStack()
        self._open: dict[Path, Any] = {}

    def __exit__(self, *exc_info: object) -> None:
        self._open.clear()
        self._stack.close()

    def load(self, name: str) -> Tensor:
        """One tensor as it is."""
        return self.fill(self.shapes[name], [(..., name)])

    def concat(self, names: Iterable[str]) -> Tensor:
        """Tensors below each other along dim 0."""
        names = tuple(names)
        total = sum(self.shapes[name][0] for name in names)
        places = []
        begin = 0
        for name in names:
            places.append((slice(begin, begin + self.shapes[name][0]), name))
            begin += self.shapes[name][0]
        return self.fill((total, *self.shapes[names[0]][1:]), places)

    def fill(
        self, shape: Shape, places: Iterable[tuple[Any, str]], *, transpose: bool = False
    ) -> Tensor:
        """A parameter of ``shape`` with each named tensor copied to its place (an index)."""
        parameter = torch.empty(shape, dtype=self._dtype, device=self._device)
        for place, name in places:
            tensor = self._read(name)
            parameter[place].copy_(tensor.t() if transpose else tensor)
        return parameter

    def _read(self, name: str) -> Tensor:
        file = self._checkpoint.tensors[name].file
        if file not in self._open:
            self._open[file] = self._stack.enter_context(safe_open(file, framework="pt"))
        tensor = self._open[file].get_tensor(name)
        assert isinstance(tensor, Tensor)
        return tensor


def _layer(source: _Source, number: int) -> Layer:
    prefix = layer_prefix(number)
    moe = source.config.moe
    if moe is not None and source.config.is_moe_layer(number):
        mlp: Mlp | Experts = _experts(source, number, moe)
    else:
        names = [f"{prefix}mlp.{part}_proj.weight" for part in ("gate", "up")]
        mlp = Mlp(source.concat(names), source.load(prefix + "mlp.down_proj.weight"))
    return Layer(
        input_norm=source.load(prefix + "input_layernorm.weight"),
        attention=_attention(source, prefix + "self_attn."),
        mlp_norm=source.load(prefix + "post_attention_layernorm.weight"),
        mlp=mlp,
    )


def _attention(source: _Source, prefix: str) -> Attention:
    config = source.config
    projections = [f"{prefix}{part}_proj" for part in "qkv"]
    bias = config.attention_bias
    norms = (
        source.load(prefix + "q_norm.weight").expand(config.num_heads, -1),
        source.load(prefix + "k_norm.weight").expand(config.num_kv_heads, -1),
    )
    return Attention(
        qkv=source.concat(f"{name}.weight" for name in projections),
        qkv_bias=source.concat(f"{name}.bias" for name in projections) if bias else None,
        qk_norm=torch.cat(norms),
        output=source.load(prefix + "o_proj.weight"),
        output_bias=source.load(prefix + "o_proj.bias") if bias else None,
    )


def _experts(source: _Source, number: int, moe: MoeConfig) -> Experts:
    hidden, inner = source.config.hidden_size, moe.intermediate_size
    experts = range(moe.num_experts)
    halves = (("gate", slice(0, inner)), ("up", slice(inner, 2 * inner)))
    return Experts(
        router=source.load(layer_prefix(number) + "mlp.gate.weight"),
        gate_up=source.fill(
            (moe.num_experts, 2 * inner, hidden),
            (
                ((expert, rows), f"{expert_prefix(number, expert)}{part}_proj.weight")
                for expert in experts
                for part, rows in halves
            ),
        ),
        down=source.fill(
            (moe.num_experts, inner, hidden),
            ((expert, f"{expert_prefix(number, expert)}down_proj.weight") for expert in experts),
            transpose=True,
        ),
        top_k=moe.num_experts_per_tok,
        renormalise=moe.norm_topk_prob,
    )
