"""One conformance suite for both stores, and what is special about each."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
import pytest

from baton.core.errors import ConfigError, NotFound, Unavailable
from controller import discovery, store_memory
from controller.store import MetadataStore
from controller.store_memory import MemoryStore
from controller.store_redis import RedisStore
from controller.store_writer import StoreWriter
from tests.controller.conftest import RedisServer

MakeStore = Callable[..., MetadataStore]


@pytest.fixture(params=["memory", "redis"])
async def make_store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[MakeStore]:
    made: list[MetadataStore] = []
    # A cluster of its own per test keeps the tests apart in the one server.
    prefix = f"t{abs(hash(request.node.name)) % 10**9}"

    def make(cluster: str = "c") -> MetadataStore:
        store: MetadataStore
        if request.param == "memory":
            store = MemoryStore(prefix + cluster, directory=tmp_path / "run")
        else:
            server: RedisServer = request.getfixturevalue("redis_server")
            store = RedisStore(server.url, prefix + cluster)
        made.append(store)
        return store

    yield make
    for store in made:
        await store.close()


async def test_values(make_store: MakeStore) -> None:
    store = make_store()
    assert await store.get("role/a") is None
    await store.put("role/a", "prefill")
    await store.put("role/a", "décode")
    await store.put("role/b", "")
    await store.put("drain/a", "1")
    assert await store.get("role/a") == "décode"
    assert await store.get("role/") is None
    assert await store.scan("role/") == {"role/a": "décode", "role/b": ""}
    assert await store.scan("nothing") == {}
    await store.delete("role/a")
    await store.delete("role/a")
    assert await store.get("role/a") is None
    assert await store.scan("") == {"role/b": "", "drain/a": "1"}


async def test_prefixes_are_literal(make_store: MakeStore) -> None:
    store = make_store()
    for key in ("a*b", "axb", "[a]", "a?", "\\x"):
        await store.put(key, key)
    assert set(await store.scan("a*")) == {"a*b"}
    assert set(await store.scan("[a]")) == {"[a]"}
    assert set(await store.scan("a?")) == {"a?"}
    assert set(await store.scan("\\")) == {"\\x"}


async def test_many_keys(make_store: MakeStore) -> None:
    store = make_store()
    expected = {f"many/{i}": str(i) for i in range(1200)}
    await asyncio.gather(*(store.put(k, v) for k, v in list(expected.items())[:50]))
    for key, value in list(expected.items())[50:]:
        await store.put(key, value)
    assert await store.scan("many/") == expected


async def test_lifetimes(make_store: MakeStore) -> None:
    store = make_store()
    await store.put("short", "1", ttl_s=0.05)
    await store.put("long", "1", ttl_s=60.0)
    assert await store.get("short") == "1"
    await asyncio.sleep(0.1)
    assert await store.get("short") is None
    assert set(await store.scan("")) == {"long"}
    await store.put("long", "2")
    assert await store.get("long") == "2"


async def test_clusters_are_apart(make_store: MakeStore) -> None:
    one, other = make_store("one"), make_store("one.2")
    await one.put("k", "1")
    assert await other.scan("") == {}
    await one.announce("h:1")
    assert await other.find_address() is None
    assert await one.next_epoch(1) == await other.next_epoch(1)


async def test_epochs_rise(make_store: MakeStore) -> None:
    store = make_store()
    assert await store.next_epoch(1) == 1
    assert await store.next_epoch(1) == 2
    assert await store.next_epoch(10) == 10
    assert await store.next_epoch(5) == 11
    await store.keep_epoch(11)
    await store.keep_epoch(3)
    assert await store.next_epoch(1) == 12
    await store.keep_epoch(20)
    assert await store.next_epoch(1) == 21
    assert await store.next_epoch(2**40) == 2**40


async def test_address_comes_and_goes(make_store: MakeStore) -> None:
    store = make_store()
    assert await store.find_address() is None
    await store.announce("127.0.0.1:1")
    assert await make_store().find_address() == "127.0.0.1:1"
    await store.announce("127.0.0.1:2")
    reader = make_store()
    assert await reader.find_address() == "127.0.0.1:2"
    await reader.close()
    assert await make_store().find_address() == "127.0.0.1:2", "only its owner withdraws it"
    await store.close()
    assert await make_store().find_address() is None


@pytest.mark.parametrize("name", ["", "a/b", "../x", "a:b", "-x", "x" * 64, "ä"])
def test_cluster_names_are_checked(name: str) -> None:
    with pytest.raises(ConfigError, match="cluster"):
        MemoryStore(name)
    with pytest.raises(ConfigError, match="cluster"):
        RedisStore("redis://localhost:1", name)


# The memory store


async def test_file_is_private_and_removed(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    store = MemoryStore("c", directory=directory)
    await store.next_epoch(7)
    await store.announce("h:1")
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    content = json.loads((directory / "c.json").read_text())
    assert (content["address"], content["pid"], content["epoch"]) == ("h:1", os.getpid(), 7)
    await store.next_epoch(1)
    assert json.loads((directory / "c.json").read_text())["epoch"] == 8
    await store.close()
    assert list(directory.iterdir()) == []


async def test_a_killed_controller_leaves_its_epoch_but_no_address(tmp_path: Path) -> None:
    code = (
        "import asyncio, sys, os, signal\n"
        "from pathlib import Path\n"
        "from controller.store_memory import MemoryStore\n"
        "async def main():\n"
        "    store = MemoryStore('c', directory=Path(sys.argv[1]))\n"
        "    await store.next_epoch(41)\n"
        "    await store.announce('h:1')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "asyncio.run(main())\n"
    )
    directory = tmp_path / "run"
    command = [sys.executable, "-c", code, str(directory)]
    await asyncio.to_thread(subprocess.run, command, check=False, timeout=60)
    assert (directory / "c.json").exists()
    store = MemoryStore("c", directory=directory)
    assert await store.find_address() is None
    assert await store.next_epoch(1) == 42
    await store.announce("h:2")
    assert await store.find_address() == "h:2"


async def test_two_live_clusters_of_one_name(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    directory.mkdir(mode=0o700)
    parent = psutil.Process(os.getppid())
    content = {"address": "h:1", "pid": parent.pid, "started": parent.create_time(), "epoch": 3}
    (directory / "c.json").write_text(json.dumps(content))
    store = MemoryStore("c", directory=directory)
    assert await store.find_address() == "h:1"
    with pytest.raises(ConfigError, match="already running"):
        await store.announce("h:2")
    await store.close()
    assert json.loads((directory / "c.json").read_text()) == content
    # The same number, but another process: it was reused.
    (directory / "c.json").write_text(json.dumps({**content, "started": 1.0}))
    assert await store.find_address() is None


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"pid": "x", "address": 3}'])
async def test_damaged_files_are_ignored(tmp_path: Path, text: str) -> None:
    directory = tmp_path / "run"
    directory.mkdir(mode=0o700)
    (directory / "c.json").write_text(text)
    store = MemoryStore("c", directory=directory)
    assert await store.find_address() is None
    assert await store.next_epoch(1) == 1


async def test_a_directory_that_others_can_use_is_refused(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    directory.mkdir(mode=0o755)
    directory.chmod(0o755)
    with pytest.raises(ConfigError, match="0700"):
        await MemoryStore("c", directory=directory).announce("h:1")


# Discovery


async def test_find_controller(
    tmp_path: Path, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_memory, "address_directory", lambda: tmp_path / "run")
    for url in ("memory", redis_server.url):
        with pytest.raises(NotFound, match="'found'"):
            await discovery.find_controller(url, "found")
        store = discovery.open_store(url, "found")
        await store.announce("h:1")
        assert await discovery.find_controller(url, "found") == "h:1"
        await store.close()
    with pytest.raises(ConfigError, match="store"):
        await discovery.find_controller("etcd://x", "c")
    with pytest.raises(Unavailable):
        await discovery.find_controller("redis://127.0.0.1:1/0", "c")
    with pytest.raises(ConfigError):
        await discovery.find_controller("redis://127.0.0.1:port/0", "c")


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


async def test_writer_writes(make_store: MakeStore) -> None:
    store = make_store()
    async with writing(store, {}) as writer:
        writer.put("a", "1")
        writer.put("b", "1")
        writer.put("a", "2")
        writer.delete("b")
        writer.raise_epoch(9)
        await eventually(store, {"a": "2"})


async def test_redis_may_go_away_and_come_back_empty(redis_server: RedisServer) -> None:
    store, reader = RedisStore(redis_server.url, "away"), RedisStore(redis_server.url, "away")
    await store.next_epoch(5)
    await store.announce("h:1")
    await store.put("role/a", "prefill")
    async with writing(store, {"role/a": "prefill"}) as writer:
        redis_server.kill()
        writer.put("role/b", "decode")
        with pytest.raises(Unavailable):
            await store.get("role/a")
        await asyncio.sleep(0.3)
        redis_server.start()
        expected = {"role/a": "prefill", "role/b": "decode"}
        await eventually(reader, expected)
        assert await reader.next_epoch(1) > 5
        assert await reader.find_address() == "h:1"
        # And again with nothing to write: the lost connection tells.
        await asyncio.sleep(0.2)
        redis_server.kill()
        redis_server.start()
        await eventually(reader, expected)
    await reader.close()
