"""The seam over which KV blocks move between instances (design, "Transport").

One side *exports* its paged cache and hands the :class:`Endpoint` to the other in the handoff's
first message. The other side *pulls*: it copies whole blocks into blocks of its own cache. Bytes
count only when the receipt says so; after any failure the destination blocks hold garbage and
must not be published.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence
from typing import Protocol

from baton.core.errors import TransferFailed

__all__ = [
    "BlockCopy",
    "Endpoint",
    "KVCache",
    "Receipt",
    "TransferFailed",
    "TransferFault",
    "Transport",
    "TransportBroken",
]


class TransferFault(enum.StrEnum):
    """Why a pull brought nothing; what it is counted by."""

    LATE = "late"
    """Its time was over."""
    STALE = "stale"
    """A block was given to other content, or does not exist."""
    SHORT = "short"
    """The answer ended in the middle."""
    CORRUPT = "corrupt"
    """Bytes that are not what was sent: a wrong checksum, words that mean nothing, the answer to
    another request."""
    GONE = "gone"
    """The peer is not there (any more), refused, or reset the connection."""
    LAYOUT = "layout"
    """The two sides mean other bytes by a block."""
    OTHER = "other"
    """Settings that differ, this side's end, a bug."""


class TransportBroken(TransferFailed):
    """The way to the peer failed (gone, refused, reset, short, corrupt); another way may work.

    A plain ``TransferFailed`` is one that no transport can mend: late, stale, another layout.
    """


@dataclasses.dataclass(frozen=True, slots=True)
class Endpoint:
    """How to reach an exported cache: one per transport, tried in the order they are listed."""

    transport: str
    """``loopback``, ``shm``, ``tcp``, ``collective`` or ``mooncake``."""
    address: str
    """Transport-specific: a name in the process, an arena file, host:port."""
    token: str
    """Random per export; proves that the reader reached the arena that was meant."""
    layout: str
    """``KVLayout`` text; a transport refuses a pull between different ones."""


@dataclasses.dataclass(frozen=True, slots=True)
class BlockCopy:
    """Copy the exporter's block ``src``, if still at ``generation``, into own block ``dst``."""

    src: int
    generation: int
    dst: int


@dataclasses.dataclass(frozen=True, slots=True)
class Receipt:
    """A pull that succeeded and verified."""

    num_blocks: int
    num_bytes: int
    seconds: float
    transport: str


class KVCache(Protocol):
    """Raw bytes of a paged cache; one row per block, all layers of a block contiguous."""

    @property
    def layout(self) -> str:
        """Canonical layout text."""

    @property
    def num_blocks(self) -> int:
        """Blocks in the cache."""

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""

    def block(self, index: int) -> memoryview:
        """Writable bytes of one block, length ``block_bytes``."""

    def run(self, start: int, count: int) -> memoryview:
        """Writable bytes of ``count`` consecutive blocks."""

    def generation(self, index: int) -> int:
        """Raised each time the block is given to new content; 0 for a block never used."""


class Transport(Protocol):
    """Moves blocks. ``export`` and ``close`` are called once; ``pull`` from a transport thread."""

    name: str

    def export(self, cache: KVCache) -> Endpoint:
        """Make ``cache`` readable for peers until ``close``."""

    def reachable(self, endpoint: Endpoint) -> bool:
        """Whether a pull from there can work (same process, same shared memory, ...). Bounded."""

    def pull(
        self, endpoint: Endpoint, cache: KVCache, copies: Sequence[BlockCopy], *, timeout_s: float
    ) -> Receipt:
        """Copy and verify. Raises TransferFailed (late, short, corrupt, stale generation, gone)."""

    def forget(self, endpoint: Endpoint) -> None:
        """The peer is gone: release what is kept for it. Harmless for one that is not."""

    def close(self) -> None:
        """Stop serving, release every thread, socket and mapping. Idempotent."""
