"""Every (state, event) pair, generated from the table."""

import pytest

from baton.engine.states import (
    HOLDS_BLOCKS,
    HOLDS_SLOT,
    LIVE_STATES,
    TRANSITIONS,
    IllegalTransition,
    SequenceEvent,
    SequenceState,
    next_state,
)

PAIRS = [(state, event) for state in SequenceState for event in SequenceEvent]


@pytest.mark.parametrize(("state", "event"), PAIRS)
def test_each_pair_follows_the_table(state: SequenceState, event: SequenceEvent) -> None:
    expected = TRANSITIONS.get((state, event))
    if expected is None:
        with pytest.raises(IllegalTransition, match=f"{state} sequence cannot {event}"):
            next_state(state, event)
    else:
        assert next_state(state, event) is expected


def test_nothing_leaves_finished() -> None:
    assert not [state for state, _ in TRANSITIONS if state is SequenceState.FINISHED]


@pytest.mark.parametrize("state", sorted(LIVE_STATES))
def test_every_live_state_can_be_aborted(state: SequenceState) -> None:
    assert next_state(state, SequenceEvent.ABORT) is SequenceState.FINISHED


def test_every_state_is_reachable_from_an_entry() -> None:
    seen = {SequenceState.WAITING, SequenceState.PENDING_BLOCKS}
    while True:
        more = {after for (before, _), after in TRANSITIONS.items() if before in seen}
        if more <= seen:
            break
        seen |= more
    assert seen == set(SequenceState)


def test_a_slot_is_never_held_without_blocks() -> None:
    assert HOLDS_SLOT <= HOLDS_BLOCKS <= LIVE_STATES


@pytest.mark.parametrize("state", sorted(HOLDS_BLOCKS - {SequenceState.PENDING_KV}))
def test_blocks_come_from_starting_reserving_or_a_state_that_has_them(
    state: SequenceState,
) -> None:
    gives_blocks = {SequenceEvent.START, SequenceEvent.RESERVE}
    for (before, event), after in TRANSITIONS.items():
        if after is state and before not in HOLDS_BLOCKS:
            assert event in gives_blocks
