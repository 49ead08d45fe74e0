"""A tiny model folder, and an instance that speaks the protocol with a deterministic model."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from baton.core.errors import Refused
from baton.core.request import Part
from protos.baton.internal.v1 import controller_pb2, controller_pb2_grpc, instance_pb2
from protos.baton.internal.v1.instance_pb2_grpc import (
    InstanceServicer,
    add_InstanceServicer_to_server,
)
from protos.convert import error_to_info
from protos.serving import channel_options, server_options

VOCAB = 320
EOS = 1
CONTEXT = 256
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('system must come first') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["def hello(world): return world + 1 # größe 世界\n"] * 5, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    fast.chat_template = TEMPLATE
    return fast


def write_model(folder: Path, *, tokenizer: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "vocab_size": VOCAB,
        "max_position_embeddings": CONTEXT,
        "eos_token_id": EOS,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS, 2]}))
    if tokenizer:
        build_tokenizer().save_pretrained(str(folder))
    return folder


def token_at(prompt_ids: tuple[int, ...], seed: int, choice: int, index: int) -> int:
    """The model: a function of the prompt, the draw and the position; printable ASCII only."""
    value = sum(prompt_ids) * 31 + index * 7 + choice * 13 + seed % 97
    return 3 + 1 + value % 80


def tokens_of(prompt_ids: tuple[int, ...], seed: int, count: int, choice: int = 0) -> list[int]:
    return [token_at(prompt_ids, seed, choice, index) for index in range(count)]


class ToyInstance(InstanceServicer):
    """One instance. ``step_s`` between tokens; switches make it misbehave."""

    def __init__(self, name: str, *, step_s: float = 0.0) -> None:
        self.name = name
        self.incarnation = 0
        self.step_s = step_s
        self.refuse = False
        self.hold = asyncio.Event()
        """Cleared: nothing is produced."""
        self.hold.set()
        self.die_after: int | None = None
        """Break every stream, and stop serving, after so many tokens of decoding."""
        self.lie_at: int | None = None
        """Send a wrong token at this index, once."""
        self.submitted: list[instance_pb2.SubmitItem] = []
        self.aborted: list[tuple[str, int]] = []
        self._running: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._streams: dict[str, asyncio.Queue[instance_pb2.TokenBatch | None]] = {}
        self._server: grpc.aio.Server | None = None
        self.address = ""
        self._broken = asyncio.Event()
        self._session: asyncio.Task[None] | None = None
        self._stopping: asyncio.Task[None] | None = None
        self._channel: grpc.aio.Channel | None = None

    @property
    def open(self) -> set[tuple[str, int]]:
        return set(self._running)

    async def start(self) -> None:
        self._server = grpc.aio.server(options=server_options())
        add_InstanceServicer_to_server(self, self._server)
        port = self._server.add_insecure_port("127.0.0.1:0")
        self.address = f"127.0.0.1:{port}"
        await self._server.start()

    async def join(self, controller_address: str, role: str) -> None:
        """Register with a real controller and hold a session."""
        self._channel = grpc.aio.insecure_channel(controller_address, options=channel_options())
        stub = controller_pb2_grpc.ControllerStub(self._channel)
        record = controller_pb2.InstanceRecord(
            instance_id=self.name,
            role=role,
            address=self.address,
            node_id="node",
            pid=1,
            model="tiny",
            model_fingerprint="f",
            kv_layout="layout",
            block_size=16,
            num_blocks=1024,
            max_model_len=CONTEXT,
            max_num_seqs=64,
            max_num_batched_tokens=512,
        )
        reply = await stub.RegisterInstance(
            controller_pb2.RegisterInstanceRequest(instance=record), timeout=5
        )
        self.incarnation = reply.incarnation

        async def beats() -> AsyncIterator[controller_pb2.InstanceHeartbeat]:
            while not self._broken.is_set():
                yield controller_pb2.InstanceHeartbeat(
                    instance_id=self.name,
                    incarnation=self.incarnation,
                    load=controller_pb2.LoadReport(num_free_blocks=1024),
                )
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._broken.wait(), 0.5)

        async def session() -> None:
            with contextlib.suppress(grpc.aio.AioRpcError):
                async for _ in stub.InstanceSession(beats()):
                    pass

        self._session = asyncio.create_task(session())

    async def stop(self) -> None:
        """Once, whoever asks: gRPC servers do not survive being stopped by two at a time."""
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop())
        await asyncio.shield(self._stopping)

    async def _stop(self) -> None:
        self._broken.set()
        for task in list(self._running.values()):
            task.cancel()
        if self._session is not None:
            self._session.cancel()
            await asyncio.gather(self._session, return_exceptions=True)
        if self._channel is not None:
            await self._channel.close(None)
        for stream in self._streams.values():
            stream.put_nowait(None)
        if self._server is not None:
            await self._server.stop(0)

    def break_streams(self) -> None:
        """End every token stream; the instance itself goes on."""
        for stream in self._streams.values():
            stream.put_nowait(None)

    async def Submit(self, request: instance_pb2.SubmitBatch, context: Any) -> Any:
        replies = []
        for item in request.items:
            reply = instance_pb2.SubmitReply(
                request_id=item.submission.request_id, attempt=item.submission.attempt
            )
            if self.refuse or item.incarnation != self.incarnation:
                reply.error.CopyFrom(error_to_info(Refused("not now")))
            else:
                self.submitted.append(item)
                key = (item.submission.request_id, item.submission.attempt)
                task = asyncio.create_task(self._produce(item))
                self._running[key] = task
                task.add_done_callback(functools.partial(self._forget, key))
            replies.append(reply)
        return instance_pb2.SubmitBatchReply(replies=replies)

    def _forget(self, key: tuple[str, int], _: asyncio.Task[None]) -> None:
        self._running.pop(key, None)

    async def Abort(self, request: instance_pb2.AbortBatch, context: Any) -> Any:
        for item in request.items:
            self.aborted.append((item.request_id, item.attempt))
            for key, task in list(self._running.items()):
                if key[0] == item.request_id and key[1] <= item.attempt:
                    task.cancel()
        return instance_pb2.AbortBatchReply()

    async def Tokens(
        self, request: instance_pb2.TokensRequest, context: Any
    ) -> AsyncIterator[instance_pb2.TokenBatch]:
        await context.send_initial_metadata(())
        queue = self._streams[request.gateway_id] = asyncio.Queue()
        while (batch := await queue.get()) is not None:
            yield batch

    async def Handoff(
        self, request_iterator: Any, context: Any
    ) -> AsyncIterator[instance_pb2.HandoffEvent]:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "both parts know the toy model")
        yield instance_pb2.HandoffEvent()

    async def Memory(
        self, request: instance_pb2.MemoryRequest, context: Any
    ) -> instance_pb2.MemoryReply:
        return instance_pb2.MemoryReply()

    async def _produce(self, item: instance_pb2.SubmitItem) -> None:
        sub = item.submission
        prompt, have = tuple(sub.prompt_ids), len(sub.output_ids)
        last = have + 1 if item.part == Part.PREFILL else sub.sampling.max_tokens
        for index in range(have, last):
            await self.hold.wait()
            await asyncio.sleep(self.step_s)
            token = token_at(prompt, sub.sampling.seed, sub.choice, index)
            if self.lie_at == index:
                token, self.lie_at = token + 1, None
            record = instance_pb2.TokenRecord(
                request_id=sub.request_id,
                attempt=sub.attempt,
                index=index,
                token_ids=[token],
                stages=[instance_pb2.StageRecord(stage=f"{item.part}_{index}", wall_s=1.0)],
            )
            if index == have:
                record.num_cached_tokens = 0
            if sub.sampling.HasField("logprobs"):
                record.logprobs.append(_logprobs(token, sub.sampling.logprobs))
            if index == 0 and sub.sampling.HasField("prompt_logprobs"):
                count = sub.sampling.prompt_logprobs
                record.prompt_logprobs.extend(_logprobs(t, count) for t in prompt[1:])
            if token in sub.sampling.stop_token_ids:
                record.finish_reason, record.stop_token_id = "stop", token
            elif index + 1 == sub.sampling.max_tokens:
                record.finish_reason = "length"
            stream = self._streams.get(sub.gateway_id)
            if stream is not None:
                stream.put_nowait(
                    instance_pb2.TokenBatch(incarnation=self.incarnation, outputs=[record])
                )
            if self.die_after is not None and item.part != Part.PREFILL and index >= self.die_after:
                await asyncio.sleep(0.01)
                asyncio.get_running_loop().create_task(self.stop())
                return
            if record.finish_reason:
                return


def _logprobs(token: int, count: int) -> instance_pb2.TokenLogprobsRecord:
    top = [
        instance_pb2.TopLogprobRecord(token_id=token + i, logprob=-0.5 - i) for i in range(count)
    ]
    return instance_pb2.TokenLogprobsRecord(token_id=token, logprob=-0.5, rank=1, top=top)


async def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    """Wait for something that another task brings about."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)
