"""One conformance suite for both stores, and what is special about each."""

from __future__ import annotations

import asyncio
import json
import os
import random
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
from tests.redis_kit import Redis

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
            server: Redis = request.getfixturevalue("redis_server")
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


async def test_like_a_dict(make_store: MakeStore) -> None:
    store, model, draw = make_store(), dict[str, str](), random.Random(4)
    # What means something in a pattern, in a key of Redis, or on the wire.
    parts = [
        "*",
        "?",
        "[",
        "]",
        "[^a]",
        "\\",
        "\\*",
        "^",
        "-",
        ":",
        "/",
        "a",
        "ä",
        "\r\n",
        "{",
        "\0",
    ]
    for _ in range(300):
        key = "".join(draw.choices(parts, k=draw.randint(1, 3)))
        if draw.random() < 0.3:
            await store.delete(key)
            model.pop(key, None)
        else:
            model[key] = draw.choice(parts) * draw.randint(0, 2)
            await store.put(key, model[key])
        prefix = "".join(draw.choices(parts, k=draw.randint(0, 2)))
        assert await store.get(key) == model.get(key)
        expected = {k: value for k, value in model.items() if k.startswith(prefix)}
        assert await store.scan(prefix) == expected


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
    # A lifetime belongs to a value: the next one has its own, or none.
    await store.put("kept", "1", ttl_s=0.05)
    await store.put("kept", "2")
    await store.put("shorter", "1")
    await store.put("shorter", "2", ttl_s=0.05)
    await asyncio.sleep(0.1)
    assert await store.scan("") == {"kept": "2", "long": "2"}


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


async def test_epochs_are_handed_out_once(make_store: MakeStore) -> None:
    store = make_store()
    found = await asyncio.gather(*(store.next_epoch(1) for _ in range(40)))
    assert sorted(found) == list(range(1, 41))
    asked = (store.next_epoch(50 if number % 2 else 1) for number in range(20))
    kept = (store.keep_epoch(number) for number in range(30, 60))
    epochs, _ = await asyncio.gather(asyncio.gather(*asked), asyncio.gather(*kept))
    assert len(set(epochs)) == 20
    assert await store.next_epoch(1) > max(59, *epochs)


async def test_watching_ends_only_with_the_server(make_store: MakeStore) -> None:
    store, connected = make_store(), asyncio.Event()
    watching = asyncio.ensure_future(store.watch(connected.set))
    if isinstance(store, RedisStore):
        await asyncio.wait_for(connected.wait(), 10.0)
    await store.put("k", "1")
    done, _ = await asyncio.wait([watching], timeout=0.2)
    assert not done
    assert connected.is_set() == isinstance(store, RedisStore)
    watching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await watching
    assert await store.get("k") == "1"


async def test_closed_twice(make_store: MakeStore) -> None:
    store = make_store()
    await store.announce("h:1")
    await store.close()
    await store.close()
    assert await make_store().find_address() is None


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


async def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    store = MemoryStore("c", directory=directory)
    (directory / "c.json").mkdir(parents=True)
    directory.chmod(0o700)
    with pytest.raises(Unavailable, match="cannot write"):
        await store.announce("h:1")
    assert list(directory.iterdir()) == [directory / "c.json"], "nothing is left"
    (directory / "c.json").rmdir()
    async with asyncio.timeout(10.0):
        await store.announce("h:1")
    assert await store.find_address() == "h:1"
    await store.close()


async def test_a_directory_that_others_can_use_is_refused(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    directory.mkdir(mode=0o755)
    directory.chmod(0o755)
    with pytest.raises(ConfigError, match="0700"):
        await MemoryStore("c", directory=directory).announce("h:1")


# Discovery


async def test_find_controller(
    tmp_path: Path, redis_server: Redis, monkeypatch: pytest.MonkeyPatch
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
