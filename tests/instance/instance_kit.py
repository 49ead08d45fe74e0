"""Instances of a test process: real engine, loop, workers and gRPC; only the model is a toy.

The toy's KV cache is the instance's real arena: each token's KV is four bytes in its block, and a
token is drawn from the whole history as it is read back from there. A block that is wrong, stale,
half pulled or given away too early gives a wrong token, or no token at all.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import struct
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Any

import grpc
import grpc.aio

from baton.core.clock import SystemClock
from baton.core.cluster import Role, Target
from baton.core.config import EngineConfig, HandoffConfig
from baton.core.request import FinishReason, Part, SamplingParams, Submission, TokenOutput
from baton.engine.engine import Engine
from baton.engine.plan import StepPlan, StepResult
from baton.instance.assembly import InstanceParts, assemble
from baton.instance.instance import Instance
from baton.instance.pool_side import PoolSide
from baton.instance.roles import RoleSwitch
from baton.instance.service import InstanceService
from kvpool.arena import BlockArena
from kvpool.transport import Transport
from kvpool.transports import TransportSet
from kvpool.transports.faulty import Fault, FaultyTransport
from kvpool.transports.loopback import LoopbackTransport
from protos.baton.internal.v1 import instance_pb2, instance_pb2_grpc
from protos.convert import output_from_record, submission_to_record
from protos.serving import channel_options, server_options
from tests.engine.simulated_runner import VOCABULARY, SimulatedRunner, generate

MAX_MODEL_LEN = 120
BLOCK_SIZE = 4
WAIT_S = 10.0

CONFIG = EngineConfig(
    block_size=BLOCK_SIZE, num_blocks=64, max_num_seqs=8, max_num_batched_tokens=16
)
HANDOFF = HandoffConfig(lease_s=20.0, pull_timeout_s=2.0)


class ArenaRunner(SimulatedRunner):
    """Keeps its KV in an arena. Position p of a block holds token + 1, so that 0 is no token."""

    def __init__(self, block_size: int, arena: BlockArena) -> None:
        super().__init__(block_size)
        self._arena = arena
        self.gate = threading.Event()
        """Cleared: steps wait before they compute."""
        self.gate.set()
        self.fails: Callable[[StepPlan], bool] = lambda plan: False
        """Whether a step raises after it ran."""
        self.num_closed = 0
        self.started: list[int] = []

    def write(self, table: Sequence[int], position: int, token: int) -> None:
        block = self._arena.block(table[position // self.block_size])
        struct.pack_into("<i", block, position % self.block_size * 4, token + 1)

    def read(self, table: Sequence[int], num_tokens: int) -> list[int]:
        tokens: list[int] = []
        for index in range(-(-num_tokens // self.block_size)):
            values = struct.unpack(f"<{self.block_size}i", self._arena.block(table[index]))
            tokens += [value - 1 for value in values]
        return tokens[:num_tokens]

    def execute(self, plan: StepPlan) -> StepResult:
        self.started.append(plan.step)
        if not self.gate.wait(WAIT_S):
            raise TimeoutError("the test never opened the gate")
        result = super().execute(plan)
        if self.fails(plan):
            raise RuntimeError("scripted: the step failed")
        return result

    def close(self) -> None:
        self.num_closed += 1


class Node:
    """One instance behind a gRPC port of the loopback interface."""

    def __init__(
        self,
        instance_id: str,
        role: Role = Role.MIXED,
        *,
        config: EngineConfig = CONFIG,
        handoff: HandoffConfig = HANDOFF,
        transports: Sequence[Transport] | None = None,
        script: Iterable[Fault] = (),
        arena: BlockArena | None = None,
        layout: str = "toy",
        incarnation: int = 1,
        pool: Callable[[Instance, BlockArena], PoolSide] | None = None,
        spill_after_s: float = 1.0,
    ) -> None:
        self.arena = arena or BlockArena.private(config.kv_blocks, config.block_size * 4, layout)
        self.engine = Engine(
            config,
            max_model_len=MAX_MODEL_LEN,
            salt=b"toy",
            generations=self.arena.generations,
            track_cache=pool is not None,
        )
        self.runner = ArenaRunner(config.block_size, self.arena)
        self.transports = TransportSet(transports or [FaultyTransport(LoopbackTransport(), script)])
        self.role = RoleSwitch(role)
        self.num_emptied = 0
        self.parts: InstanceParts = assemble(
            instance_id,
            engine=self.engine,
            runner=self.runner,
            cache=self.arena,
            transports=self.transports,
            role=self.role,
            handoff=handoff,
            clock=SystemClock(),
            vocab_size=VOCABULARY,
            on_empty=self._on_empty,
            pool=None if pool is None else lambda instance: pool(instance, self.arena),
            spill_after_s=spill_after_s,
        )
        self.instance = self.parts.instance
        self.instance.incarnation = incarnation
        self.target = Target(instance_id, incarnation, "")
        self._server: grpc.aio.Server | None = None
        self._task: asyncio.Task[None] | None = None

    def _on_empty(self) -> None:
        self.num_emptied += 1

    async def start(self) -> Node:
        self._server = server = grpc.aio.server(options=server_options())
        service = InstanceService(self.instance, self.parts.prefill)
        instance_pb2_grpc.add_InstanceServicer_to_server(service, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        self.target = dataclasses.replace(self.target, address=f"127.0.0.1:{port}")
        self._task = asyncio.create_task(self.parts.loop.run())
        if self.parts.pool is not None:
            self.parts.pool.start()
        return self

    async def kill(self) -> None:
        """Its wire ends at once, as when its process dies."""
        if self._server is not None:
            server, self._server = self._server, None
            await server.stop(None)

    async def stop(self) -> None:
        self.instance.hub.end_all()
        await self.kill()
        await self.parts.stop()
        assert not self.parts.decode._running, "a pull may still write to the arena"
        if self._task is not None:
            await self._task
        await asyncio.to_thread(self.transports.close)

    def held(self) -> dict[str, int]:
        """Everything that must be zero when nothing is open."""
        load = self.engine.load()
        return {
            "open": self.instance.num_open,
            "waiting": load.num_waiting,
            "running": load.num_running,
            "pending_kv": load.num_pending_kv,
            "held": load.num_held,
            "leases": self.parts.prefill.num_leases,
            "handoffs": len(self.parts.prefill._handoffs),
            "early_wants": len(self.parts.prefill._early_wants),
            "running_pulls": len(self.parts.decode._running),
            "pulls": self.parts.decode.num_pulls_open,
            "blocks": self.engine.block_statistics().num_referenced,
        }

    async def idle(self) -> None:
        """Wait until nothing is held, then account for every block."""
        await until(lambda: not any(self.held().values()), lambda: f"still held: {self.held()}")
        self.engine.check_integrity()


def pair(
    script: Iterable[Fault] = (), handoff: HandoffConfig = HANDOFF, config: EngineConfig = CONFIG
) -> tuple[Node, Node]:
    """A prefill and a decode instance; ``script`` are the decode side's pull faults."""
    prefill = Node("p", Role.PREFILL, handoff=handoff, config=config)
    return prefill, Node("d", Role.DECODE, handoff=handoff, config=config, script=script)


