"""Switching every instance's role back and forth while streams run."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from baton.client.admin import AdminClient
from baton.core.cluster import Role
from tests.cluster.harness import Cluster
from tests.cluster.load import Load, streaming_load

OTHER = {"prefill": "decode", "decode": "prefill", "mixed": "prefill"}


async def flip_under_load(
    cluster: Cluster,
    prompts: Sequence[Sequence[int]],
    *,
    num_tokens: int,
    rounds: int,
    concurrency: int,
) -> tuple[Load, int]:
    """``rounds`` times there and back for each instance; returns the load and the switches made."""
    flips = 0
    with AdminClient(cluster.controller) as admin:
        homes = {item.instance_id: item.role for item in admin.status().instances}
        async with streaming_load(
            cluster, prompts, num_tokens=num_tokens, concurrency=concurrency
        ) as load:
            for _ in range(rounds):
                for instance_id, home in homes.items():
                    for role in (OTHER[home], home):
                        await asyncio.to_thread(
                            admin.set_role, instance_id, Role(role), force=False
                        )
                        flips += 1
                        # Let requests be placed and handed over under the new roles.
                        finished = len(load.replies)
                        await _more_replies(load, finished + 2)
        roles = {item.instance_id: item.role for item in admin.status().instances}
    assert roles == homes
    return load, flips


async def _more_replies(load: Load, count: int) -> None:
    async with asyncio.timeout(60.0):
        while len(load.replies) < count:
            await asyncio.sleep(0.02)
