"""Asking a cluster for tokens, and where their prefixes came from."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Sequence

from baton.client.admin import AdminClient
from baton.core.errors import BatonError
from protos.baton.v1 import cluster_pb2
from tests.cluster import oracle
from tests.cluster.harness import Cluster, body, complete, http_client, wait_until

Tiers = dict[str, int]
"""Prompt tokens by the tier that they came from."""


Check = Callable[[Sequence[int], Sequence[int]], list[str]]
"""(prompt, tokens): fails for wrong ones, returns the ties."""


def ask(
    cluster: Cluster,
    prompts: Sequence[Sequence[int]],
    *,
    num_tokens: int = 8,
    salt: str = "",
    check: Check = oracle.check_greedy,
) -> list[Tiers]:
    """Each prompt in turn, tokens checked; its tiers, as explained."""
    more = {"cache_salt": salt} if salt else {}

    async def run() -> list[Tiers]:
        found = []
        async with http_client(cluster) as client:
            for prompt in prompts:
                reply = await complete(client, body(prompt, max_tokens=num_tokens, **more))
                assert reply.error is None, reply.error
                assert check(prompt, reply.token_ids) == []
                found.append(await asyncio.to_thread(tiers_of, cluster, reply.request_id))
        return found

    return asyncio.run(run())


def tiers_of(cluster: Cluster, request_id: str) -> Tiers:
    """As ``baton explain`` has it, once the outcome is reported."""
    with AdminClient(cluster.controller) as admin:

        def ended() -> bool:
            try:
                return admin.explain(request_id).outcome != "open"
            except BatonError:
                return False

        wait_until(ended, timeout_s=10.0, what=f"the outcome of {request_id}")
        reply = admin.explain(request_id)
        assert sum(reply.cached_by_tier.values()) == reply.cached_tokens
        return dict(reply.cached_by_tier)


def pools(cluster: Cluster, host: str | None = None) -> list[cluster_pb2.MemberStatus]:
    """The pool nodes, of all machines or of one."""
    with AdminClient(cluster.controller) as admin:
        found = [member for member in admin.status().members if member.kind == "pool"]
    return [m for m in found if host in (None, m.address.rpartition(":")[0])]


def pool_numbers(cluster: Cluster, host: str | None = None) -> dict[str, float]:
    """Of the only pool node, or of that of one machine."""
    (member,) = pools(cluster, host)
    return _numbers_of(cluster, member)


def _numbers_of(cluster: Cluster, member: cluster_pb2.MemberStatus) -> dict[str, float]:
    with AdminClient(cluster.controller) as admin:
        return dict(admin.pool_status(member.address).numbers)


def settle(cluster: Cluster) -> None:
    """Wait until nothing is written back any more, on any machine."""
    last: list[float] = []

    def still() -> bool:
        numbers = [_numbers_of(cluster, member) for member in pools(cluster)]
        names = ("baton_pool_host_published", "baton_pool_demoted")
        last.append(sum(each[name] for each in numbers for name in names))
        quiet = len(last) >= 3 and len(set(last[-3:])) == 1
        return quiet and not any(each["baton_pool_host_tickets"] for each in numbers)

    wait_until(still, timeout_s=20.0, what="the end of write-backs")


def kill_instance(cluster: Cluster, instance_id: str) -> None:
    """``kill -9``, then wait for its next life."""
    (old,) = [i for i in cluster.live_instances() if i.instance_id == instance_id]
    os.kill(old.pid, signal.SIGKILL)

    def back() -> bool:
        return any(
            item.instance_id == instance_id
            and item.incarnation > old.incarnation
            and item.state == "ready"
            for item in cluster.live_instances()
        )

    wait_until(back, timeout_s=60.0, what=f"the next life of {instance_id}")


def kill_pool_node(cluster: Cluster, host: str | None = None) -> None:
    """``kill -9`` the pool node (of one machine), then wait until another serves."""

    def pids() -> set[int]:
        return {member.pid for member in pools(cluster, host)}

    (old,) = pids()
    os.kill(old, signal.SIGKILL)
    wait_until(lambda: bool(pids() - {old}), timeout_s=60.0, what="another pool node")
    wait_until(lambda: len(pids()) == 1, timeout_s=60.0, what="the end of the old one's session")
