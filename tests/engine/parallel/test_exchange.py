"""Exchanges against one process that has all experts, and the same rows in other company."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from baton.core.errors import ConfigError
from baton.engine.parallel.exchange import (
    AllGatherExchange,
    AllToAllExchange,
    Compute,
    Exchange,
    LocalExchange,
    ReplicatedExchange,
    make_exchange,
)
from baton.engine.parallel.mesh import Axes, Mesh, SingleComm, single_mesh
from tests.engine.parallel.parallel_kit import CPU, on_ranks

NUM_EXPERTS, HIDDEN, TOP_K, PADDING = 7, 8, 3, 2
NOISE = 1e6
"""What padding holds: seen in a result, it shows."""


@dataclasses.dataclass(frozen=True)
class Case:
    """Tokens of every group, and the experts that they may go to."""

    group_tokens: tuple[int, ...]
    experts: tuple[int, ...] = tuple(range(NUM_EXPERTS))
    seed: int = 0


SPREAD = Case((5, 1, 3, 9))
CASES = (
    SPREAD,
    Case((4, 0, 0, 11)),
    Case((0, 0, 0, 1)),
    Case((3, 3, 3, 3), experts=(2, 3)),
    Case((6, 0, 2, 1), experts=(6,)),
    # The last groups' rows are those of the first case, in other company.
    Case((2, 1, 3, 9), seed=99),
)


def tokens(case: Case, group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, H], experts [T, K], weights [T, K] of a group, padding after its real tokens."""
    # Groups 2 and 3 have the same rows whatever the seed.
    generator = torch.Generator().manual_seed(group if group > 1 else group + case.seed)
    count = case.group_tokens[group]
    x = torch.randn(count, HIDDEN, generator=generator)
    weights = torch.rand(count, TOP_K, generator=generator)
    choice = torch.rand(count, len(case.experts), generator=generator)
    top_k = min(TOP_K, len(case.experts))
    experts = torch.tensor(case.experts)[choice.argsort(-1)[:, :top_k]]
    x = torch.cat([x, torch.full((PADDING, HIDDEN), NOISE)])
    experts = torch.cat([experts, torch.zeros(PADDING, top_k, dtype=torch.int64)])
    weights = torch.cat([weights, torch.ones(PADDING, TOP_K)])[:, :top_k]
    return x.to(dtype), experts, weights.to(dtype)


def expert(number: int, x_NH: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + number)
    weight = torch.randn(HIDDEN, HIDDEN, generator=generator).to(x_NH.dtype)
    # Row by row: no library's choice of a kernel by the number of rows can show.
    return torch.stack([torch.tanh(weight @ x) for x in x_NH])


def computing(local: range, seen: list[int] | None = None) -> Compute:
    def compute(x_NH: Tensor, experts_NK: Tensor, weights_NK: Tensor, num_rows: int) -> Tensor:
        assert num_rows <= len(x_NH) == len(experts_NK) == len(weights_NK)
        out = torch.zeros_like(x_NH)
        for number in local:
            rows, places = (experts_NK[:num_rows] == number).nonzero(as_tuple=True)
            if len(rows):
                weights = weights_NK[rows, places].unsqueeze(1)
                out[rows] += expert(number, x_NH[rows]) * weights
        if seen is not None:
            seen.append(len(x_NH))
        return out

    return compute


def exchanged(mesh: Mesh, name: str, case: Case, dtype: torch.dtype) -> dict[str, Any]:
    exchanges: dict[str, Exchange] = {
        "replicated": ReplicatedExchange(mesh.ep),
        "all_gather": AllGatherExchange(mesh),
        "all_to_all": AllToAllExchange(mesh, NUM_EXPERTS, CPU, exact=True),
        "all_to_all_fixed": AllToAllExchange(mesh, NUM_EXPERTS, CPU, exact=False),
    }
    seen: list[int] = []
    local = mesh.split_experts(NUM_EXPERTS)
    compute = computing(range(local.start, local.stop), seen)
    x, experts, weights = tokens(case, mesh.dp_rank, dtype)
    count = case.group_tokens[mesh.dp_rank]
    out = exchanges[name](x, experts, weights, count, case.group_tokens, compute)
    assert out.dtype == dtype
    return {"out": out.float().tolist(), "rows": sum(seen)}


def all_exchanged(mesh: Mesh, names: tuple[str, ...], cases: tuple[Case, ...]) -> Any:
    return {
        (name, case, dtype): exchanged(mesh, name, case, dtype)
        for name in names
        for case in cases
        for dtype in (torch.float32, torch.bfloat16)
    }


def check(found: list[Any], axes: Axes, name: str, case: Case) -> None:
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        for rank, results in enumerate(found):
            group = rank // axes.group_size
            count = case.group_tokens[group]
            x, experts, weights = tokens(case, group, dtype)
            whole = computing(range(NUM_EXPERTS))(x.float(), experts, weights.float(), count)
            out = torch.tensor(results[name, case, dtype]["out"])
            torch.testing.assert_close(out, whole, atol=tolerance, rtol=tolerance)
            assert not out[count:].any()


FOUR = {"groups of one": Axes(ep=4, dp=4), "groups of two": Axes(tp=2, ep=4, dp=2)}


