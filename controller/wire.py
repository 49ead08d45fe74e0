"""Between the controller's values and its protos, in both directions."""

from __future__ import annotations

from collections.abc import Iterable

from baton.core.cluster import Placement
from controller import events
from controller.block_directory import PrefixLookup
from controller.state import ClusterState, InstanceRecord
from controller.traces import RequestTrace
from protos.baton.internal.v1 import controller_pb2
from protos.baton.v1 import cluster_pb2
from protos.convert import (
    error_to_info,
    instance_from_record,
    instance_to_record,
    load_from_report,
    slo_from_record,
    target_to_record,
)


def registration(
    call_id: int, request: controller_pb2.RegisterInstanceRequest
) -> events.RegisterInstance:
    """From the wire. Raises ValueError for an unknown role."""
    info = instance_from_record(request.instance)
    return events.RegisterInstance(call_id, info, request.known_epoch, request.draining)


def heartbeat(session_id: int, message: controller_pb2.InstanceHeartbeat) -> events.Heartbeat:
    """From the wire."""
    return events.Heartbeat(
        session_id=session_id,
        instance_id=message.instance_id,
        incarnation=message.incarnation,
        load=load_from_report(message.load),
        acks=tuple(events.Ack(ack.directive_id, ack.ok, ack.reason) for ack in message.acks),
    )


def directive(command: events.SendDirective) -> controller_pb2.Directive:
    """To the wire."""
    message = controller_pb2.Directive(directive_id=command.directive_id)
    match command.body:
        case events.PrepareRole(role):
            message.prepare_role.role = role
        case events.CommitRole(role):
            message.commit_role.role = role
        case events.SetDraining(draining):
            message.drain = draining
        case events.Fence():
            message.fenced = True
    return message


def member_seen(session_id: int, message: controller_pb2.MemberHeartbeat) -> events.MemberSeen:
    """From the wire."""
    member = events.MemberInfo(
        kind=message.kind,
        member_id=message.member_id,
        address=message.address,
        http_address=message.http_address,
        node_id=message.node_id,
        pid=message.pid,
        rss_bytes=message.rss_bytes,
    )
    return events.MemberSeen(session_id, member, message.known_epoch)


def place_requests(
    call_id: int, batch: controller_pb2.PlaceBatch, prefixes: PrefixLookup
) -> events.PlaceRequests:
    """From the wire. What the index says now becomes part of the event, so that a log of events
    decides the same again."""
    queries = tuple(
        events.PlaceQuery(
            request_id=request.request_id,
            attempt=request.attempt,
            num_prompt_tokens=request.num_prompt_tokens,
            max_new_tokens=request.max_new_tokens,
            priority=request.priority,
            budget_s=request.budget_s if request.HasField("budget_s") else None,
            exclude=tuple(request.exclude),
            choice=request.choice,
            parent_request_id=request.parent_request_id,
            service_class=request.service_class,
            slo=slo_from_record(request),
            deadline_s=request.deadline_s if request.HasField("deadline_s") else None,
            tenant=request.tenant,
            waited_s=request.waited_s,
            # Where to decode does not depend on it.
            prefix=() if request.HasField("bind_to") else prefixes(request.block_keys),
            bind_to=request.bind_to if request.HasField("bind_to") else None,
        )
        for request in batch.requests
    )
    return events.PlaceRequests(call_id, batch.gateway_id, queries)


def place_reply(
    request: controller_pb2.PlaceRequest, result: Placement | events.Failure
) -> controller_pb2.PlaceReply:
    """To the wire."""
    reply = controller_pb2.PlaceReply(request_id=request.request_id, attempt=request.attempt)
    if isinstance(result, events.Failure):
        reply.error.CopyFrom(error_to_info(result.to_error()))
        return reply
    reply.prefill.CopyFrom(target_to_record(result.prefill))
    reply.decode.CopyFrom(target_to_record(result.decode))
    reply.tentative = result.tentative
    if result.fallback_prefill is not None and result.fallback_decode is not None:
        reply.fallback_prefill.CopyFrom(target_to_record(result.fallback_prefill))
        reply.fallback_decode.CopyFrom(target_to_record(result.fallback_decode))
    return reply


def outcomes(batch: controller_pb2.OutcomeBatch) -> events.OutcomesReported:
    """From the wire."""
    return events.OutcomesReported(
        batch.gateway_id,
        tuple(
            events.RequestEnded(
                request_id=outcome.request_id,
                outcome=outcome.outcome,
                error=outcome.error,
                prompt_tokens=outcome.prompt_tokens,
                completion_tokens=outcome.completion_tokens,
                cached_tokens=outcome.cached_tokens,
                cached_by_tier=dict(outcome.cached_by_tier),
                ttft_s=outcome.ttft_s,
                tpot_s=outcome.tpot_s,
                attempts=tuple(_attempt_ended(attempt) for attempt in outcome.attempts),
                service_class=outcome.service_class,
                met=outcome.met if outcome.HasField("met") else None,
            )
            for outcome in batch.outcomes
        ),
    )


