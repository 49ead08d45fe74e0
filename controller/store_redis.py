"""The store of many machines: a Redis server. Keys are ``baton:<cluster>:<key>``."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, cast

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from baton.core.errors import ConfigError, Stage, Unavailable
from controller.store import check_cluster_name

T = TypeVar("T")

_TIMEOUT_S = 2.0
_SCAN_COUNT = 500
_KEEPALIVE = {socket.TCP_KEEPIDLE: 5, socket.TCP_KEEPINTVL: 2, socket.TCP_KEEPCNT: 3}
"""Seconds without a word, seconds between probes, and how many of these may be lost."""

_NEXT_EPOCH = """
local epoch = math.max(tonumber(redis.call('GET', KEYS[1]) or '0') + 1, tonumber(ARGV[1]))
redis.call('SET', KEYS[1], string.format('%.0f', epoch))
return epoch
"""
_KEEP_EPOCH = """
local epoch = math.max(tonumber(redis.call('GET', KEYS[1]) or '0'), tonumber(ARGV[1]))
redis.call('SET', KEYS[1], string.format('%.0f', epoch))
return epoch
"""
_DELETE_IF_EQUAL = """
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0
"""


class RedisStore:
    """See :class:`controller.store.MetadataStore`. Connects when first used, and again after."""

    def __init__(self, url: str, cluster: str) -> None:
        self._prefix = f"baton:{check_cluster_name(cluster)}:"
        self._url = url
        self._announced: str | None = None
        # Retries are the caller's: it knows what may wait. A broken connection is made anew.
        try:
            client = redis.asyncio.Redis.from_url(
                url,
                decode_responses=True,
                socket_timeout=_TIMEOUT_S,
                socket_connect_timeout=_TIMEOUT_S,
                retry=Retry(NoBackoff(), 1),
            )
        except ValueError as error:
            raise ConfigError(f"store is not a usable Redis URL: {error}", param="store") from None
        self._client = client
        details = client.connection_pool.connection_kwargs
        self._where = f"{details.get('host', 'localhost')}:{details.get('port', 6379)}"

    async def put(self, key: str, value: str, ttl_s: float | None = None) -> None:
        """See :class:`MetadataStore`."""
        lifetime_ms = None if ttl_s is None else max(1, round(ttl_s * 1000))
        await self._ask(self._client.set(self._prefix + key, value, px=lifetime_ms))

    async def get(self, key: str) -> str | None:
        """See :class:`MetadataStore`."""
        return cast(str | None, await self._ask(self._client.get(self._prefix + key)))

    async def delete(self, key: str) -> None:
        """See :class:`MetadataStore`."""
        await self._ask(self._client.delete(self._prefix + key))

    async def scan(self, prefix: str) -> dict[str, str]:
        """See :class:`MetadataStore`."""
        pattern = _glob_escaped(self._prefix + prefix) + "*"
        names: set[str] = set()
        cursor = 0
        while True:
            reply = await self._ask(self._client.scan(cursor, match=pattern, count=_SCAN_COUNT))
            cursor, found = int(cast(Any, reply)[0]), cast(list[str], cast(Any, reply)[1])
            names.update(found)
            if not cursor:
                break
        ordered = sorted(names)
        values = cast(
            list[str | None], await self._ask(self._client.mget(ordered)) if ordered else []
        )
        pairs = zip(ordered, values, strict=True)
        return {name.removeprefix(self._prefix): v for name, v in pairs if v is not None}

    async def next_epoch(self, at_least: int) -> int:
        """See :class:`MetadataStore`."""
        key = self._prefix + "epoch"
        reply = await self._ask(cast(Any, self._client.eval(_NEXT_EPOCH, 1, key, str(at_least))))
        return int(cast(Any, reply))

    async def keep_epoch(self, epoch: int) -> None:
        """See :class:`MetadataStore`."""
        key = self._prefix + "epoch"
        await self._ask(cast(Any, self._client.eval(_KEEP_EPOCH, 1, key, str(epoch))))

    async def announce(self, address: str) -> None:
        """See :class:`MetadataStore`. The last one that announces itself is the controller."""
        await self.put("controller", address)
        self._announced = address

    async def find_address(self) -> str | None:
        """See :class:`MetadataStore`."""
        return await self.get("controller")

    async def watch(self, connected: Callable[[], None]) -> None:
        """See :class:`MetadataStore`. A subscription to nothing ends when the server goes away."""
        # A client of its own: reads without a time limit, and no silent reconnecting. A server
        # whose machine is gone closes nothing: only keepalive tells.
        client = redis.asyncio.Redis.from_url(
            self._url,
            socket_connect_timeout=_TIMEOUT_S,
            socket_keepalive=True,
            socket_keepalive_options=_KEEPALIVE,
            retry=Retry(NoBackoff(), 0),
        )
        pubsub = client.pubsub()
        try:
            subscribing = pubsub.subscribe(self._prefix + "nothing")
            await self._ask(asyncio.wait_for(subscribing, _TIMEOUT_S))
            connected()
            with contextlib.suppress(RedisError, OSError):
                # None, which a wait without an end cannot mean, stands for a connection that timed
                # out. Reading on would return at once, for ever.
                while await pubsub.get_message(timeout=None) is not None:
                    pass
        finally:
            with contextlib.suppress(RedisError, OSError):
                await pubsub.aclose()  # type: ignore[no-untyped-call]
                await client.aclose()

    async def close(self) -> None:
        """See :class:`MetadataStore`."""
        try:
            if self._announced is not None:
                key, address = self._prefix + "controller", self._announced
                self._announced = None
                # A server that is away keeps a stale address; the next controller replaces it.
                with contextlib.suppress(Unavailable):
                    await self._ask(cast(Any, self._client.eval(_DELETE_IF_EQUAL, 1, key, address)))
        finally:
            with contextlib.suppress(RedisError, OSError):
                await self._client.aclose()

    async def _ask(self, call: Awaitable[T]) -> T:
        try:
            return await call
        except (RedisError, OSError, TimeoutError) as error:
            raise Unavailable(
                f"the metadata store at {self._where} does not answer: {error}",
                stage=Stage.CONTROL,
                retry_after_s=1.0,
            ) from error


def _glob_escaped(text: str) -> str:
    return "".join(f"\\{c}" if c in "*?[]\\^-" else c for c in text)
