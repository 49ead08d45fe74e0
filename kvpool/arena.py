"""One instance's KV blocks and their generations in one shared-memory file.

Layout of the file, each part page-aligned: header (``arena_header``), one uint64 generation per
block, the blocks. The generations lie in the file so that a reader in another process can check
them, and a restarted pool node can adopt the arena as it is.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import secrets
from pathlib import Path

import numpy as np
import numpy.typing as npt

from baton.core.errors import ConfigError
from kvpool.arena_header import (
    HEADER_BYTES,
    TEMPORARY_SUFFIX,
    ArenaHeader,
    arena_name,
    arena_prefix,
    process_start,
)
from kvpool.transport import TransferFault, TransportBroken


class BlockArena:
    """A :class:`kvpool.transport.KVCache` over a mapping. Made by the class methods only.

    Views of the memory (``block``, ``run``, ``buffer``, ``generations``) may outlive ``close``:
    the pages are unmapped when the last view is gone.
    """

    def __init__(self, header: ArenaHeader, mapping: mmap.mmap, path: str | None) -> None:
        self.header = header
        self._mapping = mapping
        self._path = path
        base = memoryview(mapping)
        start = header.data_offset
        self._data: memoryview | None = base[start : start + header.num_blocks * header.block_bytes]
        self._generations: npt.NDArray[np.uint64] | None = np.frombuffer(
            mapping, dtype="<u8", count=header.num_blocks, offset=header.table_offset
        )

    @classmethod
    def create(
        cls,
        directory: str | Path,
        cluster: str,
        instance_id: str,
        nonce: int,
        pid: int,
        num_blocks: int,
        block_bytes: int,
        layout: str,
    ) -> BlockArena:
        """Make the file of one life of an instance; it appears under its name only when complete.

        All pages are reserved here: without that, a write to a full file system would kill the
        writer with SIGBUS. Raises ConfigError if there is not enough room, or no process ``pid``.
        """
        start = process_start(pid)
        if start is None:
            raise ConfigError(f"no process {pid} to own the arena of {instance_id}", param="pid")
        header = ArenaHeader(
            cluster=cluster,
            instance_id=instance_id,
            token=secrets.token_hex(16),
            nonce=nonce,
            pid=pid,
            pid_start=start,
            num_blocks=num_blocks,
            block_bytes=block_bytes,
            layout=layout,
        )
        return cls.create_file(
            directory,
            arena_name(cluster, instance_id, nonce),
            header,
            what=f"the KV arena of {instance_id}",
        )

    @classmethod
    def create_file(
        cls,
        directory: str | Path,
        name: str,
        header: ArenaHeader,
        *,
        what: str,
        extra: bytes = b"",
        extra_bytes: int = 0,
    ) -> BlockArena:
        """Make a file of the given name, with ``extra_bytes`` after the arena for its owner's use.

        These begin with ``extra``; the rest of them, like all blocks, are zeros. Raises ConfigError
        if there is not enough room, saying that ``what`` needs it.
        """
        path = os.path.join(directory, name)
        temporary = path + TEMPORARY_SUFFIX
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        try:
            fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(f"cannot make an arena in {directory}: {error}") from error
        try:
            _reserve(fd, header.num_bytes + extra_bytes, directory, what)
            os.pwrite(fd, header.pack(), 0)
            os.pwrite(fd, extra, header.num_bytes)
            mapping = mmap.mmap(fd, header.num_bytes)
            os.rename(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
        finally:
            os.close(fd)
        return cls(header, mapping, path)

    @classmethod
    def open(cls, path: str, token: str, *, writable: bool) -> BlockArena:
        """Map an existing file. Raises TransportBroken if it is gone or another one."""
        try:
            fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
        except OSError as error:
            raise TransportBroken(
                f"arena {path} cannot be opened: {error.strerror}", fault=TransferFault.GONE
            ) from error
        try:
            header = ArenaHeader.unpack(os.pread(fd, HEADER_BYTES, 0), path)
            if header.token != token:
                raise TransportBroken(
                    f"arena {path} is another one: its token differs", fault=TransferFault.GONE
                )
            if os.fstat(fd).st_size < header.num_bytes:
                raise TransportBroken(
                    f"arena {path} is shorter than its header says", fault=TransferFault.SHORT
                )
            access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
            mapping = mmap.mmap(fd, header.num_bytes, access=access)
        finally:
            os.close(fd)
        return cls(header, mapping, path)

    @classmethod
    def private(cls, num_blocks: int, block_bytes: int, layout: str) -> BlockArena:
        """Anonymous memory of this process: no file, so no peer can map it."""
        pid = os.getpid()
        header = ArenaHeader(
            cluster="",
            instance_id="",
            token=secrets.token_hex(16),
            nonce=0,
            pid=pid,
            pid_start=process_start(pid) or 0,
            num_blocks=num_blocks,
            block_bytes=block_bytes,
            layout=layout,
        )
        return cls(header, mmap.mmap(-1, header.num_bytes), None)

    @property
    def layout(self) -> str:
        """Canonical layout text."""
        return self.header.layout

    @property
    def num_blocks(self) -> int:
        """Blocks in the arena."""
        return self.header.num_blocks

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return self.header.block_bytes

    @property
    def token(self) -> str:
        """Names this arena, and no other, for good."""
        return self.header.token

    @property
    def path(self) -> str | None:
        """The file; ``None`` for private memory."""
        return self._path

    @property
    def buffer(self) -> memoryview:
        """All blocks, ``[num_blocks * block_bytes]`` bytes; read-only if opened so."""
        if self._data is None:
            raise ValueError("the arena is closed")
        return self._data

    @property
    def generations(self) -> npt.NDArray[np.uint64]:
        """The table itself, ``[num_blocks]``: its owner raises entries in place."""
        if self._generations is None:
            raise ValueError("the arena is closed")
        return self._generations

    def block(self, index: int) -> memoryview:
        """Bytes of one block."""
        return self.run(index, 1)

    def run(self, start: int, count: int) -> memoryview:
        """Bytes of ``count`` consecutive blocks. Raises IndexError outside the arena."""
        if start < 0 or count < 0 or start + count > self.num_blocks:
            raise IndexError(f"blocks [{start}, {start + count}) of {self.num_blocks}")
        size = self.block_bytes
        return self.buffer[start * size : (start + count) * size]

    def generation(self, index: int) -> int:
        """The block's generation now."""
        return int(self.generations[index])

    def close(self) -> None:
        """Give up the mapping; the file stays. Idempotent, never raises for views still held."""
        self._data = None
        self._generations = None
        # Somebody's view still needs the pages: they go with the last one.
        with contextlib.suppress(BufferError):
            self._mapping.close()

    def unlink(self) -> None:
        """Remove the file; mappings stay valid. Idempotent."""
        if self._path is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)


