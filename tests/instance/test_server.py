"""A whole instance process, but for the process: it starts, serves, stops, and fails cleanly."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from baton.core.cluster import Role, Target
from baton.core.config import EngineConfig, HandoffConfig
from baton.core.errors import ConfigError, Unavailable
from baton.core.request import Part
from baton.instance.server import InstanceServer
from baton.instance.spec import InstanceSpec
from kvpool.arena import cluster_files, remove_cluster_files
from kvpool.pool_node import PoolNode
from tests.controller.service_kit import Cluster, make_service, running
from tests.instance.instance_kit import Client, Node, request

MODEL = Path(__file__).resolve().parents[2] / "deploy" / "demo-model"
WAIT_S = 30.0


@dataclasses.dataclass
class House:
    """What an instance needs around it."""

    cluster: Cluster
    pool: PoolNode
    name: str

    def spec(self, instance_id: str = "i", **changes: object) -> InstanceSpec:
        spec = InstanceSpec(
            instance_id=instance_id,
            role=Role.MIXED,
            model=str(MODEL),
            model_name="demo",
            cluster=self.name,
            node_id="n",
            host="127.0.0.1",
            controller_address=self.cluster.service.address,
            pool_address=self.pool.address,
            engine=EngineConfig(num_blocks=32, max_num_seqs=4, max_num_batched_tokens=64),
            handoff=HandoffConfig(),
        )
        return dataclasses.replace(spec, **changes)  # type: ignore[arg-type]

    def arenas(self) -> list[Path]:
        return cluster_files(self.name, "/dev/shm")


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    name = f"test-{uuid.uuid4().hex[:8]}"
    pool = PoolNode(name)
    await pool.start()
    async with running(make_service(tmp_path)) as cluster:
        yield House(cluster, pool, name)
    await pool.stop()
    assert remove_cluster_files(name) == [], "an arena stayed behind"


def threads() -> list[str]:
    ours = ("runner", "pull-", "kv-tcp")
    return [t.name for t in threading.enumerate() if t.name.startswith(ours)]


@contextlib.asynccontextmanager
async def serving(server: InstanceServer) -> AsyncIterator[InstanceServer]:
    await asyncio.wait_for(server.start(), WAIT_S)
    try:
        yield server
    finally:
        await asyncio.wait_for(server.stop(), WAIT_S)


async def failing_start(house: House, spec: InstanceSpec) -> BaseException:
    """Start fails, and nothing of it is left."""
    before = asyncio.all_tasks()
    with pytest.raises(Exception) as caught:
        await asyncio.wait_for(InstanceServer(spec).start(), WAIT_S)
    assert house.arenas() == []
    assert threads() == []
    left = {task for task in asyncio.all_tasks() - before if not task.done()}
    assert not [task for task in left if task.get_name() in ("engine loop", "controller session")]
    return caught.value


async def test_it_serves_and_leaves_nothing(house: House) -> None:
    async with serving(InstanceServer(house.spec())) as server:
        await house.cluster.state("i", "ready")
        assert len(house.arenas()) == 1
        [record] = house.cluster.service.shell.core.state.instances.values()
        client = Client()
        node = Node("i", incarnation=record.info.incarnation)  # only its address is used
        node.target = Target("i", record.info.incarnation, record.info.address)
        await client.connect(node)
        one = request(prompt_ids=(5, 6, 7), sampling={"temperature": 0.0, "max_tokens": 5})
        assert not (await client.submit(one, Part.WHOLE, node)).HasField("error")
        await client.ended("r")
        assert len(client.tokens("r")) == 5
        async with httpx.AsyncClient() as http:
            text = (await http.get(f"http://{record.info.metrics_address}/metrics")).text
        assert 'baton_submissions_total{outcome="finished"} 1.0' in text
        assert "baton_kv_leases 0.0" in text
        assert (
            float(text.split("\nbaton_incarnation ")[1].split()[0]) == server.instance.incarnation
        )
        await client.close()
    assert house.arenas() == []
    assert threads() == []


async def test_no_controller(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("baton.instance.server._REGISTER_TIMEOUT_S", 0.5)
    spec = house.spec(controller_address="127.0.0.1:9")
    error = await failing_start(house, spec)
    assert isinstance(error, TimeoutError)
    assert "127.0.0.1:9" in str(error)


async def test_no_pool_node(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may come back: nothing for an operator to change, and worth another start."""
    monkeypatch.setattr("baton.instance.pool_client._ALLOCATE_TIMEOUT_S", 0.3)
    error = await failing_start(house, house.spec(pool_address="127.0.0.1:9"))
    assert isinstance(error, Unavailable)


