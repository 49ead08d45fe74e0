"""Products and lookups that ranks share. Wrapped around a model's parts by the loader."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from baton.engine.ops.linear import Linear
from baton.engine.parallel.mesh import Comm


class SummedLinear(Linear):
    """Each rank has some of the input's columns; the ranks' outputs are added up.

    A bias belongs to the first rank's part alone.
    """

    def __init__(self, part: Linear, comm: Comm) -> None:
        self._part = part
        self._comm = comm
        self.row_quantum = part.row_quantum

    def __call__(self, x_NK: Tensor) -> Tensor:
        """[rows, this rank's inputs] → [rows, out], the same on all ranks."""
        return self._comm.all_reduce(self._part(x_NK))


class GatheredLinear(Linear):
    """Each rank has some of the outputs, all of one number; the ranks' outputs are put together."""

    def __init__(self, part: Linear, comm: Comm, out_features: int) -> None:
        """``out_features``: of all ranks together, without what pads the last one."""
        self._part = part
        self._comm = comm
        self._out_features = out_features
        self.row_quantum = part.row_quantum

    def __call__(self, x_NK: Tensor) -> Tensor:
        """[rows, in] → [rows, out], the same on all ranks."""
        gathered = self._comm.all_gather(self._part(x_NK))
        by_rank = gathered.view(self._comm.size, len(x_NK), -1)
        return by_rank.transpose(0, 1).flatten(1)[:, : self._out_features]


class SplitEmbedding:
    """Each rank has some of the vocabulary's rows; a token is looked up where its row is."""

    def __init__(self, weight: Tensor, first: int, comm: Comm, dtype: torch.dtype) -> None:
        """``first``: the token id of the first row."""
        self._weight = weight
        self._first = first
        self._comm = comm
        self._dtype = dtype

    def __call__(self, token_ids_T: Tensor) -> Tensor:
        """[T] → [T, hidden], the same on all ranks."""
        local = token_ids_T - self._first
        here = (local >= 0) & (local < len(self._weight))
        rows = F.embedding(torch.where(here, local, 0), self._weight).to(self._dtype)
        return self._comm.all_reduce(torch.where(here.unsqueeze(1), rows, 0))
