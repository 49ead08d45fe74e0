"""Turns in the placement queue: priority, then tenants by weight, then arrival."""

from __future__ import annotations

import collections
import itertools

import hypothesis.strategies as st
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from controller.fairness import FairQueue, Ticket

TENANTS = ("a", "b", "c")


def serve_all(queue: FairQueue) -> list[int]:
    """In order of their turns, each charged."""
    order = []
    while len(queue):
        order.append(next(iter(queue)))
        queue.remove(order[-1], served=True)
    return order


def filled(*tickets: Ticket) -> FairQueue:
    queue = FairQueue()
    for ticket in tickets:
        queue.push(ticket)
    return queue


def test_first_come_first_served_within_a_tenant_and_priority_above_all() -> None:
    queue = filled(
        *(Ticket(n, priority, "a", 10) for n, priority in enumerate((0, 2, 0, 1, 2, -1), start=1))
    )
    assert list(queue) == [2, 5, 4, 1, 3, 6]
    assert (queue.highest_priority, queue.last()) == (2, 6)
    assert serve_all(queue) == [2, 5, 4, 1, 3, 6]
    assert (queue.highest_priority, queue.last()) == (None, None)


def test_a_flood_does_not_hold_up_another_tenant() -> None:
    flood = [Ticket(n, 0, "flood", 100) for n in range(1, 101)]
    queue = filled(*flood, *(Ticket(n, 0, "small", 100) for n in range(101, 111)))
    order = serve_all(queue)
    turns = [index for index, number in enumerate(order) if number > 100]
    # One of ten tickets each: the small tenant is through after at most every second turn.
    assert all(turn <= 2 * count + 1 for count, turn in enumerate(turns))
    assert sorted(order) == list(range(1, 111))


def test_shares_follow_weights() -> None:
    queue = filled(
        *(Ticket(n, 0, "gold", 10, weight=3.0) for n in range(1, 61)),
        *(Ticket(n, 0, "plain", 10) for n in range(101, 161)),
    )
    first = serve_all(queue)[:40]
    assert sum(number < 100 for number in first) == 30


def test_tokens_count_not_requests() -> None:
    queue = filled(
        *(Ticket(n, 0, "long", 1000) for n in range(1, 11)),
        *(Ticket(n, 0, "short", 100) for n in range(101, 201)),
    )
    first = serve_all(queue)[:55]
    assert sum(number < 100 for number in first) == 5


def test_who_was_away_saved_nothing_up() -> None:
    queue = filled(*(Ticket(n, 0, "busy", 10) for n in range(1, 101)))
    for _ in range(50):
        queue.remove(next(iter(queue)), served=True)
    for number in range(201, 211):
        queue.push(Ticket(number, 0, "new", 10))
    first = serve_all(queue)[:20]
    assert sum(number > 200 for number in first) == 10, "half the turns, not all of them"


def test_leaving_unserved_costs_nothing() -> None:
    queue = filled(
        *(Ticket(n, 0, "a", 10) for n in range(1, 11)),
        *(Ticket(n, 0, "b", 10) for n in range(11, 21)),
    )
    for number in range(1, 9):
        queue.remove(number, served=False)
    assert list(queue)[:4] == [9, 11, 10, 12]


def test_the_last_is_the_greediest_tenants() -> None:
    queue = filled(
        *(Ticket(n, 0, "flood", 10) for n in range(1, 11)),
        Ticket(11, 0, "small", 10),
        Ticket(12, 3, "flood", 10),
    )
    assert queue.last() == 10
    queue.push(Ticket(13, -1, "small", 1))
    assert queue.last() == 13, "lower priority goes first"


def test_a_raised_entry_waits_behind_those_of_its_new_priority() -> None:
    queue = filled(Ticket(1, -1, "a", 10), Ticket(2, 0, "a", 10), Ticket(3, -1, "a", 10))
    queue.raise_priority(3, 0)
    assert list(queue) == [2, 3, 1]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(TENANTS), st.integers(1, 500), st.sampled_from((0.5, 1.0, 4.0))),
        min_size=1,
        max_size=60,
    )
)
def test_backlogged_tenants_get_what_their_weights_say(
    arrivals: list[tuple[str, int, float]],
) -> None:
    """While two wait, their normalised service differs by one entry of each at most."""
    weight: dict[str, float] = {}
    tickets: dict[int, Ticket] = {}
    for number, (tenant, tokens, share) in enumerate(arrivals, start=1):
        weight.setdefault(tenant, share)
        tickets[number] = Ticket(number, 0, tenant, tokens, weight[tenant])
    queue = filled(*tickets.values())
    waiting = collections.Counter(ticket.tenant for ticket in tickets.values())
    largest = {
        tenant: max(t.cost for t in tickets.values() if t.tenant == tenant) for tenant in waiting
    }
    served = dict.fromkeys(waiting, 0.0)
    predicted = list(queue)
    order = []
    while len(queue):
        number = next(iter(queue))
        queue.remove(number, served=True)
        order.append(number)
        ticket = tickets[number]
        served[ticket.tenant] += ticket.cost
        waiting[ticket.tenant] -= 1
        for one, other in itertools.combinations(served, 2):
            if waiting[one] and waiting[other]:
                bound = largest[one] + largest[other]
                assert abs(served[one] - served[other]) <= bound + 1e-6
    assert order == predicted, "what iteration promises is what happens"
    for tenant in served:
        mine = [number for number in order if tickets[number].tenant == tenant]
        assert mine == sorted(mine)


class QueueMachine(RuleBasedStateMachine):
    """Pushes, serves, leaves and rises in any order: nothing is lost, priority always holds."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = FairQueue()
        self.priority: dict[int, int] = {}
        self.num = 0

    @rule(
        priority=st.integers(-1, 2),
        tenant=st.sampled_from(TENANTS),
        tokens=st.integers(1, 50),
        weight=st.sampled_from((0.5, 1.0, 2.0)),
    )
    def push(self, priority: int, tenant: str, tokens: int, weight: float) -> None:
        self.num += 1
        self.queue.push(Ticket(self.num, priority, tenant, tokens, weight))
        self.priority[self.num] = priority

    @precondition(lambda self: self.priority)
    @rule()
    def serve(self) -> None:
        number = next(iter(self.queue))
        self.queue.remove(number, served=True)
        del self.priority[number]

    @precondition(lambda self: self.priority)
    @rule(data=st.data(), served=st.booleans())
    def leave(self, data: st.DataObject, served: bool) -> None:
        number = data.draw(st.sampled_from(sorted(self.priority)))
        self.queue.remove(number, served=served)
        del self.priority[number]

    @precondition(lambda self: self.priority)
    @rule(data=st.data())
    def rise(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.priority)))
        self.queue.raise_priority(number, 0)
        self.priority[number] = 0

    @invariant()
    def everything_is_there_in_order(self) -> None:
        order = list(self.queue)
        assert sorted(order) == sorted(self.priority)
        assert len(self.queue) == len(order)
        priorities = [self.priority[number] for number in order]
        assert priorities == sorted(priorities, reverse=True)
        assert self.queue.highest_priority == (priorities[0] if order else None)
        last = self.queue.last()
        assert last is None if not order else self.priority[last or 0] == priorities[-1]


TestQueueMachine = QueueMachine.TestCase
TestQueueMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
