"""Starts instances as Ray actors, where the settings say."""

from __future__ import annotations

import dataclasses
from typing import Any

from baton.core.cluster import Role
from baton.core.config import ServeConfig
from baton.instance.actor import instance_actor_class
from baton.instance.spec import InstanceSpec


@dataclasses.dataclass(frozen=True, slots=True)
class NodeInfo:
    """A Ray node that can host instances."""

    node_id: str
    host: str
    """Address that others reach it at."""
    pool_address: str | None


def instance_names(config: ServeConfig) -> list[tuple[str, Role]]:
    """The instances a configuration asks for: (id, role), in order of start."""
    counts = ((Role.PREFILL, config.prefill), (Role.DECODE, config.decode))
    names = [(f"{role}-{i}", role) for role, count in counts for i in range(count)]
    return names + [(f"{Role.MIXED}-{i}", Role.MIXED) for i in range(config.mixed)]


def launch_instance(
    spec: InstanceSpec, *, resources: dict[str, float], ray_node_id: str | None
) -> Any:
    """Start one instance; returns its actor handle at once (``ready`` says when it serves)."""
    options: dict[str, Any] = {"name": f"baton-{spec.cluster}-{spec.instance_id}"}
    if resources:
        options["resources"] = resources
    if ray_node_id is not None:
        # Imported here: only a running Ray needs it.
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(ray_node_id, soft=False)
    return instance_actor_class().options(**options).remote(spec)
