"""Opening a store by its URL, and finding a cluster's controller through it."""

from __future__ import annotations

from baton.core.errors import ConfigError, NotFound, Stage
from controller.store import MetadataStore
from controller.store_memory import MemoryStore
from controller.store_redis import RedisStore


def open_store(url: str, cluster: str) -> MetadataStore:
    """``memory`` or ``redis://host:port/db`` (``rediss://`` for TLS). ConfigError for others."""
    if url == "memory":
        return MemoryStore(cluster)
    if url.startswith(("redis://", "rediss://")):
        return RedisStore(url, cluster)
    raise ConfigError(f"store must be memory or redis://..., got {url!r}", param="store")


async def find_controller(store_url: str, cluster: str) -> str:
    """host:port of the cluster's controller.

    Raises NotFound if none is known, Unavailable if the store does not answer, ConfigError for a
    wrong URL or name. Bounded by the store's own time limits.
    """
    store = open_store(store_url, cluster)
    try:
        address = await store.find_address()
    finally:
        await store.close()
    if address is None:
        where = "on this machine" if store_url == "memory" else "in its metadata store"
        raise NotFound(
            f"no running cluster named {cluster!r} is known {where}", stage=Stage.CONTROL
        )
    return address
