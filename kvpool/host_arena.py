"""The file of a machine's host tier: an arena of blocks, and a record of each slot behind it.

Instances map the arena part alone, as they map each other's. The table behind it is the pool
node's, and lies in the file so that the next pool node finds what the last one knew, however that
one ended. Layout: the arena (``arena``), one page that describes the table, the records
(``host_records``).
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import secrets
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt

from baton.core.errors import ConfigError
from kvpool.arena import BlockArena
from kvpool.arena_header import ArenaHeader, host_arena_name, process_start, read_header
from kvpool.host_records import RECORD, TABLE_VERSION
from kvpool.transport import TransportBroken

log = logging.getLogger(__name__)

_MAGIC = b"BATONHT\x00"
_OWNER = "~host"
_PAGE = 4096
# magic, version, bytes of a record, number of records
_FIXED = struct.Struct("<8sIIQ")


class HostArena:
    """Made by the class methods only. One pool node at a time has it."""

    def __init__(self, blocks: BlockArena, mapping: mmap.mmap) -> None:
        self._blocks = blocks
        self._mapping: mmap.mmap | None = mapping
        self._table: npt.NDArray[np.void] | None = np.frombuffer(
            mapping, dtype=RECORD, count=blocks.num_blocks, offset=_PAGE
        )

    @classmethod
    def create(
        cls,
        directory: str | Path,
        cluster: str,
        node: str = "",
        *,
        num_slots: int,
        slot_bytes: int,
        layout: str,
    ) -> HostArena:
        """Make the file, in place of one that is there; all its pages are reserved.

        Raises ConfigError if there is not enough room.
        """
        pid = os.getpid()
        header = ArenaHeader(
            cluster=cluster,
            instance_id=_OWNER,
            token=secrets.token_hex(16),
            nonce=0,
            # Who made it, for a person who looks: it stays when that process ends.
            pid=pid,
            pid_start=process_start(pid) or 0,
            num_blocks=num_slots,
            block_bytes=slot_bytes,
            layout=layout,
        )
        blocks = BlockArena.create_file(
            directory,
            host_arena_name(cluster, node),
            header,
            what="the host tier of the KV pool",
            extra=_table_header(num_slots),
            extra_bytes=_table_bytes(num_slots),
        )
        try:
            return cls._with_table(blocks)
        except BaseException:
            blocks.unlink()
            blocks.close()
            raise

    @classmethod
    def adopt(
        cls,
        directory: str | Path,
        cluster: str,
        node: str = "",
        *,
        num_slots: int,
        slot_bytes: int,
        layout: str,
    ) -> HostArena | None:
        """The file that a former pool node left, with its token; None if there is none to use.

        One that is damaged, or of other sizes or another layout, is removed. Raises ConfigError if
        it cannot be.
        """
        path = Path(directory, host_arena_name(cluster, node))
        try:
            header = read_header(path)
            found = (header.cluster, header.num_blocks, header.block_bytes, header.layout)
            if found != (cluster, num_slots, slot_bytes, layout):
                raise TransportBroken(
                    f"it has {header.num_blocks} blocks of {header.block_bytes} bytes,"
                    f" {header.layout}; wanted are {num_slots} of {slot_bytes}, {layout}"
                )
            blocks = BlockArena.open(str(path), header.token, writable=True)
            try:
                return cls._with_table(blocks)
            except BaseException:
                blocks.close()
                raise
        except FileNotFoundError:
            return None
        except (TransportBroken, OSError) as error:
            log.warning("removed the host tier's arena %s: %s", path, error)
            remove_host_arena(directory, cluster, node)
            return None

    @classmethod
    def _with_table(cls, blocks: BlockArena) -> HostArena:
        """Map the table too. Raises TransportBroken if the file has none that fits."""
        assert blocks.path is not None
        start, size = blocks.header.num_bytes, _table_bytes(blocks.num_blocks)
        fd = os.open(blocks.path, os.O_RDWR | os.O_CLOEXEC)
        try:
            if os.fstat(fd).st_size != start + size:
                raise TransportBroken(f"its size is not {start + size} bytes")
            if os.pread(fd, _FIXED.size, start) != _table_header(blocks.num_blocks):
                raise TransportBroken("its table is damaged or of another version")
            return cls(blocks, mmap.mmap(fd, size, offset=start))
        finally:
            os.close(fd)

    @property
    def blocks(self) -> BlockArena:
        """The blocks and their generations: what transports export and instances map."""
        return self._blocks

    @property
    def table(self) -> npt.NDArray[np.void]:
        """The records themselves, ``[num_slots]`` of ``host_records.RECORD``."""
        if self._table is None:
            raise ValueError("the arena is closed")
        return self._table

    def close(self) -> None:
        """Give up the mappings; the file stays. Idempotent, never raises for views still held."""
        self._table = None
        mapping, self._mapping = self._mapping, None
        if mapping is not None:
            # Somebody's view still needs the pages: they go with the last one.
            with contextlib.suppress(BufferError):
                mapping.close()
        self._blocks.close()

    def unlink(self) -> None:
        """Remove the file; mappings stay valid. Idempotent."""
        self._blocks.unlink()


def remove_host_arena(directory: str | Path, cluster: str, node: str = "") -> bool:
    """Remove the file that a former pool node left where no host tier is wanted any more."""
    try:
        Path(directory, host_arena_name(cluster, node)).unlink()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise ConfigError(f"cannot remove the host tier's arena: {error}") from error
    return True


def _table_header(num_slots: int) -> bytes:
    return _FIXED.pack(_MAGIC, TABLE_VERSION, RECORD.itemsize, num_slots)


def _table_bytes(num_slots: int) -> int:
    return -(-(_PAGE + num_slots * RECORD.itemsize) // _PAGE) * _PAGE
