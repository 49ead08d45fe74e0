"""A Redis that is away, freezes, comes back empty, or is none; and writing behind its back."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Iterator
from pathlib import Path

import pytest

from baton.core.errors import Unavailable
from controller import store_redis
from controller.store import MetadataStore
from controller.store_memory import MemoryStore
from controller.store_redis import RedisStore
from controller.store_writer import StoreWriter
from tests.redis_kit import Redis, redis_server

SHORT_S = 0.2


@pytest.fixture
def own_redis() -> Iterator[Redis]:
    """For one test, which may do to it what it likes."""
    with redis_server() as server:
        yield server


@pytest.fixture
def short_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls give up sooner."""
    monkeypatch.setattr(store_redis, "_TIMEOUT_S", SHORT_S)


def all_calls(store: MetadataStore) -> list[Awaitable[object]]:
    return [
        store.put("k", "2"),
        store.put("k", "2", ttl_s=60.0),
        store.get("k"),
        store.delete("other"),
        store.scan(""),
        store.next_epoch(1),
        store.keep_epoch(3),
        store.announce("h:2"),
        store.find_address(),
        store.watch(lambda: None),
    ]


async def check_unavailable(store: MetadataStore) -> None:
    """Every method says so, within its own time limit."""
    async with asyncio.timeout(10.0):
        found = await asyncio.gather(*all_calls(store), return_exceptions=True)
    assert [type(each) for each in found] == [Unavailable] * len(found)
    for error in found:
        assert isinstance(error, Unavailable)
        assert "127.0.0.1" in error.message, "it names the server"


@pytest.mark.usefixtures("short_limits")
@pytest.mark.parametrize("how", ["killed", "frozen"])
async def test_every_method_fails_in_time_and_works_again(own_redis: Redis, how: str) -> None:
    store = RedisStore(own_redis.url, "c")
    await store.put("k", "1")
    if how == "killed":
        own_redis.kill()
    else:
        own_redis.freeze()
    await check_unavailable(store)
    await check_unavailable(RedisStore(own_redis.url, "c"))
    if how == "killed":
        own_redis.start()
    else:
        own_redis.thaw()
    await store.put("k", "3")
    assert await store.get("k") == "3"
    first = await store.next_epoch(1)
    assert await store.next_epoch(1) == first + 1
    await store.announce("h:3")
    assert await store.find_address() == "h:3"
    await store.close()


@pytest.mark.usefixtures("short_limits")
async def test_closing_does_not_wait_for_a_frozen_server(own_redis: Redis) -> None:
    store = RedisStore(own_redis.url, "c")
    await store.announce("h:1")
    own_redis.freeze()
    async with asyncio.timeout(10.0):
        await store.close()


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"-ERR no\r\n" * 9])
async def test_something_else_on_that_port(said: bytes) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(said)
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        store = RedisStore(f"redis://127.0.0.1:{port}/0", "c")
        await check_unavailable(store)
        await store.close()


async def test_epochs_of_several_controllers(own_redis: Redis) -> None:
    stores = [RedisStore(own_redis.url, "c") for _ in range(4)]
    calls = (store.next_epoch(1) for store in stores for _ in range(25))
    assert sorted(await asyncio.gather(*calls)) == list(range(1, 101))
    for store in stores:
        await store.close()


async def test_watching_ends_when_the_server_goes(own_redis: Redis) -> None:
    store = RedisStore(own_redis.url, "c")
    for _ in range(2):
        connected = asyncio.Event()
        watching = asyncio.ensure_future(store.watch(connected.set))
        await asyncio.wait_for(connected.wait(), 10.0)
        own_redis.kill()
        await asyncio.wait_for(watching, 10.0)
        own_redis.start()
    await store.close()


# Writing behind


@contextlib.asynccontextmanager
async def writing(store: MetadataStore, values: dict[str, str]) -> AsyncIterator[StoreWriter]:
    writer = StoreWriter(store, address="h:1", epoch=5, values=values)
    writer.start()
    try:
        yield writer
    finally:
        await writer.stop(2.0)
        await store.close()


async def eventually(store: MetadataStore, expected: dict[str, str]) -> None:
    found: dict[str, str] = {}
    for _ in range(400):
        await asyncio.sleep(0.02)
        with contextlib.suppress(Unavailable):
            found = await store.scan("")
            if isinstance(store, RedisStore):
                # These two are values there.
                epoch, address = found.pop("epoch", None), found.pop("controller", None)
                if epoch is None or address != "h:1":
                    continue
            if found == expected:
                return
    raise AssertionError(f"{found} instead of {expected}")


@pytest.mark.parametrize("kind", ["memory", "redis"])
async def test_writer_writes(kind: str, own_redis: Redis, tmp_path: Path) -> None:
    store: MetadataStore = MemoryStore("c", directory=tmp_path / "run")
    if kind == "redis":
        store = RedisStore(own_redis.url, "c")
    async with writing(store, {}) as writer:
        writer.put("a", "1")
        writer.put("b", "1")
        writer.put("a", "2")
        writer.delete("b")
        writer.raise_epoch(9)
        await eventually(store, {"a": "2"})


async def test_redis_may_go_away_and_come_back_empty(own_redis: Redis) -> None:
    store, reader = RedisStore(own_redis.url, "away"), RedisStore(own_redis.url, "away")
    await store.next_epoch(5)
    await store.announce("h:1")
    await store.put("role/a", "prefill")
    await store.put("role/c", "mixed")
    async with writing(store, {"role/a": "prefill", "role/c": "mixed"}) as writer:
        own_redis.kill()
        writer.put("role/b", "decode")
        writer.delete("role/c")
        with pytest.raises(Unavailable):
            await store.get("role/a")
        await asyncio.sleep(0.3)
        own_redis.start()
        expected = {"role/a": "prefill", "role/b": "decode"}
        await eventually(reader, expected)
        assert await reader.next_epoch(1) > 5
        assert await reader.find_address() == "h:1"
        # And again with nothing to write: the lost connection tells.
        await asyncio.sleep(0.2)
        own_redis.kill()
        own_redis.start()
        await eventually(reader, expected)
    await reader.close()


@pytest.mark.usefixtures("short_limits")
async def test_the_last_write_counts_after_a_freeze(own_redis: Redis) -> None:
    store, reader = RedisStore(own_redis.url, "c"), RedisStore(own_redis.url, "c")
    async with writing(store, {"gone": "1"}) as writer:
        await eventually(reader, {"gone": "1"})
        own_redis.freeze()
        # Each write is sent, given up, and read by the server when it goes on.
        for number in range(6):
            writer.put("a", str(number))
            writer.delete("gone")
            await asyncio.sleep(2.5 * SHORT_S)
        own_redis.thaw()
        await eventually(reader, {"a": "5"})
        # What was sent before it has been read by now.
        await asyncio.sleep(0.3)
        await eventually(reader, {"a": "5"})
    await reader.close()


async def test_a_writer_stops_in_time_while_the_server_is_frozen(own_redis: Redis) -> None:
    store = RedisStore(own_redis.url, "c")
    writer = StoreWriter(store, address="h:1", epoch=1, values={})
    writer.start()
    own_redis.freeze()
    writer.put("a", "1")
    async with asyncio.timeout(5.0):
        await writer.stop(SHORT_S)
    own_redis.kill()
    await store.close()
