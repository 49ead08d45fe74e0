"""Elastic roles over real gRPC: a planner's switch, what operators see of it, and what they say."""

from __future__ import annotations

import asyncio
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from baton.core.cluster import Role
from baton.core.config import ControllerConfig
from baton.core.errors import Code
from baton.core.policy_config import RolesConfig
from controller.planner import RoleAdvice, ScriptedPlanner
from protos.baton.internal.v1 import controller_pb2 as pb
from protos.baton.v1 import cluster_pb2
from tests.controller.fleet import proposal
from tests.controller.service_kit import Cluster, failing, make_service, running, within
from tests.redis_kit import Redis

QUICK = ControllerConfig(
    dead_after_s=60.0, roles=RolesConfig(interval_s=0.05, cooldown_s=0.1), heartbeat_s=0.2
)


def wishing(name: str, role: str) -> ScriptedPlanner:
    """Wants one switch as long as it is not made."""
    wish = proposal(name, role, reason="decode is short", inputs={"queue": 3.0}, urgent=True)
    planner = ScriptedPlanner(lambda view, now: wish)
    planner.says = RoleAdvice({Role.PREFILL: 1, Role.DECODE: 2}, 5)
    return planner


async def roles(cluster: Cluster, limit: int | None = None) -> cluster_pb2.RolesStatus:
    reply = await within(cluster.operate.GetRoles(cluster_pb2.GetRolesRequest(log_limit=limit)))
    assert isinstance(reply, cluster_pb2.RolesStatus)
    return reply


async def pin(cluster: Cluster, name: str, pinned: bool) -> Any:
    message = cluster_pb2.PinRoleRequest(instance_id=name, pinned=pinned)
    return await within(cluster.operate.PinRole(message))


async def pause(cluster: Cluster, paused: bool, duration_s: float | None = None) -> None:
    message = cluster_pb2.PauseRolesRequest(paused=paused, duration_s=duration_s)
    await within(cluster.operate.PauseRoles(message))


async def metrics(cluster: Cluster) -> str:
    address = (await cluster.status()).controller_metrics_address
    url = f"http://{address}/metrics"
    return await asyncio.to_thread(lambda: urllib.request.urlopen(url).read().decode())


async def becomes(cluster: Cluster, name: str, role: str) -> None:
    watch = await cluster.watch("waits for a role")
    await cluster.until(
        watch,
        lambda view: {i.record.instance_id: i.record.role for i in view.instances}[name] == role,
    )
    watch.cancel()


async def test_a_planners_switch_and_what_operators_see(tmp_path: Path) -> None:
    service = make_service(tmp_path, QUICK, planner=wishing("p1", "decode"))
    async with running(service) as cluster:
        for name, role in (("p0", "prefill"), ("p1", "prefill"), ("d0", "decode")):
            await cluster.join(name, role)
        await pause(cluster, True)
        await cluster.place("r")
        assert "baton_roles_paused 1.0" in await metrics(cluster)
        await pause(cluster, False)
        await becomes(cluster, "p1", "decode")
        ended = pb.Outcome(request_id="r", outcome="stop", met=True)
        await within(cluster.control.ReportOutcomes(pb.OutcomeBatch(outcomes=[ended])))
        status = await roles(cluster)
        assert (status.mode, status.paused) == ("auto", False)
        assert dict(status.desired) == {"prefill": 1, "decode": 2}
        assert status.desired_instances == 5
        assert [(i.instance_id, i.role, i.pinned) for i in status.instances] == [
            ("d0", "decode", False),
            ("p0", "prefill", False),
            ("p1", "decode", False),
        ]
        flip = status.log[-1]
        assert (flip.instance_id, flip.from_role, flip.to_role) == ("p1", "prefill", "decode")
        assert (flip.who, flip.reason, flip.urgent) == ("planner", "decode is short", True)
        assert dict(flip.inputs) == {"queue": 3.0}
        assert not flip.HasField("predicted_before")
        assert abs(flip.wall_s - service.shell.clock.wall()) < 60.0, "Unix time"
        assert not (await roles(cluster, 0)).log
        text = await metrics(cluster)
        done = '{from="prefill",result="done",to="decode",who="planner"} 1.0'
        assert f"baton_role_flips_total{done}" in text
        assert "baton_role_flip_seconds_count 1.0" in text
        assert "baton_roles_desired_instances 5.0" in text
        assert 'baton_roles_desired{role="decode"} 2.0' in text
        assert "baton_roles_paused 0.0" in text


async def test_operators_errors_are_named(tmp_path: Path) -> None:
    async with running(make_service(tmp_path)) as cluster:
        missing = cluster_pb2.PinRoleRequest(instance_id="nobody", pinned=True)
        error = await failing(cluster.operate.PinRole(missing))
        assert (error.code, error.param) == (Code.NOT_FOUND, "instance_id")
        wrong = cluster_pb2.PauseRolesRequest(paused=True, duration_s=-1.0)
        error = await failing(cluster.operate.PauseRoles(wrong))
        assert (error.code, error.param) == (Code.INVALID_REQUEST, "duration_s")


@pytest.mark.parametrize(("run_id", "p1"), [("run", "decode"), ("next run", "prefill")])
async def test_roles_pins_and_pauses_outlive_the_controller(
    redis_server: Redis, tmp_path: Path, run_id: str, p1: str
) -> None:
    def service(run_id: str) -> Any:
        values = {"store": None, "store_url": redis_server.url, "cluster": f"c-{p1}"}
        planner = wishing("p1", "decode") if run_id == "run" else None
        return make_service(tmp_path, QUICK, planner=planner, run_id=run_id, **values)

    async with running(service("run")) as cluster:
        for name, role in (("p0", "prefill"), ("p1", "prefill"), ("d0", "decode")):
            await cluster.join(name, role)
        assert (await pin(cluster, "d0", True)).role == "decode"
        await cluster.place("r")
        await becomes(cluster, "p1", "decode")
        await pause(cluster, True, 1000.0)
    async with running(service(run_id)) as cluster:
        for name, role in (("p0", "prefill"), ("p1", "prefill"), ("d0", "mixed")):
            await cluster.join(name, role)
        status = await roles(cluster)
        assert {i.instance_id: (i.role, i.pinned) for i in status.instances} == {
            "p0": ("prefill", False),
            "p1": (p1, False),
            "d0": ("decode", True),
        }
        assert status.paused
        assert 0 < status.paused_for_s <= 1000.0
        await pin(cluster, "d0", False)
        await pause(cluster, False)
        status = await roles(cluster)
        assert not status.paused
        assert not any(item.pinned for item in status.instances)
