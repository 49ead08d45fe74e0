"""What a launcher must say to start an instance."""

from __future__ import annotations

import dataclasses

from baton.core.cluster import Role
from baton.core.config import EngineConfig, HandoffConfig, PoolConfig


@dataclasses.dataclass(frozen=True, slots=True)
class InstanceSpec:
    """One instance. Plain values, so that it travels to another node."""

    instance_id: str
    role: Role
    model: str
    """Folder of the checkpoint, on the instance's node."""
    model_name: str
    cluster: str
    node_id: str
    host: str
    """Address that the instance binds and others reach it at."""
    controller_address: str
    pool_address: str | None
    """The machine's pool node; ``None`` keeps the KV cache in private memory (then TCP only)."""
    engine: EngineConfig = dataclasses.field(default_factory=EngineConfig)
    handoff: HandoffConfig = dataclasses.field(default_factory=HandoffConfig)
    pool: PoolConfig = dataclasses.field(default_factory=PoolConfig)

    @property
    def num_blocks(self) -> int:
        """KV blocks of the instance: those of all its dp groups."""
        return self.engine.dp * self.engine.kv_blocks
