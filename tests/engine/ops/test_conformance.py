"""Every implementation of every operation against its reference in float64; see conformance.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from baton.engine.ops import reference
from baton.engine.ops.catalog import CATALOG
from baton.engine.ops.devices import available_devices
from baton.engine.ops.grouped import TorchGroupedMatmul
from baton.engine.ops.linear import PlainLinear
from baton.engine.ops.registry import REFERENCE, Implementation, Ops, Site, choose
from tests.engine.ops.cases import CASES
from tests.engine.ops.conformance import CPU, DTYPES, TOLERANCES, Run, runs

RUNS = tuple(runs(CATALOG, CASES))
HOT_OPERATIONS = {
    "rms_norm",
    "add_rms_norm",
    "rotary",
    "paged_attention",
    "mla_attention",
    "cache_write",
    "swiglu",
    "linear",
    "grouped_matmul",
    "moe_routing",
    "sample",
    "quantize",
    "dequantize",
}
NOT_EXERCISED_WITHOUT = {("grouped_matmul", "torch_grouped"): "cuda"}
"""Implementations that cannot run on a CPU, and the device that they need."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_conforms(run: Run) -> None:
    run.check()


# That nothing is left out.


def test_every_hot_operation_is_registered() -> None:
    assert HOT_OPERATIONS - {item.op for item in CATALOG} == set()


def test_every_operation_has_a_reference_cases_and_tolerances() -> None:
    ops = {item.op for item in CATALOG}
    assert {item.op for item in CATALOG if item.name == REFERENCE} == ops
    assert {case.op for case in CASES} == ops
    assert set(TOLERANCES) == ops
    assert all(set(by_dtype) == set(DTYPES) for by_dtype in TOLERANCES.values())
    names = [(item.op, item.name) for item in CATALOG]
    assert len(set(names)) == len(names)
    assert len({(case.op, case.name) for case in CASES}) == len(CASES)


def test_every_attention_has_decode_prefill_and_mixed_steps() -> None:
    for op in ("paged_attention", "mla_attention"):
        kinds = {case.name.partition("-")[0] for case in CASES if case.op == op}
        assert {"decode", "prefill", "mixed"} <= kinds, op


def test_what_is_not_exercised_is_listed() -> None:
    here = {device.type for device in available_devices()}
    exercised = {(run.implementation.op, run.implementation.name) for run in RUNS}
    missing = {(item.op, item.name) for item in CATALOG} - exercised
    listed = {name for name, device in NOT_EXERCISED_WITHOUT.items() if device not in here}
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert missing == listed
    else:
        # A CPU without bfloat16 products still packs large float32 weights.
        assert missing - {("linear", "onednn_packed")} == listed


def test_every_reference_runs_on_every_case_and_device() -> None:
    asked = len(CASES) * len(DTYPES) * len(available_devices())
    assert sum(run.implementation.name == REFERENCE for run in RUNS) == asked


# What a device at hand lacks, as far as it goes.


def test_the_grouped_product_in_its_cpu_form() -> None:
    """The device's kernel is not here; the arguments and what becomes of them are the same."""
    (grouped,) = (item for item in CATALOG if item.name == "torch_grouped")
    found = list(runs([dataclasses.replace(grouped, devices=None)], CASES, [CPU]))
    assert {run.case.name for run in found} >= {"seven-experts", "strangers", "only-strangers"}
    assert all(run.dtype == torch.bfloat16 for run in found)
    for run in found:
        run.check()
    nobody = TorchGroupedMatmul(torch.ones(2, 16, 8, dtype=torch.bfloat16))
    empty = nobody(torch.ones(0, 8, dtype=torch.bfloat16), torch.tensor([0, 0]))
    assert empty.shape == (0, 16)


@pytest.mark.parametrize(
    ("dtype", "inner", "reason"),
    [
        (torch.float32, 64, "only bfloat16"),
        (torch.bfloat16, 20, "multiples of 16 bytes"),
        (torch.bfloat16, 64, None),
    ],
)
def test_where_the_grouped_product_is_taken(
    dtype: torch.dtype, inner: int, reason: str | None
) -> None:
    ops = Ops(torch.device("cuda"), dtype, dry=True)
    ops.bind("grouped_matmul", "experts", in_features=inner, out_features=48)
    (choice,) = ops.choices
    if reason is None:
        assert choice.implementation.name == "torch_grouped"
        assert choice.layout == "[experts, out, in]"
    else:
        assert choice.implementation.name == REFERENCE
        assert reason in dict(choice.passed_over)["torch_grouped"]
    assert dict(choice.passed_over)["per_expert"] == "only on cpu"


# That a wrong override is caught: one plausible mistake, or several, per operation.