async def test_a_pool_node_that_has_moved_is_found(house: House) -> None:
    """A restarted pool node may have another port; the controller knows it by its machine."""
    pool = PoolNode(
        house.name,
        controller_address=house.cluster.service.address,
        member_id="pool-m",
        node_id="machine",
    )
    await pool.start()
    try:
        async with asyncio.timeout(WAIT_S):
            while not house.cluster.service.shell.core.state.members:
                await asyncio.sleep(0.01)
        spec = house.spec(pool_address="127.0.0.1:9", node_id="machine")
        async with serving(InstanceServer(spec)):
            await house.cluster.state("i", "ready")
            assert len(house.arenas()) == 1
    finally:
        await pool.stop()


async def test_a_host_that_is_not_here(house: House) -> None:
    """The arena is there by then, and the weights are loaded."""
    error = await failing_start(house, house.spec(host="203.0.113.1"))
    assert isinstance(error, ConfigError), repr(error)


async def test_a_cache_that_does_not_fit(house: House) -> None:
    engine = EngineConfig(num_blocks=2**30, max_num_seqs=4, max_num_batched_tokens=64)
    error = await failing_start(house, house.spec(engine=engine))
    assert isinstance(error, ConfigError)
    assert error.param == "engine.num_blocks"


async def test_the_cache_gets_what_memory_is_left(house: House) -> None:
    """Engine, arena and what the controller is told have the number that was measured."""
    engine = EngineConfig(
        num_blocks=None, memory_limit_gib=1.5, max_num_seqs=4, max_num_batched_tokens=64
    )
    async with serving(InstanceServer(house.spec(engine=engine))) as server:
        await house.cluster.state("i", "ready")
        num_blocks = server.spec.num_blocks
        [record] = house.cluster.service.shell.core.state.instances.values()
        assert record.info.num_blocks == num_blocks > 1000
        assert server.parts.instance.load().num_free_blocks == num_blocks
        [arena] = house.arenas()
        assert arena.stat().st_size > num_blocks * 32768
        client = Client()
        node = Node("i", incarnation=record.info.incarnation)  # only its address is used
        node.target = Target("i", record.info.incarnation, record.info.address)
        await client.connect(node)
        one = request(prompt_ids=(5, 6, 7), sampling={"temperature": 0.0, "max_tokens": 5})
        assert not (await client.submit(one, Part.WHOLE, node)).HasField("error")
        await client.ended("r")
        assert len(client.tokens("r")) == 5
        await client.close()
    assert house.arenas() == []


async def test_a_limit_that_nothing_fits_into(house: House) -> None:
    engine = EngineConfig(
        num_blocks=None, memory_limit_gib=0.1, max_num_seqs=4, max_num_batched_tokens=64
    )
    error = await failing_start(house, house.spec(engine=engine))
    assert isinstance(error, ConfigError)
    assert error.param == "engine.memory_limit_gib"
    assert "limit 102.4 MiB" in error.message


async def test_blocks_beyond_the_limit(house: House) -> None:
    engine = EngineConfig(
        num_blocks=2**15, memory_limit_gib=1.0, max_num_seqs=4, max_num_batched_tokens=64
    )
    error = await failing_start(house, house.spec(engine=engine))
    assert isinstance(error, ConfigError)
    assert error.param == "engine.num_blocks"
    assert "32768 KV blocks" in error.message


async def test_a_start_that_is_cancelled(house: House) -> None:
    start = asyncio.create_task(
        InstanceServer(house.spec(controller_address="127.0.0.1:9")).start()
    )
    async with asyncio.timeout(WAIT_S):
        while not any(task.get_name() == "controller session" for task in asyncio.all_tasks()):
            await asyncio.sleep(0.01)
    assert len(house.arenas()) == 1
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(start, WAIT_S)
    assert house.arenas() == []
    assert threads() == []


async def test_a_second_life_fences_the_first(house: House) -> None:
    async with serving(InstanceServer(house.spec())) as first:
        failed = asyncio.ensure_future(first.wait_failed())
        async with serving(InstanceServer(house.spec())) as second:
            error = await asyncio.wait_for(failed, WAIT_S)
            assert "fenced" in str(error)
            assert second.instance.incarnation > first.instance.incarnation


async def test_a_broken_engine_loop_is_a_failure_of_the_instance(house: House) -> None:
    async with serving(InstanceServer(house.spec(pool_address=None))) as server:

        def broken(now: float) -> None:
            raise ZeroDivisionError

        server.parts.loop._engine.schedule = broken  # type: ignore[method-assign]
        server.parts.loop.wake()
        error = await asyncio.wait_for(server.wait_failed(), WAIT_S)
        assert isinstance(error, ZeroDivisionError)
    assert threads() == []
