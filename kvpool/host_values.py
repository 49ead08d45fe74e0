"""What the host tier's accounts answer with. Pure values."""

from __future__ import annotations

import dataclasses
import enum

from kvpool.tiers import BlockMeta, Tier

_LOWER = (Tier.DISK, Tier.REMOTE, Tier.EXTERNAL)


@dataclasses.dataclass(frozen=True, slots=True)
class HostSettings:
    """How the host tier decides."""

    life: int = 0
    """Below 2**31 and different for each start of a pool node: tickets and holds of a former one
    are then unknown to this one, instead of somebody else's."""
    quarantine_s: float = 10.0
    """How long a slot is not used again after its writer let the lease run out."""
    admit_all: bool = False
    """Let every new block displace an old one, however often that is used."""


@dataclasses.dataclass(frozen=True, slots=True)
class Grant:
    """Write one block into ``slot``, then publish ``ticket``."""

    ticket: int
    slot: int
    generation: int
    """The slot's, raised for this block."""


class SkipReason(enum.StrEnum):
    """Why a block gets no slot."""

    KNOWN = "known"
    """It is there, or somebody writes it now."""
    FULL = "full"
    """All slots are held, being written or parents of such."""
    NOT_ADMITTED = "not_admitted"
    """What it would displace is worth more."""
    NO_PARENT = "no_parent"
    """The block before it is neither there nor being written, so nobody would find it."""


@dataclasses.dataclass(frozen=True, slots=True)
class Skip:
    """Do not write the block."""

    reason: SkipReason


@dataclasses.dataclass(frozen=True, slots=True)
class Hold:
    """Blocks that stay until the hold ends; one entry per block, in the order of the keys."""

    hold_id: int
    slots: tuple[int, ...]
    generations: tuple[int, ...]
    """A slot that has another one when its bytes were copied was given away: a late reader."""
    checksums: tuple[int, ...]
    num_tokens: tuple[int, ...]
    priorities: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class StoredBlock:
    """A ready block, for those who write it elsewhere too."""

    slot: int
    generation: int
    checksum: int
    meta: BlockMeta
    frequency: int
    """Estimated uses, by which a writer decides whether it is worth that."""


@dataclasses.dataclass(frozen=True, slots=True)
class HostStatistics:
    """The first five add up to ``num_slots``; counts of events are since the table was made."""

    num_slots: int
    num_free: int
    num_filling: int
    """Being written, or written below a block that is."""
    num_quarantined: int
    """Given up while somebody may still write to them."""
    num_idle: int
    """Ready and held by nobody."""
    num_held: int
    num_ready: int
    """Blocks that can be held, now held or not."""
    num_transient: int
    num_on_disk: int
    """Ready blocks that are on disk too."""
    num_tickets: int
    num_holds: int
    num_published: int
    num_evictions: int
    num_demotions: int
    """Evictions of blocks that are on disk."""
    num_not_admitted: int
    num_full: int
    """Blocks that got no slot because all were in use."""
    num_hits: int
    """Blocks that lookups found."""
    num_misses: int
    """Blocks that lookups asked for and did not find."""
    num_expired: int
    """Leases that ended because nobody renewed them, of tickets and holds."""


@dataclasses.dataclass(frozen=True, slots=True)
class HeldSlot:
    """A block that its reader may read."""

    slot: int
    generation: int
    checksum: int
    num_tokens: int
    priority: int
    tier: Tier


@dataclasses.dataclass(slots=True)
class TierCounters:
    """Totals since the start, in blocks."""

    num_promoted: dict[Tier, int] = dataclasses.field(
        default_factory=lambda: dict.fromkeys(_LOWER, 0)
    )
    num_failed: dict[Tier, int] = dataclasses.field(
        default_factory=lambda: dict.fromkeys(_LOWER, 0)
    )
    """Said to be there, and then not, or not in time, or not what their checksum says."""
    num_demoted: int = 0
    num_damaged: int = 0
    """In the host tier, and not what their checksum says."""
