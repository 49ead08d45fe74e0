"""An instance's session against the real controller."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from baton.core.cluster import InstanceInfo, InstanceLoad, Role
from baton.core.config import ControllerConfig
from baton.core.errors import Code
from baton.instance.roles import Duty, RoleSwitch
from baton.instance.session import ControllerSession
from controller.service import ControllerService
from protos.baton.v1 import cluster_pb2
from tests.controller.controller_helpers import make_info
from tests.controller.service_kit import Cluster, failing, make_service, running, within

CONFIG = ControllerConfig(heartbeat_s=0.2, dead_after_s=30.0, queue_timeout_s=0.5)
SLOW = dataclasses.replace(CONFIG, heartbeat_s=20.0)
"""Nothing in a test may wait for a beat that is only due by time."""


class Member:
    """An instance as its session sees it."""

    def __init__(self, address: str, name: str = "i", role: Role = Role.MIXED) -> None:
        self.name = name
        self.incarnation = 0
        self.role = RoleSwitch(role)
        self.num_open = 0
        self.registrations: list[int] = []
        self.fenced: list[str] = []
        self.num_loads = 0
        self.load_error: Exception | None = None
        self.on_load: Callable[[], object] | None = None
        self.session = ControllerSession(
            address,
            describe=self.describe,
            load=self.load,
            role=self.role,
            on_registered=self.on_registered,
            on_fenced=self.fenced.append,
        )
        self.task: asyncio.Task[None] | None = None

    def describe(self) -> InstanceInfo:
        return make_info(self.name, self.role.duty.role, incarnation=self.incarnation)

    def load(self) -> InstanceLoad:
        self.num_loads += 1
        hook, self.on_load = self.on_load, None
        if hook is not None:
            hook()
        if self.load_error is not None:
            raise self.load_error
        return InstanceLoad(num_running=self.num_open, num_free_blocks=100)

    async def beat(self) -> None:
        """Two changes: the second while the message that tells the first is being written."""
        before, written = self.num_loads, asyncio.Event()

        def news() -> None:
            self.session.heartbeat_now()
            written.set()

        self.on_load = lambda: asyncio.get_running_loop().call_soon(news)
        self.session.heartbeat_now()
        await within(written.wait())
        await until(lambda: self.num_loads >= before + 2)

    def on_registered(self, incarnation: int) -> None:
        self.registrations.append(incarnation)
        self.incarnation = incarnation

    async def __aenter__(self) -> Member:
        self.task = asyncio.create_task(self.session.run())
        await within(self.session.registered.wait())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self.task is not None
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError, RuntimeError):
            await within(self.task)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


async def set_role(cluster: Cluster, name: str, role: Role, force: bool = True) -> None:
    request = cluster_pb2.SetRoleRequest(instance_id=name, role=role, force=force)
    await within(cluster.operate.SetRole(request))


@contextlib.asynccontextmanager
async def controlled(
    path: Path, config: ControllerConfig = SLOW
) -> AsyncIterator[tuple[Cluster, ControllerService]]:
    service = make_service(path, config)
    async with running(service) as cluster:
        yield cluster, service


async def test_it_registers_and_becomes_ready(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (cluster, service), Member(service.address) as member:
        await cluster.state("i", "ready")
        assert member.registrations == [member.incarnation]
        assert member.incarnation
        assert not member.fenced


async def test_a_stored_role_wins_at_the_registration(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (cluster, service):
        async with Member(service.address, role=Role.PREFILL) as member:
            await cluster.state("i", "ready")
            await set_role(cluster, "i", Role.DECODE)
            assert member.role.duty.role is Role.DECODE
        async with Member(service.address, role=Role.PREFILL) as reborn:
            assert reborn.role.duty.role is Role.DECODE


async def test_role_switches_do_not_wait_for_a_beat(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (cluster, service), Member(service.address) as member:
        await cluster.state("i", "ready")
        for role in (Role.PREFILL, Role.DECODE, Role.DECODE, Role.MIXED):
            await set_role(cluster, "i", role)
            assert member.role.duty == Duty(role)
            assert member.role._prepared is None


async def test_a_refused_preparation_is_told_and_forgotten(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (cluster, service), Member(service.address) as member:
        await cluster.state("i", "ready")
        member.role.prepare(Role.PREFILL)  # as if another switch were half done
        request = cluster_pb2.SetRoleRequest(instance_id="i", role="decode", force=True)
        error = await failing(cluster.operate.SetRole(request))
        assert error.code is Code.REFUSED
        assert "a switch to prefill is under way" in error.message
        # The controller then told it to keep its role, which ends the preparation.
        await until(lambda: member.role._prepared is None)
        await set_role(cluster, "i", Role.DECODE)
        assert member.role.duty.role is Role.DECODE


async def test_becoming_empty_is_reported_at_once(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (cluster, service), Member(service.address) as member:
        await cluster.state("i", "ready")
        member.num_open = 1
        member.session.heartbeat_now()
        request = cluster_pb2.DrainRequest(instance_id="i", wait=True, timeout_s=30.0)
        drain = asyncio.ensure_future(cluster.operate.Drain(request))
        await until(lambda: member.role.duty.draining)
        await asyncio.sleep(0.1)
        assert not drain.done()
        member.num_open = 0
        member.session.heartbeat_now()
        assert (await within(drain)).drained


async def test_news_during_a_beat_are_not_lost(tmp_path: Path) -> None:
    """What changes after the snapshot, while the message is being written."""
    async with controlled(tmp_path) as (cluster, service), Member(service.address) as member:
        await cluster.state("i", "ready")
        for _ in range(20):
            await member.beat()


async def test_it_comes_back_to_a_restarted_controller_as_it_is(tmp_path: Path) -> None:
    service = make_service(tmp_path, CONFIG)
    await service.start()
    port = int(service.address.rpartition(":")[2])
    async with Member(service.address) as member:
        cluster = Cluster(service)
        await cluster.state("i", "ready")
        await set_role(cluster, "i", Role.PREFILL)
        await within(cluster.operate.Drain(cluster_pb2.DrainRequest(instance_id="i")))
        await until(lambda: member.role.duty.draining)
        first = member.incarnation
        await cluster.close()
        await service.stop()
        (tmp_path / "empty").mkdir()
        again = make_service(tmp_path / "empty", CONFIG, port=port)  # it remembers nothing
        async with running(again) as cluster:
            await until(lambda: len(member.registrations) == 2)
            assert member.registrations == [first, first]
            await cluster.state("i", "drained")
            assert member.role.duty == Duty(Role.PREFILL, draining=True)
            await within(
                cluster.operate.Drain(cluster_pb2.DrainRequest(instance_id="i", undo=True))
            )
            await until(lambda: not member.role.duty.draining)
            assert not member.fenced


async def test_a_session_that_the_controller_does_not_know_registers_again(tmp_path: Path) -> None:
    async with (
        controlled(tmp_path, CONFIG) as (cluster, service),
        Member(service.address) as member,
    ):
        await cluster.state("i", "ready")
        # As if a controller that had forgotten it answered: NOT_FOUND ends the stream.
        member.incarnation += 1000
        member.session.heartbeat_now()
        await until(lambda: len(member.registrations) >= 2)
        assert not member.fenced


async def test_a_superseded_life_is_fenced_and_its_session_ends(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (cluster, service), Member(service.address) as older:
        await cluster.state("i", "ready")
        async with Member(service.address) as newer:
            await until(lambda: bool(older.fenced))
            assert older.task is not None
            await within(older.task)
            assert newer.incarnation > older.incarnation
            assert not newer.fenced


async def test_a_life_that_is_over_may_not_register_again(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (cluster, service):
        async with Member(service.address) as member:
            await cluster.state("i", "ready")
            old = member.incarnation
        async with Member(service.address):
            late = Member(service.address)
            late.incarnation = old
            await within(late.session.run())
            assert late.fenced
            assert not late.registrations


async def test_a_snapshot_that_raises_ends_the_session_loudly(tmp_path: Path) -> None:
    async with controlled(tmp_path) as (cluster, service), Member(service.address) as member:
        await cluster.state("i", "ready")
        member.load_error = RuntimeError("a bug")
        member.session.heartbeat_now()
        assert member.task is not None
        with pytest.raises(RuntimeError, match="a bug"):
            await within(asyncio.shield(member.task))


async def test_nothing_stays_behind(tmp_path: Path) -> None:
    async with controlled(tmp_path, CONFIG) as (cluster, service):
        await cluster.status()
        before = len(asyncio.all_tasks())
        async with Member(service.address) as member:
            await cluster.state("i", "ready")
            for record in list(service.shell.core.state.instances.values()):
                assert record.session_id is not None
            member.incarnation += 1000
            member.session.heartbeat_now()
            await until(lambda: len(member.registrations) >= 2)
        await until(lambda: len(asyncio.all_tasks()) <= before)
