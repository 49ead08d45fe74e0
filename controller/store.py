"""Where the controller keeps what must outlive it: one interface, one conformance suite.

Keys in use: ``role/<instance>``, ``drain/<instance>``, ``pause/roles``; the epoch and the
controller's address have methods of their own.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Protocol

from baton.core.errors import ConfigError


class MetadataStore(Protocol):
    """Small values by key, one namespace per cluster.

    Every method is bounded in time and raises :class:`Unavailable` when the store does not
    answer; it may be called again then. Not safe to share between event loops.
    """

    async def put(self, key: str, value: str, ttl_s: float | None = None) -> None:
        """Set a value; with ``ttl_s`` it is gone after so many seconds."""

    async def get(self, key: str) -> str | None:
        """The value, or ``None``."""

    async def delete(self, key: str) -> None:
        """Forget a key; fine if there is none."""

    async def scan(self, prefix: str) -> dict[str, str]:
        """All keys that begin with ``prefix``, and their values."""

    async def next_epoch(self, at_least: int) -> int:
        """Raise the epoch by one, and to ``at_least`` if that is more; the new one. Atomic."""

    async def keep_epoch(self, epoch: int) -> None:
        """Raise the stored epoch to at least ``epoch``; fine if it is there already. Atomic."""

    async def announce(self, address: str) -> None:
        """Publish where the controller is. ConfigError if a live one of this machine is there."""

    async def find_address(self) -> str | None:
        """What was announced, if that controller may still be there."""

    async def watch(self, connected: Callable[[], None]) -> None:
        """Call ``connected`` once the store's server is there, return once it went away.

        From before ``connected`` on nothing is forgotten unnoticed. The one method without a time
        limit; it costs nothing while it waits. A store in memory never calls and never returns.
        """

    async def close(self) -> None:
        """Withdraw the address if this object announced it, and release everything."""


def check_cluster_name(cluster: str) -> str:
    """Cluster names are parts of keys and of file names. Raises ConfigError."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", cluster):
        raise ConfigError(
            "cluster must be 1 to 63 letters, digits, '.', '_' or '-', beginning with a letter or "
            f"digit, got {cluster!r}",
            param="cluster",
        )
    return cluster
