"""How tokens reach the experts of other ranks, and their sums come back.

Every rank of an instance calls its exchange once per MoE layer and step, an idle group's too. All
counts that shapes depend on come from ``group_tokens``, which the plan tells; only the exact form
of ``AllToAllExchange``, for CPUs, reads counts of experts on the host.

A token's sum is taken over its ranks in their order, so it does not depend on the other tokens of
the step, nor on those of other groups (on CPUs; see ``comm``).

Dim letters: T tokens of this group with padding, N rows that a rank computes, H hidden, K experts
per token, R ranks that share the experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from baton.core.config import ExchangeName
from baton.core.errors import ConfigError
from baton.engine.parallel.mesh import Comm, Mesh

Compute = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""``(x_NH, experts_NK, weights_NK, num_rows) -> [N, H]``: for each row, the weighted sum over those
of its K experts (global numbers; -1 is none) that are on this rank. Rows from ``num_rows`` on are
padding and give zeros. A row's result does not depend on other rows: the callback pads their number
as it needs."""


class Exchange(Protocol):
    """Applies the experts of all ranks to this rank's tokens."""

    def __call__(
        self,
        x_TH: Tensor,
        experts_TK: Tensor,
        weights_TK: Tensor,
        num_tokens: int,
        group_tokens: tuple[int, ...],
        compute: Compute,
    ) -> Tensor:
        """[T, H]: each token's weighted sum over all its K experts; zeros for padding.

        ``num_tokens`` of the T are real: 0 in an idle group, which passes padding only.
        ``group_tokens``: real tokens of every dp group, this one included. Collective: all ranks
        call it, as often and in the same order. Raises RankLost.
        """


class LocalExchange:
    """All experts are here."""

    def __call__(
        self,
        x_TH: Tensor,
        experts_TK: Tensor,
        weights_TK: Tensor,
        num_tokens: int,
        group_tokens: tuple[int, ...],
        compute: Compute,
    ) -> Tensor:
        """See ``Exchange``."""
        return compute(x_TH, experts_TK, weights_TK, num_tokens)


class ReplicatedExchange:
    """All ranks have all tokens: each computes its part, and the sums are added.

    Its part: its own experts (ep), or its share of every expert's inner dim (tp without ep).
    """

    def __init__(self, comm: Comm) -> None:
        self._comm = comm

    def __call__(
        self,
        x_TH: Tensor,
        experts_TK: Tensor,
        weights_TK: Tensor,
        num_tokens: int,
        group_tokens: tuple[int, ...],
        compute: Compute,
    ) -> Tensor:
        """See ``Exchange``."""
        return self._comm.all_reduce(compute(x_TH, experts_TK, weights_TK, num_tokens))


