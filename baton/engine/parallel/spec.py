"""What a rank must be told to live."""

from __future__ import annotations

import dataclasses

from baton.core.config import EngineConfig
from baton.engine.parallel.mesh import Axes


@dataclasses.dataclass(frozen=True, slots=True)
class ArenaPart:
    """Where the KV blocks of a rank's dp group lie in the instance's arena."""

    path: str
    token: str
    first_block: int
    """Of the arena; the group has ``EngineConfig.num_blocks`` from there."""


@dataclasses.dataclass(frozen=True, slots=True)
class RankSpec:
    """One rank of one instance. Plain values, so that it travels to another process."""

    instance_id: str
    rank: int
    axes: Axes
    model: str
    """Folder of the checkpoint."""
    engine: EngineConfig
    socket_path: str
    """Where the driver listens; on the same machine."""
    secret: bytes = dataclasses.field(repr=False)
    """Shown to the driver."""
    arena: ArenaPart | None = None
    """``None``: the rank allocates its own KV cache."""
    collective_timeout_s: float = 60.0
    """How long a rank waits for the others at one collective; how far they may be apart."""

    @property
    def name(self) -> str:
        """The rank, its places on the axes, and its instance."""
        return f"{self.axes.name(self.rank)} of {self.instance_id}"
