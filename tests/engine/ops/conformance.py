"""Compares implementations of operations with their references in float64.

A :class:`Case` makes its inputs in float32 on the CPU. For a run they are rounded to the run's
dtype and put on its device; for the yardstick the same rounded numbers are widened to float64. So
what is measured is what the implementation adds, and not what the rounding of its inputs costs.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from baton.engine.kv_cache import KVCache
from baton.engine.ops.devices import available_devices
from baton.engine.ops.registry import REFERENCE, Implementation, Site
from baton.engine.plan import SequenceStep
from baton.engine.step_inputs import StepInputs, build_inputs
from kvpool.layout import KVLayout

Args = dict[str, Any]
DTYPES = (torch.float32, torch.bfloat16)
CPU = torch.device("cpu")

TOLERANCES: dict[str, dict[torch.dtype, tuple[float, float]]] = {
    # (absolute, relative). Inputs are such that results are of the order of 1. bfloat16 rounds by
    # 2^-9 = 0.002 of a number; relative bounds allow for two or three such roundings in a row,
    # absolute ones for those of summands that cancel.
    "rms_norm": {torch.float32: (1e-6, 2e-6), torch.bfloat16: (0.0, 0.01)},
    "add_rms_norm": {torch.float32: (1e-6, 2e-6), torch.bfloat16: (0.02, 0.01)},
    "rotary": {torch.float32: (1e-6, 1e-6), torch.bfloat16: (0.02, 0.01)},
    "swiglu": {torch.float32: (1e-6, 2e-6), torch.bfloat16: (1e-3, 0.01)},
    "cache_write": {torch.float32: (0.0, 0.0), torch.bfloat16: (0.0, 0.0)},
    "linear": {torch.float32: (5e-6, 1e-5), torch.bfloat16: (0.01, 0.01)},
    "grouped_matmul": {torch.float32: (5e-6, 1e-5), torch.bfloat16: (0.01, 0.01)},
    "moe_routing": {torch.float32: (1e-6, 2e-6), torch.bfloat16: (1e-6, 2e-6)},
    "paged_attention": {torch.float32: (2e-6, 1e-5), torch.bfloat16: (0.005, 0.01)},
    "mla_attention": {torch.float32: (5e-6, 1e-5), torch.bfloat16: (0.01, 0.01)},
    "sample": {torch.float32: (0.0, 0.0), torch.bfloat16: (0.0, 0.0)},
    "quantize": {torch.float32: (0.0, 1e-6), torch.bfloat16: (0.0, 1e-6)},
    "dequantize": {torch.float32: (0.0, 1e-6), torch.bfloat16: (0.0, 0.005)},
}


@dataclasses.dataclass(frozen=True)
class Exact:
    """A tensor whose dtype belongs to the operation: it stays as it is, but for the yardstick."""

    tensor: Tensor


@dataclasses.dataclass(frozen=True)
class OutDtype:
    """Stands for the run's dtype where an operation takes one."""


