"""Which rank does what: the axes of an instance and the groups that its ranks form.

Ranks are numbered with dp outermost: ``rank = (dp_rank * ep_extra + extra) * tp + tp_rank``. Four
cuts exist, and others are refused:

* ``tp`` alone: heads and MLP columns are split; experts too, by their inner dim.
* ``ep`` = ``tp * dp``: experts are split over all ranks as wholes; attention by tp and dp.
* ``ep`` alone (``tp = dp = 1``): attention and dense layers are computed by every rank alike, and
  the experts are split.
* ``dp`` without ep: engines that share nothing but the instance.

A dp rank is a *group* of ``world // dp`` ranks that compute the same tokens and have one scheduler
state. Source: docs/design.md, "Ranks".
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    # The driver of an instance speaks of axes too, and must not pay for torch.
    from torch import Tensor


class Comm(Protocol):
    """Collectives of one group. Every member calls the same ones, in the same order.

    Each is bounded by the group's timeout; what a lost peer raises is ``RankLost``.
    """

    rank: int
    """This rank's place in the group."""
    size: int

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over members, in place; all get the same bits. Returns ``x``."""

    def all_gather(self, x: Tensor) -> Tensor:
        """Members' tensors of one shape, stacked along dim 0 in order: [size * n, ...]."""

    def all_to_all(
        self, x: Tensor, send_rows: list[int] | None, receive_rows: list[int] | None
    ) -> Tensor:
        """Rows of ``x``, those for member i after those for i - 1; returns what came, by sender.

        Without counts all parts are of one size, and nothing about them is known on the host.
        """


class SingleComm:
    """A group of one: every collective is the identity."""

    rank = 0
    size = 1

    def all_reduce(self, x: Tensor) -> Tensor:
        """``x``."""
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """``x``."""
        return x

    def all_to_all(
        self, x: Tensor, send_rows: list[int] | None, receive_rows: list[int] | None
    ) -> Tensor:
        """``x``."""
        return x


@dataclasses.dataclass(frozen=True, slots=True)
class Axes:
    """How an instance is cut; ``EngineConfig`` has refused the cuts that do not exist."""

    tp: int = 1
    ep: int = 1
    dp: int = 1

    @property
    def world_size(self) -> int:
        """Ranks of the instance."""
        return max(self.tp * self.dp, self.ep)

    @property
    def group_size(self) -> int:
        """Ranks that compute the same tokens."""
        return self.world_size // self.dp

    def name(self, rank: int) -> str:
        """A rank as errors and logs call it, with its places on the axes that there are."""
        if self.world_size > self.tp * self.dp:
            return f"rank {rank} (ep {rank})"
        return f"rank {rank} (tp {rank % self.tp}, dp {rank // self.group_size})"


@dataclasses.dataclass(frozen=True, slots=True)
class Mesh:
    """One rank's view of its instance."""

    axes: Axes
    rank: int
    tp: Comm
    """Ranks that share the heads of the same tokens; of size 1 where heads are not split."""
    ep: Comm
    """Ranks that share the experts; of size 1 where they are not split as wholes."""
    dp: Comm
    """Ranks of the same place in all groups: gathers the tokens of all groups."""

    @property
    def dp_rank(self) -> int:
        """Which group this rank belongs to."""
        return self.rank // self.axes.group_size

    @property
    def group_rank(self) -> int:
        """Place in the group; rank 0 of a group reports its tokens."""
        return self.rank % self.axes.group_size

    def split(self, count: int, what: str) -> slice:
        """This rank's share of ``count`` heads or columns. ``ValueError`` if they do not divide."""
        if count % self.tp.size:
            raise ValueError(f"{what} {count} cannot be split over tp={self.tp.size}")
        share = count // self.tp.size
        return slice(self.tp.rank * share, (self.tp.rank + 1) * share)

    def split_experts(self, count: int) -> slice:
        """This rank's experts: the first ranks have one more where they do not divide."""
        return self.experts_of(count, self.ep.rank)

    def experts_of(self, count: int, ep_rank: int) -> slice:
        """The experts of a member of ``ep``."""
        share, more = divmod(count, self.ep.size)
        begin = ep_rank * share + min(ep_rank, more)
        return slice(begin, begin + share + (ep_rank < more))


def single_mesh() -> Mesh:
    """One rank."""
    return Mesh(Axes(), 0, SingleComm(), SingleComm(), SingleComm())