def _reserve(fd: int, num_bytes: int, directory: str | Path, what: str) -> None:
    """Give the file its pages. What cannot fit is not even tried: others need the room too."""
    stat = os.statvfs(directory)
    free, total = stat.f_bavail * stat.f_frsize, stat.f_blocks * stat.f_frsize
    cause: OSError | None = None
    if not total or num_bytes <= free:
        try:
            os.posix_fallocate(fd, 0, num_bytes)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.ENOMEM, errno.EDQUOT):
                raise
            cause = error
        else:
            return
    raise ConfigError(
        f"{what} needs {num_bytes} bytes, but {directory} has {free} bytes free of {total}:"
        " use fewer KV blocks or make it larger",
        param="num_blocks",
    ) from cause


def cluster_files(cluster: str, directory: str | Path) -> list[Path]:
    """Arena files of a cluster, half-made ones included."""
    prefix = arena_prefix(cluster)
    try:
        names = sorted(name for name in os.listdir(directory) if name.startswith(prefix))
    except FileNotFoundError:
        return []
    return [Path(directory, name) for name in names]


def remove_cluster_files(cluster: str, directory: str | Path = "/dev/shm") -> list[Path]:
    """Unlink all arena files of a cluster that has ended; returns those that were there."""
    removed = []
    for path in cluster_files(cluster, directory):
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
            removed.append(path)
    return removed
