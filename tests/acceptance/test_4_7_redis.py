"""Issue 4, line 7: the metadata store is away for 10 s, in two ways, and costs no request."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Callable

import pytest

from baton.cli.ports import answers
from baton.client.admin import AdminClient
from baton.core.cluster import Role
from baton.core.errors import BatonError, Unavailable
from controller.store_redis import RedisStore
from protos.baton.v1 import cluster_pb2
from tests.cluster import oracle
from tests.cluster.harness import (
    Cluster,
    assert_nothing_held,
    body,
    complete_all,
    serving,
    wait_until,
)
from tests.cluster.load import Load, streaming_load
from tests.cluster.machines import two_machines
from tests.redis_kit import Redis, redis_server

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(900)]

AWAY_S = 10.0
NUM_TOKENS = 64
CONCURRENCY = 16


def go_away(redis: Redis, how: str) -> None:
    """Frozen, connections stay and nobody answers; killed, all that was stored is lost."""
    if how == "frozen":
        redis.freeze()
    else:
        redis.kill()


def come_back(redis: Redis, how: str) -> None:
    if how == "frozen":
        redis.thaw()
    else:
        redis.start()


def status_of(cluster: Cluster) -> cluster_pb2.ClusterStatus | None:
    """``None`` while there is no controller."""
    try:
        with AdminClient(cluster.controller, timeout_s=2.0) as admin:
            return admin.status()
    except BatonError:
        return None


def roles(status: cluster_pb2.ClusterStatus) -> dict[str, tuple[str, str, int]]:
    """Role, state and life by instance; without the dead."""
    living = [item for item in status.instances if item.state != "dead"]
    return {item.instance_id: (item.role, item.state, item.incarnation) for item in living}


def kill_controller(cluster: Cluster) -> int:
    """``kill -9``; the epoch that it was in."""
    status = status_of(cluster)
    assert status is not None
    os.kill(status.controller_pid, signal.SIGKILL)
    return int(status.epoch)


def check_back(
    cluster: Cluster, before: dict[str, tuple[str, str, int]], *, above: int
) -> cluster_pb2.ClusterStatus:
    """A controller of a later epoch knows all instances as they were."""
    last: list[cluster_pb2.ClusterStatus | None] = []

    def back() -> bool:
        last.append(status_of(cluster))
        return last[-1] is not None and last[-1].epoch > above and roles(last[-1]) == before

    wait_until(back, timeout_s=60.0, what=f"the controller knows {before} again")
    assert last[-1] is not None
    return last[-1]


async def replies(load: Load, more: int) -> None:
    """So many requests end."""
    count = len(load.replies) + more
    async with asyncio.timeout(120.0):
        while len(load.replies) < count:
            await asyncio.sleep(0.02)


async def outage_under_load(
    cluster: Cluster, redis: Redis, prompts: list[list[int]], how: str
) -> tuple[Load, int]:
    """The load, and how many requests ended during the outage."""
    with AdminClient(cluster.controller) as admin:
        async with streaming_load(
            cluster, prompts, num_tokens=NUM_TOKENS, concurrency=CONCURRENCY
        ) as load:
            await replies(load, CONCURRENCY)
            go_away(redis, how)
            began, ended = asyncio.get_running_loop().time(), len(load.replies)
            # Operators are served as well: two switches of one role, a drain and its end.
            await asyncio.to_thread(admin.set_role, "prefill-1", Role.DECODE)
            await asyncio.to_thread(admin.drain, "decode-1", wait=False)
            await replies(load, 4)
            await asyncio.to_thread(admin.set_role, "prefill-1", Role.MIXED)
            await asyncio.to_thread(admin.drain, "decode-1", undo=True)
            await asyncio.to_thread(admin.drain, "decode-0", wait=False)
            await asyncio.sleep(max(0.0, began + AWAY_S - asyncio.get_running_loop().time()))
            ended = len(load.replies) - ended
            come_back(redis, how)
            await asyncio.to_thread(check_stored, cluster, redis)
            await replies(load, CONCURRENCY)
    return load, ended


def check_stored(cluster: Cluster, redis: Redis) -> None:
    """What was decided while the store was away, and nothing that was taken back."""
    expected = {"role/prefill-1": "mixed", "drain/decode-0": "1", "controller": cluster.controller}
    found: dict[str, str] = {}

    def stored() -> bool:
        nonlocal found
        found = redis.values(cluster.name)
        epoch = found.pop("epoch", None)
        return epoch is not None and found == expected

    try:
        wait_until(stored, timeout_s=15.0, what="the store was told")
    except AssertionError:
        raise AssertionError(f"{found} instead of {expected}") from None


@pytest.mark.parametrize("how", ["frozen", "killed"])
def test_ten_seconds_without_redis(how: str) -> None:
    prompts = oracle.prompts(32, longest=600)
    with (
        redis_server() as redis,
        serving("--prefill", "2", "--decode", "2", "--store", redis.url) as cluster,
    ):
        load, ended = asyncio.run(outage_under_load(cluster, redis, prompts, how))
        assert not load.failed, load.failed[0].error
        assert ended >= CONCURRENCY, "the cluster went on"
        check_restarts(cluster, redis, how)
        assert_nothing_held(cluster, within_s=10.0)
    ties = load.check_tokens(prompts, num_tokens=NUM_TOKENS)
    print(f"{how}: {len(load.replies)} requests, {ended} during the outage, ties {ties}")


def check_restarts(cluster: Cluster, redis: Redis, how: str) -> None:
    """A controller that dies after the outage, and one that dies during another one."""
    wait_until(
        lambda: {i.state for i in cluster.live_instances()} == {"ready", "drained"},
        timeout_s=30.0,
        what="decode-0 is empty",
    )
    status = status_of(cluster)
    assert status is not None
    known = roles(status)
    assert known["prefill-1"][:2] == ("mixed", "ready")
    assert known["decode-0"][:2] == ("decode", "drained")

    epoch = kill_controller(cluster)
    epoch = int(check_back(cluster, known, above=epoch).epoch)

    go_away(redis, how)
    assert kill_controller(cluster) == epoch
    # Those that start meanwhile find no store.
    time.sleep(AWAY_S)
    assert status_of(cluster) is None
    come_back(redis, how)
    # The store has forgotten the roles if it was killed. The instances have not.
    after = check_back(cluster, known, above=epoch)
    assert after.ready
    requests = [body(prompt, max_tokens=16) for prompt in oracle.prompts(4, longest=60)]
    for reply in asyncio.run(complete_all(cluster, requests, concurrency=4)):
        assert reply.error is None, reply.error


def test_a_store_whose_machine_is_gone() -> None:
    """It closes no connection. Who watches hears of it, or would trust in what is forgotten."""

    async def watch(url: str, unplug: Callable[[], int]) -> None:
        store, connected = RedisStore(url, "c"), asyncio.Event()
        watching = asyncio.ensure_future(store.watch(connected.set))
        await asyncio.wait_for(connected.wait(), 10.0)
        unplug()
        await asyncio.wait_for(watching, 60.0)
        with pytest.raises(Unavailable):
            await store.get("k")
        await store.close()

    with two_machines() as (machine, _):
        server = subprocess.Popen(
            machine.command(["redis-server", "--save", "", "--protected-mode", "no"]),
            stdout=subprocess.DEVNULL,
        )
        try:
            wait_until(
                lambda: answers(f"{machine.address}:6379"), timeout_s=10.0, what="redis-server"
            )
            cable = ["ip", "link", "set", machine.link]
            asyncio.run(
                watch(
                    f"redis://{machine.address}:6379/0",
                    lambda: subprocess.check_call([*cable, "down"]),
                )
            )
            # Connections that cannot end would keep the machine.
            subprocess.check_call([*cable, "up"])
        finally:
            server.kill()
            server.wait(10)
