"""What an instance knows of each submission that it works on."""

from __future__ import annotations

import asyncio
import dataclasses

from baton.core.request import Part, Submission
from kvpool.tiers import Tier


@dataclasses.dataclass(slots=True)
class OpenRequest:
    """A submission that this instance works on."""

    sequence_id: str
    """What engine and workers call it. One per attempt: while an aborted attempt's last step or
    pull still runs, the next attempt may already be here."""
    submission: Submission
    part: Part
    stages: list[tuple[str, float]] = dataclasses.field(default_factory=list)
    """Not yet reported; they travel with the next output."""
    deadline: asyncio.TimerHandle | None = None
    first_output_sent: bool = False


@dataclasses.dataclass(slots=True)
class InstanceCounters:
    """Totals since the start, for metrics."""

    num_submitted: int = 0
    num_refused: int = 0
    num_finished: int = 0
    num_aborted: int = 0
    num_failed: int = 0
    num_preemptions: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_generated_tokens: int = 0


def by_tier(num_cached: int, fetched: dict[Tier, int]) -> tuple[tuple[str, int], ...]:
    """Cached tokens by tier, fastest first; what was not fetched was in the device tier.

    More than ``num_cached`` may have been fetched: the outputs of an earlier attempt do not count.
    """
    found: dict[Tier, int] = {}
    left = num_cached
    for tier, count in fetched.items():
        found[tier] = min(count, left)
        left -= found[tier]
    found[Tier.DEVICE] = left
    return tuple((str(tier), found[tier]) for tier in Tier if found.get(tier))
