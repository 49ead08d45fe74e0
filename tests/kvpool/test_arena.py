from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest

from baton.core.errors import ConfigError
from kvpool.arena import BlockArena, cluster_files, remove_cluster_files
from kvpool.arena_header import ArenaHeader, arena_name, arena_prefix, process_start, read_header
from kvpool.transport import TransportBroken


def make(directory: Path, cluster: str = "c", instance: str = "p-0", nonce: int = 7) -> BlockArena:
    return BlockArena.create(directory, cluster, instance, nonce, os.getpid(), 5, 300, "layout")


def test_another_mapping_sees_blocks_and_generations(tmp_path: Path) -> None:
    ours = make(tmp_path)
    assert ours.path is not None
    theirs = BlockArena.open(ours.path, ours.token, writable=False)
    ours.block(3)[:] = b"x" * 300
    ours.generations[3] += np.uint64(2)
    assert bytes(theirs.run(2, 2)) == bytes(300) + b"x" * 300
    assert (theirs.generation(3), theirs.generation(2)) == (2, 0)
    assert (theirs.layout, theirs.num_blocks, theirs.block_bytes) == ("layout", 5, 300)
    assert theirs.header == ours.header
    with pytest.raises(TypeError):
        theirs.block(0)[0] = 1
    assert os.stat(ours.path).st_mode & 0o777 == 0o600


def test_writable_open_shares_writes(tmp_path: Path) -> None:
    made = make(tmp_path)
    assert made.path is not None
    owner = BlockArena.open(made.path, made.token, writable=True)
    made.close()
    owner.buffer[-1] = 9
    again = BlockArena.open(owner.path or "", owner.token, writable=False)
    assert again.buffer[-1] == 9
    assert len(again.buffer) == 5 * 300


def test_data_does_not_overlap_the_table(tmp_path: Path) -> None:
    arena = BlockArena.create(tmp_path, "c", "i", 1, os.getpid(), 3000, 8, "l")
    arena.generations[:] = np.arange(3000, dtype=np.uint64)
    arena.buffer[:] = b"\xff" * len(arena.buffer)
    assert arena.generations.tolist() == list(range(3000))
    assert read_header(arena.path or "") == arena.header
    assert arena.header.data_offset % 4096 == 0


@pytest.mark.parametrize(("start", "count"), [(-1, 1), (0, 6), (5, 1), (2, -1)])
def test_outside_is_refused(start: int, count: int) -> None:
    with pytest.raises(IndexError):
        BlockArena.private(5, 10, "l").run(start, count)


def test_a_stale_token_is_refused(tmp_path: Path) -> None:
    old = make(tmp_path)
    new = make(tmp_path)
    assert old.path == new.path
    assert old.token != new.token
    with pytest.raises(TransportBroken, match="token differs"):
        BlockArena.open(old.path or "", old.token, writable=False)
    BlockArena.open(new.path or "", new.token, writable=False).close()


def test_files_that_are_no_arena_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(TransportBroken, match="cannot be opened"):
        BlockArena.open(str(path), "t", writable=False)
    path.write_bytes(b"hello")
    with pytest.raises(TransportBroken, match="is not an arena"):
        BlockArena.open(str(path), "t", writable=False)


def test_damaged_headers_are_refused(tmp_path: Path) -> None:
    arena = make(tmp_path)
    path = Path(arena.path or "")
    whole = path.read_bytes()
    path.write_bytes(whole[:8] + struct.pack("<I", 99) + whole[12:])
    with pytest.raises(TransportBroken, match="version 99"):
        read_header(path)
    path.write_bytes(whole[:-1])
    with pytest.raises(TransportBroken, match="shorter"):
        BlockArena.open(str(path), arena.token, writable=False)
    path.write_bytes(whole[:8192])
    os.truncate(path, 20)
    with pytest.raises(TransportBroken, match="not an arena"):
        read_header(path)


