from __future__ import annotations

import asyncio
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xxhash

from baton.core.errors import ConfigError
from kvpool.arena import BlockArena, cluster_files, remove_cluster_files
from kvpool.arena_header import arena_name, host_arena_name
from kvpool.arena_owners import ArenaOwners
from kvpool.host_arena import HostArena, remove_host_arena
from kvpool.host_records import RECORD
from kvpool.host_table import HostTable
from kvpool.host_values import Grant
from kvpool.tiers import BlockMeta
from kvpool.transports.shm import ShmTransport
from tests.kvpool.host_writer import CLUSTER, LAYOUT, SHAPE, payload

KEY = bytes(range(16))


def create(directory: Path, cluster: str = "c") -> HostArena:
    return HostArena.create(directory, cluster, num_slots=70, slot_bytes=300, layout="layout")


def adopt(directory: Path, cluster: str = "c") -> HostArena | None:
    return HostArena.adopt(directory, cluster, num_slots=70, slot_bytes=300, layout="layout")


def store(arena: HostArena, key: bytes = KEY) -> int:
    """One block; returns its slot."""
    table = HostTable(arena.table, arena.blocks.generations)
    meta = BlockMeta(key, None, num_tokens=16)
    [grant] = table.reserve([meta], owner="a", now=0.0, lease_s=1.0)
    assert isinstance(grant, Grant)
    arena.blocks.block(grant.slot)[:] = b"x" * 300
    assert table.publish(grant.ticket, 42, 0.0)
    return grant.slot


def test_the_next_pool_node_finds_blocks_records_and_token(tmp_path: Path) -> None:
    first = create(tmp_path)
    slot = store(first)
    reader = BlockArena.open(first.blocks.path or "", first.blocks.token, writable=True)
    first.close()
    second = adopt(tmp_path)
    assert second is not None
    assert second.blocks.token == reader.token
    table = HostTable.rebuild(second.table, second.blocks.generations, now=0.0)
    hold = table.hold([KEY], owner="b", now=0.0, lease_s=1.0)
    assert hold is not None
    assert (hold.slots, hold.generations, hold.checksums) == ((slot,), (1,), (42,))
    assert bytes(second.blocks.block(slot)) == b"x" * 300
    second.blocks.block(slot)[:3] = b"new"
    assert bytes(reader.block(slot)[:3]) == b"new", "who mapped it before sees the same pages"
    assert reader.generation(slot) == 1


def test_the_table_lies_behind_the_blocks_and_nobody_maps_it_with_them(tmp_path: Path) -> None:
    arena = create(tmp_path)
    arena.blocks.buffer[:] = b"\xff" * len(arena.blocks.buffer)
    arena.blocks.generations[:] = np.uint64(2**64 - 1)
    assert not arena.table.view(np.uint8).any()
    assert arena.table.shape == (70,)
    assert arena.table.dtype == RECORD
    arena.table["checksum"] = np.uint64(2**64 - 1)
    assert arena.blocks.header.num_bytes <= os.stat(arena.blocks.path or "").st_size - 70 * 64
    assert os.stat(arena.blocks.path or "").st_mode & 0o777 == 0o600
    arena.close()
    again = adopt(tmp_path)
    assert again is not None
    assert (again.table["checksum"] == np.uint64(2**64 - 1)).all()


def test_nothing_to_adopt(tmp_path: Path) -> None:
    assert adopt(tmp_path) is None
    assert adopt(tmp_path / "missing") is None
    create(tmp_path, cluster="other")
    assert adopt(tmp_path) is None
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "other",
    [{"num_slots": 71}, {"num_slots": 69}, {"slot_bytes": 301}, {"layout": "another"}],
)
def test_other_sizes_are_not_adopted(tmp_path: Path, other: dict[str, int | str]) -> None:
    create(tmp_path).close()
    wanted = {"num_slots": 70, "slot_bytes": 300, "layout": "layout"} | other
    assert HostArena.adopt(tmp_path, "c", **wanted) is None  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["magic", "version", "short", "long", "table", "empty"])
def test_damaged_files_are_not_adopted(tmp_path: Path, damage: str) -> None:
    arena = create(tmp_path)
    path, table_at = Path(arena.blocks.path or ""), arena.blocks.header.num_bytes
    arena.close()
    with path.open("r+b") as file:
        if damage in ("short", "long"):
            file.truncate(path.stat().st_size + {"short": -1, "long": 4096}[damage])
        elif damage == "empty":
            file.truncate(0)
        else:
            file.seek({"magic": 0, "version": 8, "table": table_at + 8}[damage])
            file.write(struct.pack("<I", 99))
    assert adopt(tmp_path) is None
    assert not path.exists()
    assert create(tmp_path).table.shape == (70,)


