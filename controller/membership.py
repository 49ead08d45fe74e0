"""The life of an instance, as a table: which event leads from which state to which.

    joining    registered; its session is not open yet
    ready      its session is open; it takes placements
    draining   an operator wants it empty; what it has goes on, nothing new comes
    drained    draining, and empty
    suspect    its session ended; no placements until it comes back
    dead       fenced for good: this incarnation never serves again

A table entry that is missing is a bug of the caller and raises KeyError: every pair that may
happen is listed, also those that change nothing.
"""

from __future__ import annotations

import enum


class InstanceState(enum.StrEnum):
    """See the module docstring."""

    JOINING = "joining"
    READY = "ready"
    DRAINING = "draining"
    DRAINED = "drained"
    SUSPECT = "suspect"
    DEAD = "dead"

    @property
    def placeable(self) -> bool:
        """Whether new work may be placed on it."""
        return self is InstanceState.READY


class InstanceEvent(enum.StrEnum):
    """What may happen to an instance."""

    REGISTERED = "registered"
    """It registered (again) with this incarnation."""
    SESSION_OPENED = "session_opened"
    """The first heartbeat of a stream arrived."""
    SESSION_CLOSED = "session_closed"
    """Its stream ended."""
    DRAIN = "drain"
    UNDRAIN = "undrain"
    EMPTIED = "emptied"
    """It reports that nothing is open."""
    BUSY = "busy"
    """It reports that something is open."""
    LOST = "lost"
    """Silent for too long, or its grace is over."""
    SUPERSEDED = "superseded"
    """A newer incarnation of the same instance registered."""


_S, _E = InstanceState, InstanceEvent

_TABLE: dict[InstanceState, dict[InstanceEvent, InstanceState]] = {
    _S.JOINING: {
        _E.REGISTERED: _S.JOINING,
        _E.SESSION_OPENED: _S.READY,
        _E.SESSION_CLOSED: _S.JOINING,
        _E.DRAIN: _S.JOINING,
        _E.UNDRAIN: _S.JOINING,
        _E.LOST: _S.DEAD,
        _E.SUPERSEDED: _S.DEAD,
    },
    _S.READY: {
        _E.REGISTERED: _S.JOINING,
        _E.SESSION_OPENED: _S.READY,
        _E.SESSION_CLOSED: _S.SUSPECT,
        _E.DRAIN: _S.DRAINING,
        _E.UNDRAIN: _S.READY,
        _E.EMPTIED: _S.READY,
        _E.BUSY: _S.READY,
        _E.LOST: _S.DEAD,
        _E.SUPERSEDED: _S.DEAD,
    },
    _S.DRAINING: {
        _E.REGISTERED: _S.JOINING,
        _E.SESSION_OPENED: _S.DRAINING,
        _E.SESSION_CLOSED: _S.SUSPECT,
        _E.DRAIN: _S.DRAINING,
        _E.UNDRAIN: _S.READY,
        _E.EMPTIED: _S.DRAINED,
        _E.BUSY: _S.DRAINING,
        _E.LOST: _S.DEAD,
        _E.SUPERSEDED: _S.DEAD,
    },
    _S.DRAINED: {
        _E.REGISTERED: _S.JOINING,
        _E.SESSION_OPENED: _S.DRAINED,
        _E.SESSION_CLOSED: _S.SUSPECT,
        _E.DRAIN: _S.DRAINED,
        _E.UNDRAIN: _S.READY,
        _E.EMPTIED: _S.DRAINED,
        _E.BUSY: _S.DRAINING,
        _E.LOST: _S.DEAD,
        _E.SUPERSEDED: _S.DEAD,
    },
    _S.SUSPECT: {
        _E.REGISTERED: _S.JOINING,
        _E.SESSION_OPENED: _S.READY,
        _E.SESSION_CLOSED: _S.SUSPECT,
        _E.DRAIN: _S.SUSPECT,
        _E.UNDRAIN: _S.SUSPECT,
        _E.LOST: _S.DEAD,
        _E.SUPERSEDED: _S.DEAD,
    },
    # Nothing leads out of dead; a process that comes back gets a new incarnation.
    _S.DEAD: {},
}


def transitions() -> list[tuple[InstanceState, InstanceEvent, InstanceState]]:
    """Every entry of the table; tests and documents are made from it."""
    return [(state, event, to) for state, row in _TABLE.items() for event, to in row.items()]


def next_state(state: InstanceState, event: InstanceEvent) -> InstanceState:
    """The state after ``event``. KeyError for a pair that must not happen."""
    return _TABLE[state][event]
