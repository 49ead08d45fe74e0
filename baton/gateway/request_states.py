"""The life of one submission at the gateway, as a table. Pure; tests are generated from it.

``received``  checked, nothing asked for yet
``queued``    waits for its first placement
``placed``    has a placement; being submitted, no new token yet in this attempt
``streaming`` this attempt has brought new tokens
``replaying`` the attempt is lost; waits for the next placement
``finished``, ``failed``, ``aborted``: over, each for good
"""

from __future__ import annotations

import enum


class State(enum.StrEnum):
    """Where a submission is."""

    RECEIVED = "received"
    QUEUED = "queued"
    PLACED = "placed"
    STREAMING = "streaming"
    REPLAYING = "replaying"
    FINISHED = "finished"
    FAILED = "failed"
    ABORTED = "aborted"


class Transition(enum.StrEnum):
    """What happens to a submission."""

    ENQUEUE = "enqueue"
    PLACE = "place"
    OUTPUT = "output"
    LOSE = "lose"
    FINISH = "finish"
    FAIL = "fail"
    ABORT = "abort"


TERMINAL = frozenset({State.FINISHED, State.FAILED, State.ABORTED})

_ENDS = {Transition.FAIL: State.FAILED, Transition.ABORT: State.ABORTED}
_RUNNING = {
    Transition.OUTPUT: State.STREAMING,
    Transition.LOSE: State.REPLAYING,
    Transition.FINISH: State.FINISHED,
    **_ENDS,
}

TABLE: dict[State, dict[Transition, State]] = {
    State.RECEIVED: {Transition.ENQUEUE: State.QUEUED, **_ENDS},
    State.QUEUED: {Transition.PLACE: State.PLACED, **_ENDS},
    State.PLACED: _RUNNING,
    State.STREAMING: _RUNNING,
    # A lost attempt may already have brought every token: then there is nothing to replay.
    State.REPLAYING: {Transition.PLACE: State.PLACED, Transition.FINISH: State.FINISHED, **_ENDS},
    State.FINISHED: {},
    State.FAILED: {},
    State.ABORTED: {},
}


class IllegalTransition(RuntimeError):
    """A bug of the caller: the table has no such step."""


def advance(state: State, transition: Transition) -> State:
    """The next state. Raises IllegalTransition where the table has none."""
    try:
        return TABLE[state][transition]
    except KeyError:
        raise IllegalTransition(f"{transition} in state {state}") from None