@dataclasses.dataclass(frozen=True)
class Paged:
    """A cache full of numbers and a step that attends in it, on layer 1 of shard 1."""

    steps: tuple[tuple[int, int], ...]
    """Per row: tokens computed before, tokens of this step."""
    num_kv_heads: int
    head_dim: int
    kind: Any = "gqa"
    block_size: int = 16
    row_quantum: int = 4

    @property
    def num_padded(self) -> int:
        """Tokens of the step with padding."""
        count = sum(count for _, count in self.steps)
        return count + -count % self.row_quantum

    def build(self, device: torch.device, dtype: torch.dtype, *, wide: bool) -> _Step:
        layout = KVLayout(
            dtype="float32" if dtype == torch.float32 else "bfloat16",
            block_size=self.block_size,
            num_layers=2,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            kind=self.kind,
            num_shards=2,
        )
        used = [-(-(start + count) // self.block_size) for start, count in self.steps]
        generator = torch.Generator().manual_seed(sum(used))
        # Out of order, and with blocks of nobody in between.
        order = torch.randperm(sum(used) + 3, generator=generator).tolist()
        rows = []
        for slot, ((start, count), blocks) in enumerate(zip(self.steps, used, strict=True)):
            table = tuple(order.pop() for _ in range(blocks))
            rows.append(SequenceStep(slot, start, (1,) * count, table, sample=False))
        cache = KVCache(layout, sum(used) + 3, device, shard=1)
        numbers = torch.randn(cache.tensor.shape, generator=generator)
        cache.tensor.copy_(numbers)
        if wide:
            # Layouts know no float64: the same rounded numbers in a tensor made for the yardstick.
            cache.tensor, cache.rows, cache.pages = (
                view.double() for view in (cache.tensor, cache.rows, cache.pages)
            )
        inputs = build_inputs(
            rows,
            layout,
            torch.zeros(1, dtype=torch.int64, device=device),
            device=device,
            dtype=dtype,
            row_quantum=self.row_quantum,
            shard=1,
        )
        return _Step(cache, 1, inputs)


@dataclasses.dataclass(frozen=True)
class _Step:
    cache: KVCache
    layer: int
    inputs: StepInputs


@dataclasses.dataclass(frozen=True)
class Case:
    """Inputs of one shape for one operation.

    Args:
        shape: the sizes of its ``Site``.
        make: inputs by name: float32 tensors, lists of them, ``Exact``, ``Paged``, ``OutDtype``,
            or anything that is passed as it is.
        run: from what was bound and the inputs to the results that are compared.
        expected: results, where these come from somewhere else than the reference.
    """

    op: str
    name: str
    shape: dict[str, int]
    make: Callable[[torch.Generator], Args]
    run: Callable[[Any, Args], tuple[Tensor, ...]]
    expected: Callable[[Args], tuple[Tensor, ...]] | None = None

    def site(self, device: torch.device, dtype: torch.dtype) -> Site:
        return Site(self.op, f"cases.{self.name}", device, dtype, tuple(sorted(self.shape.items())))

    def inputs(self, device: torch.device, dtype: torch.dtype, *, wide: bool = False) -> Args:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.op} {self.name}".encode()))
        made = self.make(generator)
        return {name: _placed(value, device, dtype, wide) for name, value in made.items()}


@dataclasses.dataclass(frozen=True)
class Run:
    """One implementation on one case."""

    implementation: Implementation
    case: Case
    device: torch.device
    dtype: torch.dtype

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        name = f"{self.case.op}-{self.implementation.name}-{self.device}-{dtype}"
        return f"{name}-{self.case.name}"

    def check(self) -> None:
        """AssertionError where results are further from the yardstick than the table allows."""
        case = self.case
        bound = self.implementation.make(case.site(self.device, self.dtype))
        with torch.inference_mode():
            results = case.run(bound, case.inputs(self.device, self.dtype))
        atol, rtol = TOLERANCES[case.op][self.dtype]
        yardstick = _yardstick(case, self.dtype)
        assert len(results) == len(yardstick)
        for result, exact in zip(results, yardstick, strict=True):
            torch.testing.assert_close(
                result.cpu().double(),
                exact,
                atol=atol,
                rtol=rtol,
                msg=lambda text: f"{self} {text}",
            )


def runs(
    catalog: Sequence[Implementation],
    cases: Sequence[Case],
    devices: Sequence[torch.device] | None = None,
) -> Iterator[Run]:
    """Every implementation on every case of its operation, wherever it can handle it."""
    for implementation in catalog:
        for device in available_devices() if devices is None else devices:
            for dtype in DTYPES:
                for case in cases:
                    if case.op != implementation.op:
                        continue
                    if implementation.refusal(case.site(device, dtype)) is None:
                        yield Run(implementation, case, device, dtype)


@functools.cache
def _yardsticks() -> dict[tuple[str, str, torch.dtype], tuple[Tensor, ...]]:
    return {}


def _yardstick(case: Case, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The catalog's reference in float64 on the CPU, of inputs rounded to ``dtype``."""
    from baton.engine.ops.catalog import CATALOG

    key = (case.op, case.name, dtype)
    known = _yardsticks()
    if key not in known:
        if case.expected is not None:
            exact = case.expected(case.inputs(CPU, dtype))
        else:
            (made,) = (item for item in CATALOG if item.op == case.op and item.name == REFERENCE)
            bound = made.make(case.site(CPU, torch.float64))
            with torch.inference_mode():
                exact = case.run(bound, case.inputs(CPU, dtype, wide=True))
        known[key] = tuple(result.double() for result in exact)
    return known[key]


def _placed(value: Any, device: torch.device, dtype: torch.dtype, wide: bool) -> Any:
    if isinstance(value, Exact):
        value = value.tensor.to(device)
        return value.double() if wide and value.is_floating_point() else value
    if isinstance(value, OutDtype):
        return torch.float64 if wide else dtype
    if isinstance(value, Paged):
        return value.build(device, dtype, wide=wide)
    if isinstance(value, list):
        return [_placed(item, device, dtype, wide) for item in value]
    if isinstance(value, Tensor):
        if value.is_floating_point():
            value = value.to(dtype)
        value = value.to(device)
        return value.double() if wide and value.is_floating_point() else value
    return value
