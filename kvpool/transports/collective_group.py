"""Groups of two over torch.distributed; the only file of this package that imports torch.

A group is made of a store and a back end directly, and not registered as a process group: many of
them live in a process, beside the group of its ranks. gloo is what the tests run on. The code for
devices (nccl, hccl and what else registers itself with torch) is tested with a stand-in on the CPU
and untested on hardware.
"""

from __future__ import annotations

import contextlib
import datetime
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from baton.core.errors import ConfigError
from kvpool.transports.collective_pair import NUM_SLOTS, GroupBroken

_DEVICES = {"gloo": "cpu", "nccl": "cuda", "hccl": "npu"}
_DATA_TAG, _ABORT_TAG = 0, 1
_ABORT_WAIT_S = 0.001
_LOOK_S = 0.0005
_DEVICE_OP_S = 3600.0


class TorchGroups:
    """See :class:`kvpool.transports.collective_pair.PairGroups`.

    Args:
        host: own address, on which the store listens and gloo connects.
        backend: ``gloo``, ``nccl``, ``hccl``, or one registered with torch.distributed.
        slice_bytes: length of a slot.

    Raises ConfigError if the back end is not there.
    """

    def __init__(self, host: str, backend: str, *, slice_bytes: int) -> None:
        known = dist.is_available() and (
            (backend == "gloo" and dist.is_gloo_available())
            or (backend == "nccl" and dist.is_nccl_available())
            or backend.upper() in dist.Backend._plugins
        )
        if not known or len(backend) > 16:
            raise ConfigError(
                f"torch.distributed has no back end {backend!r} here; use another transport",
                param="handoff.transport",
            )
        self.backend = backend
        self.slice_bytes = slice_bytes
        self._host = host

    def open(self, timeout_s: float) -> TorchPendingGroup:
        """Start a store for the two, on a port of its own."""
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        # Bound here, for the store itself would listen on all addresses.
        listener = socket.create_server((self._host, 0), family=family)
        port = listener.getsockname()[1]
        with _failures():
            store = TCPStore(
                self._host,
                port,
                2,
                is_master=True,
                timeout=datetime.timedelta(seconds=timeout_s),
                wait_for_workers=False,
                master_listen_fd=listener.detach(),
            )
        return TorchPendingGroup(self, store, f"{secrets.token_hex(8)}@{self._host}:{port}")

    def join(self, address: str, timeout_s: float) -> TorchPairGroup:
        """Complete a group at the exporter's store."""
        prefix, _, place = address.partition("@")
        host, _, port = place.rpartition(":")
        if not port.isdecimal():
            raise GroupBroken(f"{address!r} is not an address of a group")
        with _failures():
            store = TCPStore(
                host,
                int(port),
                2,
                is_master=False,
                timeout=datetime.timedelta(seconds=timeout_s),
                wait_for_workers=False,
            )
        return self.make(store, prefix, 1, timeout_s)

    def make(self, store: Store, prefix: str, rank: int, timeout_s: float) -> TorchPairGroup:
        """One side of a group; waits for the other one where the back end does."""
        with _failures():
            group = self._backend(PrefixStore(prefix, store), rank, timeout_s)
        return TorchPairGroup(group, self.backend, rank, self.slice_bytes)

    def _backend(self, store: Store, rank: int, timeout_s: float) -> Any:
        if self.backend == "gloo":
            gloo: Any = dist.ProcessGroupGloo
            options = gloo._Options()
            options._devices = [gloo.create_device(hostname=self._host)]
            options._threads = 1  # sends and receives need none
            options._timeout = datetime.timedelta(seconds=timeout_s)
            return gloo(store, rank, 2, options)
        # Devices connect with the first transfer. Their own limit ends the whole process, so it
        # is far away: ours, and the abort, come first.
        limit = datetime.timedelta(seconds=_DEVICE_OP_S)
        if self.backend == "nccl":
            nccl = dist.ProcessGroupNCCL.Options()
            nccl._timeout = limit
            return dist.ProcessGroupNCCL(store, rank, 2, nccl)
        plugin = dist.Backend._plugins[self.backend.upper()]
        if not plugin.extended_api:
            return plugin.creator_fn(store, rank, 2, limit)
        registry: Any = dist.distributed_c10d
        described = registry._DistributedBackendOptions()
        described.store = store
        described.group_rank = rank
        described.group_size = 2
        described.timeout = limit
        described.group_id = secrets.token_hex(8)
        described.global_ranks_in_group = [0, 1]
        return plugin.creator_fn(described, None)


