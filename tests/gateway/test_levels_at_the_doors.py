"""Service levels from both doors to the controller and the instances, and what is counted."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio

from baton.client import AsyncBatonClient, generate_request
from baton.core.blocks import block_keys, block_salt, tenant_salt
from baton.core.errors import Code, InvalidRequest, Overloaded, error_from_code
from baton.core.policy_config import ServiceClassConfig, ServiceConfig
from baton.core.slo import Slo
from baton.gateway.errors import error_headers, http_status
from baton.gateway.service_levels import tenant_of
from controller.events import PlaceQuery, PrefixMatch
from protos.baton.internal.v1 import controller_pb2, controller_pb2_grpc, instance_pb2
from protos.serving import channel_options
from protos.status import STATUS_BY_CODE, error_from_detail, error_to_detail
from tests.gateway import recording_policy
from tests.gateway.gateway_support import until
from tests.gateway.recording_policy import RecordingPolicy
from tests.gateway.toy_cluster import PROMPT, Toy, toy_cluster

SERVICE = ServiceConfig(
    classes={
        "chat": ServiceClassConfig(ttft_s=20.0, tpot_s=5.0, priority=2, min_ttft_s=10.0),
        "strict": ServiceClassConfig(ttft_s=1e-6),
        "night": ServiceClassConfig(priority=-1, deadline_s=100.0),
    },
    default="chat",
    api_keys={"k-night": "night"},
)


@pytest_asyncio.fixture
async def toy(tmp_path: Path, model_dir: Path) -> AsyncIterator[Toy]:
    RecordingPolicy.seen.clear()
    made = toy_cluster(tmp_path, model_dir, policy=recording_policy.NAME, service=SERVICE)
    async with made as cluster:
        yield cluster


async def post(toy: Toy, headers: dict[str, str] | None = None, **fields: Any) -> Any:
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 4, "ignore_eos": True, **fields}
    return await toy.http.post("/v1/completions", json=body, headers=headers)


def placed() -> PlaceQuery:
    return RecordingPolicy.seen[-1]


def left_s() -> float:
    deadline_s = placed().deadline_s
    assert deadline_s is not None
    return deadline_s


def submitted(toy: Toy) -> instance_pb2.SubmissionRecord:
    return toy.instances["prefill-0"].submitted[-1].submission


async def test_http_levels_reach_every_queue(toy: Toy) -> None:
    assert (await post(toy)).status_code == 200
    query, record = placed(), submitted(toy)
    assert (query.service_class, query.slo, query.priority) == ("chat", Slo(20.0, 5.0), 2)
    assert (query.deadline_s, query.tenant) == (None, "")
    assert 0.0 <= query.waited_s < 5.0
    assert (record.service_class, record.ttft_s, record.tpot_s) == ("chat", 20.0, 5.0)
    assert (record.priority, record.HasField("rise_after_s")) == (2, False)

    headers = {"authorization": "Bearer k-night"}
    assert (await post(toy, headers, cache_salt="salt")).status_code == 200
    query, record = placed(), submitted(toy)
    assert (query.service_class, query.slo, query.priority) == ("night", Slo(), -1)
    assert 90.0 < left_s() <= 100.0
    assert query.tenant == tenant_of("k-night", "salt")
    assert record.tenant == "salt", "the cache is shared by salt, the cluster by key"
    assert 40.0 < record.rise_after_s <= 50.0, "half of the time that is left"

    asked = {"x-baton-class": "chat", "x-baton-ttft-ms": "12000", "x-baton-tpot-ms": "6000"}
    assert (await post(toy, asked, priority=1)).status_code == 200
    query = placed()
    assert (query.service_class, query.slo, query.priority) == ("chat", Slo(12.0, 6.0), 1)

    fields: dict[str, Any] = {"service_class": "night", "deadline_s": 50.0, "priority": -5}
    assert (await post(toy, headers, **fields)).status_code == 200
    assert 0.0 < left_s() <= 50.0
    assert submitted(toy).priority == -5


async def test_grpc_levels_reach_every_queue(toy: Toy) -> None:
    await toy.generate(service_class="chat", ttft_s=11.0)
    assert (placed().service_class, placed().slo) == ("chat", Slo(11.0, 5.0))
    async with AsyncBatonClient(toy.gateway.addresses.grpc, api_key="k-night") as client:
        request = generate_request(PROMPT, max_tokens=4, ignore_eos=True, deadline_s=30.0)
        assert [chunk async for chunk in client.generate(request)]
    assert (placed().service_class, placed().priority) == ("night", -1)
    assert placed().tenant == tenant_of("k-night", "")
    assert 0.0 < left_s() <= 30.0
    for fields, param in (
        ({"service_class": "nobody"}, "service_class"),
        ({"ttft_s": 9.0}, "ttft_s"),
        ({"priority": 3}, "priority"),
        ({"deadline_s": -1.0, "service_class": "night"}, "deadline_s"),
    ):
        with pytest.raises(InvalidRequest) as caught:
            await toy.generate(**fields)
        assert caught.value.param == param


async def test_what_is_beyond_the_limits_is_refused(toy: Toy) -> None:
    answer = await post(toy, {"x-baton-ttft-ms": "9000"})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "ttft_s")
    assert "no less than 10" in error["message"]
    answer = await post(toy, service_class="nobody")
    assert answer.status_code == 400
    assert "chat, night, strict" in answer.json()["error"]["message"]
    for fields in ({"ttft_s": 0}, {"tpot_s": "1"}, {"priority": 1.5}, {"service_class": ""}):
        assert (await post(toy, **fields)).status_code == 400
    assert not RecordingPolicy.seen


async def test_attainment_is_counted_by_class(toy: Toy) -> None:
    for _ in range(3):
        await post(toy)
    await post(toy, service_class="strict")
    await post(toy, service_class="night")
    await post(toy, service_class="night", timeout=0.000001)

    async def value(name: str, **labels: str) -> float:
        inside = ",".join(f'{key}="{text}"' for key, text in labels.items())
        return await toy.metric(f"{name}{{{inside}}}")

    async def ended(name: str, outcome: str) -> float:
        labels = {"outcome": outcome, "service_class": name}
        return await value("baton_requests_slo_total", **labels)

    await toy.idle()
    assert await ended("chat", "met") == 3
    assert (await ended("strict", "met"), await ended("strict", "missed")) == (0, 1)
    assert (await ended("night", "met"), await ended("night", "failed")) == (1, 1)
    assert await ended("none", "met") == 0
    missed = {"service_class": "strict", "target": "ttft"}
    assert await value("baton_slo_misses_total", **missed) == 1
    assert await value("baton_slo_attainment", service_class="chat") == 1.0
    assert await value("baton_slo_attainment", service_class="night") == 0.5
    assert await value("baton_goodput_requests_per_second", service_class="chat") == 3 / 60
    count = "baton_class_time_to_first_token_seconds_count"
    assert await value(count, service_class="chat") == 3


async def test_explain_says_class_and_verdict(toy: Toy) -> None:
    for request_id, name in (("good", "chat"), ("late", "strict")):
        await post(toy, {"x-request-id": request_id}, service_class=name)
    core = toy.controller.shell.core
    await until(lambda: all(_ended(core, name) for name in ("good", "late")))
    assert (_ended(core, "good").service_class, _ended(core, "good").met) == ("chat", True)
    assert (_ended(core, "late").service_class, _ended(core, "late").met) == ("strict", False)


def _ended(core: Any, request_id: str) -> Any:
    trace = core.explain(request_id)
    return trace and trace.ended


async def test_placement_is_told_who_has_the_prompts_beginning(toy: Toy) -> None:
    prompt = list(range(3, 3 + 50))
    salt = tenant_salt(block_salt(model_fingerprint="f", layout="layout"), tenant="salt")
    keys = block_keys(prompt, block_size=16, salt=salt)
    report = controller_pb2.BlockReport(
        holder="prefill-0",
        life=1,
        snapshot=True,
        blocks=[controller_pb2.TierBlocks(tier="device", keys=keys[:2])],
    )
    address = toy.controller.address
    async with grpc.aio.insecure_channel(address, options=channel_options()) as channel:
        stub: Any = controller_pb2_grpc.ControllerStub(channel)
        await stub.ReportBlocks(report, timeout=5)
    known = (PrefixMatch("prefill-0", "device", 32),)
    await post(toy, prompt=prompt, cache_salt="salt", n=2)
    assert [query.prefix for query in RecordingPolicy.seen[-2:]] == [known, known]
    await post(toy, prompt=prompt)
    assert placed().prefix == (), "another tenant's blocks"
    await post(toy, prompt=prompt, cache_salt="salt", echo=True, logprobs=1)
    assert placed().prefix == (), "it computes the whole prompt"


def test_shed_requests_are_told_when_to_come_back() -> None:
    shed = Overloaded("too much", retry_after_s=2.3)
    assert http_status(shed) == 429
    assert error_headers(shed) == {"x-should-retry": "true", "retry-after": "3"}
    assert STATUS_BY_CODE[Code.OVERLOADED] is grpc.StatusCode.RESOURCE_EXHAUSTED
    back = error_from_detail(error_to_detail(shed))
    assert isinstance(back, Overloaded)
    assert (back.retryable, back.retry_after_s) == (True, 2.3)
    assert isinstance(error_from_code("overloaded", "x"), Overloaded)
