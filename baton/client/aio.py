"""The asynchronous inference client."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from types import TracebackType

import grpc
import grpc.aio

from baton.client.messages import GenerateChunk, call_metadata, chunk_from_response
from protos.baton.v1 import inference_pb2, inference_pb2_grpc
from protos.serving import channel_options
from protos.status import error_from_rpc

_CALL_TIMEOUT_S = 10.0


class AsyncBatonClient:
    """Speaks to a gateway's gRPC port on one event loop; close it, or use ``async with``.

    Every method raises the BatonError that the gateway answered.
    """

    def __init__(self, address: str, *, api_key: str | None = None) -> None:
        """``address`` is host:port. ``api_key``: chooses a service class; no authentication."""
        self._metadata = call_metadata(api_key)
        self._channel = grpc.aio.insecure_channel(address, options=channel_options())
        self._stub = inference_pb2_grpc.InferenceStub(self._channel)

    async def __aenter__(self) -> AsyncBatonClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancel what is open and disconnect."""
        await self._channel.close(None)

    async def generate(
        self, request: inference_pb2.GenerateRequest, *, timeout_s: float | None = None
    ) -> AsyncGenerator[GenerateChunk, None]:
        """Chunks as they are made; closing the generator early cancels the request."""
        call = self._stub.Generate(request, timeout=timeout_s, metadata=self._metadata)
        try:
            async for response in call:
                yield chunk_from_response(response)
        except grpc.RpcError as error:
            raise error_from_rpc(error) from error
        finally:
            call.cancel()

    async def model_info(
        self, *, timeout_s: float = _CALL_TIMEOUT_S
    ) -> inference_pb2.GetModelInfoResponse:
        """What the gateway serves."""
        try:
            return await self._stub.GetModelInfo(
                inference_pb2.GetModelInfoRequest(), timeout=timeout_s
            )
        except grpc.RpcError as error:
            raise error_from_rpc(error) from error

    async def abort(self, request_id: str, *, timeout_s: float = _CALL_TIMEOUT_S) -> None:
        """End a request that another call started; unknown ones are no error."""
        message = inference_pb2.AbortRequest(request_id=request_id)
        try:
            await self._stub.Abort(message, timeout=timeout_s)
        except grpc.RpcError as error:
            raise error_from_rpc(error) from error
