from __future__ import annotations

import pytest

from controller.deadlines import Deadlines
from controller.membership import InstanceEvent, InstanceState, next_state, transitions

OPEN = (InstanceState.READY, InstanceState.DRAINING, InstanceState.DRAINED)


@pytest.mark.parametrize(("state", "event", "to"), transitions())
def test_each_transition(state: InstanceState, event: InstanceEvent, to: InstanceState) -> None:
    assert next_state(state, event) is to
    if event in (InstanceEvent.LOST, InstanceEvent.SUPERSEDED):
        assert to is InstanceState.DEAD
    if event is InstanceEvent.REGISTERED:
        assert to is InstanceState.JOINING
    if event is InstanceEvent.SESSION_CLOSED:
        assert to not in OPEN
    if to is InstanceState.READY and state is not InstanceState.READY:
        assert event in (InstanceEvent.SESSION_OPENED, InstanceEvent.UNDRAIN)


@pytest.mark.parametrize("event", InstanceEvent)
def test_nothing_leads_out_of_dead(event: InstanceEvent) -> None:
    with pytest.raises(KeyError):
        next_state(InstanceState.DEAD, event)


@pytest.mark.parametrize("state", [s for s in InstanceState if s is not InstanceState.DEAD])
def test_everything_can_die_and_reconnect(state: InstanceState) -> None:
    assert next_state(state, InstanceEvent.LOST) is InstanceState.DEAD
    again = next_state(state, InstanceEvent.REGISTERED)
    assert next_state(again, InstanceEvent.SESSION_OPENED) is InstanceState.READY


def test_only_ready_is_placeable() -> None:
    assert [state for state in InstanceState if state.placeable] == [InstanceState.READY]


def test_every_state_is_reached() -> None:
    assert {to for _, _, to in transitions()} == set(InstanceState)


def test_deadlines_come_in_order_and_move() -> None:
    deadlines: Deadlines[str] = Deadlines()
    assert deadlines.next() is None
    deadlines.set("a", 3.0)
    deadlines.set("b", 1.0)
    deadlines.set("c", 2.0)
    deadlines.set("b", 4.0)
    deadlines.clear("c")
    deadlines.clear("unknown")
    assert deadlines.next() == 3.0
    assert deadlines.pop_due(2.9) == []
    assert deadlines.pop_due(10.0) == ["a", "b"]
    assert deadlines.next() is None


def test_moved_deadlines_do_not_pile_up() -> None:
    deadlines: Deadlines[int] = Deadlines()
    for round_ in range(1000):
        for key in range(3):
            deadlines.set(key, float(round_))
    assert len(deadlines) == 3
    assert len(deadlines._heap) < 200
    assert sorted(deadlines.pop_due(1000.0)) == [0, 1, 2]
