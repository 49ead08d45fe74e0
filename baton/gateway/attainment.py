"""Whether requests got what they were promised, and which share did lately. Pure."""

from __future__ import annotations

import dataclasses
import enum
from collections import deque
from collections.abc import Sequence

from baton.core.errors import Code
from baton.core.request import FinishReason
from baton.core.slo import NO_TARGETS, ServiceLevel, Timing

WINDOW_S = 60
NO_CLASS = "none"
"""How metrics call requests of no class."""
TARGETS = ("ttft", "tpot", "deadline")


class SloOutcome(enum.StrEnum):
    """How a request ended, as its promises see it. All but the first and the last are misses."""

    MET = "met"
    MISSED = "missed"
    """Finished, and too late for a target."""
    FAILED = "failed"
    SHED = "shed"
    """Refused by admission control."""
    ABORTED = "aborted"
    """The client went away: neither met nor missed."""


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """Of one request."""

    outcome: SloOutcome
    missed: tuple[str, ...] = ()
    """The targets that it missed, of ``TARGETS``."""
    met: bool | None = None
    """``None`` where there were no targets, or the client left."""


def judge(
    outcome: str, level: ServiceLevel, timings: Sequence[Timing], num_choices: int, e2e_s: float
) -> Verdict:
    """``outcome``: a finish reason or an error's code. All choices have to meet the targets."""
    has_targets = level.slo != NO_TARGETS or level.deadline_s is not None
    if outcome == Code.ABORTED:
        return Verdict(SloOutcome.ABORTED)
    if outcome not in (FinishReason.STOP, FinishReason.LENGTH) or len(timings) < num_choices:
        shed = outcome == Code.OVERLOADED
        found = SloOutcome.SHED if shed else SloOutcome.FAILED
        return Verdict(found, met=False if has_targets else None)
    slo = level.slo
    late = {
        "ttft": slo.ttft_s is not None and any(t.ttft_s > slo.ttft_s for t in timings),
        "tpot": slo.tpot_s is not None and any((t.tpot_s or 0.0) > slo.tpot_s for t in timings),
        "deadline": level.deadline_s is not None and e2e_s > level.deadline_s,
    }
    missed = tuple(target for target in TARGETS if late[target])
    return Verdict(
        SloOutcome.MISSED if missed else SloOutcome.MET,
        missed,
        met=not missed if has_targets else None,
    )


class AttainmentWindow:
    """Requests of the last ``WINDOW_S`` seconds, in buckets of one: what it keeps is bounded."""

    def __init__(self) -> None:
        self._buckets: deque[list[int]] = deque()
        """[second, met, all]"""

    def add(self, met: bool, now: float) -> None:
        """A request ended; ``now`` never goes back."""
        second = int(now)
        if not self._buckets or self._buckets[-1][0] != second:
            self._buckets.append([second, 0, 0])
            self._forget(now)
        self._buckets[-1][1] += met
        self._buckets[-1][2] += 1

    def counts(self, now: float) -> tuple[int, int]:
        """(met, all)."""
        self._forget(now)
        return sum(b[1] for b in self._buckets), sum(b[2] for b in self._buckets)

    def _forget(self, now: float) -> None:
        while self._buckets and self._buckets[0][0] <= now - WINDOW_S:
            self._buckets.popleft()