def test_a_new_file_takes_the_place_of_an_old_one(tmp_path: Path) -> None:
    old = create(tmp_path)
    store(old)
    new = create(tmp_path)
    assert new.blocks.token != old.blocks.token
    assert not new.table.view(np.uint8).any()
    assert len(list(tmp_path.iterdir())) == 1


def test_close_gives_the_memory_back_and_spares_views(tmp_path: Path) -> None:
    arena = create(tmp_path)
    name = arena.blocks.path or ""
    view = arena.table
    arena.close()
    arena.close()
    view["priority"][69] = 5
    with pytest.raises(ValueError, match="closed"):
        _ = arena.table
    assert name in Path("/proc/self/maps").read_text()
    del view
    assert name not in Path("/proc/self/maps").read_text()
    arena.unlink()
    arena.unlink()
    assert not list(tmp_path.iterdir())


def test_its_pages_are_reserved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def full(fd: int, offset: int, length: int) -> None:
        asked.append(length)
        raise OSError(28, "No space left on device")

    size = os.stat(create(tmp_path, cluster="other").blocks.path or "").st_size
    remove_cluster_files("other", tmp_path)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ConfigError, match=r"the host tier of the KV pool needs \d+ bytes"):
        create(tmp_path)
    assert asked == [size]
    assert not list(tmp_path.iterdir())


def test_it_is_the_clusters_but_no_instances(tmp_path: Path) -> None:
    for instance in ("host", "~host", "h", "/host"):
        assert arena_name("c", instance, 0) != host_arena_name("c")
        assert not arena_name("c", instance, 0).startswith(host_arena_name("c"))
    arena = create(tmp_path)
    path = Path(arena.blocks.path or "")
    half = path.with_name(path.name + ".tmp")
    half.write_bytes(b"half-made, by another thread of this pool node")

    async def adopt_instances() -> int:
        return ArenaOwners("c", str(tmp_path)).adopt()

    assert asyncio.run(adopt_instances()) == 0
    assert cluster_files("c", tmp_path) == [path, half]
    assert remove_cluster_files("c-2", tmp_path) == []
    assert remove_cluster_files("c", tmp_path) == [path, half]
    with pytest.raises(ConfigError, match="too long"):
        create(tmp_path, cluster="c" * 250)


def test_it_can_be_removed_where_it_is_not_wanted(tmp_path: Path) -> None:
    create(tmp_path).close()
    assert remove_host_arena(tmp_path, "c")
    assert not remove_host_arena(tmp_path, "c")
    assert not list(tmp_path.iterdir())


def test_transports_export_it_like_an_instances_arena(tmp_path: Path) -> None:
    arena = create(tmp_path)
    slot = store(arena)
    transport = ShmTransport()
    try:
        endpoint = transport.export(arena.blocks)
        assert endpoint.token == arena.blocks.token
        reader = BlockArena.open(endpoint.address, endpoint.token, writable=False)
        assert bytes(reader.block(slot)) == b"x" * 300
    finally:
        transport.close()


@pytest.mark.parametrize("num_blocks", [1, 13, 150])
def test_killed_in_the_middle_what_is_ready_is_whole(tmp_path: Path, num_blocks: int) -> None:
    """The pool node gets SIGKILL while it stores, evicts and stores again."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.kvpool.host_writer", str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    try:
        assert process.stdout is not None
        keys = [bytes.fromhex(process.stdout.readline()) for _ in range(num_blocks)]
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        keys += [bytes.fromhex(line) for line in process.stdout if len(line) == 33]
        process.stdout.close()
    arena = HostArena.adopt(tmp_path, CLUSTER, "", layout=LAYOUT, **SHAPE)
    assert arena is not None
    # The last one may have been made ready without a word of it.
    ready = arena.table["state"] == 2
    before = arena.blocks.generations.copy()
    table = HostTable.rebuild(arena.table, arena.blocks.generations, now=0.0)
    table.check_integrity()
    found = table.snapshot_keys()
    assert len(found) == ready.sum()
    assert len(set(found) - set(keys)) <= 1
    assert len(found) >= min(num_blocks, SHAPE["num_slots"] - 1)
    for slot in np.flatnonzero(ready):
        block = arena.blocks.block(int(slot))
        key = arena.table["key"][slot].tobytes()
        assert key in found
        assert bytes(block) == payload(key)
        assert xxhash.xxh3_64_intdigest(block) == arena.table["checksum"][slot]
    assert (arena.blocks.generations[ready] == before[ready]).all()
    table.expire(100.0)
    assert table.statistics().num_free == SHAPE["num_slots"] - len(found)