def test_close_with_views_held_does_not_raise(tmp_path: Path) -> None:
    arena = make(tmp_path)
    block, table = arena.block(1), arena.generations
    tensor = np.frombuffer(arena.buffer, dtype=np.uint8)
    arena.close()
    arena.close()
    block[0] = 5
    table[1] = 1
    assert tensor[300] == 5
    with pytest.raises(ValueError, match="closed"):
        arena.block(0)


def test_close_gives_the_memory_back(tmp_path: Path) -> None:
    arena = make(tmp_path)
    name = os.path.basename(arena.path or "")
    assert name in Path("/proc/self/maps").read_text()
    arena.close()
    assert name not in Path("/proc/self/maps").read_text()
    arena.unlink()
    arena.unlink()
    assert not list(tmp_path.iterdir())


def test_private_memory_has_no_file() -> None:
    arena = BlockArena.private(4, 8, "l")
    arena.block(3)[:] = b"12345678"
    assert arena.path is None
    assert bytes(arena.buffer[-8:]) == b"12345678"
    arena.unlink()
    arena.close()


def test_no_room_names_the_numbers_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ConfigError, match=r"needs \d+ bytes, but .* has \d+ bytes free of \d+"):
        make(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_really_full_file_system_is_a_config_error() -> None:
    """More than the machine's shared memory, however large that is."""
    stat = os.statvfs("/dev/shm")
    if not stat.f_blocks:
        pytest.skip("/dev/shm has no limit here")
    num_blocks = 2 * stat.f_blocks * stat.f_frsize // (1 << 30) + 1
    # A file size beyond the limit is refused at once on tmpfs: nothing is reserved first.
    before = os.statvfs("/dev/shm").f_bavail
    with pytest.raises(ConfigError, match="use fewer KV blocks"):
        BlockArena.create("/dev/shm", "full", "i", 1, os.getpid(), num_blocks, 1 << 30, "l")
    assert os.statvfs("/dev/shm").f_bavail > before // 2
    assert cluster_files("full", "/dev/shm") == []


def test_bad_arguments_are_config_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot make an arena"):
        make(tmp_path / "missing")
    with pytest.raises(ConfigError, match="no process"):
        BlockArena.create(tmp_path, "c", "i", 1, 2**22 + 1, 1, 1, "l")
    with pytest.raises(ConfigError, match="too long"):
        make(tmp_path, instance="i" * 250)
    with pytest.raises(ConfigError, match="needs blocks"):
        BlockArena.private(0, 1, "l")
    with pytest.raises(ConfigError, match="too long"):
        BlockArena.private(1, 1, "l" * 5000)
    assert not list(tmp_path.iterdir())


def test_names_are_safe_and_clusters_do_not_match_each_other(tmp_path: Path) -> None:
    assert "/" not in arena_name("../x", "a/b é", 1)
    names = {
        arena_name(cluster, instance, 1)
        for cluster in ("a", "a-b", "a/b", "a~2d")
        for instance in ("b", "b-b", "b/b")
    }
    assert len(names) == 12
    one, other = make(tmp_path, cluster="a"), make(tmp_path, cluster="a-b")
    half = tmp_path / (arena_prefix("a") + "x-1.tmp")
    half.write_bytes(b"")
    assert not arena_name("a-b", "x", 1).startswith(arena_prefix("a"))
    assert remove_cluster_files("a", tmp_path) == [Path(one.path or ""), half]
    assert cluster_files("a-b", tmp_path) == [Path(other.path or "")]
    assert remove_cluster_files("a", tmp_path) == []
    assert remove_cluster_files("a", tmp_path / "missing") == []


def test_owner_alive_knows_a_reused_pid(tmp_path: Path) -> None:
    header = make(tmp_path).header
    assert header.owner_alive
    fields = {name: getattr(header, name) for name in header.__slots__}
    assert not ArenaHeader(**fields | {"pid_start": header.pid_start - 1}).owner_alive
    assert not ArenaHeader(**fields | {"pid": 2**22 + 1}).owner_alive
    assert process_start(os.getpid()) == header.pid_start
