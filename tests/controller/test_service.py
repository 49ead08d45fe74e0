"""The controller over real gRPC, with clients that speak the protos."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import urllib.request
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from baton.core.config import ControllerConfig
from baton.core.errors import Code, ConfigError, Unavailable
from controller.actor import ControllerActor
from protos.baton.internal.v1 import controller_pb2 as pb
from protos.baton.v1 import cluster_pb2, cluster_pb2_grpc
from protos.convert import instance_to_record
from protos.serving import channel_options
from protos.status import error_from_rpc
from tests.controller.controller_helpers import make_info
from tests.controller.service_kit import (
    CONFIG,
    WAIT_S,
    Cluster,
    FakeInstance,
    failing,
    make_service,
    running,
    states,
    within,
)
from tests.redis_kit import Redis


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with running(make_service(tmp_path)) as made:
        yield made


async def test_register_place_report_explain_status(cluster: Cluster) -> None:
    watch = await cluster.watch()
    assert (await cluster.until(watch, lambda view: True)).ready is False
    p = await cluster.join("p", "prefill")
    await cluster.join("d", "decode")
    view = await cluster.until(watch, lambda view: view.ready)
    assert states(view) == {"p": "ready", "d": "ready"}
    assert view.epoch == 1

    one, two = await cluster.place("r-0", "r-1", parent_request_id="r")
    assert (one.request_id, two.request_id) == ("r-0", "r-1")
    assert (one.prefill.instance_id, one.decode.instance_id) == ("p", "d")
    assert one.prefill.incarnation == p.incarnation
    assert one.prefill.address == "p:1"
    assert not one.HasField("fallback_prefill")
    explain = cluster_pb2.ExplainRequest(request_id="r")
    response = await within(cluster.operate.Explain(explain))
    assert response.outcome == "open"
    stages = [
        cluster_pb2.StageTime(stage="submitted", where="g", wall_s=2.0),
        cluster_pb2.StageTime(stage="received", where="g", wall_s=1.0),
    ]
    attempts = [
        pb.AttemptOutcome(request_id="r-0", stages=stages),
        pb.AttemptOutcome(request_id="r-1"),
    ]
    outcome = pb.Outcome(request_id="r", outcome="stop", prompt_tokens=10, attempts=attempts)
    report = pb.OutcomeBatch(gateway_id="g", outcomes=[outcome])
    await within(cluster.control.ReportOutcomes(report))
    assert not cluster.service.shell.core.state.open
    response = await within(cluster.operate.Explain(explain))
    assert (response.outcome, response.prompt_tokens) == ("stop", 10)
    assert len(response.attempts) == 2
    assert response.attempts[0].prefill_instance == "p"
    assert response.attempts[0].decode_instance == "d"
    assert response.attempts[0].num_candidates == 1
    assert [at.stage for at in response.attempts[0].stages] == ["received", "submitted"]
    error = await failing(cluster.operate.Explain(cluster_pb2.ExplainRequest(request_id="x")))
    assert (error.code, error.param) == (Code.NOT_FOUND, "request_id")

    status = await cluster.status()
    assert (status.cluster, status.model, status.epoch, status.ready) == ("c", "m", 1, True)
    assert [(i.instance_id, i.role, i.state) for i in status.instances] == [
        ("d", "decode", "ready"),
        ("p", "prefill", "ready"),
    ]
    assert [(m.kind, m.member_id, m.rss_bytes) for m in status.members if m.member_id == "g"] == [
        ("gateway", "g", 5)
    ]
    assert status.num_placements == 2
    assert status.controller_address == cluster.service.address
    assert status.controller_rss_bytes > 0
    metrics = await asyncio.to_thread(
        lambda: (
            urllib.request.urlopen(f"http://{status.controller_metrics_address}/metrics")
            .read()
            .decode()
        )
    )
    assert 'baton_controller_placements_total{outcome="placed"} 2.0' in metrics
    assert 'baton_instances{role="prefill",state="ready"} 1.0' in metrics
    assert "baton_controller_epoch 1.0" in metrics
    assert "baton_controller_open_placements 0.0" in metrics


async def test_queue_waits_for_an_instance_or_is_refused(cluster: Cluster) -> None:
    replies = await cluster.place("r")
    assert replies[0].error.code == Code.UNAVAILABLE
    assert replies[0].error.retry_after_s > 0
    await cluster.join("p", "prefill")
    waiting = asyncio.create_task(cluster.place("r2"))
    await cluster.queued(1)
    await cluster.join("d", "decode")
    replies = await within(waiting)
    assert replies[0].decode.instance_id == "d"
    replies = await cluster.place("r3", num_prompt_tokens=10_000)
    assert replies[0].error.code == Code.CONTEXT_LENGTH_EXCEEDED


async def test_a_caller_that_hangs_up_leaves_the_queue(tmp_path: Path) -> None:
    config = ControllerConfig(queue_timeout_s=60.0)
    async with running(make_service(tmp_path, config)) as cluster:
        waiting = asyncio.create_task(cluster.place("r"))
        await cluster.queued(1)
        waiting.cancel()
        await cluster.queued(0)


async def test_end_of_stream_is_suspect_then_dead(cluster: Cluster) -> None:
    watch = await cluster.watch()
    p = await cluster.join("p", "prefill")
    await p.close()
    await cluster.until(watch, lambda view: states(view).get("p") == "suspect")
    view = await cluster.until(watch, lambda view: states(view).get("p") == "dead")
    assert not view.ready
    error = await failing(p.register(p.incarnation))
    assert error.code is Code.FENCED
    old = p.incarnation
    await p.join()
    assert p.incarnation > old
    await cluster.until(watch, lambda view: states(view).get("p") == "ready")


async def test_back_within_the_grace_keeps_its_incarnation(cluster: Cluster) -> None:
    p = await cluster.join("p", "prefill")
    own = p.incarnation
    await p.close()
    await cluster.state("p", "suspect")
    await p.register(own, known_epoch=1)
    assert p.incarnation == own
    await p.open()
    await cluster.state("p", "ready")


async def test_silence_is_death(tmp_path: Path) -> None:
    config = ControllerConfig(heartbeat_s=0.1, dead_after_s=0.3)
    async with running(make_service(tmp_path, config)) as cluster:
        p = await cluster.join("p", "prefill")
        await cluster.state("p", "dead")
        directive = await within(p.directives.get())
        assert directive.fenced
        assert p.task is not None
        await within(p.task)
        assert p.error is not None
        assert p.error.code is Code.FENCED


async def test_a_new_process_fences_the_old(cluster: Cluster) -> None:
    old = await cluster.join("p", "prefill")
    new = await cluster.join("p", "prefill")
    assert new.incarnation > old.incarnation
    assert (await within(old.directives.get())).fenced


async def test_strangers_must_register(cluster: Cluster) -> None:
    stranger = FakeInstance(cluster.control, "s", "prefill")
    cluster.instances.append(stranger)
    stranger.incarnation = 12345
    await stranger.open()
    assert stranger.task is not None
    await within(stranger.task)
    assert stranger.error is not None
    assert stranger.error.code is Code.NOT_FOUND


async def test_bad_registrations(cluster: Cluster) -> None:
    record = instance_to_record(make_info("p"))
    record.role = "boss"
    request = pb.RegisterInstanceRequest(instance=record)
    error = await failing(cluster.control.RegisterInstance(request))
    assert (error.code, error.param) == (Code.INVALID_REQUEST, "role")
    call = cluster.control.MemberSession()
    await call.write(pb.MemberHeartbeat(kind="cat", member_id="x"))
    error = await failing(call.read())
    assert (error.code, error.param) == (Code.INVALID_REQUEST, "kind")


def set_role(cluster: Cluster, name: str, role: str, force: bool = False) -> Awaitable[Any]:
    request = cluster_pb2.SetRoleRequest(instance_id=name, role=role, force=force)
    call: Awaitable[Any] = cluster.operate.SetRole(request)
    return call


async def test_role_switch(cluster: Cluster) -> None:
    p0, p1 = await cluster.join("p0", "prefill"), await cluster.join("p1", "prefill")
    await cluster.join("d", "decode")
    assert (await within(set_role(cluster, "p1", "mixed"))).previous_role == "prefill"
    assert p1.role == "mixed"
    assert {i.instance_id: i.role for i in (await cluster.status()).instances}["p1"] == "mixed"
    p0.answer = lambda d: pb.DirectiveAck(directive_id=d.directive_id, reason="busy")
    error = await failing(set_role(cluster, "p0", "decode"))
    assert error.code is Code.REFUSED
    assert "busy" in error.message
    # p1 is mixed and still decodes, so this is allowed; it is the last one that does.
    assert (await within(set_role(cluster, "d", "prefill"))).previous_role == "decode"
    error = await failing(set_role(cluster, "p1", "prefill"))
    assert "no usable decode" in error.message


async def test_role_switch_errors(cluster: Cluster) -> None:
    await cluster.join("p", "prefill")
    await cluster.join("d", "decode")
    error = await failing(set_role(cluster, "p", "decode"))
    assert error.code is Code.REFUSED
    assert "no usable prefill" in error.message
    error = await failing(set_role(cluster, "x", "decode"))
    assert (error.code, error.param) == (Code.NOT_FOUND, "instance_id")
    error = await failing(set_role(cluster, "p", "boss"))
    assert (error.code, error.param) == (Code.INVALID_REQUEST, "role")
    assert (await within(set_role(cluster, "p", "decode", force=True))).previous_role == "prefill"
    assert not (await cluster.status()).ready


async def test_a_silent_instance_keeps_its_role(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("controller.roles.SWITCH_TIMEOUT_S", 0.3)
    p = await cluster.join("p", "prefill")
    await cluster.join("m", "mixed")
    p.answer = lambda directive: None
    error = await failing(set_role(cluster, "p", "decode"))
    assert error.code is Code.UNAVAILABLE
    assert "keeps the role prefill" in error.message
    kinds = [(await within(p.directives.get())).WhichOneof("what") for _ in range(2)]
    assert kinds == ["prepare_role", "commit_role"]
    assert p.role == "prefill"


def drain(cluster: Cluster, name: str, **values: Any) -> Awaitable[Any]:
    call: Awaitable[Any] = cluster.operate.Drain(
        cluster_pb2.DrainRequest(instance_id=name, **values)
    )
    return call


async def test_drain(cluster: Cluster) -> None:
    p = await cluster.join("p", "prefill")
    await cluster.join("m", "mixed")
    p.load.num_running = 1
    await p.beat()
    waiting = asyncio.ensure_future(drain(cluster, "p", wait=True, timeout_s=30.0))
    directive = await within(p.directives.get())
    assert directive.WhichOneof("what") == "drain"
    assert directive.drain
    for index in range(5):
        assert (await cluster.place(f"r{index}"))[0].prefill.instance_id == "m"
    assert not waiting.done()
    p.load.num_running = 0
    await p.beat()
    reply = await within(waiting)
    assert (reply.drained, reply.num_open, reply.ready) == (True, 0, True)
    reply = await within(drain(cluster, "m"))
    assert not reply.ready
    reply = await within(drain(cluster, "p", undo=True))
    assert reply.drained is False
    directive = await within(p.directives.get())
    assert not directive.drain
    error = await failing(drain(cluster, "nobody"))
    assert (error.code, error.param) == (Code.NOT_FOUND, "instance_id")


async def test_restart_of_the_controller(tmp_path: Path, redis_server: Redis) -> None:
    options: dict[str, Any] = {"store": None, "store_url": redis_server.url, "cluster": "restart"}
    async with running(make_service(tmp_path, **options)) as cluster:
        p = await cluster.join("p", "prefill")
        await cluster.join("m", "mixed")
        await within(set_role(cluster, "p", "decode"))
        own, port = p.incarnation, int(cluster.service.address.rpartition(":")[2])
    async with running(make_service(tmp_path, port=port, **options)) as cluster:
        p = FakeInstance(cluster.control, "p", "prefill")
        cluster.instances.append(p)
        reply = await p.register(own, known_epoch=1)
        assert (reply.incarnation, reply.epoch, reply.role) == (own, 2, "decode")
        fresh = await FakeInstance(cluster.control, "q", "prefill").register()
        assert fresh.incarnation >= 2 * 2**20


async def test_stop_answers_everyone(tmp_path: Path) -> None:
    config = ControllerConfig(queue_timeout_s=60.0)
    service = make_service(tmp_path, config)
    async with running(service) as cluster:
        p = await cluster.join("p", "prefill")
        watch = await cluster.watch()
        await cluster.until(watch, lambda view: True)
        placing = asyncio.create_task(cluster.place("r"))
        await cluster.queued(1)
        await within(service.stop())
        assert (await within(placing))[0].error.code == Code.UNAVAILABLE
        assert p.task is not None
        await within(p.task)
        with contextlib.suppress(grpc.aio.AioRpcError):
            assert not isinstance(await within(watch.read()), pb.ClusterView)
        error = await failing(cluster.status())
        assert error.code is Code.UNAVAILABLE
    assert list((tmp_path / "run").iterdir()) == []


async def test_a_port_in_use_is_a_config_error(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=str(port)):
            await within(make_service(tmp_path, port=port).start())


async def test_a_store_that_is_away_may_come_back(tmp_path: Path) -> None:
    # Not a ConfigError: that one a supervisor takes for final.
    service = make_service(tmp_path, store=None, store_url="redis://127.0.0.1:1/0")
    with pytest.raises(Unavailable, match="does not answer"):
        await within(service.start())


async def test_idle_means_no_timer(cluster: Cluster) -> None:
    assert cluster.service.shell.core.next_deadline() is None
    assert cluster.service.shell._timer is None


def test_the_actor_class_serves_without_ray(redis_server: Redis) -> None:
    actor = ControllerActor("actor", "127.0.0.1", 0, redis_server.url, CONFIG, "m")
    try:
        with grpc.insecure_channel(actor.address(), options=channel_options()) as channel:
            stub: Any = cluster_pb2_grpc.ClusterStub(channel)
            status = stub.GetStatus(cluster_pb2.GetStatusRequest(), timeout=WAIT_S)
            assert status.cluster == "actor"
            with pytest.raises(grpc.RpcError) as caught:
                stub.Explain(cluster_pb2.ExplainRequest(request_id="x"), timeout=WAIT_S)
            assert error_from_rpc(caught.value).code is Code.NOT_FOUND
        port = int(actor.address().rpartition(":")[2])
        # A constructor that fails would be tried again for ever: the first question tells.
        other = ControllerActor("other", "127.0.0.1", port, redis_server.url, CONFIG, "m")
        with pytest.raises(ConfigError, match="in use"):
            other.address()
        other.stop()
    finally:
        actor.stop()
