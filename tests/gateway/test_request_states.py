from __future__ import annotations

import itertools

import pytest

from baton.gateway.request_states import TABLE, TERMINAL, IllegalTransition, State, Transition
from baton.gateway.request_states import advance as step


@pytest.mark.parametrize(("state", "transition"), list(itertools.product(State, Transition)))
def test_every_pair_is_in_the_table_or_refused(state: State, transition: Transition) -> None:
    if transition in TABLE[state]:
        assert step(state, transition) is TABLE[state][transition]
    else:
        with pytest.raises(IllegalTransition, match=str(state)):
            step(state, transition)


@pytest.mark.parametrize("state", State)
def test_ends_are_final_and_everything_else_can_end(state: State) -> None:
    if state in TERMINAL:
        assert TABLE[state] == {}
    else:
        assert TABLE[state][Transition.ABORT] is State.ABORTED
        assert TABLE[state][Transition.FAIL] is State.FAILED


def test_every_state_is_reachable() -> None:
    reached = {State.RECEIVED}
    while more := {after for state in reached for after in TABLE[state].values()} - reached:
        reached |= more
    assert reached == set(State)


def test_tokens_only_come_from_a_placed_attempt() -> None:
    with_output = {state for state in State if Transition.OUTPUT in TABLE[state]}
    assert with_output == {State.PLACED, State.STREAMING}
    entered_by_place = {
        t for state in State for t, after in TABLE[state].items() if after is State.PLACED
    }
    assert entered_by_place == {Transition.PLACE}
