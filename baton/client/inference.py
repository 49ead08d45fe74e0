"""The synchronous inference client."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType

import grpc

from baton.client.messages import GenerateChunk, call_metadata, chunk_from_response
from protos.baton.v1 import inference_pb2, inference_pb2_grpc
from protos.serving import channel_options
from protos.status import error_from_rpc

_CALL_TIMEOUT_S = 10.0


class BatonClient:
    """Speaks to a gateway's gRPC port. Safe to share between threads; close it, or use ``with``.

    Every method raises the BatonError that the gateway answered.
    """

    def __init__(self, address: str, *, api_key: str | None = None) -> None:
        """``address`` is host:port. ``api_key``: chooses a service class; no authentication."""
        self._metadata = call_metadata(api_key)
        self._channel = grpc.insecure_channel(address, options=channel_options())
        self._stub = inference_pb2_grpc.InferenceStub(self._channel)

    def __enter__(self) -> BatonClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what is open and disconnect."""
        self._channel.close()

    def generate(
        self, request: inference_pb2.GenerateRequest, *, timeout_s: float | None = None
    ) -> Iterator[GenerateChunk]:
        """Chunks as they are made; closing the iterator early cancels the request."""
        call = self._stub.Generate(request, timeout=timeout_s, metadata=self._metadata)
        try:
            for response in call:
                yield chunk_from_response(response)
        except grpc.RpcError as error:
            raise error_from_rpc(error) from error
        finally:
            call.cancel()  # type: ignore[no-untyped-call]

    def model_info(
        self, *, timeout_s: float = _CALL_TIMEOUT_S
    ) -> inference_pb2.GetModelInfoResponse:
        """What the gateway serves."""
        try:
            return self._stub.GetModelInfo(inference_pb2.GetModelInfoRequest(), timeout=timeout_s)
        except grpc.RpcError as error:
            raise error_from_rpc(error) from error

    def abort(self, request_id: str, *, timeout_s: float = _CALL_TIMEOUT_S) -> None:
        """End a request that another call started; unknown ones are no error."""
        try:
            self._stub.Abort(inference_pb2.AbortRequest(request_id=request_id), timeout=timeout_s)
        except grpc.RpcError as error:
            raise error_from_rpc(error) from error