class Client:
    """A gateway's side of the wire: one token stream per node, outputs by request."""

    def __init__(self, gateway_id: str = "g") -> None:
        self.gateway_id = gateway_id
        self.outputs: list[tuple[str, TokenOutput]] = []
        """(instance id, output), in order of arrival."""
        self.num_messages = 0
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._streams: dict[str, tuple[Any, asyncio.Task[None]]] = {}

    def stub(self, node: Node) -> Any:
        address = node.target.address
        if address not in self._channels:
            channel = grpc.aio.insecure_channel(address, options=channel_options())
            self._channels[address] = channel
        return instance_pb2_grpc.InstanceStub(self._channels[address])

    async def connect(self, *nodes: Node) -> None:
        for node in nodes:
            call = self.stub(node).Tokens(instance_pb2.TokensRequest(gateway_id=self.gateway_id))
            await asyncio.wait_for(call.initial_metadata(), WAIT_S)
            name = node.target.instance_id
            self._streams[name] = (call, asyncio.create_task(self._read(name, call)))

    async def _read(self, name: str, call: Any) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
            async for batch in call:
                self.num_messages += 1
                self.outputs += [(name, output_from_record(item)) for item in batch.outputs]

    async def drop(self, node: Node) -> None:
        """End the stream to a node."""
        call, task = self._streams.pop(node.target.instance_id)
        call.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def submit(
        self, submission: Submission, part: Part, node: Node, prefill: Node | None = None
    ) -> instance_pb2.SubmitReply:
        item = instance_pb2.SubmitItem(
            submission=submission_to_record(submission),
            part=part,
            incarnation=node.target.incarnation,
        )
        if prefill is not None:
            item.prefill_instance_id = prefill.target.instance_id
            item.prefill_incarnation = prefill.target.incarnation
            item.prefill_address = prefill.target.address
        reply = await self.stub(node).Submit(instance_pb2.SubmitBatch(items=[item]), timeout=WAIT_S)
        assert isinstance(reply.replies[0], instance_pb2.SubmitReply)
        return reply.replies[0]

    async def hand_over(self, submission: Submission, prefill: Node, decode: Node) -> None:
        """Submit to both sides; neither may refuse."""
        for reply in (
            await self.submit(submission, Part.DECODE, decode, prefill),
            await self.submit(submission, Part.PREFILL, prefill),
        ):
            assert not reply.HasField("error"), reply.error.message

    async def abort(self, request_id: str, attempt: int, *nodes: Node) -> None:
        item = instance_pb2.AbortItem(request_id=request_id, attempt=attempt)
        for node in nodes:
            await self.stub(node).Abort(instance_pb2.AbortBatch(items=[item]), timeout=WAIT_S)

    def of(self, request_id: str, attempt: int = 0) -> list[TokenOutput]:
        return [
            output
            for _, output in self.outputs
            if (output.request_id, output.attempt) == (request_id, attempt)
        ]

    def tokens(self, request_id: str, attempt: int = 0, first_index: int = 0) -> list[int]:
        """The tokens by index, those that came twice once; no two may differ, none be missing."""
        by_index: dict[int, int] = {}
        for output in self.of(request_id, attempt):
            for index, token in enumerate(output.token_ids, output.index):
                assert by_index.setdefault(index, token) == token, f"token {index} differs"
        assert sorted(by_index) == list(range(first_index, first_index + len(by_index)))
        return [by_index[index] for index in sorted(by_index)]

    def end(self, request_id: str, attempt: int = 0) -> TokenOutput | None:
        return next((o for o in self.of(request_id, attempt) if o.finish_reason), None)

    async def ended(self, request_id: str, attempt: int = 0) -> TokenOutput:
        await until(
            lambda: self.end(request_id, attempt) is not None,
            lambda: f"{request_id} did not end: {self.of(request_id, attempt)}",
        )
        end = self.end(request_id, attempt)
        assert end is not None
        return end

    async def check(self, submission: Submission) -> None:
        """Wait for the end; tokens and reason are those of one plain instance."""
        end = await self.ended(submission.request_id, submission.attempt)
        expected, reason = plain(submission)
        assert (end.error_code, end.finish_reason) == (None, reason), end
        first = len(submission.output_ids)
        assert self.tokens(submission.request_id, submission.attempt, first) == expected[first:]

    async def close(self) -> None:
        for call, task in self._streams.values():
            call.cancel()
            await asyncio.gather(task, return_exceptions=True)
        for channel in self._channels.values():
            await channel.close(None)


