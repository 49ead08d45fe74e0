"""The clients people use: `openai`, plain gRPC from the published proto, health, reflection."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from openai import AsyncOpenAI, BadRequestError, NotFoundError, OpenAI

from tests.cluster import oracle
from tests.cluster.harness import DEMO_MODEL, ROOT, Cluster

MODEL = DEMO_MODEL.name
PROMPT = "import os\n\n\ndef main(argv):\n"
ON: Any = {"ignore_eos": True}
"""Whatever the demo model was trained to, it goes on for as long as a test wants."""
CHAT: list[Any] = [{"role": "user", "content": "Write a Python function that adds two numbers."}]


@pytest.fixture
def client(pair: Cluster) -> OpenAI:
    return OpenAI(base_url=f"{pair.url}/v1", api_key="none", max_retries=0)


def test_completion_and_stream_agree(client: OpenAI) -> None:
    whole = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=24, extra_body=ON, temperature=0
    )
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == len(oracle.tokenizer()(PROMPT)["input_ids"])
    assert whole.usage.completion_tokens == 24
    assert whole.choices[0].finish_reason == "length"
    chunks = list(
        client.completions.create(
            model=MODEL,
            prompt=PROMPT,
            max_tokens=24,
            extra_body=ON,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].text
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 24
    expected = oracle.tokenizer().decode(
        oracle.model().generate(
            oracle.tokenizer()(PROMPT, return_tensors="pt")["input_ids"],
            do_sample=False,
            max_new_tokens=24,
            min_new_tokens=24,
        )[0, whole.usage.prompt_tokens :]
    )
    assert text == expected


def test_chat(client: OpenAI) -> None:
    whole = client.chat.completions.create(
        model=MODEL,
        messages=CHAT,
        max_tokens=32,
        extra_body=ON,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
    )
    choice = whole.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    for item in choice.logprobs.content:
        assert item.logprob <= 0
        assert item.logprob == item.top_logprobs[0].logprob  # greedy takes the best
    stream = client.chat.completions.create(
        model=MODEL, messages=CHAT, max_tokens=32, extra_body=ON, temperature=0, stream=True
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert text == choice.message.content


def test_choices_stop_echo_and_logprobs(client: OpenAI) -> None:
    reply = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=16, extra_body=ON, n=3, seed=11, temperature=1.0
    )
    assert sorted(choice.index for choice in reply.choices) == [0, 1, 2]
    assert len({choice.text for choice in reply.choices}) > 1
    again = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=16, extra_body=ON, n=3, seed=11, temperature=1.0
    )
    assert [c.text for c in again.choices] == [c.text for c in reply.choices]

    free = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=40, extra_body=ON, temperature=0
    )
    stop = free.choices[0].text[10:14]
    cut = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=40, extra_body=ON, temperature=0, stop=[stop]
    )
    assert cut.choices[0].finish_reason == "stop"
    assert free.choices[0].text.startswith(cut.choices[0].text)
    assert stop not in cut.choices[0].text

    echo = client.completions.create(
        model=MODEL,
        prompt=PROMPT,
        max_tokens=4,
        extra_body=ON,
        temperature=0,
        echo=True,
        logprobs=1,
    )
    assert echo.choices[0].text.startswith(PROMPT)
    logprobs = echo.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    num_prompt = len(oracle.tokenizer()(PROMPT)["input_ids"])
    assert len(logprobs.token_logprobs) == num_prompt + 4
    first, *others = cast("list[float | None]", logprobs.token_logprobs)
    assert first is None
    assert all(value is not None and value <= 0 for value in others)


async def test_async_client(pair: Cluster) -> None:
    async with AsyncOpenAI(base_url=f"{pair.url}/v1", api_key="none", max_retries=0) as client:
        stream = await client.completions.create(
            model=MODEL, prompt=PROMPT, max_tokens=12, extra_body=ON, temperature=0, stream=True
        )
        text = "".join([chunk.choices[0].text async for chunk in stream if chunk.choices])
        whole = await client.completions.create(
            model=MODEL, prompt=PROMPT, max_tokens=12, extra_body=ON, temperature=0
        )
        assert text == whole.choices[0].text
        assert [model.id async for model in await client.models.list()] == [MODEL]


def test_errors_are_the_clients_own(client: OpenAI) -> None:
    with pytest.raises(BadRequestError) as bad:
        client.completions.create(
            model=MODEL, prompt=PROMPT, max_tokens=4, extra_body=ON, temperature=9
        )
    assert bad.value.param == "temperature"
    with pytest.raises(NotFoundError):
        client.completions.create(model="no-such-model", prompt=PROMPT, max_tokens=4, extra_body=ON)


def test_grpc_client_built_from_the_published_proto(pair: Cluster, tmp_path: Path) -> None:
    """Compile the .proto as a user would, elsewhere, and talk to the cluster with it."""
    subprocess.run(
        [
            *(sys.executable, "-m", "grpc_tools.protoc"),
            f"-I{ROOT / 'protos' / 'baton' / 'v1'}",
            *(f"--python_out={tmp_path}", f"--grpc_python_out={tmp_path}"),
            str(ROOT / "protos" / "baton" / "v1" / "inference.proto"),
        ],
        check=True,
        timeout=60,
    )
    # A process of its own: one descriptor pool cannot hold the same file twice.
    script = (
        "import sys, grpc, inference_pb2 as pb, inference_pb2_grpc as rpc\n"
        "stub = rpc.InferenceStub(grpc.insecure_channel(sys.argv[1]))\n"
        "info = stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=10)\n"
        "print(info.model, info.max_model_len)\n"
        "request = pb.GenerateRequest(text='def f(x):', request_id='from-proto')\n"
        "request.sampling.max_tokens = 12\n"
        "request.sampling.temperature = 0\n"
        "request.sampling.ignore_eos = True\n"
        "messages = list(stub.Generate(request, timeout=30))\n"
        "print(sum(len(m.token_ids) for m in messages), messages[-1].finish_reason,\n"
        "      messages[-1].usage.completion_tokens, messages[-1].request_id)\n"
        "stub.Abort(pb.AbortRequest(request_id='nobody'), timeout=10)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, pair.grpc],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    first, second = result.stdout.splitlines()
    assert first.split()[0] == MODEL
    assert second == "12 length 12 from-proto"


def test_health_and_reflection(pair: Cluster) -> None:
    importlib.import_module("grpc_reflection.v1alpha")
    with grpc.insecure_channel(pair.grpc) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", "baton.v1.Inference"):
            reply = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=10)
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
        database = ProtoReflectionDescriptorDatabase(channel)
        assert "baton.v1.Inference" in database.get_services()
        service = DescriptorPool(database).FindServiceByName("baton.v1.Inference")
        assert {method.name for method in service.methods} == {"Generate", "GetModelInfo", "Abort"}
