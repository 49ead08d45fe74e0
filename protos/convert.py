"""Between the wire and the vocabulary, in both directions, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterable

from baton.core.cluster import InstanceInfo, InstanceLoad, Role, StepSample, Target
from baton.core.cost_model import StepShape
from baton.core.errors import BatonError, error_from_code
from baton.core.request import (
    FinishReason,
    SamplingParams,
    Submission,
    TokenLogprobs,
    TokenOutput,
)
from baton.core.slo import Slo
from protos.baton.internal.v1 import controller_pb2, instance_pb2
from protos.baton.v1 import cluster_pb2


def sampling_to_record(params: SamplingParams) -> instance_pb2.SamplingRecord:
    """To the wire."""
    return instance_pb2.SamplingRecord(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        seed=params.seed,
        max_tokens=params.max_tokens,
        stop_token_ids=params.stop_token_ids,
        ignore_eos=params.ignore_eos,
        logprobs=params.logprobs,
        prompt_logprobs=params.prompt_logprobs,
    )


def sampling_from_record(record: instance_pb2.SamplingRecord) -> SamplingParams:
    """From the wire. Raises ValueError for values out of range."""
    return SamplingParams(
        temperature=record.temperature,
        top_k=record.top_k if record.HasField("top_k") else None,
        top_p=record.top_p,
        min_p=record.min_p,
        repetition_penalty=record.repetition_penalty,
        presence_penalty=record.presence_penalty,
        frequency_penalty=record.frequency_penalty,
        seed=record.seed,
        max_tokens=record.max_tokens,
        stop_token_ids=tuple(record.stop_token_ids),
        ignore_eos=record.ignore_eos,
        logprobs=record.logprobs if record.HasField("logprobs") else None,
        prompt_logprobs=record.prompt_logprobs if record.HasField("prompt_logprobs") else None,
    )


def submission_to_record(submission: Submission) -> instance_pb2.SubmissionRecord:
    """To the wire."""
    return instance_pb2.SubmissionRecord(
        request_id=submission.request_id,
        attempt=submission.attempt,
        prompt_ids=submission.prompt_ids,
        output_ids=submission.output_ids,
        sampling=sampling_to_record(submission.sampling),
        choice=submission.choice,
        priority=submission.priority,
        budget_s=submission.budget_s,
        tenant=submission.tenant,
        adapter=submission.adapter,
        gateway_id=submission.gateway_id,
        protocol_version=submission.protocol_version,
        service_class=submission.service_class,
        ttft_s=submission.slo.ttft_s,
        tpot_s=submission.slo.tpot_s,
        rise_after_s=submission.rise_after_s,
    )


def submission_from_record(record: instance_pb2.SubmissionRecord) -> Submission:
    """From the wire. Raises ValueError for a submission that cannot be run."""
    return Submission(
        request_id=record.request_id,
        attempt=record.attempt,
        prompt_ids=tuple(record.prompt_ids),
        sampling=sampling_from_record(record.sampling),
        output_ids=tuple(record.output_ids),
        choice=record.choice,
        priority=record.priority,
        budget_s=record.budget_s if record.HasField("budget_s") else None,
        tenant=record.tenant,
        adapter=record.adapter,
        gateway_id=record.gateway_id,
        protocol_version=record.protocol_version,
        service_class=record.service_class,
        slo=slo_from_record(record),
        rise_after_s=record.rise_after_s if record.HasField("rise_after_s") else None,
    )


def logprobs_to_record(logprobs: TokenLogprobs) -> instance_pb2.TokenLogprobsRecord:
    """To the wire."""
    return instance_pb2.TokenLogprobsRecord(
        token_id=logprobs.token_id,
        logprob=logprobs.logprob,
        rank=logprobs.rank,
        top=[instance_pb2.TopLogprobRecord(token_id=t, logprob=p) for t, p in logprobs.top],
    )


def logprobs_from_record(record: instance_pb2.TokenLogprobsRecord) -> TokenLogprobs:
    """From the wire."""
    return TokenLogprobs(
        token_id=record.token_id,
        logprob=record.logprob,
        rank=record.rank,
        top=tuple((top.token_id, top.logprob) for top in record.top),
    )


def output_to_record(output: TokenOutput) -> instance_pb2.TokenRecord:
    """To the wire."""
    return instance_pb2.TokenRecord(
        request_id=output.request_id,
        attempt=output.attempt,
        index=output.index,
        token_ids=output.token_ids,
        logprobs=[logprobs_to_record(item) for item in output.logprobs],
        finish_reason=output.finish_reason or "",
        stop_token_id=output.stop_token_id,
        error_code=output.error_code or "",
        error_message=output.error_message or "",
        num_cached_tokens=output.num_cached_tokens,
        prompt_logprobs=[logprobs_to_record(item) for item in output.prompt_logprobs],
        stages=[instance_pb2.StageRecord(stage=s, wall_s=t) for s, t in output.stages],
        cached_by_tier=[
            instance_pb2.TierTokens(tier=tier, num_tokens=count)
            for tier, count in output.cached_by_tier
        ],
    )


def output_from_record(record: instance_pb2.TokenRecord) -> TokenOutput:
    """From the wire."""
    return TokenOutput(
        request_id=record.request_id,
        attempt=record.attempt,
        index=record.index,
        token_ids=tuple(record.token_ids),
        logprobs=tuple(logprobs_from_record(item) for item in record.logprobs),
        finish_reason=FinishReason(record.finish_reason) if record.finish_reason else None,
        stop_token_id=record.stop_token_id if record.HasField("stop_token_id") else None,
        error_code=record.error_code or None,
        error_message=record.error_message or None,
        num_cached_tokens=(
            record.num_cached_tokens if record.HasField("num_cached_tokens") else None
        ),
        prompt_logprobs=tuple(logprobs_from_record(item) for item in record.prompt_logprobs),
        stages=tuple((item.stage, item.wall_s) for item in record.stages),
        cached_by_tier=tuple((item.tier, item.num_tokens) for item in record.cached_by_tier),
    )


def instance_to_record(info: InstanceInfo) -> controller_pb2.InstanceRecord:
    """To the wire."""
    return controller_pb2.InstanceRecord(
        instance_id=info.instance_id,
        incarnation=info.incarnation,
        role=info.role,
        address=info.address,
        metrics_address=info.metrics_address,
        node_id=info.node_id,
        pid=info.pid,
        model=info.model,
        model_fingerprint=info.model_fingerprint,
        kv_layout=info.kv_layout,
        block_size=info.block_size,
        num_blocks=info.num_blocks,
        max_model_len=info.max_model_len,
        max_num_seqs=info.max_num_seqs,
        max_num_batched_tokens=info.max_num_batched_tokens,
    )


def instance_from_record(record: controller_pb2.InstanceRecord) -> InstanceInfo:
    """From the wire. Raises ValueError for an unknown role."""
    return InstanceInfo(
        instance_id=record.instance_id,
        incarnation=record.incarnation,
        role=Role(record.role),
        address=record.address,
        metrics_address=record.metrics_address,
        node_id=record.node_id,
        pid=record.pid,
        model=record.model,
        model_fingerprint=record.model_fingerprint,
        kv_layout=record.kv_layout,
        block_size=record.block_size,
        num_blocks=record.num_blocks,
        max_model_len=record.max_model_len,
        max_num_seqs=record.max_num_seqs,
        max_num_batched_tokens=record.max_num_batched_tokens,
    )


def load_to_report(load: InstanceLoad) -> controller_pb2.LoadReport:
    """To the wire."""
    return controller_pb2.LoadReport(
        num_waiting=load.num_waiting,
        num_running=load.num_running,
        num_pending_kv=load.num_pending_kv,
        num_held=load.num_held,
        num_waiting_tokens=load.num_waiting_tokens,
        num_free_blocks=load.num_free_blocks,
        num_cached_blocks=load.num_cached_blocks,
        num_leases=load.num_leases,
        num_steps=load.num_steps,
        num_finished=load.num_finished,
        num_preemptions=load.num_preemptions,
        rss_bytes=load.rss_bytes,
        num_decoding=load.num_decoding,
        num_context_tokens=load.num_context_tokens,
        num_offline_waiting_tokens=load.num_offline_waiting_tokens,
        num_offline_decoding=load.num_offline_decoding,
        num_offline_context_tokens=load.num_offline_context_tokens,
        samples=[
            controller_pb2.StepSample(
                num_prefill_tokens=sample.shape.num_prefill_tokens,
                prefill_context=sample.shape.prefill_context,
                num_decodes=sample.shape.num_decodes,
                decode_context=sample.shape.decode_context,
                seconds=sample.seconds,
            )
            for sample in load.samples
        ],
    )


def load_from_report(report: controller_pb2.LoadReport) -> InstanceLoad:
    """From the wire."""
    return InstanceLoad(
        num_waiting=report.num_waiting,
        num_running=report.num_running,
        num_pending_kv=report.num_pending_kv,
        num_held=report.num_held,
        num_waiting_tokens=report.num_waiting_tokens,
        num_free_blocks=report.num_free_blocks,
        num_cached_blocks=report.num_cached_blocks,
        num_leases=report.num_leases,
        num_steps=report.num_steps,
        num_finished=report.num_finished,
        num_preemptions=report.num_preemptions,
        rss_bytes=report.rss_bytes,
        num_decoding=report.num_decoding,
        num_context_tokens=report.num_context_tokens,
        num_offline_waiting_tokens=report.num_offline_waiting_tokens,
        num_offline_decoding=report.num_offline_decoding,
        num_offline_context_tokens=report.num_offline_context_tokens,
        samples=tuple(
            StepSample(
                StepShape(
                    sample.num_prefill_tokens,
                    sample.prefill_context,
                    sample.num_decodes,
                    sample.decode_context,
                ),
                sample.seconds,
            )
            for sample in report.samples
        ),
    )


def slo_from_record(
    record: instance_pb2.SubmissionRecord | controller_pb2.PlaceRequest,
) -> Slo:
    """Targets of a message that may carry them."""
    return Slo(
        record.ttft_s if record.HasField("ttft_s") else None,
        record.tpot_s if record.HasField("tpot_s") else None,
    )


def target_to_record(target: Target) -> controller_pb2.TargetRecord:
    """To the wire."""
    return controller_pb2.TargetRecord(
        instance_id=target.instance_id, incarnation=target.incarnation, address=target.address
    )


def target_from_record(record: controller_pb2.TargetRecord) -> Target:
    """From the wire."""
    return Target(
        instance_id=record.instance_id, incarnation=record.incarnation, address=record.address
    )


def error_to_info(error: BatonError) -> cluster_pb2.ErrorInfo:
    """To the wire."""
    return cluster_pb2.ErrorInfo(
        code=error.code,
        message=error.message,
        stage=error.stage,
        param=error.param or "",
        retry_after_s=error.retry_after_s or 0.0,
    )


def error_from_info(info: cluster_pb2.ErrorInfo) -> BatonError:
    """From the wire."""
    error = error_from_code(info.code, info.message, stage=info.stage, param=info.param or None)
    error.retry_after_s = info.retry_after_s or None
    return error


def outputs_to_batch(incarnation: int, outputs: Iterable[TokenOutput]) -> instance_pb2.TokenBatch:
    """One step's outputs for one gateway."""
    return instance_pb2.TokenBatch(
        incarnation=incarnation, outputs=[output_to_record(output) for output in outputs]
    )
