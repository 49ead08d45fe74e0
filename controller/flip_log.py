"""The log of role switches: why each was made, what was expected of it, and what came of it. Pure.

The effect is the attainment (share of ended requests within their targets) in the window before a
switch and in the window after it. Requests without targets count nowhere.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
from collections.abc import Iterator, Mapping

from baton.core.cluster import Role
from baton.core.slo import attainment
from controller.role_events import Who

MAX_ENTRIES = 1000
_BUCKETS_PER_WINDOW = 32


class FlipState(enum.StrEnum):
    """Where a switch of the log stands."""

    SWITCHING = "switching"
    DONE = "done"
    REFUSED = "refused"
    """Nothing changed: a rule or the instance was against it."""
    FAILED = "failed"
    """The instance went away or did not answer; it has its old role again."""
    ADVISED = "advised"
    """Only said: the mode is ``advise``, or the planner is paused."""


@dataclasses.dataclass(slots=True)
class Tally:
    """Ended requests, and how many of them were within their targets."""

    num_met: int = 0
    num_ended: int = 0

    def add(self, met: bool) -> None:
        """One more."""
        self.num_met += met
        self.num_ended += 1

    @property
    def attainment(self) -> float | None:
        """``None`` of none."""
        return attainment(self.num_met, self.num_ended)


@dataclasses.dataclass(slots=True)
class FlipEntry:
    """One line of the log. Written by :class:`FlipLog` only."""

    number: int
    at_s: float
    """On the controller's clock."""
    instance_id: str
    source: Role
    target: Role
    who: Who
    reason: str
    state: FlipState
    inputs: Mapping[str, float] = dataclasses.field(default_factory=dict)
    predicted_before: float | None = None
    predicted_after: float | None = None
    urgent: bool = False
    desired_instances: int | None = None
    detail: str = ""
    """Why it was refused, or failed."""
    seconds: float | None = None
    """From the preparation to the end, once done."""
    before: Tally = dataclasses.field(default_factory=Tally)
    """Over the window up to ``at_s``."""
    after: Tally = dataclasses.field(default_factory=Tally)
    """Over the window from its end on; grows until that is over."""


class FlipLog:
    """The last :data:`MAX_ENTRIES` switches, and the attainment that their effect is read from."""

    def __init__(self, window_s: float) -> None:
        self.window_s = window_s
        self._entries: collections.deque[FlipEntry] = collections.deque(maxlen=MAX_ENTRIES)
        self._num_entries = 0
        self._settling: list[tuple[float, FlipEntry]] = []
        """(End of its window, entry) of those whose effect is still counted."""
        self._recent: collections.deque[tuple[float, Tally]] = collections.deque()
        """Attainment of the last window, in pieces: (begin, tally)."""

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[FlipEntry]:
        """Oldest first."""
        return iter(self._entries)

    def tail(self, count: int | None = None) -> list[FlipEntry]:
        """The last ``count`` (``None``: all there are), oldest first."""
        entries = list(self._entries)
        return entries if count is None else entries[max(0, len(entries) - count) :]

    def add(self, entry: FlipEntry) -> FlipEntry:
        """Number an entry, take its ``before``, and keep it."""
        self._num_entries += 1
        entry.number = self._num_entries
        entry.before = self.recent(entry.at_s)
        self._entries.append(entry)
        return entry

    def done(self, entry: FlipEntry, now: float) -> None:
        """It was carried out: count its effect from now on."""
        entry.state = FlipState.DONE
        entry.seconds = now - entry.at_s
        self._settling.append((now + self.window_s, entry))

    def ended(self, met: bool, now: float) -> None:
        """A request with targets ended."""
        if not self._recent or now >= self._recent[-1][0] + self.window_s / _BUCKETS_PER_WINDOW:
            self._recent.append((now, Tally()))
        self._recent[-1][1].add(met)
        self._forget(now)
        self._settling = [(until_s, entry) for until_s, entry in self._settling if now <= until_s]
        for _, entry in self._settling:
            entry.after.add(met)

    def recent(self, now: float) -> Tally:
        """Over the window that ends ``now``."""
        self._forget(now)
        return Tally(
            sum(tally.num_met for _, tally in self._recent),
            sum(tally.num_ended for _, tally in self._recent),
        )

    def settled(self, entry: FlipEntry, now: float) -> bool:
        """Whether the window after a switch that was carried out is over."""
        return entry.seconds is not None and now > entry.at_s + entry.seconds + self.window_s

    def _forget(self, now: float) -> None:
        while self._recent and self._recent[0][0] < now - self.window_s:
            self._recent.popleft()
