"""The gRPC door: baton.v1.Inference with the standard health and reflection services."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Callable
from typing import Any, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

import baton
from baton.core.clock import Clock
from baton.core.errors import BatonError, InvalidRequest
from baton.core.request import TokenLogprobs
from baton.gateway.errors import as_baton_error
from baton.gateway.metrics import GatewayMetrics
from baton.gateway.requests import (
    GatewayRequest,
    RequestChecker,
    RequestHead,
    check_request_id,
)
from baton.gateway.service import SEND_GRACE_S, ChoiceDelta, InferenceService
from baton.gateway.service_levels import AskedLevel, bearer_key
from protos.baton.v1 import inference_pb2
from protos.serving import server_options
from protos.status import abort_with

SERVICE_NAME = "baton.v1.Inference"
_MESSAGE_OVERHEAD_BYTES = 4096

M = TypeVar("M", bound=Message)
Context = grpc.aio.ServicerContext[Any, Any]


class GrpcDoor:
    """The handlers, and the server that carries them."""

    def __init__(
        self,
        service: InferenceService,
        metrics: GatewayMetrics,
        clock: Clock,
        *,
        checker: Callable[[], RequestChecker],
        dtype: str,
    ) -> None:
        self._service = service
        self._metrics = metrics
        self._clock = clock
        self._checker = checker
        self._dtype = dtype
        self._health = _Health()

    def server(self) -> grpc.aio.Server:
        """A server with all services, bound to nothing yet."""
        limit = self._checker().limits.max_body_bytes + _MESSAGE_OVERHEAD_BYTES
        options = [
            *(item for item in server_options() if item[0] != "grpc.max_receive_message_length"),
            ("grpc.max_receive_message_length", limit),
        ]
        server = grpc.aio.server(options=options)
        server.add_generic_rpc_handlers((self._handlers(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        return server

    async def set_ready(self, ready: bool) -> None:
        """What the health service says, overall and for the inference service."""
        status = (
            health_pb2.HealthCheckResponse.SERVING
            if ready
            else health_pb2.HealthCheckResponse.NOT_SERVING
        )
        for name in ("", SERVICE_NAME):
            await self._health.set(name, status)

    async def end_watches(self) -> None:
        """Say NOT_SERVING for good and end the health streams: a stop would wait for them."""
        await self._health.enter_graceful_shutdown()
        self._health.ending.set()

    def _handlers(self) -> grpc.GenericRpcHandler[Any, Any]:
        return grpc.method_handlers_generic_handler(
            SERVICE_NAME,
            {
                "Generate": grpc.unary_stream_rpc_method_handler(
                    self._generate,
                    request_deserializer=_lenient(inference_pb2.GenerateRequest),
                    response_serializer=inference_pb2.GenerateResponse.SerializeToString,
                ),
                "GetModelInfo": grpc.unary_unary_rpc_method_handler(
                    self._get_model_info,
                    request_deserializer=_lenient(inference_pb2.GetModelInfoRequest),
                    response_serializer=inference_pb2.GetModelInfoResponse.SerializeToString,
                ),
                "Abort": grpc.unary_unary_rpc_method_handler(
                    self._abort,
                    request_deserializer=_lenient(inference_pb2.AbortRequest),
                    response_serializer=inference_pb2.AbortResponse.SerializeToString,
                ),
            },
        )

    async def _generate(
        self, message: inference_pb2.GenerateRequest | None, context: Context
    ) -> None:
        received_s = self._clock.now()
        checked = False
        try:
            request = await self._check(_decoded(message), context)
            checked = True
            # A client that does not read would keep its request's tokens here for ever.
            async with asyncio.timeout(request.timeout_s + SEND_GRACE_S):
                deltas = self._service.generate(request, received_s=received_s)
                async with contextlib.aclosing(deltas):
                    async for delta in deltas:
                        await context.write(self._response(request, delta))
        except Exception as problem:
            error = as_baton_error(problem)
            if not checked:
                self._metrics.requests.labels("grpc", str(error.code)).inc()
            await abort_with(context, error)

    async def _get_model_info(
        self, message: inference_pb2.GetModelInfoRequest | None, context: Context
    ) -> inference_pb2.GetModelInfoResponse:
        if message is None:
            await abort_with(context, _undecodable())
        checker = self._checker()
        return inference_pb2.GetModelInfoResponse(
            model=checker.served_name,
            max_model_len=checker.max_model_len,
            vocab_size=checker.model.vocab_size,
            architecture=checker.model.architecture,
            dtype=self._dtype,
            eos_token_ids=checker.model.eos_token_ids,
            version=baton.__version__,
        )

    async def _abort(
        self, message: inference_pb2.AbortRequest | None, context: Context
    ) -> inference_pb2.AbortResponse:
        try:
            request_id = _decoded(message).request_id
            self._service.abort(check_request_id(request_id, param="request_id"))
        except BatonError as error:
            await abort_with(context, error)
        return inference_pb2.AbortResponse()

    async def _check(
        self, message: inference_pb2.GenerateRequest, context: Context
    ) -> GatewayRequest:
        checker = self._checker()
        if message.model:
            checker.check_model(message.model)
        request_id = message.request_id or uuid.uuid4().hex
        check_request_id(request_id, param="request_id")
        self._service.check_free(request_id, param="request_id")
        sampling = message.sampling
        prompt: str | list[int]
        which = message.WhichOneof("prompt")
        if which is None:
            raise InvalidRequest("text or token_ids must be set", param="prompt")
        prompt = message.text if which == "text" else list(message.token_ids.ids)
        remaining_s = context.time_remaining()
        timeout_s = None if remaining_s is None else max(remaining_s, 0.001)
        return await checker.single(
            prompt,
            _sampling_fields(sampling),
            RequestHead(request_id, timeout_s, _asked(message, context)),
            max_tokens=_positive(sampling, "max_tokens"),
            n=sampling.n if sampling.HasField("n") else 1,
            seed=sampling.seed if sampling.HasField("seed") else None,
            stops=list(sampling.stop),
            include_stop=sampling.include_stop_str_in_output,
            skip_special_tokens=(
                sampling.skip_special_tokens if sampling.HasField("skip_special_tokens") else True
            ),
            cache_salt=message.cache_salt,
        )

    def _response(
        self, request: GatewayRequest, delta: ChoiceDelta
    ) -> inference_pb2.GenerateResponse:
        response = inference_pb2.GenerateResponse(
            request_id=request.request_id,
            choice=delta.choice,
            index=delta.index,
            token_ids=delta.token_ids,
            text=delta.text,
            logprobs=[self._logprob(item) for item in delta.logprobs],
            finish_reason=delta.finish_reason or "",
            stop_reason="" if delta.stop_reason is None else str(delta.stop_reason),
            prompt_logprobs=[self._logprob(item) for item in delta.prompt_logprobs],
        )
        if delta.usage is not None:
            response.usage.prompt_tokens = delta.usage.prompt_tokens
            response.usage.completion_tokens = delta.usage.completion_tokens
            response.usage.cached_tokens = delta.usage.cached_tokens
        return response

    def _logprob(self, item: TokenLogprobs) -> inference_pb2.TokenLogprob:
        return inference_pb2.TokenLogprob(
            token_id=item.token_id,
            logprob=item.logprob,
            rank=item.rank,
            text=self._text(item.token_id),
            top=[
                inference_pb2.TopLogprob(token_id=token, logprob=logprob, text=self._text(token))
                for token, logprob in item.top
            ],
        )

    def _text(self, token_id: int) -> str:
        tokenizer = self._checker().tokenizer
        return "" if tokenizer is None else tokenizer.token_text(token_id)


class _Health(health.aio.HealthServicer):  # type: ignore[name-defined,misc]
    """The standard service, whose watches end when the server is about to stop."""

    def __init__(self) -> None:
        super().__init__()
        self.ending = asyncio.Event()

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Context) -> None:
        """See the health checking protocol."""
        watch = asyncio.ensure_future(super().Watch(request, context))
        ending = asyncio.ensure_future(self.ending.wait())
        try:
            await asyncio.wait({watch, ending}, return_when=asyncio.FIRST_COMPLETED)
            if watch.done():
                watch.result()
        finally:
            watch.cancel()
            ending.cancel()
            await asyncio.gather(watch, ending, return_exceptions=True)


def _asked(message: inference_pb2.GenerateRequest, context: Context) -> AskedLevel:
    authorization = dict(context.invocation_metadata() or ()).get("authorization")
    return AskedLevel(
        service_class=message.service_class or None,
        api_key=bearer_key(authorization if isinstance(authorization, str) else None),
        ttft_s=message.ttft_s if message.HasField("ttft_s") else None,
        tpot_s=message.tpot_s if message.HasField("tpot_s") else None,
        deadline_s=message.deadline_s if message.HasField("deadline_s") else None,
        priority=message.priority if message.HasField("priority") else None,
    )


def _sampling_fields(sampling: inference_pb2.SamplingParams) -> dict[str, object]:
    """What the client set, named as in SamplingParams."""
    fields: dict[str, object] = {
        "stop_token_ids": tuple(sampling.stop_token_ids),
        "ignore_eos": sampling.ignore_eos,
    }
    names = (
        *("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty"),
        *("frequency_penalty", "logprobs", "prompt_logprobs"),
    )
    for name in names:
        if sampling.HasField(name):  # type: ignore[arg-type]
            value = getattr(sampling, name)
            # 0.1 as a float32 is shown and computed as the 0.1 that was meant.
            fields[name] = float(f"{value:.7g}") if isinstance(value, float) else value
    return fields


def _positive(sampling: inference_pb2.SamplingParams, name: str) -> int | None:
    if not sampling.HasField(name):  # type: ignore[arg-type]
        return None
    value = int(getattr(sampling, name))
    if value < 1:
        raise InvalidRequest(f"{name} must be at least 1, got {value}", param=name)
    return value


def _lenient(kind: type[M]) -> Callable[[bytes], M | None]:
    """A deserializer whose failure reaches the handler, which answers INVALID_ARGUMENT."""

    def parse(data: bytes) -> M | None:
        try:
            return kind.FromString(data)
        except DecodeError:
            return None

    return parse


def _decoded(message: M | None) -> M:
    if message is None:
        raise _undecodable()
    return message


def _undecodable() -> InvalidRequest:
    return InvalidRequest("the message does not decode as the request of this method")
