"""A holder's last events, numbered, for whoever keeps an index of holders. Pure."""

from __future__ import annotations

import dataclasses
import itertools
from collections import deque

from baton.core.blocks import BlockKey
from kvpool.tiers import KVEvent, KVEventBatch

MAX_KEYS_PER_EVENT = 64
"""Events grow together up to this many keys."""
KEYS_PER_EVENT_KEPT = 16
"""The log keeps at most ``capacity`` times this many keys."""


@dataclasses.dataclass(frozen=True, slots=True)
class Gap:
    """The events asked for are not here: send a snapshot instead."""

    first_seq: int
    """Number of the oldest event that is kept; ``next_seq`` of the log if there is none."""


class KVEventLog:
    """Numbers the events of one life of a holder, from 0, and keeps the last ones.

    An event like the one before it (kind, tier, ``to``) is joined to that one, unless a reader may
    have seen its number already: ``batch_after`` and ``next_seq`` end the event that is growing.
    """

    def __init__(self, holder: str, life: int, capacity: int = 4096) -> None:
        if capacity < 1:
            raise ValueError(f"a log keeps at least one event, got a capacity of {capacity}")
        self._holder = holder
        self._life = life
        self._capacity = capacity
        self._events: deque[KVEvent] = deque()
        self._first_seq = 0
        self._num_keys = 0
        self._growing: KVEvent | None = None
        self._growing_keys: list[BlockKey] = []

    @property
    def holder(self) -> str:
        """Whose events these are."""
        return self._holder

    @property
    def life(self) -> int:
        """Which life of it."""
        return self._life

    @property
    def next_seq(self) -> int:
        """Number of the next event to be appended, which a snapshot taken now has to carry."""
        self._end_growing()
        return self._first_seq + len(self._events)

    def append(self, event: KVEvent) -> None:
        """What has just happened. Events without keys are nothing."""
        if not event.keys:
            return
        growing = self._growing
        if (
            growing is None
            or (growing.kind, growing.tier, growing.to) != (event.kind, event.tier, event.to)
            or len(self._growing_keys) + len(event.keys) > MAX_KEYS_PER_EVENT
        ):
            self._end_growing()
            self._growing = event
        self._growing_keys.extend(event.keys)

    def batch_after(self, seq: int, max_events: int) -> KVEventBatch | Gap | None:
        """Up to ``max_events`` events from number ``seq`` on; ``None`` if there are none yet.

        :class:`Gap` if some of them are no longer kept, or if ``seq`` is of the future: then the
        reader took numbers from another log. Raises ValueError if ``max_events`` is below 1.
        """
        if max_events < 1:
            raise ValueError(f"a batch has at least one event, got max_events={max_events}")
        next_seq = self.next_seq
        if seq == next_seq:
            return None
        if not self._first_seq <= seq < next_seq:
            return Gap(self._first_seq)
        start = seq - self._first_seq
        events = tuple(itertools.islice(self._events, start, start + max_events))
        return KVEventBatch(self._holder, self._life, seq, events)

    def _end_growing(self) -> None:
        if self._growing is None:
            return
        event = dataclasses.replace(self._growing, keys=tuple(self._growing_keys))
        self._growing = None
        self._growing_keys = []
        self._events.append(event)
        self._num_keys += len(event.keys)
        max_keys = self._capacity * KEYS_PER_EVENT_KEPT
        while len(self._events) > self._capacity or self._num_keys > max_keys:
            self._num_keys -= len(self._events.popleft().keys)
            self._first_seq += 1