def no_eps(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return reference.rms_norm(x, weight, 1e-30)


def sum_lost(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return reference.add_rms_norm(x, residual, weight, eps)[0], residual


def sum_in_place(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return reference.add_rms_norm(x, torch.zeros_like(x), weight, eps)[0], residual.add_(x)


def turned_back(x: Tensor, rotary_T21D: Tensor, out: Tensor) -> None:
    cos, sin = rotary_T21D.unbind(1)
    reference.rotary(x, torch.stack((cos, -sin), 1), out)


def up_before_gate(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(up) * gate


def first_plane_only(cache: Tensor, rows: Tensor, values: Tensor) -> None:
    cache.index_put_((rows,), values[:, :1].expand_as(values))


def bias_lost(weight: Tensor, bias: Tensor | None) -> PlainLinear:
    return PlainLinear(weight, None)


class EmptyGroupsSkipped(reference.GroupedMatmul):
    def __call__(self, x_NH: Tensor, counts_E: Tensor) -> Tensor:
        used = counts_E[counts_E > 0]
        return super().__call__(x_NH, F.pad(used, (0, len(counts_E) - len(used))))


def bias_kept(logits: Tensor, bias: Tensor | None, config: Any) -> tuple[Tensor, Tensor]:
    logits = logits if bias is None else logits + bias
    return reference.moe_routing(logits, None, config)


def groups_ignored(logits: Tensor, bias: Tensor | None, config: Any) -> tuple[Tensor, Tensor]:
    return reference.moe_routing(logits, bias, dataclasses.replace(config, num_groups=1))


def one_key_too_few(q: Tensor, cache: Any, layer: int, inputs: Any, scale: float) -> Tensor:
    earlier = (inputs.positions_T - 1).clamp(min=0)
    inputs = dataclasses.replace(inputs, positions_T=earlier)
    return reference.paged_attention(q, cache, layer, inputs, scale)


def other_layer(q: Tensor, cache: Any, layer: int, inputs: Any, scale: float) -> Tensor:
    return reference.paged_attention(q, cache, 0, inputs, scale)


def rotated_key_lost(q_nope: Tensor, q_rope: Tensor, *args: Any) -> Tensor:
    return reference.mla_attention(q_nope, q_rope * 0, *args)


def always_greedy(logits: Tensor, slots: Any, uniforms: Any, state: Any) -> Tensor:
    return logits.argmax(-1)


def truncated(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = reference.quantize(x)[1]
    return (x / scale).trunc().to(torch.int8), scale


def half_scale(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return reference.dequantize(values, scale / 2, dtype)


WRONG: list[tuple[str, Callable[..., Any]]] = [
    ("rms_norm", no_eps),
    ("add_rms_norm", sum_lost),
    ("add_rms_norm", sum_in_place),
    ("rotary", turned_back),
    ("swiglu", up_before_gate),
    ("cache_write", first_plane_only),
    ("linear", bias_lost),
    ("grouped_matmul", EmptyGroupsSkipped),
    ("moe_routing", bias_kept),
    ("moe_routing", groups_ignored),
    ("paged_attention", one_key_too_few),
    ("paged_attention", other_layer),
    ("mla_attention", rotated_key_lost),
    ("sample", always_greedy),
    ("quantize", truncated),
    ("dequantize", half_scale),
]


@pytest.mark.parametrize(
    ("op", "function"), WRONG, ids=lambda value: getattr(value, "__name__", value)
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_wrong_override_fails(op: str, function: Callable[..., Any], dtype: torch.dtype) -> None:
    """In either dtype by itself; and it is the override that a model would get."""
    wrong = Implementation(op, "wrong", lambda site: function, priority=99)
    catalog = (*CATALOG, wrong)
    site = next(case for case in CASES if case.op == op).site(CPU, dtype)
    assert choose(site, catalog).implementation is wrong
    failed = []
    for run in runs([item for item in catalog if item.op == op], CASES, [CPU]):
        if run.dtype == dtype:
            try:
                run.check()
            except AssertionError:
                failed.append(run.implementation.name)
    assert set(failed) == {"wrong"}


def test_every_operation_has_a_wrong_override() -> None:
    assert {op for op, _ in WRONG} == {item.op for item in CATALOG}


def test_reasons() -> None:
    """What is passed over, and why, as ``baton ops`` prints it."""
    shy = Implementation("swiglu", "shy", lambda site: None, 30, None, lambda site: "too shy")
    far = Implementation("swiglu", "far", lambda site: None, 20, frozenset({"cuda"}))
    near = Implementation("swiglu", "near", lambda site: None, 10, layout=lambda site: "flat")

    def chosen(*more: Implementation) -> Any:
        ops = Ops(CPU, torch.float32, (*CATALOG, *more))
        ops.bind("swiglu", "here")
        return ops.choices[0]

    alone = chosen()
    assert (alone.implementation.name, alone.passed_over) == (REFERENCE, ())
    assert alone.reason == "there is no override"
    unable = chosen(far, shy)
    assert unable.implementation.name == REFERENCE
    assert unable.reason == "no override can run here"
    assert unable.passed_over == (("shy", "too shy"), ("far", "only on cuda"))
    able = chosen(near, far, shy)
    assert able.implementation.name == "near"
    assert (able.reason, able.layout) == ("best that can run here (priority 10)", "flat")
    assert able.passed_over[-1] == (REFERENCE, "priority 0")
    assert isinstance(able.site, Site)