def request(name: str = "r", **values: Any) -> Submission:
    """A submission whose prompt and seed follow from its name."""
    length = values.pop("num_prompt_tokens", 22)
    base = sum(name.encode()) * 7
    sampling = {"max_tokens": 12, "seed": base, **values.pop("sampling", {})}
    fields: dict[str, Any] = {
        "request_id": name,
        "attempt": 0,
        "prompt_ids": tuple((base + 5 * i * i) % 23 for i in range(length)),
        "sampling": SamplingParams(**sampling),
        "gateway_id": "g",
        **values,
    }
    return Submission(**fields)


def plain(submission: Submission) -> tuple[list[int], FinishReason]:
    """All output tokens, and the end, that one plain engine gives."""
    tokens, reason, _ = generate(submission, MAX_MODEL_LEN)
    return tokens, reason


async def until(
    condition: Callable[[], bool], why: Callable[[], str] = lambda: "it never became true"
) -> None:
    try:
        async with asyncio.timeout(WAIT_S):
            while not condition():
                await asyncio.sleep(0.005)
    except TimeoutError:
        raise AssertionError(why()) from None


@contextlib.asynccontextmanager
async def running(*nodes: Node, connect: bool = True) -> AsyncIterator[Client]:
    """The nodes serve and a client listens to all; afterwards they stop with nothing held."""
    client = Client()
    try:
        for node in nodes:
            await node.start()
        if connect:
            await client.connect(*nodes)
        yield client
    finally:
        await client.close()
        for node in nodes:
            await node.stop()
    for node in nodes:
        assert node.runner.num_closed == 1
        await node.idle()
