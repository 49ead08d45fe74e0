"""The pool node as a Ray actor: the constructor returns once it serves.

If the server breaks, the process ends, and Ray starts another that adopts the arenas.
"""

from __future__ import annotations

from typing import Any

import ray

from kvpool.pool_node import PoolNode
from kvpool.tier_spec import HostTierSpec
from protos.serving import HostedServer

_START_TIMEOUT_S = 30.0
_CALL_TIMEOUT_S = 5.0
_STOP_TIMEOUT_S = 10.0


class PoolNodeActor:
    """Runs one machine's :class:`PoolNode` in this process."""

    def __init__(
        self,
        cluster: str,
        directory: str,
        host: str,
        port: int,
        controller_address: str | None,
        tier: HostTierSpec | None = None,
    ) -> None:
        node_id = ray.get_runtime_context().get_node_id()
        self._server = HostedServer(
            "pool-node",
            lambda: PoolNode(
                cluster,
                directory,
                host,
                port,
                controller_address=controller_address,
                member_id=f"pool-{node_id[:12]}",
                node_id=node_id,
                tier=tier,
            ),
            start_timeout_s=_START_TIMEOUT_S,
        )

    def address(self) -> str:
        """Where gRPC is served. Raises ConfigError if it never will be."""

        async def ask(node: PoolNode) -> str:
            return node.address

        return self._server.call(ask, _CALL_TIMEOUT_S)

    def stop(self) -> None:
        """Stop serving and remove all arenas; the actor is of no use afterwards."""
        self._server.stop(_STOP_TIMEOUT_S)


def pool_actor_class() -> Any:
    """The actor class: holds no CPU, is restarted for as long as the cluster lives."""
    return ray.remote(max_restarts=-1, num_cpus=0)(PoolNodeActor)
