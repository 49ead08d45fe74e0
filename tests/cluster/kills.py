"""``kill -9`` of instances while streams run."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Sequence

from baton.client.admin import AdminClient
from tests.cluster.harness import Cluster
from tests.cluster.load import Load, streaming_load

MAX_SILENCE_S = 5.0
BACK_WITHIN_S = 90.0


async def kill_under_load(
    cluster: Cluster,
    prompts: Sequence[Sequence[int]],
    victims: Sequence[str],
    *,
    num_tokens: int,
    concurrency: int,
    pid_of: Callable[[str], int] | None = None,
) -> tuple[Load, dict[str, tuple[int, int]]]:
    """Kill each victim in turn; wait until it is back. Returns the load and old → new lives.

    ``pid_of``: what to kill of an instance; default: its own process.
    """
    lives = {}
    with AdminClient(cluster.controller) as admin:
        async with streaming_load(
            cluster, prompts, num_tokens=num_tokens, concurrency=concurrency
        ) as load:
            for victim in victims:
                await asyncio.sleep(0.5)
                before = _ready(admin, victim)
                assert before is not None
                pid = before[1] if pid_of is None else pid_of(victim)
                os.kill(pid, signal.SIGKILL)
                after = await _back(admin, victim, before[0])
                lives[victim] = (before[0], after)
    return load, lives


def _ready(admin: AdminClient, instance_id: str) -> tuple[int, int] | None:
    for item in admin.status().instances:
        if item.instance_id == instance_id and item.state == "ready":
            return item.incarnation, item.pid
    return None


async def _back(admin: AdminClient, instance_id: str, old: int) -> int:
    async with asyncio.timeout(BACK_WITHIN_S):
        while True:
            found = await asyncio.to_thread(_ready, admin, instance_id)
            if found is not None and found[0] != old:
                return found[0]
            await asyncio.sleep(0.1)
