"""An instance as a process: builds its parts, serves the data plane, stops cleanly.

Order matters at start: checkpoint, arena, runner (loads the weights), engine, transports, gRPC
server, warm-up, and only then the registration with the controller, so that nothing is placed on
an instance that cannot serve.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import secrets
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import psutil
from prometheus_client import make_asgi_app

from baton.core.blocks import block_salt
from baton.core.clock import SystemClock
from baton.core.cluster import InstanceInfo, InstanceLoad, Target
from baton.core.errors import BatonError, ConfigError
from baton.core.request import Part
from baton.engine.checkpoint import open_checkpoint
from baton.engine.engine import Engine
from baton.engine.loop import EngineLoop
from baton.engine.models.config import kv_layout, resolve_max_model_len
from baton.engine.runner import InlineRunner
from baton.instance.instance import Instance
from baton.instance.metrics import make_registry
from baton.instance.roles import RoleSwitch
from baton.instance.session import ControllerSession
from baton.instance.spec import InstanceSpec
from decode_worker.worker import DecodeHooks, DecodeWorker
from kvpool.arena import BlockArena
from kvpool.transports import TransportSet, make_transports
from prefill_worker.worker import PrefillWorker
from protos.baton.internal.v1 import instance_pb2, instance_pb2_grpc, pool_pb2, pool_pb2_grpc
from protos.convert import error_to_info, outputs_to_batch, submission_from_record
from protos.http import HttpServer
from protos.serving import channel_options, server_options

logger = logging.getLogger(__name__)

_POOL_TIMEOUT_S = 10.0
_REGISTER_TIMEOUT_S = 30.0
_GRACE_S = 0.5


class InstanceServer:
    """One instance, from start to stop. Implements ``protos.serving.Service``."""

    def __init__(self, spec: InstanceSpec) -> None:
        self.spec = spec
        self._process = psutil.Process()
        self._nonce = secrets.randbits(63)
        self._failed: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        self._tasks: list[asyncio.Task[None]] = []
        self._address = ""
        self._metrics_address = ""

    async def start(self) -> None:
        """Load, bind, warm up, register. Raises ConfigError with one clear sentence."""
        spec = self.spec
        clock = SystemClock()
        self._checkpoint = checkpoint = open_checkpoint(spec.model)
        layout = kv_layout(checkpoint.config, spec.engine)
        self._max_model_len = resolve_max_model_len(checkpoint.config, spec.engine)
        self._cache = await self._make_cache(layout.block_bytes, layout.text)
        loop = asyncio.get_running_loop()
        runner = await loop.run_in_executor(
            None,
            lambda: InlineRunner(checkpoint, spec.engine, kv_buffer=self._cache.buffer),
        )
        await loop.run_in_executor(None, runner.warm_up)
        engine = Engine(
            spec.engine,
            max_model_len=self._max_model_len,
            salt=block_salt(model_fingerprint=checkpoint.fingerprint, layout=layout.text),
            generations=self._cache.generations,
        )
        self._transports = TransportSet(make_transports(_transport_names(spec), spec.host))
        self.role = RoleSwitch(spec.role)
        self.instance = instance = Instance(
            spec.instance_id, engine=engine, role=self.role, clock=clock
        )
        self.loop = EngineLoop(
            engine,
            runner,
            clock=clock,
            on_events=instance.on_events,
            on_failed=instance.on_failed,
            max_in_flight=2 if spec.engine.async_scheduling else 1,
        )
        self.prefill = PrefillWorker(
            instance_id=spec.instance_id,
            incarnation=lambda: instance.incarnation,
            endpoints=self._transports.endpoints(self._cache),
            lease_s=spec.handoff.lease_s,
            clock=clock,
            release=instance.release_held,
        )
        self.decode = DecodeWorker(
            DecodeHooks(
                kv_arrived=instance.kv_arrived,
                kv_failed=instance.kv_failed,
                engine_abort=instance.engine_abort,
                repeat=instance.repeat_first,
                stage=instance.note_stage,
            ),
            instance_id=spec.instance_id,
            incarnation=lambda: instance.incarnation,
            cache=self._cache,
            transports=self._transports,
            block_size=spec.engine.block_size,
            lease_s=spec.handoff.lease_s,
            pull_timeout_s=spec.handoff.pull_timeout_s,
        )
        self._session = ControllerSession(
            spec.controller_address,
            describe=self._describe,
            load=self._load,
            role=self.role,
            on_registered=self._on_registered,
            on_fenced=self._on_fenced,
        )
        instance.attach(
            prefill=self.prefill,
            decode=self.decode,
            wake=self.loop.wake,
            on_empty=self._session.heartbeat_now,
        )
        await self._serve()
        self._spawn(self.loop.run(), "engine loop")
        self._spawn(self._session.run(), "controller session")
        async with asyncio.timeout(_REGISTER_TIMEOUT_S):
            await self._session.registered.wait()

    async def stop(self) -> None:
        """Stop serving and release everything. Bounded."""
        self.instance.hub.end_all()
        await self._server.stop(_GRACE_S)
        self.prefill.stop()
        await self.decode.stop()
        await self.loop.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._metrics.stop()
        self._transports.close()
        await self._release_cache()

    async def wait_failed(self) -> BaseException:
        """See ``protos.serving.Service``."""
        return await asyncio.shield(self._failed)

    async def _serve(self) -> None:
        registry = make_registry(
            self.instance, self.loop, self.prefill, self.decode, self._process, self.role
        )
        self._metrics = HttpServer(
            make_asgi_app(registry), host=self.spec.host, setting="metrics port"
        )
        self._metrics_address = await self._metrics.start()
        self._server = grpc.aio.server(options=server_options())
        instance_pb2_grpc.add_InstanceServicer_to_server(
            InstanceService(self.instance, self.prefill), self._server
        )
        port = self._server.add_insecure_port(f"{self.spec.host}:0")
        await self._server.start()
        self._address = f"{self.spec.host}:{port}"

    def _spawn(self, coroutine: Any, name: str) -> None:
        task = asyncio.ensure_future(coroutine)
        task.set_name(name)
        task.add_done_callback(self._on_task_done)
        self._tasks.append(task)

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None and not self._failed.done():
            logger.error("%s of %s broke", task.get_name(), self.spec.instance_id, exc_info=error)
            self._failed.set_result(error)

    def _on_registered(self, incarnation: int) -> None:
        if self.instance.incarnation not in (0, incarnation):
            self._on_fenced(f"registered as {incarnation}, was {self.instance.incarnation}")
            return
        self.instance.incarnation = incarnation

    def _on_fenced(self, reason: str) -> None:
        if not self._failed.done():
            self._failed.set_result(RuntimeError(f"{self.spec.instance_id} is fenced: {reason}"))

    def _describe(self) -> InstanceInfo:
        spec = self.spec
        return InstanceInfo(
            instance_id=spec.instance_id,
            incarnation=self.instance.incarnation,
            role=self.role.duty.role,
            address=self._address,
            metrics_address=self._metrics_address,
            node_id=spec.node_id,
            pid=os.getpid(),
            model=spec.model_name,
            model_fingerprint=self._checkpoint.fingerprint,
            kv_layout=self._cache.layout,
            block_size=spec.engine.block_size,
            num_blocks=spec.engine.num_blocks,
            max_model_len=self._max_model_len,
            max_num_seqs=spec.engine.max_num_seqs,
            max_num_batched_tokens=spec.engine.max_num_batched_tokens,
        )

    def _load(self) -> InstanceLoad:
        return dataclasses.replace(
            self.instance.load(),
            num_steps=self.loop.counters.num_steps,
            rss_bytes=self._process.memory_info().rss,
        )

    async def _make_cache(self, block_bytes: int, layout: str) -> BlockArena:
        spec = self.spec
        if spec.pool_address is None:
            return BlockArena.private(
                num_blocks=spec.engine.num_blocks, block_bytes=block_bytes, layout=layout
            )
        async with grpc.aio.insecure_channel(
            spec.pool_address, options=channel_options()
        ) as channel:
            stub: pool_pb2_grpc.PoolNodeAsyncStub = pool_pb2_grpc.PoolNodeStub(channel)
            try:
                reply = await stub.AllocateArena(
                    pool_pb2.AllocateArenaRequest(
                        instance_id=spec.instance_id,
                        nonce=self._nonce,
                        pid=os.getpid(),
                        num_blocks=spec.engine.num_blocks,
                        block_bytes=block_bytes,
                        layout=layout,
                    ),
                    timeout=_POOL_TIMEOUT_S,
                    wait_for_ready=True,
                )
            except grpc.aio.AioRpcError as error:
                raise ConfigError(
                    f"the pool node at {spec.pool_address} gave no KV arena: {error.details()}",
                    param="engine.num_blocks",
                ) from error
        return BlockArena.open(reply.path, reply.token, writable=True)

    async def _release_cache(self) -> None:
        self._cache.close()
        if self.spec.pool_address is None:
            return
        async with grpc.aio.insecure_channel(
            self.spec.pool_address, options=channel_options()
        ) as channel:
            stub: pool_pb2_grpc.PoolNodeAsyncStub = pool_pb2_grpc.PoolNodeStub(channel)
            try:
                await stub.ReleaseArena(
                    pool_pb2.ReleaseArenaRequest(
                        instance_id=self.spec.instance_id, nonce=self._nonce
                    ),
                    timeout=1.0,
                )
            except grpc.aio.AioRpcError:
                logger.info("the pool node is gone already; it releases arenas by itself")


class InstanceService(instance_pb2_grpc.InstanceServicer):
    """The data plane's wire."""

    def __init__(self, instance: Instance, prefill: PrefillWorker) -> None:
        self._instance = instance
        self._prefill = prefill

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
        async for event in self._prefill.serve(request_iterator):
            yield event


def _transport_names(spec: InstanceSpec) -> tuple[str, ...]:
    if spec.handoff.transport != "auto":
        return (spec.handoff.transport,)
    return ("shm", "tcp") if spec.pool_address is not None else ("tcp",)
