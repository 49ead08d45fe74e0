"""Matrix products whose rows do not depend on each other: a token's numbers are the same bits in
any batch, so no request's tokens depend on what else the instance is doing.

A CPU library picks its kernel by the number of rows, and a few rows more or less change the order
in which a row's products are summed. It does so for small counts only. Each :class:`Linear` states
its ``row_quantum``: a row comes out the same in every batch of a multiple of that many rows. The
step is padded to such a multiple, and a probe at load finds the quantum on the machine at hand.
"""

from __future__ import annotations

import abc
import logging
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

_log = logging.getLogger(__name__)

_PACK_ELEMENTS = 2**17
"""Weights from this size up are packed: below it, the call costs more than packing saves."""
_QUANTA = (1, 2, 4, 8, 16)
_PROBED_ROWS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48)
_probed: dict[tuple[object, ...], int] = {}
packed_calls: set[tuple[torch.Size, int]] = set()
"""(shape of the weight, rows) of all packed products so far: oneDNN keeps a kernel for each."""


class Linear(abc.ABC):
    """``x @ weight.T + bias``, with the weight laid out as the device likes it."""

    row_quantum: int
    """Rows come out the same in all batches of a multiple of this many rows."""
    repacks: ClassVar[bool] = False
    """Whether the weight is copied into a layout of its own, and not held."""

    @abc.abstractmethod
    def __call__(self, x_NK: Tensor) -> Tensor:
        """[rows, in] → [rows, out], in the weight's dtype."""


class PlainLinear(Linear):
    """The weight as it is, [out, in]."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = weight
        self._bias = bias
        self.row_quantum = _row_quantum(self, weight, "plain")

    def __call__(self, x_NK: Tensor) -> Tensor:
        """[rows, in] → [rows, out]."""
        return F.linear(x_NK, self._weight, self._bias)


class PackedLinear(Linear):
    """CPU: the weight in oneDNN's blocked layout, which spares each call from packing it anew."""

    repacks = True
    _EXPECTED_ROWS = 16

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._shape = weight.shape
        self._weight = torch.ops.mkldnn._reorder_linear_weight(
            weight.contiguous(), self._EXPECTED_ROWS
        )
        self._bias = bias
        self.row_quantum = _row_quantum(self, weight, "packed")

    def __call__(self, x_NK: Tensor) -> Tensor:
        """[rows, in] → [rows, out]."""
        packed_calls.add((self._shape, len(x_NK)))
        out: Tensor = torch.ops.mkldnn._linear_pointwise(
            x_NK, self._weight, self._bias, "none", [], ""
        )
        return out


class GroupedLinear:
    """Row group e of x times expert e's product, each rounded up to whole quanta."""

    def __init__(self, linears: Sequence[Linear], out_features: int) -> None:
        self._linears = tuple(linears)
        self._out_features = out_features
        self._quantum = max((linear.row_quantum for linear in self._linears), default=1)

    def __call__(self, x_NH: Tensor, counts_E: Tensor) -> Tensor:
        """See ``reference.GroupedMatmul``; rows beyond the counts' sum come out as anything."""
        quantum = self._quantum
        out = x_NH.new_empty(len(x_NH), self._out_features)
        begin = 0
        for linear, count in zip(self._linears, counts_E.tolist(), strict=True):
            if count:
                end = begin + count + -count % quantum
                # Some of the neighbour's rows come along; at the end there may be none left.
                x = x_NH[begin:end]
                if end > len(x_NH):
                    x = F.pad(x, (0, 0, 0, end - len(x_NH)))
                out[begin : begin + count] = linear(x)[:count]
                begin += count
        return out


def packs(in_features: int, out_features: int, dtype: torch.dtype) -> str | None:
    """Whether oneDNN's layout is worth it here: ``None``, or why not."""
    if not torch._C._has_mkldnn:
        return "this torch has no oneDNN"
    if dtype == torch.bfloat16:
        # The plain call goes through the same kernels, and packs every time.
        supported = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return None if supported else "this CPU has no bfloat16 products"
    if dtype != torch.float32:
        return f"no {dtype}"
    if in_features * out_features < _PACK_ELEMENTS:
        return f"fewer than {_PACK_ELEMENTS} weights"
    return None


def _row_quantum(linear: Linear, weight: Tensor, kind: str) -> int:
    """Find the quantum by trying, once per shape: other devices and kernels have other rules."""
    if weight.device.type != "cpu":
        # Padding buys nothing where the kernel is chosen by other things than a few rows.
        return 1
    key = (kind, weight.shape, weight.dtype, torch.get_num_threads())
    if key not in _probed:
        _probed[key] = _probe(linear, weight)
    return _probed[key]


def _probe(linear: Linear, weight: Tensor) -> int:
    generator = torch.Generator().manual_seed(weight.shape[0])
    rows = torch.randn(_PROBED_ROWS[-1], weight.shape[1], generator=generator).to(weight.dtype)
    whole = linear(rows)
    same = {count: torch.equal(linear(rows[:count]), whole[:count]) for count in _PROBED_ROWS}
    for quantum in _QUANTA:
        if all(equal for count, equal in same.items() if count % quantum == 0):
            return quantum
    _log.warning(
        "on this CPU a row of a [%d, %d] %s product depends on its batch: outputs of equal "
        "requests may differ where two tokens are almost equally likely",
        *weight.shape,
        weight.dtype,
    )
    return 1
