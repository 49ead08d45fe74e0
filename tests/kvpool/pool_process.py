"""A pool node that can be killed: serves until its standard input ends.

``python -m tests.kvpool.pool_process DIRECTORY CLUSTER NODE [CONTROLLER]``: prints its address.
"""

from __future__ import annotations

import asyncio
import sys

from kvpool.pool_node import PoolNode
from tests.kvpool.tier_kit import spec


async def serve(directory: str, cluster: str, node_id: str, controller: str | None = None) -> None:
    node = PoolNode(cluster, directory, controller_address=controller, node_id=node_id, tier=spec())
    print(await node.start(), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await node.stop()


if __name__ == "__main__":
    asyncio.run(serve(*sys.argv[1:]))
