"""Collectives of a rank's groups over torch.distributed.

On a CPU a sum is taken in the order of the ranks, element by element, so a row's sum depends
neither on its place in the tensor nor on how many rows there are, which a ring's does from three
members on. It costs what gloo's own sum costs: members send their parts to all others at once.
Accelerators sum as their back end does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import socket
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store, TCPStore

from baton.core.errors import ConfigError, RankLost
from baton.engine.parallel.mesh import Axes, Comm, Mesh, SingleComm

BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
"""Of torch.distributed, by device type."""

LOCAL_HOST = "127.0.0.1"


class TorchComm:
    """A ``Comm`` over a process group of torch.distributed.

    Args:
        group: the process group; its timeout bounds every collective.
        members: the ranks of the group, in order, as errors call them.
        rank: this rank's place among them.
        ordered: sum in the order of ranks (see above) and not as the back end likes: for gloo.
    """

    def __init__(
        self, group: dist.ProcessGroup, members: Sequence[str], rank: int, *, ordered: bool
    ) -> None:
        self._group = group
        self._members = tuple(members)
        self._ordered = ordered
        self.rank = rank
        self.size = len(self._members)

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over members, in place; all get the same bits. Returns ``x``."""
        if not self._ordered:
            with self._peers():
                dist.all_reduce(x, group=self._group)
            return x
        parts = self.all_gather(x.unsqueeze(0))
        # Rounded once: what short formats would lose between members stays.
        total = parts[0].to(torch.float32) if x.dtype.itemsize < 4 else parts[0]
        for part in parts[1:]:
            total += part
        return x.copy_(total)

    def all_gather(self, x: Tensor) -> Tensor:
        """Members' tensors of one shape, stacked along dim 0 in order: [size * n, ...]."""
        if self._ordered:  # gloo's gather is a ring: as many turns as members
            return self.all_to_all(x.repeat(self.size, *(1,) * (x.dim() - 1)), None, None)
        out = x.new_empty(self.size * x.shape[0], *x.shape[1:])
        with self._peers():
            dist.all_gather_into_tensor(out, x.contiguous(), group=self._group)
        return out

    def all_to_all(
        self, x: Tensor, send_rows: list[int] | None, receive_rows: list[int] | None
    ) -> Tensor:
        """Rows of ``x``, those for member i after those for i - 1; returns what came, by sender.

        Without counts all parts are of one size, and nothing about them is known on the host.
        """
        num_rows = x.shape[0] if receive_rows is None else sum(receive_rows)
        out = x.new_empty(num_rows, *x.shape[1:])
        with self._peers():
            dist.all_to_all_single(out, x.contiguous(), receive_rows, send_rows, group=self._group)
        return out

    @contextlib.contextmanager
    def _peers(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            # A wrong argument is a ValueError or TypeError; what is left is the wire.
            others = [name for i, name in enumerate(self._members) if i != self.rank]
            who = others[0] if len(others) == 1 else f"one of {', '.join(others)}"
            raise RankLost(f"{who} does not take part any more: {_first_line(error)}") from error


@dataclasses.dataclass(slots=True)
class HostedStore:
    """The rendezvous of an instance's ranks, in rank 0."""

    store: Store
    address: str
    """``host:port``, for the others."""


def host_store(timeout_s: float, host: str = LOCAL_HOST) -> HostedStore:
    """Make the rendezvous, at a free port of ``host`` and of no other interface."""
    listener = socket.create_server((host, 0))
    port = listener.getsockname()[1]
    # The store owns the descriptor from now on.
    store = TCPStore(
        host,
        port,
        is_master=True,
        timeout=datetime.timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    return HostedStore(store, f"{host}:{port}")


def join_store(address: str, timeout_s: float) -> Store:
    """Connect to the rendezvous that rank 0 hosts. ``RankLost`` if nothing answers there."""
    host, _, port = address.rpartition(":")
    timeout = datetime.timedelta(seconds=timeout_s)
    try:
        return TCPStore(host, int(port), is_master=False, timeout=timeout)
    except RuntimeError as error:
        raise RankLost(f"rank 0 cannot be reached at {address}: {_first_line(error)}") from error


def make_mesh(
    axes: Axes, rank: int, *, store: Store | str, timeout_s: float, device: torch.device
) -> Mesh:
    """Join the instance's ranks and form their groups. Once per process, by all ranks.

    Args:
        axes: how the instance is cut, the same for all.
        rank: this one.
        store: the rendezvous, or its ``host:port`` (see ``host_store``).
        timeout_s: bound of the meeting and of each collective afterwards.
        device: where tensors live; decides the back end.

    Raises RankLost where the others do not come, ConfigError for a device without a back end.
    ``close_mesh`` undoes it.
    """
    if axes.world_size == 1:
        return Mesh(axes, 0, SingleComm(), SingleComm(), SingleComm())
    backend = BACKENDS.get(device.type)
    if backend is None:
        raise ConfigError(f"ranks on {device.type} devices have no collectives", param="device")
    if device.type == "cpu":
        _stay_on_this_machine()
    if isinstance(store, str):
        store = join_store(store, timeout_s)
    timeout = datetime.timedelta(seconds=timeout_s)
    try:
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=axes.world_size, timeout=timeout
        )
        return _form_groups(axes, rank, backend, timeout, ordered=device.type == "cpu")
    except RuntimeError as error:
        close_mesh()
        raise RankLost(f"the ranks did not all meet: {_first_line(error)}") from error


def close_mesh() -> None:
    """Leave all groups. Idempotent."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _form_groups(
    axes: Axes, rank: int, backend: str, timeout: datetime.timedelta, *, ordered: bool
) -> Mesh:
    """All ranks make all groups, in one order: torch counts them to tell them apart."""
    world, width = range(axes.world_size), axes.group_size
    made: dict[tuple[int, ...], dist.ProcessGroup] = {}

    def comm(groups: Sequence[Sequence[int]]) -> Comm:
        own: Comm = SingleComm()
        for group in map(tuple, groups):
            if len(group) == 1:
                continue
            if group not in made:
                made[group] = dist.new_group(list(group), timeout=timeout, backend=backend)
            if rank in group:
                names = [axes.name(member) for member in group]
                own = TorchComm(made[group], names, group.index(rank), ordered=ordered)
        return own

    tp = comm([world[first : first + axes.tp] for first in range(0, len(world), axes.tp)])
    ep = comm([world] if axes.ep > 1 else [])
    dp = comm([world[place::width] for place in range(width)])
    return Mesh(axes, rank, tp, ep, dp)


def _stay_on_this_machine() -> None:
    """Gloo listens where the host's name points; ranks share a machine, so loopback is enough."""
    for _, name in socket.if_nameindex():
        if name.startswith("lo"):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            return


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
