"""What a pool node is told to keep. Plain values, so that they travel to another node."""

from __future__ import annotations

import dataclasses

from baton.core.config import PoolConfig, TlsConfig
from baton.core.errors import ConfigError


@dataclasses.dataclass(frozen=True, slots=True)
class HostTierSpec:
    """Of the host tier and those below it."""

    layout: str
    """Canonical text of the blocks' layout."""
    slot_bytes: int
    """Of one block in that layout."""
    pool: PoolConfig
    tls: TlsConfig | None = None
    """For pulls by other machines."""

    @property
    def num_slots(self) -> int:
        """Blocks that the host tier holds. Raises ConfigError where not even one fits."""
        count = self.pool.host_bytes // self.slot_bytes
        if not count:
            raise ConfigError(
                f"pool.host_bytes is {self.pool.host_bytes}, but one block of this model has "
                f"{self.slot_bytes} bytes: make it larger, or 0 for no host tier",
                param="pool.host_bytes",
            )
        return count
