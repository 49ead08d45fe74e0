"""Grouped products for devices that do all groups in one launch."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from baton.engine.ops.registry import Site

_ALIGNMENT_BYTES = 16
_MIN_CAPABILITY = (8, 0)


class TorchGroupedMatmul:
    """All experts' products in one launch of torch's kernel; the host never learns the counts.

    Untested on hardware: the arithmetic is compared with the reference by torch's own CPU form of
    the same call only.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        """``weights``: [out, in] per expert, at least one. They are copied into one tensor, so a
        layer's experts are held twice while this runs."""
        self._weights_EOI = torch.stack(tuple(weights))

    def __call__(self, x_NH: Tensor, counts_E: Tensor) -> Tensor:
        """See ``reference.GroupedMatmul``; rows beyond the counts' sum come out as anything."""
        if not len(x_NH):
            return x_NH.new_empty(0, self._weights_EOI.shape[1])
        ends_E = counts_E.cumsum(0).to(torch.int32)
        return torch._grouped_mm(x_NH, self._weights_EOI.transpose(1, 2), offs=ends_E)


def refuses_grouped(site: Site) -> str | None:
    """Whether torch's kernel can do this product: ``None``, or why not."""
    if not hasattr(torch, "_grouped_mm"):
        return "this torch has no grouped product"
    if site.dtype != torch.bfloat16:
        return "only bfloat16"
    if any(site[side] * site.dtype.itemsize % _ALIGNMENT_BYTES for side in _SIDES):
        return f"rows are not multiples of {_ALIGNMENT_BYTES} bytes"
    if site.device.type == "cuda" and torch.accelerator.is_available():
        capability = torch.cuda.get_device_capability(site.device)
        if capability < _MIN_CAPABILITY:
            return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    return None


_SIDES = ("in_features", "out_features")
