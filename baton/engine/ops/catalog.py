"""All implementations that Baton has. A device's file adds its own here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from baton.engine import sampler
from baton.engine.ops import reference, sdpa
from baton.engine.ops.grouped import TorchGroupedMatmul, refuses_grouped
from baton.engine.ops.linear import GroupedLinear, Linear, PackedLinear, PlainLinear, packs
from baton.engine.ops.norm import add_rms_norm, rms_norm
from baton.engine.ops.registry import REFERENCE, Implementation, Site

_CPU = frozenset({"cpu"})
_CUDA = frozenset({"cuda"})
_SDPA = frozenset({"cpu", "cuda"})


def _function(function: Callable[..., Any]) -> Callable[[Site], Callable[..., Any]]:
    return lambda site: function


def _linear(site: Site) -> Callable[[Tensor, Tensor | None], Linear]:
    return PlainLinear


def _packed(site: Site) -> Callable[[Tensor, Tensor | None], Linear]:
    return PackedLinear


def _grouped(site: Site) -> Callable[[Iterable[Tensor]], GroupedLinear]:
    kind = PackedLinear if _packs(site) is None else PlainLinear
    return lambda weights: GroupedLinear(
        [kind(weight, None) for weight in weights], site["out_features"]
    )


def _packs(site: Site) -> str | None:
    return packs(site["in_features"], site["out_features"], site.dtype)


def _lies(layout: str) -> Callable[[Site], str | None]:
    return lambda site: layout


def _grouped_layout(site: Site) -> str | None:
    return f"per expert: {_BLOCKS if _packs(site) is None else _PLAIN}"


_PLAIN, _BLOCKS = "[out, in]", "oneDNN blocks"
"""How a product's weight lies, as ``baton ops`` prints it."""

CATALOG: tuple[Implementation, ...] = (
    Implementation("rms_norm", REFERENCE, _function(reference.rms_norm)),
    Implementation("rms_norm", "torch_fused", _function(rms_norm), priority=10, devices=_SDPA),
    Implementation("add_rms_norm", REFERENCE, _function(reference.add_rms_norm)),
    Implementation(
        "add_rms_norm", "torch_fused", _function(add_rms_norm), priority=10, devices=_SDPA
    ),
    Implementation("rotary", REFERENCE, _function(reference.rotary)),
    Implementation("swiglu", REFERENCE, _function(reference.swiglu)),
    Implementation("cache_write", REFERENCE, _function(reference.cache_write)),
    Implementation("linear", REFERENCE, _linear, layout=_lies(_PLAIN)),
    Implementation("linear", "onednn_packed", _packed, 10, _CPU, _packs, _lies(_BLOCKS)),
    Implementation(
        "grouped_matmul",
        REFERENCE,
        _function(reference.GroupedMatmul),
        layout=_lies(f"per expert: {_PLAIN}"),
    ),
    Implementation("grouped_matmul", "per_expert", _grouped, 10, _CPU, layout=_grouped_layout),
    Implementation(
        "grouped_matmul",
        "torch_grouped",
        _function(TorchGroupedMatmul),
        10,
        _CUDA,
        refuses_grouped,
        _lies("[experts, out, in]"),
    ),
    Implementation("moe_routing", REFERENCE, _function(reference.moe_routing)),
    Implementation("paged_attention", REFERENCE, _function(reference.paged_attention)),
    Implementation("paged_attention", "sdpa", _function(sdpa.paged_attention), 10, _SDPA),
    Implementation("mla_attention", REFERENCE, _function(reference.mla_attention)),
    Implementation("mla_attention", "sdpa_absorbed", _function(sdpa.mla_attention), 10, _SDPA),
    Implementation("sample", REFERENCE, _function(sampler.sample)),
    Implementation("quantize", REFERENCE, _function(reference.quantize)),
    Implementation("dequantize", REFERENCE, _function(reference.dequantize)),
)