class AllGatherExchange:
    """Every rank gets the tokens of all groups; then as in ``ReplicatedExchange``."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    def __call__(
        self,
        x_TH: Tensor,
        experts_TK: Tensor,
        weights_TK: Tensor,
        num_tokens: int,
        group_tokens: tuple[int, ...],
        compute: Compute,
    ) -> Tensor:
        """See ``Exchange``."""
        width, total = max(group_tokens), sum(group_tokens)
        if not total:
            return torch.zeros_like(x_TH)
        tensors = (x_TH, experts_TK, weights_TK)
        parts = self._mesh.dp.all_gather(_rows(_pack(tensors), 0, num_tokens, width))
        begins = range(0, len(parts), width)
        real = torch.cat(
            [parts[at : at + count] for at, count in zip(begins, group_tokens, strict=True)]
        )
        x_NH, experts_NK, weights_NK = _unpack(real, tensors)
        sums = self._mesh.ep.all_reduce(compute(x_NH, experts_NK, weights_NK, total))
        first = sum(group_tokens[: self._mesh.dp_rank])
        return _rows(sums, first, first + num_tokens, len(x_TH))


class AllToAllExchange:
    """Each token goes once to each rank that has one of its experts, and one sum comes back.

    Where a group has several ranks (tp), each sends its share of the tokens, and the group's ranks
    tell each other the sums.

    ``exact``: parts are as long as they must be, so their lengths are exchanged first and read on
    the host. Otherwise all parts have one length, that of the largest share of any group: then
    nothing about experts is known on the host, which need not wait for the device. Parts of that
    length have room for all tokens of a share, so every token travels to every rank, and a rank
    returns zeros for those that it has no expert of.
    """

    def __init__(self, mesh: Mesh, num_experts: int, device: torch.device, *, exact: bool) -> None:
        self._mesh = mesh
        self._exact = exact
        owners = []
        for rank in range(mesh.ep.size):
            owned = mesh.experts_of(num_experts, rank)
            owners += [rank] * (owned.stop - owned.start)
        self._owner_of = torch.tensor(owners, device=device)

    def __call__(
        self,
        x_TH: Tensor,
        experts_TK: Tensor,
        weights_TK: Tensor,
        num_tokens: int,
        group_tokens: tuple[int, ...],
        compute: Compute,
    ) -> Tensor:
        """See ``Exchange``."""
        mesh = self._mesh
        if not any(group_tokens):
            return torch.zeros_like(x_TH)
        size = mesh.axes.group_size
        share = -(-num_tokens // size)
        begin = min(mesh.group_rank * share, num_tokens)
        end = min(begin + share, num_tokens)
        tensors = (x_TH[begin:end], experts_TK[begin:end], weights_TK[begin:end])
        if self._exact:
            sums = self._send_exact(*tensors, compute)
        else:
            longest = -(-max(group_tokens) // size)
            sums = self._send_fixed(*tensors, longest, compute)[: end - begin]
        out_TH = torch.zeros_like(x_TH)
        out_TH[begin:end] = sums
        return mesh.tp.all_reduce(out_TH) if size > 1 else out_TH

    def _send_exact(
        self, x_TH: Tensor, experts_TK: Tensor, weights_TK: Tensor, compute: Compute
    ) -> Tensor:
        ep = self._mesh.ep
        owners_TK = self._owner_of[experts_TK]
        goes_RT = torch.stack([(owners_TK == rank).any(1) for rank in range(ep.size)])
        # By receiver, and there by token.
        tokens_N = goes_RT.nonzero()[:, 1]
        counts_R = goes_RT.sum(1)
        sent: list[int] = counts_R.tolist()
        received: list[int] = ep.all_to_all(counts_R, None, None).tolist()

        tensors = (x_TH, experts_TK, weights_TK)
        rows = ep.all_to_all(_pack(tensors).index_select(0, tokens_N), sent, received)
        x_NH, experts_NK, weights_NK = _unpack(rows, tensors)
        sums_NH = x_NH
        if len(x_NH):
            sums_NH = compute(x_NH, experts_NK, weights_NK, len(x_NH))
        total_TH = _accumulator(x_TH)
        returned = ep.all_to_all(sums_NH, received, sent).to(total_TH.dtype)
        begin = 0
        for count in sent:
            # A rank returns a token once: each gets its ranks' sums in their order.
            part = slice(begin, begin + count)
            total_TH.index_add_(0, tokens_N[part], returned[part])
            begin += count
        return total_TH.to(x_TH.dtype)

    def _send_fixed(
        self, x_TH: Tensor, experts_TK: Tensor, weights_TK: Tensor, longest: int, compute: Compute
    ) -> Tensor:
        ep = self._mesh.ep
        count = len(x_TH)
        tensors = tuple(
            _rows(tensor, 0, count, longest, fill)
            for tensor, fill in ((x_TH, 0), (experts_TK, -1), (weights_TK, 0))
        )
        # The same rows for all: a gather sends them without a copy per receiver.
        x_NH, experts_NK, weights_NK = _unpack(ep.all_gather(_pack(tensors)), tensors)
        sums_NH = compute(x_NH, experts_NK, weights_NK, len(x_NH))
        total = _accumulator(x_NH[:longest])
        for part in ep.all_to_all(sums_NH, None, None).view(ep.size, longest, -1):
            total += part
        return total.to(x_TH.dtype)


def make_exchange(
    mesh: Mesh, name: ExchangeName, num_experts: int, device: torch.device
) -> Exchange:
    """The exchange that fits a mesh.

    ``auto`` is all-to-all where each dp group is one rank: a token then travels to the ranks that
    need it and not to all. Groups of several ranks hold each token several times, and gather.
    Raises ConfigError where there are fewer experts than ranks to share them.
    """
    if mesh.ep.size == 1:
        return LocalExchange() if mesh.tp.size == 1 else ReplicatedExchange(mesh.tp)
    if num_experts < mesh.ep.size:
        raise ConfigError(
            f"{num_experts} experts cannot be shared by ep={mesh.ep.size} ranks: lower ep",
            param="ep",
        )
    if mesh.axes.dp == 1:
        return ReplicatedExchange(mesh.ep)
    if name == "all_to_all" or (name == "auto" and mesh.axes.group_size == 1):
        return AllToAllExchange(mesh, num_experts, device, exact=device.type == "cpu")
    return AllGatherExchange(mesh)


def _pack(tensors: Sequence[Tensor]) -> Tensor:
    """[N, bytes]: rows of several tensors beside each other, so that they travel together."""
    return torch.cat([tensor.contiguous().view(torch.uint8) for tensor in tensors], 1)


def _unpack(rows: Tensor, like: Sequence[Tensor]) -> Sequence[Tensor]:
    """The inverse, for tensors of the dtypes and widths of ``like``."""
    widths = [tensor.shape[1] * tensor.dtype.itemsize for tensor in like]
    parts = torch.split_with_sizes(rows, widths, 1)
    # A copy always: one row counts as contiguous, and still begins at any byte.
    copies = [part.clone(memory_format=torch.contiguous_format) for part in parts]
    return [copy.view(own.dtype) for copy, own in zip(copies, like, strict=True)]


def _rows(tensor: Tensor, begin: int, end: int, length: int, fill: float = 0) -> Tensor:
    """Rows [begin, end) of ``tensor`` and ``fill`` after them, ``length`` rows in all."""
    if end - begin == length:
        return tensor[begin:end]
    out = tensor.new_full((length, *tensor.shape[1:]), fill)
    out[: end - begin] = tensor[begin:end]
    return out


def _accumulator(like: Tensor) -> Tensor:
    """Zeros to add ranks' sums to: short formats are rounded once, at the end."""
    dtype = torch.float32 if like.dtype.itemsize < 4 else like.dtype
    return torch.zeros(like.shape, dtype=dtype, device=like.device)
