"""The operations client: what the ``baton`` command asks of a controller."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import TypeVar

import grpc

from baton.core.cluster import Role
from baton.core.errors import NotFound, Stage
from protos.baton.internal.v1 import (
    instance_pb2,
    instance_pb2_grpc,
    pool_pb2,
    pool_pb2_grpc,
)
from protos.baton.v1 import cluster_pb2, cluster_pb2_grpc
from protos.serving import channel_options
from protos.status import error_from_rpc

_CALL_TIMEOUT_S = 10.0
_DRAIN_SLACK_S = 5.0

T = TypeVar("T")


class AdminClient:
    """Speaks to the controller's gRPC port; close it, or use ``with``.

    Every method raises the BatonError that the controller answered.
    """

    def __init__(self, address: str, *, timeout_s: float = _CALL_TIMEOUT_S) -> None:
        """``address`` is host:port of the controller."""
        self._timeout_s = timeout_s
        self._channel = grpc.insecure_channel(address, options=channel_options())
        self._stub = cluster_pb2_grpc.ClusterStub(self._channel)

    def __enter__(self) -> AdminClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Disconnect."""
        self._channel.close()

    def status(self) -> cluster_pb2.ClusterStatus:
        """Instances, members and counts."""
        message = cluster_pb2.GetStatusRequest()
        return _ask(lambda: self._stub.GetStatus(message, timeout=self._timeout_s))

    def pool_status(self, address: str, *, dump: bool = False) -> pool_pb2.PoolStatus:
        """What the pool node at ``address`` has, as in the members of :meth:`status`."""
        with grpc.insecure_channel(address, options=channel_options()) as channel:
            stub = pool_pb2_grpc.PoolNodeStub(channel)
            message = pool_pb2.GetPoolStatusRequest(dump=dump)
            return _ask(lambda: stub.GetPoolStatus(message, timeout=self._timeout_s))

    def set_role(
        self, instance_id: str, role: Role, *, force: bool = False, timeout_s: float = 60.0
    ) -> Role:
        """Switch an instance's role; the role it had. Raises Refused with the reason."""
        message = cluster_pb2.SetRoleRequest(instance_id=instance_id, role=role, force=force)
        reply = _ask(lambda: self._stub.SetRole(message, timeout=timeout_s))
        return Role(reply.previous_role)

    def drain(
        self,
        instance_id: str,
        *,
        wait: bool = True,
        timeout_s: float = 60.0,
        undo: bool = False,
    ) -> cluster_pb2.DrainResponse:
        """Stop new placements there; with ``wait``, until its last request has ended."""
        message = cluster_pb2.DrainRequest(
            instance_id=instance_id, wait=wait, timeout_s=timeout_s, undo=undo
        )
        return _ask(lambda: self._stub.Drain(message, timeout=timeout_s + _DRAIN_SLACK_S))

    def roles(self, *, log_limit: int | None = None) -> cluster_pb2.RolesStatus:
        """Who switches roles, pins, the planner's advice, and the log (its newest entries)."""
        message = cluster_pb2.GetRolesRequest(log_limit=log_limit)
        return _ask(lambda: self._stub.GetRoles(message, timeout=self._timeout_s))

    def pin_role(self, instance_id: str, *, pinned: bool = True) -> Role | None:
        """Keep an instance's role from the planner, or give it back; the role that it has."""
        message = cluster_pb2.PinRoleRequest(instance_id=instance_id, pinned=pinned)
        reply = _ask(lambda: self._stub.PinRole(message, timeout=self._timeout_s))
        return Role(reply.role) if reply.role else None

    def pause_roles(self, *, paused: bool = True, duration_s: float | None = None) -> None:
        """Let the planner switch nothing (``duration_s``: for so long), or go on."""
        message = cluster_pb2.PauseRolesRequest(paused=paused, duration_s=duration_s)
        _ask(lambda: self._stub.PauseRoles(message, timeout=self._timeout_s))

    def explain(self, request_id: str) -> cluster_pb2.ExplainResponse:
        """Where a request was placed and when each stage happened. Raises NotFound."""
        message = cluster_pb2.ExplainRequest(request_id=request_id)
        return _ask(lambda: self._stub.Explain(message, timeout=self._timeout_s))

    def memory(self, instance_id: str) -> instance_pb2.MemoryReply:
        """What an instance's memory is used for, by the instance itself. Raises NotFound."""
        instances = {item.instance_id: item for item in self.status().instances}
        if instance_id not in instances:
            known = ", ".join(sorted(instances)) or "none"
            raise NotFound(
                f"there is no instance {instance_id!r}; there are: {known}",
                stage=Stage.CONTROL,
                param="instance",
            )
        address = instances[instance_id].address
        with grpc.insecure_channel(address, options=channel_options()) as channel:
            stub: instance_pb2_grpc.InstanceStub = instance_pb2_grpc.InstanceStub(channel)
            request = instance_pb2.MemoryRequest()
            return _ask(lambda: stub.Memory(request, timeout=self._timeout_s))


def _ask(call: Callable[[], T]) -> T:
    try:
        return call()
    except grpc.RpcError as error:
        raise error_from_rpc(error) from error
