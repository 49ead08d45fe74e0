"""The data plane's wire: gRPC in, :class:`Instance` and :class:`PrefillWorker` behind it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import grpc.aio

from baton.core.cluster import Target
from baton.core.errors import BatonError
from baton.core.request import Part
from baton.engine.memory import MemoryMap
from baton.instance.instance import Instance
from prefill_worker.worker import PrefillWorker
from protos.baton.internal.v1 import instance_pb2, instance_pb2_grpc
from protos.convert import error_to_info, outputs_to_batch, submission_from_record


class InstanceService(instance_pb2_grpc.InstanceServicer):
    """The data plane's wire. ``memory``: a map per rank; called in a thread."""

    def __init__(
        self,
        instance: Instance,
        prefill: PrefillWorker,
        memory: Callable[[], Sequence[MemoryMap]] = tuple,
    ) -> None:
        self._instance = instance
        self._prefill = prefill
        self._memory = memory

    async def Submit(
        self, request: instance_pb2.SubmitBatch, context: grpc.aio.ServicerContext[Any, Any]
    ) -> instance_pb2.SubmitBatchReply:
        """Take on submissions; each is answered by itself."""
        return instance_pb2.SubmitBatchReply(replies=[self._submit(item) for item in request.items])

    def _submit(self, item: instance_pb2.SubmitItem) -> instance_pb2.SubmitReply:
        record = item.submission
        reply = instance_pb2.SubmitReply(request_id=record.request_id, attempt=record.attempt)
        prefill = None
        if item.prefill_instance_id:
            prefill = Target(
                item.prefill_instance_id, item.prefill_incarnation, item.prefill_address
            )
        try:
            part = Part(item.part)
            submission = submission_from_record(record)
            if part is Part.DECODE and prefill is None:
                raise ValueError("a decode submission must name its prefill instance")
            self._instance.submit(submission, part, incarnation=item.incarnation, prefill=prefill)
        except BatonError as error:
            reply.error.CopyFrom(error_to_info(error))
        except ValueError as error:
            reply.error.code, reply.error.message = "invalid_request", str(error)
        return reply

    async def Abort(
        self, request: instance_pb2.AbortBatch, context: grpc.aio.ServicerContext[Any, Any]
    ) -> instance_pb2.AbortBatchReply:
        """End requests; unknown ones are remembered, in case the submission is still under way."""
        for item in request.items:
            self._instance.abort(item.request_id, item.attempt)
        return instance_pb2.AbortBatchReply()

    async def Tokens(
        self, request: instance_pb2.TokensRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[instance_pb2.TokenBatch]:
        """All tokens of one gateway's requests, one message per step."""
        hub = self._instance.hub
        stream = hub.open(request.gateway_id)
        try:
            # Says that the stream is open: the gateway submits only after it.
            await context.send_initial_metadata(())
            async for outputs in stream:
                yield outputs_to_batch(self._instance.incarnation, outputs)
        finally:
            hub.close(stream)

    async def Handoff(
        self,
        request_iterator: AsyncIterator[instance_pb2.HandoffMessage],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[instance_pb2.HandoffEvent]:
        """One decode instance's stream."""
        # Closed with this call, not when the collector finds it: the peer's leases are cut short.
        async with contextlib.aclosing(self._prefill.serve(request_iterator)) as events:
            async for event in events:
                yield event

    async def Memory(
        self, request: instance_pb2.MemoryRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> instance_pb2.MemoryReply:
        """What each rank's memory is used for."""
        maps = await asyncio.get_running_loop().run_in_executor(None, self._memory)
        return instance_pb2.MemoryReply(
            instance_id=self._instance.instance_id,
            incarnation=self._instance.incarnation,
            maps=[_map_record(item) for item in maps],
        )


def _map_record(item: MemoryMap) -> instance_pb2.MemoryMapRecord:
    record = instance_pb2.MemoryMapRecord(
        rank=item.rank,
        device=item.device,
        entries=[
            instance_pb2.MemoryEntryRecord(tag=entry.tag, size=entry.size, in_use=entry.in_use)
            for entry in item.entries
        ],
        in_use=item.in_use,
        unaccounted=item.unaccounted,
        imports=item.imports,
        peak=item.peak,
    )
    if (needs := item.needs) is not None:
        record.needs.CopyFrom(
            instance_pb2.MemoryNeedsRecord(
                held=needs.held,
                prefill=needs.prefill,
                decode=needs.decode,
                mixed=needs.mixed,
                reserve=needs.reserve,
                margin=needs.margin,
                limit=needs.limit,
                block_bytes=needs.block_bytes,
                seconds=needs.seconds,
            )
        )
    return record