@pytest.mark.parametrize("axes", FOUR.values(), ids=FOUR)
def test_uneven_idle_and_crowded(axes: Axes) -> None:
    """Seven experts on four ranks."""
    names = ("all_gather", "all_to_all", "all_to_all_fixed")
    cases = tuple(
        dataclasses.replace(case, group_tokens=case.group_tokens[-axes.dp :]) for case in CASES
    )
    found = on_ranks(axes, all_exchanged, names, cases)
    for name in names:
        for case in cases:
            check(found, axes, name, case)
            for dtype in (torch.float32, torch.bfloat16):
                outs = [results[name, case, dtype]["out"] for results in found]
                for rank, out in enumerate(outs):
                    assert out == outs[rank - rank % axes.group_size], "a group's ranks differ"
    if axes.dp == 4:
        # Rows of groups 2 and 3 come out as the same bits beside other rows of the others.
        for name in names:
            for results in found[2:]:
                first = results[name, cases[0], torch.float32]["out"]
                assert first == results[name, cases[-1], torch.float32]["out"]


def test_a_token_goes_once_to_each_rank_that_has_its_experts() -> None:
    axes = Axes(ep=4, dp=4)
    cases = (Case((3, 3, 3, 3), experts=(2, 3)), Case((6, 0, 2, 1), experts=(6,)))
    found = on_ranks(axes, all_exchanged, ("all_to_all",), cases)
    rows = [[r["all_to_all", case, torch.float32]["rows"] for r in found] for case in cases]
    # Experts 2 and 3 are both of rank 1, expert 6 is of rank 3.
    assert rows == [[0, 12, 0, 0], [0, 0, 0, 9]]


def test_replicated_tokens() -> None:
    axes = Axes(ep=3)
    cases = (Case((6,)), Case((4,), experts=(0,)))
    found = on_ranks(axes, all_exchanged, ("replicated",), cases)
    for case in cases:
        check(found, axes, "replicated", case)


def test_one_rank() -> None:
    case = Case((5,))
    x, experts, weights = tokens(case, 0, torch.float32)
    compute = computing(range(NUM_EXPERTS))
    exchange = make_exchange(single_mesh(), "auto", NUM_EXPERTS, CPU)
    out = exchange(x, experts, weights, 5, (5,), compute)
    assert torch.equal(out, compute(x, experts, weights, 5))


class Member(SingleComm):
    """A member of a group whose others are absent: shapes are right, contents are its own."""

    def __init__(self, size: int) -> None:
        self.size = size

    def all_gather(self, x: Tensor) -> Tensor:
        return x.repeat(self.size, *(1,) * (x.dim() - 1))


def mesh_of(axes: Axes) -> Mesh:
    return Mesh(axes, 0, Member(axes.tp), Member(axes.ep), Member(axes.dp))


@pytest.mark.parametrize(
    ("axes", "name", "kind"),
    [
        (Axes(), "all_to_all", LocalExchange),
        (Axes(tp=2), "auto", ReplicatedExchange),
        (Axes(dp=2), "all_to_all", LocalExchange),
        (Axes(ep=2), "auto", ReplicatedExchange),
        (Axes(tp=2, ep=2), "all_to_all", ReplicatedExchange),
        (Axes(ep=2, dp=2), "auto", AllToAllExchange),
        (Axes(ep=2, dp=2), "all_gather", AllGatherExchange),
        (Axes(tp=2, ep=4, dp=2), "auto", AllGatherExchange),
        (Axes(tp=2, ep=4, dp=2), "all_to_all", AllToAllExchange),
    ],
)
def test_choice(axes: Axes, name: Any, kind: type) -> None:
    mesh = mesh_of(axes)
    if axes.ep == 1:
        mesh = dataclasses.replace(mesh, ep=SingleComm())
    assert type(make_exchange(mesh, name, NUM_EXPERTS, CPU)) is kind


def test_more_ranks_than_experts() -> None:
    with pytest.raises(ConfigError, match="lower ep"):
        make_exchange(mesh_of(Axes(ep=8)), "auto", NUM_EXPERTS, CPU)


def on_device_only(make: Any) -> Tensor:
    """One call whose tensors have shapes and no values: what reads one on the host raises."""
    meta = torch.device("meta")
    mesh = mesh_of(Axes(tp=2, ep=8, dp=4))
    x = torch.empty(7, HIDDEN, device=meta)
    experts = torch.empty(7, TOP_K, dtype=torch.int64, device=meta)
    weights = torch.empty(7, TOP_K, device=meta)
    out: Tensor = make(mesh, meta)(
        x, experts, weights, 5, (5, 0, 9, 2), lambda x, *_: torch.empty_like(x)
    )
    return out


def test_nothing_of_the_experts_is_read_on_the_host() -> None:
    fixed = on_device_only(lambda mesh, meta: make_exchange(mesh, "all_to_all", 16, meta))
    assert fixed.shape == (7, HIDDEN)
    gathered = on_device_only(lambda mesh, meta: make_exchange(mesh, "auto", 16, meta))
    assert gathered.shape == (7, HIDDEN)
    with pytest.raises((RuntimeError, NotImplementedError)):
        on_device_only(lambda mesh, meta: AllToAllExchange(mesh, 16, meta, exact=True))
