"""The same over gRPC: ``baton.v1.Inference/Generate``."""

from __future__ import annotations

import time

import grpc
import grpc.aio

from benchmarks.outcome import Outcome
from benchmarks.workload import Prompt
from protos.baton.v1 import inference_pb2 as pb
from protos.baton.v1 import inference_pb2_grpc as rpc

SHED = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED}


class GrpcSender:
    """One channel for all requests."""

    def __init__(
        self, address: str, model: str, *, temperature: float = 0.0, ends_s: float | None = None
    ) -> None:
        """``ends_s``: by ``time.perf_counter``; what has not finished then has failed."""
        self._channel = grpc.aio.insecure_channel(address)
        self._stub = rpc.InferenceStub(self._channel)
        self._model = model
        self._temperature = temperature
        self._ends_s = ends_s

    async def send(self, prompt: Prompt, outcome: Outcome) -> None:
        """See :class:`benchmarks.outcome.Sender`."""
        request = pb.GenerateRequest(
            model=self._model,
            service_class=outcome.service_class,
            sampling=pb.SamplingParams(
                temperature=self._temperature, max_tokens=outcome.num_wanted, ignore_eos=True
            ),
        )
        if isinstance(prompt, str):
            request.text = prompt
        else:
            request.token_ids.ids.extend(prompt)
        finished = False
        left_s = None if self._ends_s is None else max(0.0, self._ends_s - time.perf_counter())
        try:
            async for message in self._stub.Generate(request, timeout=left_s):
                at_s = time.perf_counter()
                outcome.token_ids.extend(message.token_ids)
                outcome.token_times_s.extend([at_s] * len(message.token_ids))
                finished = finished or bool(message.finish_reason)
        except grpc.aio.AioRpcError as error:
            kind = "shed" if error.code() in SHED else f"grpc_{error.code().name.lower()}"
            outcome.fail(kind, error.details() or "")
            return
        count = len(outcome.token_times_s)
        if not finished:
            outcome.fail("unfinished", f"the stream ended after {count} tokens")
        elif count != outcome.num_wanted:
            outcome.fail("short", f"{count} of {outcome.num_wanted} tokens")

    async def vocab_size(self) -> int:
        """How many token ids the model knows. Raises ``grpc.aio.AioRpcError``."""
        info = await self._stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=10)
        return info.vocab_size

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close(grace=None)
