"""From safetensors files to a model in memory.

Files are memory-mapped and every tensor is copied (and cast) once, straight into its place in the
fused parameter, which is then laid out for the device: the peak is one model and one parameter.
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
from baton.engine.linear import Linear, make_linear
from baton.engine.models.config import MoeConfig
from baton.engine.models.qwen3 import Attention, Layer, Qwen3
from baton.engine.models.tensors import (
    EMBED,
    FINAL_NORM,
    LM_HEAD,
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
            lm_head=make_linear(embedding)
            if config.tie_word_embeddings
            else source.linear(LM_HEAD),
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
        return self.concat([name])

    def linear(self, *names: str, bias: bool = False) -> Linear:
        """One product with the named weights below each other; ``bias``: their biases too."""
        biases = [name.removesuffix("weight") + "bias" for name in names]
        return make_linear(self.concat(names), self.concat(biases) if bias else None)

    def concat(self, names: Iterable[str]) -> Tensor:
        """Tensors below each other along dim 0."""
        names = tuple(names)
        total = sum(self.shapes[name][0] for name in names)
        shape = (total, *self.shapes[names[0]][1:])
        parameter = torch.empty(shape, dtype=self._dtype, device=self._device)
        begin = 0
        for name in names:
            end = begin + self.shapes[name][0]
            parameter[begin:end].copy_(self._read(name))
            begin = end
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
        mlp = Mlp(*_swiglu(source, prefix + "mlp."))
    return Layer(
        input_norm=source.load(prefix + "input_layernorm.weight"),
        attention=_attention(source, prefix + "self_attn."),
        mlp_norm=source.load(prefix + "post_attention_layernorm.weight"),
        mlp=mlp,
    )


def _attention(source: _Source, prefix: str) -> Attention:
    config = source.config
    norms = (
        source.load(prefix + "q_norm.weight").expand(config.num_heads, -1),
        source.load(prefix + "k_norm.weight").expand(config.num_kv_heads, -1),
    )
    bias = config.attention_bias
    return Attention(
        qkv=source.linear(*(f"{prefix}{part}_proj.weight" for part in "qkv"), bias=bias),
        qk_norm=torch.cat(norms),
        output=source.linear(prefix + "o_proj.weight", bias=bias),
    )


def _experts(source: _Source, number: int, moe: MoeConfig) -> Experts:
    experts = [_swiglu(source, expert_prefix(number, expert)) for expert in range(moe.num_experts)]
    return Experts(
        router=source.linear(layer_prefix(number) + "mlp.gate.weight"),
        gate_up=tuple(gate_up for gate_up, _ in experts),
        down=tuple(down for _, down in experts),
        top_k=moe.num_experts_per_tok,
        renormalise=moe.norm_topk_prob,
    )


def _swiglu(source: _Source, prefix: str) -> tuple[Linear, Linear]:
    """The gate-and-up product and the down product."""
    gate_up = source.linear(prefix + "gate_proj.weight", prefix + "up_proj.weight")
    return gate_up, source.linear(prefix + "down_proj.weight")
