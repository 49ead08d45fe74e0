"""Switches of roles, one after the other and at random, while requests run."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Callable, Sequence

from baton.client.admin import AdminClient
from baton.core.cluster import Role
from tests.cluster import oracle
from tests.cluster.emulated_kit import Ask, describe_s, emulated_load
from tests.cluster.harness import Cluster
from tests.cluster.load import Load, streaming_load

MAX_LOGGED = 1000
"""As many as ``baton roles log`` remembers."""


@dataclasses.dataclass(slots=True)
class Storm:
    """What was switched."""

    num_flips: int
    num_replies: int
    """All with the right tokens."""
    names: set[str]
    """Instances that changed their roles."""
    kinds: set[tuple[str, str]]
    """(old role, new role)."""
    seconds: list[float]
    """From the preparation to the end of each switch, as the controller's log has it."""

    def describe(self) -> str:
        """For people."""
        return (
            f"{self.num_flips} flips under load, {self.num_replies} requests with every token "
            f"right; prepare to done: {describe_s(self.seconds)}"
        )


async def storm_on_emulated(
    cluster: Cluster, asks: Sequence[Ask], *, flips: int, concurrency: int, seed: int
) -> Storm:
    """Tokens are checked as they come; see :mod:`tests.cluster.emulated_kit`."""
    async with emulated_load(cluster, asks, concurrency=concurrency) as replies:
        storm = await _flip(cluster, flips, seed, lambda: len(replies))
    storm.num_replies = len(replies)
    return storm


async def storm_on_model(
    cluster: Cluster,
    prompts: Sequence[Sequence[int]],
    *,
    flips: int,
    num_tokens: int,
    concurrency: int,
    seed: int,
) -> tuple[Storm, Load]:
    """On the real engine; check the load's tokens afterwards."""
    async with streaming_load(
        cluster, prompts, num_tokens=num_tokens, concurrency=concurrency
    ) as load:
        storm = await _flip(cluster, flips, seed, lambda: len(load.replies))
    storm.num_replies = len(load.replies)
    return storm, load


async def _flip(cluster: Cluster, count: int, seed: int, num_replies: Callable[[], int]) -> Storm:
    draw = random.Random(seed)
    storm = Storm(0, 0, set(), set(), [])
    with AdminClient(cluster.controller) as admin:
        status = await asyncio.to_thread(admin.status)
        roles = {item.instance_id: Role(item.role) for item in status.instances}
        first_replies, last_number = num_replies(), 0
        while storm.num_flips < count:
            name, role = draw.choice(_possible(roles))
            # No force: the controller keeps both pools, too.
            await asyncio.to_thread(admin.set_role, name, role, force=False)
            storm.names.add(name)
            storm.kinds.add((roles[name], role))
            roles[name] = role
            storm.num_flips += 1
            # Often while requests of the switch before are still on their way, and without end
            # only as long as some come through.
            await asyncio.sleep(draw.choice((0.0, 0.02, 0.2)))
            await _until(lambda: num_replies() - first_replies >= storm.num_flips // 4)
            if storm.num_flips % (MAX_LOGGED // 2) == 0 or storm.num_flips == count:
                log = (await asyncio.to_thread(admin.roles)).log
                new = [flip for flip in log if flip.number > last_number]
                last_number = max(flip.number for flip in new)
                assert {flip.state for flip in new} == {"done"}
                storm.seconds += [flip.seconds for flip in new]
        status = await asyncio.to_thread(admin.status)
        assert {item.instance_id: Role(item.role) for item in status.instances} == roles
    return storm


def _possible(roles: dict[str, Role]) -> list[tuple[str, Role]]:
    """Switches after which both pools have somebody."""
    found = []
    for name, now in roles.items():
        others = [role for other, role in roles.items() if other != name]
        for role in Role:
            then = [*others, role]
            if role is not now and (
                any(r.takes_prefill for r in then) and any(r.takes_decode for r in then)
            ):
                found.append((name, role))
    return found


async def _until(done: Callable[[], bool]) -> None:
    async with asyncio.timeout(120.0):
        while not done():
            await asyncio.sleep(0.02)


def check_tokens(load: Load, prompts: Sequence[Sequence[int]], *, num_tokens: int) -> list[str]:
    """Nothing failed, and all is as the oracle says; the ties."""
    assert not load.failed, load.failed[0].error
    ties = load.check_tokens(prompts, num_tokens=num_tokens)
    assert len(ties) <= oracle.MAX_TIES
    return ties
