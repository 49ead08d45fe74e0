from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st

from baton.client import AdminClient, generate_request
from baton.client.messages import chunk_from_response
from baton.core.cluster import Role
from baton.core.config import ControllerConfig
from baton.core.errors import BatonError, Code, NotFound
from controller.service import ControllerService
from controller.store_memory import MemoryStore
from protos.baton.v1 import inference_pb2


@given(
    ids=st.lists(st.integers(0, 2**32 - 1)),
    seed=st.none() | st.integers(0, 2**64 - 1),
    top_k=st.none() | st.integers(0, 1000),
)
def test_what_is_not_given_is_not_sent(ids: list[int], seed: int | None, top_k: int | None) -> None:
    request = generate_request(ids, seed=seed, top_k=top_k)
    sent = inference_pb2.GenerateRequest.FromString(request.SerializeToString())
    assert list(sent.token_ids.ids) == ids
    assert sent.WhichOneof("prompt") == "token_ids"
    assert sent.sampling.HasField("seed") == (seed is not None)
    assert sent.sampling.HasField("top_k") == (top_k is not None)
    assert not sent.sampling.HasField("temperature")
    assert sent.sampling.seed == (seed or 0)


def test_chunk_of_a_response() -> None:
    response = inference_pb2.GenerateResponse(
        request_id="r",
        choice=1,
        index=4,
        token_ids=[7],
        text="x",
        logprobs=[
            inference_pb2.TokenLogprob(
                token_id=7,
                logprob=-0.5,
                rank=1,
                top=[inference_pb2.TopLogprob(token_id=7, logprob=-0.5)],
            )
        ],
        finish_reason="stop",
        usage=inference_pb2.Usage(prompt_tokens=3, completion_tokens=5, cached_tokens=0),
    )
    chunk = chunk_from_response(response)
    assert (chunk.choice, chunk.index, chunk.token_ids) == (1, 4, (7,))
    assert chunk.logprobs[0].top == ((7, -0.5),)
    assert (chunk.finish_reason, chunk.stop_reason) == ("stop", None)
    assert (chunk.prompt_tokens, chunk.completion_tokens, chunk.cached_tokens) == (3, 5, 0)
    assert chunk_from_response(inference_pb2.GenerateResponse()).prompt_tokens is None


@pytest_asyncio.fixture
async def controller(tmp_path: Path) -> AsyncIterator[str]:
    service = ControllerService(
        cluster="clients",
        host="127.0.0.1",
        port=0,
        store_url="memory",
        config=ControllerConfig(),
        model="tiny",
        store=MemoryStore("clients", directory=tmp_path),
    )
    await service.start()
    yield service.address
    await service.stop()


async def test_admin_client_raises_what_the_controller_answers(controller: str) -> None:
    def ask() -> None:
        with AdminClient(controller) as admin:
            status = admin.status()
            assert (status.model, status.ready, list(status.instances)) == ("tiny", False, [])
            with pytest.raises(NotFound):
                admin.explain("unknown")
            with pytest.raises(NotFound):
                admin.set_role("unknown", Role.PREFILL)
            with pytest.raises(NotFound):
                admin.drain("unknown", wait=False)

    await asyncio.to_thread(ask)


def test_nobody_there_is_retryable() -> None:
    with AdminClient("127.0.0.1:9", timeout_s=1.0) as admin, pytest.raises(BatonError) as caught:
        admin.status()
    assert caught.value.code is Code.UNAVAILABLE
    assert caught.value.retryable
