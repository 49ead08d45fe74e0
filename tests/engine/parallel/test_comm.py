"""Collectives over gloo, several processes each."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from baton.core.errors import RankLost
from baton.engine.parallel.mesh import Axes, Mesh, single_mesh
from tests.engine.parallel.parallel_kit import on_ranks


def numbers(rank: int, num_rows: int, dtype: torch.dtype) -> torch.Tensor:
    """[num_rows, 8], of magnitudes for which the order of a sum shows; rows from one generator."""
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(num_rows, 8, generator=generator)
    scale = 10.0 ** torch.randint(-4, 5, (num_rows, 8), generator=generator)
    return (x * scale).to(dtype)


def sums(mesh: Mesh) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = numbers(mesh.rank, 37, dtype)
        whole = mesh.ep.all_reduce(x.clone())
        parts = [mesh.ep.all_reduce(x[i : i + 1].clone()) for i in range(len(x))]
        found[str(dtype)] = (whole.float().tolist(), torch.cat(parts).float().tolist())
    found["scalar"] = mesh.ep.all_reduce(torch.tensor(mesh.rank + 1)).tolist()
    return found


def test_sums_are_the_same_bits_everywhere_in_any_batch() -> None:
    results = on_ranks(Axes(ep=3), sums)
    assert results[0] == results[1] == results[2]
    assert results[0]["scalar"] == 6
    for dtype in (torch.float32, torch.bfloat16):
        whole, row_by_row = results[0][str(dtype)]
        assert whole == row_by_row
        parts = [numbers(rank, 37, dtype).float() for rank in range(3)]
        in_order = (parts[0] + parts[1]) + parts[2]
        assert whole == in_order.to(dtype).float().tolist()
        # The numbers are such that another order would have shown.
        if dtype == torch.float32:
            assert whole != (parts[0] + (parts[1] + parts[2])).tolist()


def moves(mesh: Mesh) -> dict[str, Any]:
    me, size = mesh.ep.rank, mesh.ep.size
    mine = torch.tensor([[me, 0], [me, 1]])
    # Member i sends i + j rows to member j, so none goes from 0 to 0.
    send = [me + other for other in range(size)]
    rows = [[me, other, n] for other in range(size) for n in range(me + other)]
    exact = mesh.ep.all_to_all(torch.tensor(rows).view(-1, 3), send, send)
    fixed = mesh.ep.all_to_all(torch.arange(size) + 10 * me, None, None)
    nothing = mesh.ep.all_to_all(torch.zeros(0, 4), [0] * size, [0] * size)
    flags = mesh.ep.all_to_all(torch.full((size, 2), me, dtype=torch.bfloat16), None, None)
    return {
        "gather": mesh.ep.all_gather(mine).tolist(),
        "exact": exact.tolist(),
        "fixed": fixed.tolist(),
        "nothing": tuple(nothing.shape),
        "flags": flags.tolist(),
    }


def test_rows_reach_their_members_in_order() -> None:
    for me, found in enumerate(on_ranks(Axes(ep=3), moves)):
        assert found["gather"] == [[rank, n] for rank in range(3) for n in range(2)]
        assert found["exact"] == [[other, me, n] for other in range(3) for n in range(me + other)]
        assert found["fixed"] == [me, 10 + me, 20 + me]
        assert found["nothing"] == (0, 4)
        assert found["flags"] == [[rank, rank] for rank in range(3)]


def members(mesh: Mesh) -> dict[str, Any]:
    mine = torch.tensor([mesh.rank])
    groups = {"tp": mesh.tp, "ep": mesh.ep, "dp": mesh.dp}
    return {name: comm.all_gather(mine).tolist() for name, comm in groups.items()} | {
        "places": (mesh.dp_rank, mesh.group_rank),
        "experts": list(range(7))[mesh.split_experts(7)],
    }


def test_groups_of_both_axes() -> None:
    found = on_ranks(Axes(tp=2, ep=4, dp=2), members)
    assert [rank["tp"] for rank in found] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [rank["dp"] for rank in found] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [rank["ep"] for rank in found] == [[0, 1, 2, 3]] * 4
    assert [rank["places"] for rank in found] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [rank["experts"] for rank in found] == [[0, 1], [2, 3], [4, 5], [6]]


def test_groups_of_one_axis() -> None:
    found = on_ranks(Axes(tp=2), members)
    assert [(rank["tp"], rank["ep"], rank["dp"]) for rank in found] == [
        ([0, 1], [0], [0]),
        ([0, 1], [1], [1]),
    ]
    assert single_mesh().split_experts(7) == slice(0, 7)


def lose_one(mesh: Mesh) -> str:
    mesh.tp.all_reduce(torch.ones(4))
    if mesh.rank == 1:
        os._exit(0)
    with pytest.raises(RankLost) as caught:
        mesh.tp.all_reduce(torch.ones(4))
    return caught.value.message


def test_a_lost_peer_is_named() -> None:
    first, second = on_ranks(Axes(tp=2), lose_one, may_end=(1,))
    assert first.startswith("rank 1 (tp 1, dp 0) does not take part any more: ")
    assert second is None


def test_one_of_several_peers_is_lost() -> None:
    for rank, message in enumerate(on_ranks(Axes(tp=3), lose_one, may_end=(1,))):
        if rank != 1:
            assert message.startswith(f"one of rank {0 if rank else 1} (tp ")


def stay_away(mesh: Mesh, fifo: str) -> str | None:
    if mesh.rank == 1:
        # Alive, but at no collective, until the other has given up: opening waits for its end.
        os.close(os.open(fifo, os.O_RDONLY))
        return None
    with pytest.raises(RankLost) as caught:
        mesh.ep.all_reduce(torch.ones(1))
    os.close(os.open(fifo, os.O_WRONLY))
    return caught.value.message


def test_a_peer_that_does_not_come_is_waited_for_no_longer_than_agreed(tmp_path: Path) -> None:
    fifo = str(tmp_path / "gave-up")
    os.mkfifo(fifo)
    message, _ = on_ranks(Axes(ep=2), stay_away, fifo, timeout_s=1.0)
    assert message is not None
    assert "rank 1 (ep 1)" in message
    assert "1000ms" in message