def cluster_view(state: ClusterState) -> controller_pb2.ClusterView:
    """What watchers get."""
    return controller_pb2.ClusterView(
        epoch=state.epoch,
        version=state.version,
        ready=state.ready,
        instances=[
            controller_pb2.InstanceView(record=instance_to_record(record.info), state=record.state)
            for record in state.all_records()
        ],
    )


def instance_statuses(state: ClusterState, now: float) -> list[cluster_pb2.InstanceStatus]:
    """Live instances by name, then the recently dead."""
    live = sorted(state.instances.values(), key=lambda record: record.info.instance_id)
    return [_instance_status(record, now) for record in [*live, *state.recently_dead]]


def member_statuses(members: Iterable[events.MemberInfo]) -> list[cluster_pb2.MemberStatus]:
    """Gateways, then pool nodes, by name."""
    return [
        cluster_pb2.MemberStatus(
            kind=member.kind,
            member_id=member.member_id,
            address=member.address,
            http_address=member.http_address,
            node_id=member.node_id,
            pid=member.pid,
            rss_bytes=member.rss_bytes,
        )
        for member in sorted(members, key=lambda m: (m.kind, m.member_id))
    ]


def explanation(trace: RequestTrace) -> cluster_pb2.ExplainResponse:
    """What ``baton explain`` shows."""
    response = cluster_pb2.ExplainResponse(request_id=trace.request_id, outcome="open")
    if trace.ended is not None:
        ended = trace.ended
        response.outcome, response.error = ended.outcome, ended.error
        response.prompt_tokens = ended.prompt_tokens
        response.completion_tokens = ended.completion_tokens
        response.cached_tokens = ended.cached_tokens
        response.cached_by_tier.update(ended.cached_by_tier)
        response.ttft_s, response.tpot_s = ended.ttft_s, ended.tpot_s
        response.service_class = ended.service_class
        if ended.met is not None:
            response.met = ended.met
    for entry in sorted(trace.attempts.values(), key=lambda e: (e.choice, e.attempt)):
        message = response.attempts.add(
            attempt=entry.attempt,
            choice=entry.choice,
            reason=entry.reason,
            num_candidates=entry.num_candidates,
            stages=[
                cluster_pb2.StageTime(stage=at.stage, where=at.where, wall_s=at.wall_s)
                for at in sorted(entry.stages, key=lambda at: at.wall_s)
            ],
        )
        if entry.predicted_ttft_s is not None:
            message.predicted_ttft_s = entry.predicted_ttft_s
        if entry.predicted_tpot_s is not None:
            message.predicted_tpot_s = entry.predicted_tpot_s
        placement = entry.placement
        if placement is None:
            continue
        message.prefill_instance = placement.prefill.instance_id
        message.prefill_incarnation = placement.prefill.incarnation
        message.decode_instance = placement.decode.instance_id
        message.decode_incarnation = placement.decode.incarnation
        if placement.fallback_prefill is not None and placement.fallback_decode is not None:
            names = (placement.fallback_prefill.instance_id, placement.fallback_decode.instance_id)
            message.fallback = " + ".join(dict.fromkeys(names))
    return response


def _attempt_ended(attempt: controller_pb2.AttemptOutcome) -> events.AttemptEnded:
    return events.AttemptEnded(
        request_id=attempt.request_id,
        attempt=attempt.attempt,
        choice=attempt.choice,
        stages=tuple(events.StageAt(at.stage, at.where, at.wall_s) for at in attempt.stages),
    )


def _instance_status(record: InstanceRecord, now: float) -> cluster_pb2.InstanceStatus:
    info, load = record.info, record.load
    return cluster_pb2.InstanceStatus(
        instance_id=info.instance_id,
        incarnation=info.incarnation,
        role=info.role,
        state=record.state,
        address=info.address,
        metrics_address=info.metrics_address,
        node_id=info.node_id,
        pid=info.pid,
        num_waiting=load.num_waiting,
        num_running=load.num_running,
        num_pending_kv=load.num_pending_kv,
        num_held=load.num_held,
        num_blocks=info.num_blocks,
        num_free_blocks=load.num_free_blocks,
        num_cached_blocks=load.num_cached_blocks,
        num_leases=load.num_leases,
        rss_bytes=load.rss_bytes,
        last_seen_s=max(0.0, now - record.last_seen_s),
        num_finished=load.num_finished,
        num_preemptions=load.num_preemptions,
    )
