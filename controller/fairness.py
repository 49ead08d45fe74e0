"""Whose turn it is in a queue: by priority, then tenants by weight, then arrival. Pure.

Start-time fair queueing. Each tenant has a virtual time at which its next entry *starts*; an entry
ends ``tokens / weight`` later, and the entry that ends first goes first. A tenant that was served
much is far ahead of the others, who go before it; one that had nothing to do for a while begins
where the others are, so it can save nothing up. Only what is served is charged: an entry that
leaves in another way costs its tenant nothing.

For tenants of equal weight: while both wait, what one got is never ahead of what the other got by
more than one entry of each.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import heapq
from collections.abc import Iterator

_MAX_IDLE_TENANTS = 4096
_MAX_IDLE_LEVELS = 64


@dataclasses.dataclass(frozen=True, slots=True)
class Ticket:
    """One entry: ``number`` names it, and is higher for a later arrival."""

    number: int
    priority: int
    tenant: str
    tokens: float
    weight: float = 1.0

    @property
    def cost(self) -> float:
        """Of virtual time."""
        return self.tokens / self.weight


class _Tenant:
    def __init__(self, start: float) -> None:
        self.start = start
        """Virtual time at which its first entry starts."""
        self.waiting: collections.deque[Ticket] = collections.deque()
        """In order of arrival."""
        self.cost = 0.0
        """Of all that wait."""


class _Level:
    """The tenants of one priority."""

    def __init__(self) -> None:
        self._now = 0.0
        """Virtual: where the entry served last started."""
        self._tenants: dict[str, _Tenant] = {}
        self._idle: collections.OrderedDict[str, float] = collections.OrderedDict()
        """Where tenants without an entry would start, if that is ahead of the others."""

    def __bool__(self) -> bool:
        return bool(self._tenants)

    def push(self, ticket: Ticket) -> None:
        tenant = self._tenants.get(ticket.tenant)
        if tenant is None:
            start = max(self._now, self._idle.pop(ticket.tenant, 0.0))
            tenant = self._tenants[ticket.tenant] = _Tenant(start)
        tenant.waiting.append(ticket)
        tenant.cost += ticket.cost

    def remove(self, ticket: Ticket, *, served: bool) -> None:
        tenant = self._tenants[ticket.tenant]
        if tenant.waiting[0] is ticket:
            tenant.waiting.popleft()
        else:
            tenant.waiting.remove(ticket)
        tenant.cost -= ticket.cost
        if served:
            self._now = max(self._now, tenant.start)
            tenant.start += ticket.cost
        if tenant.waiting:
            return
        del self._tenants[ticket.tenant]
        if tenant.start > self._now:
            self._idle[ticket.tenant] = tenant.start
            if len(self._idle) > _MAX_IDLE_TENANTS:
                self._idle.popitem(last=False)

    def __iter__(self) -> Iterator[Ticket]:
        """In the order in which they would be served. Nothing may change meanwhile."""
        heads = []
        for tenant in self._tenants.values():
            rest = iter(tenant.waiting)
            first = next(rest)
            heads.append((tenant.start + first.cost, first.number, first, rest))
        heapq.heapify(heads)
        while heads:
            end, _, ticket, rest = heads[0]
            yield ticket
            following = next(rest, None)
            if following is None:
                heapq.heappop(heads)
            else:
                heapq.heapreplace(heads, (end + following.cost, following.number, following, rest))

    def last(self) -> Ticket:
        """Of the tenant that would be served last, what came last."""
        tenant = max(
            self._tenants.values(),
            key=lambda item: (item.start + item.cost, item.waiting[-1].number),
        )
        return tenant.waiting[-1]


class FairQueue:
    """Entries in the order of their turns."""

    def __init__(self) -> None:
        self._levels: dict[int, _Level] = {}
        self._priorities: list[int] = []
        """Of all levels, lowest first."""
        self._tickets: dict[int, Ticket] = {}

    def __len__(self) -> int:
        return len(self._tickets)

    def __contains__(self, number: int) -> bool:
        return number in self._tickets

    def push(self, ticket: Ticket) -> None:
        """Add an entry; its number must be new."""
        assert ticket.number not in self._tickets
        self._tickets[ticket.number] = ticket
        if ticket.priority not in self._levels:
            if len(self._levels) >= _MAX_IDLE_LEVELS:
                self._levels = {p: level for p, level in self._levels.items() if level}
                self._priorities = sorted(self._levels)
            self._levels[ticket.priority] = _Level()
            bisect.insort(self._priorities, ticket.priority)
        self._levels[ticket.priority].push(ticket)

    def remove(self, number: int, *, served: bool) -> None:
        """Take an entry out; one that was served is charged to its tenant."""
        ticket = self._tickets.pop(number)
        self._levels[ticket.priority].remove(ticket, served=served)

    def raise_priority(self, number: int, priority: int) -> None:
        """Move an entry up (or down), behind what waits there."""
        ticket = self._tickets[number]
        self.remove(number, served=False)
        self.push(dataclasses.replace(ticket, priority=priority))

    def __iter__(self) -> Iterator[int]:
        """Numbers in order of their turns. Nothing may change meanwhile."""
        for priority in reversed(self._priorities):
            for ticket in self._levels[priority]:
                yield ticket.number

    @property
    def highest_priority(self) -> int | None:
        """Of all entries; ``None`` of none."""
        return next((p for p in reversed(self._priorities) if self._levels[p]), None)

    def last(self) -> int | None:
        """Whose turn is least near: of the lowest priority, the one that came last of the tenant
        with the most before it. ``None`` of none."""
        lowest = next((p for p in self._priorities if self._levels[p]), None)
        return None if lowest is None else self._levels[lowest].last().number
