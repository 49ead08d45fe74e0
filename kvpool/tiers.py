"""Words that all tiers of the KV pool share. Pure values.

The pool keeps blocks in a canonical layout (``KVLayout`` with one shard), whatever the tensor
parallelism of those who wrote them, so that a block's key names the same bytes for every reader.
"""

from __future__ import annotations

import dataclasses
import enum

from baton.core.blocks import BlockKey


class Tier(enum.StrEnum):
    """Where a block lies, fastest first."""

    DEVICE = "device"
    """An instance's paged cache."""
    HOST = "host"
    """The machine's arena in shared memory."""
    DISK = "disk"
    """The machine's segment files."""
    REMOTE = "remote"
    """Another machine's host tier or disk."""
    EXTERNAL = "external"
    """A store that is not ours."""


@dataclasses.dataclass(frozen=True, slots=True)
class BlockMeta:
    """What the pool knows of a block besides its bytes."""

    key: BlockKey
    parent: BlockKey | None
    """Key of the block before it; ``None`` for the first of a prompt."""
    depth: int = 0
    """Blocks before it."""
    num_tokens: int = 0
    """Tokens in it; fewer than a block's size only in a handoff's last block."""
    priority: int = 0
    """Of the request that made it; lower is evicted first, offline work is negative."""


class KVEventKind(enum.StrEnum):
    """What happened to blocks at a holder."""

    STORED = "stored"
    """Now in ``tier``."""
    REMOVED = "removed"
    """No longer in ``tier``."""
    DEMOTED = "demoted"
    """No longer in ``tier``, now in ``to``, a lower one."""
    PROMOTED = "promoted"
    """Still in ``tier``, now also in ``to``, a higher one."""


@dataclasses.dataclass(frozen=True, slots=True)
class KVEvent:
    """One change at one holder. ``keys`` are in chain order: each is the parent of the next."""

    kind: KVEventKind
    tier: Tier
    keys: tuple[BlockKey, ...]
    to: Tier | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class KVEventBatch:
    """Consecutive events of one life of a holder; the first has number ``first_seq``."""

    holder: str
    life: int
    """Incarnation of an instance, start number of a pool node: numbers begin anew with it."""
    first_seq: int
    events: tuple[KVEvent, ...]

    @property
    def next_seq(self) -> int:
        """Number of the event after these."""
        return self.first_seq + len(self.events)


@dataclasses.dataclass(frozen=True, slots=True)
class KVSnapshot:
    """Everything that a holder has, as of event ``next_seq``; replaces what was known of it."""

    holder: str
    life: int
    next_seq: int
    blocks: tuple[tuple[Tier, tuple[BlockKey, ...]], ...]
    """Keys by tier, parents before children."""