class TorchPendingGroup:
    """See :class:`kvpool.transports.collective_pair.PendingGroup`."""

    def __init__(self, groups: TorchGroups, store: Store, address: str) -> None:
        self._groups = groups
        self._store: Store | None = store
        self.address = address

    def join(self, timeout_s: float) -> TorchPairGroup:
        """Wait for the reader, at most as long as ``open`` was given."""
        store = self._store
        if store is None:
            raise GroupBroken("the group was given up")
        return self._groups.make(store, self.address.partition("@")[0], 0, timeout_s)

    def close(self) -> None:
        """The store ends with its last user."""
        self._store = None


class TorchPairGroup:
    """See :class:`kvpool.transports.collective_pair.PairGroup`."""

    def __init__(self, group: Any, backend: str, rank: int, slice_bytes: int) -> None:
        self._group = group
        self._gloo = backend == "gloo"
        self._peer = 1 - rank
        self._aborted = threading.Event()
        device = _DEVICES.get(backend, "cpu")
        on_device = device != "cpu"
        self._host = [
            torch.empty(slice_bytes, dtype=torch.uint8, pin_memory=on_device)
            for _ in range(NUM_SLOTS)
        ]
        self._staged = (
            [torch.empty_like(one, device=device) for one in self._host]
            if on_device
            else self._host
        )
        self.slots: Sequence[memoryview] = [one.numpy().data for one in self._host]

    def send(self, slot: int, num_bytes: int, timeout_s: float) -> None:
        """Through the device's memory, where there is a device."""
        deadline = time.monotonic() + timeout_s
        staged = self._staged[slot][:num_bytes]
        if staged.is_cpu:
            self._run("send", staged, deadline)
            return
        staged.copy_(self._host[slot][:num_bytes])
        self._run("send", staged, deadline)

    def receive(self, slot: int, num_bytes: int, timeout_s: float) -> None:
        """Likewise."""
        deadline = time.monotonic() + timeout_s
        staged = self._staged[slot][:num_bytes]
        self._run("recv", staged, deadline)
        if not staged.is_cpu:
            self._host[slot][:num_bytes].copy_(staged)

    def abort(self) -> None:
        """Devices have an abort; gloo's does not wake who waits."""
        self._aborted.set()
        group = self._group
        if group is None:
            return
        if not self._gloo:
            group.abort()
            return
        # gloo closes its connections when an operation is late, which ends all others, also at
        # the peer. So: an operation that must be late, for nobody sends with this tag.
        with contextlib.suppress(RuntimeError):
            late = group.recv([torch.empty(1, dtype=torch.uint8)], self._peer, _ABORT_TAG)
            late.wait(datetime.timedelta(seconds=_ABORT_WAIT_S))

    def close(self) -> None:
        """Connections close with the last reference to the back end."""
        group, self._group = self._group, None
        if group is not None and not self._gloo:
            # Not a shutdown, which may wait for the peer.
            with _failures():
                group.abort()

    def _run(self, operation: str, staged: torch.Tensor, deadline: float) -> None:
        group = self._group
        if group is None or self._aborted.is_set():
            raise GroupBroken("the group was aborted")
        try:
            with _failures():
                work = getattr(group, operation)([staged], self._peer, _DATA_TAG)
                left = max(_ABORT_WAIT_S, deadline - time.monotonic())
                work.wait(datetime.timedelta(seconds=left))
        except TimeoutError:
            # gloo calls what an abort ended late, too.
            if self._aborted.is_set():
                raise GroupBroken("the group was aborted") from None
            raise
        if self._gloo:
            return
        # On a device, ``wait`` may have done no more than order the stream behind the transfer,
        # and what waits for a stream on the host takes no time limit.
        while not work.is_completed():
            if time.monotonic() >= deadline:
                raise TimeoutError
            if self._aborted.wait(_LOOK_S):
                raise GroupBroken("the group was aborted")


@contextlib.contextmanager
def _failures() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch.distributed's own are of this kind
        text = str(error).partition("\n")[0]
        if "timeout" in text.lower() or "timed out" in text.lower():
            raise TimeoutError(text) from None
        raise GroupBroken(text) from None
