"""Ranks as Ray actors in one placement group, all on the machine of their driver.

Ray only starts and places them: plans go over the driver's socket. A rank is never restarted by
itself, because its instance is: that starts all of them anew.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import threading
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from baton.core.errors import ConfigError, RankLost
from baton.engine.parallel.launch import RankHandle
from baton.engine.parallel.spec import RankSpec

_PLACE_TIMEOUT_S = 30.0
_NODE_SHARE = 0.001
"""Of a node's own resource, which there is one of: names the node and leaves room for others."""


class RankActor:
    """Lives one rank's life in this process."""

    def __init__(self, spec: RankSpec) -> None:
        self._spec = spec

    def run(self) -> None:
        """Returns after an orderly end. The process ends with its driver, however that ends."""
        # Only here: the launcher's process names this class, and must not pay for torch.
        from baton.engine.parallel.rank import run_rank

        run_rank(self._spec)


class RayRank:
    """A rank as an actor. Made by ``RayRankLauncher``."""

    def __init__(self, actor: Any, life: Any) -> None:
        self._actor = actor
        self._ended: concurrent.futures.Future[str] = concurrent.futures.Future()
        # Not in Ray's own call back: who is told calls Ray again, which would wait for itself.
        threading.Thread(
            target=self._wait, args=(life.future(),), name="rank-life", daemon=True
        ).start()

    @property
    def ended(self) -> concurrent.futures.Future[str]:
        """See ``RankHandle``."""
        return self._ended

    def kill(self) -> None:
        """See ``RankHandle``."""
        # Ray may be shutting down, and takes its actors with it.
        with contextlib.suppress(Exception):
            ray.kill(self._actor, no_restart=True)

    def _wait(self, life: concurrent.futures.Future[None]) -> None:
        error = life.exception()
        text = "ended" if error is None else f"ended: {str(error).strip().splitlines()[0]}"
        self._ended.set_result(text)


class RayRankLauncher:
    """A ``RankLauncher`` of actors. Used in a process that is connected to Ray.

    Args:
        num_cpus: Ray CPUs that each rank takes; 0 takes none into account.
        num_gpus: Ray GPUs that each rank takes.
    """

    def __init__(self, *, num_cpus: float = 0.0, num_gpus: float = 0.0) -> None:
        self._options = {"num_cpus": num_cpus, "num_gpus": num_gpus}
        self._group: Any = None
        self._ranks: list[RayRank] = []
        self._closed = False

    def start(self, spec: RankSpec) -> RankHandle:
        """See ``RankLauncher``. Raises ConfigError where this node has no room for all ranks."""
        if self._closed:
            raise RankLost(f"{spec.name} is not started: its launcher is closed")
        if self._group is None:
            self._group = self._place(spec)
        actor = (
            ray.remote(max_restarts=0, max_task_retries=0)(RankActor)
            .options(
                **self._options,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    self._group, placement_group_bundle_index=spec.rank
                ),
            )
            .remote(spec)
        )
        rank = RayRank(actor, actor.run.remote())
        self._ranks.append(rank)
        return rank

    def close(self) -> None:
        """See ``RankLauncher``."""
        self._closed = True
        for rank in self._ranks:
            rank.kill()
        if self._group is not None:
            with contextlib.suppress(Exception):
                remove_placement_group(self._group)
            self._group = None

    def _place(self, spec: RankSpec) -> Any:
        """Room for all ranks on this node."""
        size = spec.axes.world_size
        bundle = {_own_node(): _NODE_SHARE}
        bundle |= {
            resource: amount
            for resource, amount in (
                ("CPU", self._options["num_cpus"]),
                ("GPU", self._options["num_gpus"]),
            )
            if amount
        }
        group = placement_group([bundle] * size, strategy="STRICT_PACK")
        if not group.wait(_PLACE_TIMEOUT_S):
            remove_placement_group(group)
            raise ConfigError(
                f"the node has no room for the {size} ranks of {spec.instance_id}, each with "
                f"{bundle}: give it more, or ask for less"
            )
        return group


def _own_node() -> str:
    """The resource that every node has one of, by its address."""
    own = ray.get_runtime_context().get_node_id()
    for node in ray.nodes():
        if node["NodeID"] == own:
            for name in node["Resources"]:
                if name.startswith("node:") and not name.startswith("node:__"):
                    return str(name)
    raise RankLost(f"Ray does not know the node {own} that its ranks are to be on")
