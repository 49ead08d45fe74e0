"""The first page of an arena file: whose it is, what it holds, and the names of such files.

A file is called ``baton-<cluster>-<instance>-<nonce>``. The cluster's part never holds a ``-`` (it
is escaped), so the files of a cluster are exactly those with its prefix, and no cluster can
match another's.
"""

from __future__ import annotations

import dataclasses
import mmap
import re
import struct
from pathlib import Path

from baton.core.errors import ConfigError
from kvpool.transport import TransferFault, TransportBroken

MAGIC = b"BATONKV\x00"
VERSION = 1
HEADER_BYTES = 4096
TEMPORARY_SUFFIX = ".tmp"

_GENERATION_BYTES = 8
# magic, version, pid, token, nonce, pid_start, block_bytes, num_blocks, three text lengths
_FIXED = struct.Struct("<8sII32sQQQI3H")
_MAX_NAME_BYTES = 255


def _align(value: int) -> int:
    page = max(mmap.PAGESIZE, HEADER_BYTES)
    return -(-value // page) * page


def _escape(text: str, allowed: str) -> str:
    return re.sub(
        f"[^{allowed}]", lambda match: "".join(f"~{b:02x}" for b in match[0].encode()), text
    )


def arena_prefix(cluster: str) -> str:
    """What the names of all of a cluster's arena files begin with."""
    return f"baton-{_escape(cluster, 'A-Za-z0-9_.')}-"


def arena_name(cluster: str, instance_id: str, nonce: int) -> str:
    """File name of one life of an instance. Raises ConfigError if it is too long for a file."""
    instance = _escape(instance_id, "A-Za-z0-9_.-")
    name = f"{arena_prefix(cluster)}{instance}-{nonce:016x}"
    if len(name) + len(TEMPORARY_SUFFIX) > _MAX_NAME_BYTES:
        raise ConfigError(
            f"cluster and instance names are too long for a file name: {name!r}", param="cluster"
        )
    return name


def host_arena_prefix(cluster: str) -> str:
    """What the names of host tiers begin with; no instance's can: ``~h`` escapes nothing."""
    return f"{arena_prefix(cluster)}~host"


def host_arena_name(cluster: str, node: str = "") -> str:
    """File name of a pool node's host tier.

    ``node``: the same for each start of one pool node, and another for each of several that share
    a machine's memory. Raises ConfigError if the name is too long for a file.
    """
    name = f"{host_arena_prefix(cluster)}-{_escape(node, 'A-Za-z0-9_.-')}"
    if len(name) + len(TEMPORARY_SUFFIX) > _MAX_NAME_BYTES:
        raise ConfigError(f"the cluster's name is too long for a file: {name!r}", param="cluster")
    return name


def process_start(pid: int) -> int | None:
    """When a process began, in clock ticks since boot; ``None`` if it is not there.

    With the pid it names a process for good: a pid that was given away again has another start.
    A zombie counts as gone.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    # The command's name, in parentheses, may hold spaces and parentheses itself.
    fields = stat[stat.rindex(b")") + 2 :].split()
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


@dataclasses.dataclass(frozen=True, slots=True)
class ArenaHeader:
    """What an arena file says about itself."""

    cluster: str
    instance_id: str
    token: str
    """32 hexadecimal digits, random per arena."""
    nonce: int
    pid: int
    """The owner's."""
    pid_start: int
    """``process_start`` of the owner when the arena was made."""
    num_blocks: int
    block_bytes: int
    layout: str

    def __post_init__(self) -> None:
        if self.num_blocks < 1 or self.block_bytes < 1:
            raise ConfigError(
                f"an arena needs blocks, got {self.num_blocks} of {self.block_bytes} bytes",
                param="num_blocks",
            )
        texts = sum(len(text.encode()) for text in (self.cluster, self.instance_id, self.layout))
        if _FIXED.size + texts > HEADER_BYTES:
            raise ConfigError("cluster, instance and layout texts are too long", param="layout")

    @property
    def table_offset(self) -> int:
        """Where the table of generations begins."""
        return HEADER_BYTES

    @property
    def data_offset(self) -> int:
        """Where block 0 begins; page-aligned."""
        return _align(HEADER_BYTES + _GENERATION_BYTES * self.num_blocks)

    @property
    def num_bytes(self) -> int:
        """Size of the whole file."""
        return _align(self.data_offset + self.num_blocks * self.block_bytes)

    @property
    def owner_alive(self) -> bool:
        """Whether the process that owns the arena still runs."""
        return process_start(self.pid) == self.pid_start

    def pack(self) -> bytes:
        """The header's bytes, at most ``HEADER_BYTES``."""
        texts = [text.encode() for text in (self.cluster, self.instance_id, self.layout)]
        fixed = _FIXED.pack(
            MAGIC,
            VERSION,
            self.pid,
            self.token.encode(),
            self.nonce,
            self.pid_start,
            self.block_bytes,
            self.num_blocks,
            *(len(text) for text in texts),
        )
        return fixed + b"".join(texts)

    @classmethod
    def unpack(cls, data: bytes, where: str) -> ArenaHeader:
        """Parse a header. Raises TransportBroken if ``data`` is not one, or of another version."""
        if len(data) < _FIXED.size or not data.startswith(MAGIC):
            raise TransportBroken(f"{where} is not an arena", fault=TransferFault.CORRUPT)
        _, version, pid, token, nonce, start, block_bytes, num_blocks, *lengths = (
            _FIXED.unpack_from(data)
        )
        if version != VERSION:
            raise TransportBroken(
                f"{where} has version {version}, this process reads {VERSION}",
                fault=TransferFault.LAYOUT,
            )
        texts: list[str] = []
        offset = _FIXED.size
        try:
            for length in lengths:
                texts.append(data[offset : offset + length].decode())
                offset += length
            return cls(
                cluster=texts[0],
                instance_id=texts[1],
                token=token.decode("ascii"),
                nonce=nonce,
                pid=pid,
                pid_start=start,
                num_blocks=num_blocks,
                block_bytes=block_bytes,
                layout=texts[2],
            )
        except (UnicodeDecodeError, ConfigError) as error:
            raise TransportBroken(
                f"{where} has a damaged header: {error}", fault=TransferFault.CORRUPT
            ) from None


def read_header(path: str | Path) -> ArenaHeader:
    """The header of a file. Raises FileNotFoundError, or TransportBroken if it is none."""
    with open(path, "rb") as file:
        return ArenaHeader.unpack(file.read(HEADER_BYTES), str(path))
