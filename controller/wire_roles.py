"""Roles as operators see them, to their protos."""

from __future__ import annotations

from baton.core.clock import Clock
from controller.elastic import RoleAutomation
from controller.flip_log import FlipEntry
from controller.state import ClusterState
from protos.baton.v1 import cluster_pb2


def roles_status(
    roles: RoleAutomation, state: ClusterState, clock: Clock, log_limit: int | None
) -> cluster_pb2.RolesStatus:
    """What ``baton roles`` shows; ``log_limit``: newest entries of the log (``None``: all)."""
    now = clock.now()
    recent = roles.log.recent(now)
    status = cluster_pb2.RolesStatus(
        mode=roles.config.mode,
        paused=roles.paused,
        desired={str(role): count for role, count in roles.advice.desired.items()},
        desired_instances=roles.advice.desired_instances,
        attainment=recent.attainment,
        num_ended=recent.num_ended,
    )
    if roles.paused_until_s is not None:
        status.paused_for_s = max(0.0, roles.paused_until_s - now)
    for item in roles.view(now).instances:
        record = state.instances[item.instance_id]
        status.instances.add(
            instance_id=item.instance_id,
            role=item.role,
            state=record.state,
            flip_group=item.flip_group,
            pinned=item.pinned,
            switching_to=record.switch.target if record.switch else "",
            since_s=now - item.since_s,
        )
    for entry in roles.log.tail(log_limit):
        status.log.append(_flip(entry, roles, clock.wall() - now, now))
    return status


def _flip(
    entry: FlipEntry, roles: RoleAutomation, wall_offset_s: float, now: float
) -> cluster_pb2.RoleFlip:
    return cluster_pb2.RoleFlip(
        number=entry.number,
        wall_s=entry.at_s + wall_offset_s,
        instance_id=entry.instance_id,
        from_role=entry.source,
        to_role=entry.target,
        who=entry.who,
        reason=entry.reason,
        state=entry.state,
        detail=entry.detail,
        inputs=entry.inputs,
        predicted_before=entry.predicted_before,
        predicted_after=entry.predicted_after,
        seconds=entry.seconds,
        attainment_before=entry.before.attainment,
        attainment_after=entry.after.attainment,
        num_before=entry.before.num_ended,
        num_after=entry.after.num_ended,
        settled=roles.log.settled(entry, now),
        urgent=entry.urgent,
        desired_instances=entry.desired_instances,
    )
