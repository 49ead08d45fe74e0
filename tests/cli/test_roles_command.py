"""``baton roles`` as a user runs it, on a controller with a scripted planner."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from typer.testing import CliRunner

from baton.cli.main import app
from baton.core.cluster import Role
from baton.core.config import ControllerConfig
from baton.core.policy_config import RolesConfig
from controller.planner import FlipProposal, RoleAdvice, ScriptedPlanner
from protos.baton.internal.v1 import controller_pb2
from tests.controller.service_kit import Cluster, make_service, running, within

ROLES = RolesConfig(interval_s=0.05, cooldown_s=0.1)
WISH = FlipProposal(
    "p1",
    Role.DECODE,
    "decode is [short]",
    inputs={"queue": 3.0, "batch": 0.125},
    predicted_before=0.5,
    predicted_after=0.75,
)


@pytest_asyncio.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    """Two prefill and one decode instance; the planner wants ``p1`` for decode."""
    planner = ScriptedPlanner(lambda view, now: WISH)
    planner.says = RoleAdvice({Role.PREFILL: 1, Role.DECODE: 2}, 5)
    config = ControllerConfig(dead_after_s=60.0, roles=ROLES)
    async with running(make_service(tmp_path, config, planner=planner)) as made:
        for name, role in (("p0", "prefill"), ("p1", "prefill"), ("d0", "decode")):
            await made.join(name, role)
        yield made


async def baton(cluster: Cluster, *args: str, status: int = 0) -> str:
    """Standard output, or standard error where a failure is expected."""
    line = ["roles", *args, "--controller", cluster.service.address]
    result = await asyncio.to_thread(CliRunner().invoke, app, line)
    assert result.exit_code == status, result.output
    return result.stderr if status else result.stdout


async def asked(cluster: Cluster, *args: str) -> Any:
    return json.loads(await baton(cluster, *args, "--json"))


async def test_before_anything_happened(cluster: Cluster) -> None:
    assert "no role was switched" in await baton(cluster, "log")
    shown = await baton(cluster)
    assert "mode auto" in shown
    assert "the planner has no opinion" in shown
    assert "no request with targets ended lately" in shown
    for name in ("p0", "p1", "d0"):
        assert name in shown


async def test_pin_pause_log_unpin_resume(cluster: Cluster) -> None:
    assert await baton(cluster, "pin", "p1") == "p1: pinned to prefill\n"
    assert "until baton roles resume" in await baton(cluster, "pause")
    status = await asked(cluster)
    assert (status["mode"], status["paused"], "paused_for_s" in status) == ("auto", True, False)
    pinned = {item["instance_id"]: item["pinned"] for item in status["instances"]}
    assert pinned == {"p0": False, "p1": True, "d0": False}
    assert "for 100 s" in await baton(cluster, "pause", "--for", "100")
    assert 0 < (await asked(cluster))["paused_for_s"] <= 100
    assert "paused for" in await baton(cluster)

    await cluster.place("r")
    assert "may switch it; now prefill" in await baton(cluster, "unpin", "p1")
    assert await baton(cluster, "resume") == "the planner may switch roles\n"
    watch = await cluster.watch()
    await cluster.until(
        watch,
        lambda view: (
            {i.record.instance_id: i.record.role for i in view.instances}["p1"] == "decode"
        ),
    )
    for index in range(4):
        outcome = controller_pb2.Outcome(request_id=f"x{index}", outcome="stop", met=index > 0)
        batch = controller_pb2.OutcomeBatch(gateway_id="g", outcomes=[outcome])
        await within(cluster.control.ReportOutcomes(batch))
    flip = (await asked(cluster, "log"))["log"][-1]
    assert (flip["instance_id"], flip["from_role"], flip["to_role"]) == ("p1", "prefill", "decode")
    assert (flip["who"], flip["state"], flip["inputs"]) == ("planner", "done", dict(WISH.inputs))
    assert flip["seconds"] >= 0
    text = await baton(cluster, "log", "--limit", "1")
    assert "p1: prefill -> decode  done in" in text
    for words in ("decode is [short]", "batch 0.125, queue 3", "expected: 50.0% -> 75.0%"):
        assert words in text
    assert "attainment: none ended -> " in text
    assert "would like 1 prefill, 2 decode; 5 instances" in await baton(cluster)


async def test_refusals_are_one_sentence(cluster: Cluster) -> None:
    unknown = await baton(cluster, "pin", "p9", status=1)
    assert unknown == "baton: no instance is called 'p9'; there are: d0, p0, p1\n"
    wrong = await baton(cluster, "pause", "--for", "-1", status=1)
    assert "duration_s must be positive" in wrong


@pytest.mark.parametrize("option", [("--json",), ("--cluster", "x")])
def test_options_in_front_of_a_command_are_not_lost(option: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, ["roles", *option, "log"])
    assert result.exit_code == 2
    assert "options go behind" in result.stderr
