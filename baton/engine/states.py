"""The life of a sequence inside one engine, as a table.

A sequence enters in ``WAITING`` (``Part.PREFILL``, ``Part.WHOLE``) or ``PENDING_BLOCKS``
(``Part.DECODE``, and any that is to fetch a prefix first) and leaves in ``FINISHED``. What a
state holds (blocks, a slot of the runner) is a table as well: whoever moves a sequence reads there
what to give back.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from types import MappingProxyType


class SequenceState(enum.StrEnum):
    """Where a sequence stands."""

    WAITING = "waiting"
    """Wants blocks and a slot, to compute all of its tokens."""
    PENDING_BLOCKS = "pending_blocks"
    """Wants blocks for KV that another instance computes, or that the pool holds."""
    PENDING_KV = "pending_kv"
    """Blocks reserved, bytes on their way."""
    READY = "ready"
    """Has its blocks and KV (all of it, or a trusted prefix); wants a slot."""
    RUNNING = "running"
    """Has blocks and a slot: prefills or decodes."""
    PREEMPTED = "preempted"
    """Must give its blocks back; an uncommitted plan may still write to them."""
    HELD = "held"
    """Prefill part: done; the blocks wait for the decode side."""
    FINISHED = "finished"
    """Over. Blocks are freed as soon as no uncommitted plan writes to them."""


class SequenceEvent(enum.StrEnum):
    """What may happen to a sequence."""

    START = "start"
    """It gets a slot (and blocks, where it has none)."""
    RESERVE = "reserve"
    """It gets blocks for KV to come."""
    KV_ARRIVED = "kv_arrived"
    KV_FAILED = "kv_failed"
    """The KV will not come: compute it here."""
    FETCHED = "fetched"
    """What the pool had of a prefix is here; the rest is computed here."""
    PREEMPT = "preempt"
    """Others need its blocks more."""
    DRAINED = "drained"
    """No uncommitted plan contains it any more."""
    HOLD = "hold"
    """Its prefill is complete and another instance decodes."""
    RELEASE = "release"
    """The decode side has the blocks, or its lease ran out."""
    FINISH = "finish"
    """Stop token or length."""
    ABORT = "abort"
    """The client, a deadline or a failed step ends it."""


class IllegalTransition(Exception):
    """An event met a state that does not know it: a bug of the engine."""


_S, _E = SequenceState, SequenceEvent

LIVE_STATES = frozenset(SequenceState) - {_S.FINISHED}

TRANSITIONS: Mapping[tuple[SequenceState, SequenceEvent], SequenceState] = MappingProxyType(
    {
        (_S.WAITING, _E.START): _S.RUNNING,
        (_S.READY, _E.START): _S.RUNNING,
        (_S.PENDING_BLOCKS, _E.RESERVE): _S.PENDING_KV,
        (_S.PENDING_KV, _E.KV_ARRIVED): _S.READY,
        (_S.PENDING_KV, _E.KV_FAILED): _S.READY,
        (_S.PENDING_BLOCKS, _E.KV_FAILED): _S.WAITING,
        (_S.PENDING_KV, _E.FETCHED): _S.READY,
        (_S.PENDING_BLOCKS, _E.FETCHED): _S.WAITING,
        (_S.RUNNING, _E.PREEMPT): _S.PREEMPTED,
        (_S.READY, _E.PREEMPT): _S.PREEMPTED,
        (_S.PREEMPTED, _E.DRAINED): _S.WAITING,
        (_S.RUNNING, _E.HOLD): _S.HELD,
        (_S.HELD, _E.RELEASE): _S.FINISHED,
        (_S.RUNNING, _E.FINISH): _S.FINISHED,
        (_S.PREEMPTED, _E.FINISH): _S.FINISHED,
        (_S.PENDING_BLOCKS, _E.FINISH): _S.FINISHED,
        (_S.PENDING_KV, _E.FINISH): _S.FINISHED,
        **{(state, _E.ABORT): _S.FINISHED for state in LIVE_STATES},
    }
)

HOLDS_BLOCKS = frozenset({_S.PENDING_KV, _S.READY, _S.RUNNING, _S.PREEMPTED, _S.HELD})
"""Outside these a sequence has no blocks (a FINISHED one: once it is drained)."""

HOLDS_SLOT = frozenset({_S.RUNNING})


def next_state(state: SequenceState, event: SequenceEvent) -> SequenceState:
    """The state after ``event``. Raises IllegalTransition where the table has no entry."""
    try:
        return TRANSITIONS[state, event]
    except KeyError:
        raise IllegalTransition(f"a {state} sequence cannot {event}") from None
