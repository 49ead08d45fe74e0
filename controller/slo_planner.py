"""Plans roles so that the demand that is predicted fits the instances. Pure.

Demand is counted in instances. *Prefill*: seconds of prefill work that arrive per second, and the
work that waits, which is to be gone within a TTFT. *Decode*: tokens that are asked for per second,
over what one instance makes when its steps take as long as the TPOT target allows. Both come from
requests as they arrive and wait, not from those that have finished: when a queue grows, the
requests that end still look fine.

For each split of a flip group into prefill, mixed and decode instances there is a *headroom*: the
smaller of capacity over demand of the two. The best split is the target, and one instance at a time
moves towards it, if that promises enough (``RolesConfig.gain``).
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from baton.core.cluster import Role
from baton.core.cost_model import CostModel
from controller.events import PlaceQuery, RequestEnded
from controller.planner import FlipProposal, RoleAdvice, RoleInstance, RoleView

_P, _D, _M = Role.PREFILL, Role.DECODE, Role.MIXED


@dataclasses.dataclass(frozen=True, slots=True)
class PlannerTuning:
    """How the planner looks at demand. The defaults were chosen on the first halves of traces."""

    short_s: float = 4.0
    """A window that sees bursts; demand is the larger of what the two windows say."""
    long_s: float = 20.0
    """A window that sees the level."""
    tpot_share: float = 0.8
    """Of the TPOT target that a full decode batch may use."""
    decode_weight: float = 1.25
    """How much more headroom decode shall have than prefill: its requests stay for longer."""
    enough: float = 3.0
    """Headroom beyond this is worth nothing."""
    urgent: float = 0.9
    """Less headroom than this is urgent."""


@dataclasses.dataclass(frozen=True, slots=True)
class Demand:
    """What is asked for; in instances of one shape that do nothing else."""

    prefill: float
    decode: float
    tpot_s: float | None
    """The tightest target of recent requests."""
    context: float
    """Mean tokens in the cache of a decode."""


class _Window:
    """Sums of what arrived within the last ``span_s``."""

    def __init__(self, span_s: float) -> None:
        self._span_s = span_s
        self._items: deque[tuple[float, float, float]] = deque()
        self._sums = [0.0, 0.0]
        self._first_s: float | None = None

    def add(self, now: float, prefill_s: float, num_tokens: float) -> None:
        """One request."""
        if self._first_s is None:
            self._first_s = now
        self._items.append((now, prefill_s, num_tokens))
        self._sums[0] += prefill_s
        self._sums[1] += num_tokens

    def rates(self, now: float) -> tuple[float, float]:
        """Per second: prefill seconds, output tokens."""
        items, sums = self._items, self._sums
        while items and items[0][0] < now - self._span_s:
            _, prefill_s, num_tokens = items.popleft()
            sums[0] -= prefill_s
            sums[1] -= num_tokens
        if not items:
            sums[0] = sums[1] = 0.0
        since = now if self._first_s is None else self._first_s
        span_s = max(1.0, min(self._span_s, now - since))
        return sums[0] / span_s, sums[1] / span_s


class SloPlanner:
    """The default. ``cost_of`` predicts for an instance (id); ``None`` while nothing is known."""

    def __init__(
        self,
        cost_of: Callable[[str], CostModel | None],
        *,
        tuning: PlannerTuning | None = None,
    ) -> None:
        self._cost_of = cost_of
        self._tuning = tuning or PlannerTuning()
        self._short = _Window(self._tuning.short_s)
        self._long = _Window(self._tuning.long_s)
        self._some_cost: CostModel | None = None
        self._output_tokens: dict[str, float] = {}
        self._prompt_tokens = 0.0
        self._ttft_s: float | None = None
        self._tpot_s: float | None = None
        self._advice = RoleAdvice()

    # What happens.

    def placed(self, query: PlaceQuery, now: float) -> None:
        """See ``RolePlanner``."""
        slo = query.slo
        if query.attempt or query.bind_to is not None or query.priority < 0:
            return
        if slo.ttft_s is None and slo.tpot_s is None:
            return
        cost = self._some_cost
        cached = max((match.num_tokens for match in query.prefix), default=0)
        prefill_s = 0.0
        if cost is not None:
            prefill_s = cost.prefill_s(
                query.num_prompt_tokens, min(cached, query.num_prompt_tokens)
            )
        output = self._output_tokens.get(query.service_class)
        # While nothing is known of outputs, what decodes there are tells the demand.
        output = 0.0 if output is None else min(output, query.max_new_tokens)
        for window in (self._short, self._long):
            window.add(now, prefill_s, output)
        self._prompt_tokens += 0.02 * (query.num_prompt_tokens - self._prompt_tokens)
        self._ttft_s = _tighter(self._ttft_s, slo.ttft_s)
        self._tpot_s = _tighter(self._tpot_s, slo.tpot_s)

    def ended(self, outcome: RequestEnded, now: float) -> None:
        """See ``RolePlanner``."""
        if outcome.error or not outcome.completion_tokens:
            return
        known = self._output_tokens.get(outcome.service_class, float(outcome.completion_tokens))
        known += 0.02 * (outcome.completion_tokens - known)
        self._output_tokens[outcome.service_class] = known

    # What should be.

    def plan(self, view: RoleView, now: float) -> FlipProposal | None:
        """See ``RolePlanner``."""
        groups = sorted({item.flip_group for item in view.instances if item.ready})
        proposal: FlipProposal | None = None
        desired: dict[Role, int] = {}
        wanted = 0
        for group in groups:
            members = [item for item in view.group(group) if item.ready]
            cost = self._cost_of(members[0].instance_id)
            if cost is None:
                continue
            self._some_cost = cost
            if self._tpot_s is None and self._ttft_s is None:
                continue
            demand = self.demand(members, cost, now)
            target, now_at = self._target(members, view, cost, demand)
            for role, count in zip((_P, _M, _D), target[1], strict=True):
                desired[role] = desired.get(role, 0) + count
            wanted += max(2, math.ceil(demand.prefill + self._tuning.decode_weight * demand.decode))
            if proposal is None and group not in view.busy_groups:
                proposal = self._towards(members, view, demand, now_at, target, wanted)
        self._advice = RoleAdvice(desired, wanted or None)
        return proposal

    def advice(self) -> RoleAdvice:
        """See ``RolePlanner``."""
        return self._advice

    def demand(self, members: Sequence[RoleInstance], cost: CostModel, now: float) -> Demand:
        """Of the whole group; what waits is in it."""
        tuning = self._tuning
        short, long = self._short.rates(now), self._long.rates(now)
        waiting = sum(
            max(0, item.load.num_waiting_tokens - item.load.num_offline_waiting_tokens)
            for item in members
        )
        item_s = cost.prefill.item_s + cost.prefill.overhead_s / max(
            1, members[0].info.max_num_batched_tokens
        )
        backlog_s = waiting * item_s
        ttft_s = self._ttft_s if self._ttft_s is not None else 1.0
        prefill = max(short[0], long[0]) + backlog_s / max(ttft_s, tuning.short_s)
        context = self._prompt_tokens + self._mean_output() / 2
        decoding = sum(
            max(0, item.load.num_decoding - item.load.num_offline_decoding) for item in members
        )
        per_instance = self._decode_batch(members[0], cost, context)
        limit_s = self._limit_s(cost)
        # Tokens asked for per second, or sequences that are there: whichever is more.
        decode = max(max(short[1], long[1]) * limit_s / per_instance, decoding / per_instance)
        return Demand(prefill, decode, self._tpot_s, context)

    def _mean_output(self) -> float:
        values = self._output_tokens.values()
        return sum(values) / len(values) if values else 0.0

    def _limit_s(self, cost: CostModel) -> float:
        """How long a decode step may take."""
        least = 1.5 * cost.decode.overhead_s
        if self._tpot_s is None:
            return max(4 * cost.decode.overhead_s, least)
        return max(self._tpot_s * self._tuning.tpot_share, least)

    def _decode_batch(self, item: RoleInstance, cost: CostModel, context: float) -> float:
        """The most sequences one instance decodes within the limit, by time, slots and memory."""
        info = item.info
        marginal = cost.decode.item_s + context * cost.decode.context_s
        by_time = (self._limit_s(cost) - cost.decode.overhead_s) / max(marginal, 1e-9)
        by_memory = info.num_blocks * info.block_size / max(1.0, context)
        return max(1.0, min(by_time, float(info.max_num_seqs), by_memory))

    def _headroom(self, split: tuple[int, int, int], cost: CostModel, demand: Demand) -> float:
        """Of a split (prefill, mixed, decode): the smaller of both sides', weighted."""
        num_prefill, num_mixed, num_decode = split
        weight = self._tuning.decode_weight
        need = max(1e-3, demand.decode * weight)
        # Decodes go where nothing else is done first.
        on_mixed = max(0.0, need - num_decode)
        if on_mixed > num_mixed:
            on_mixed = float(num_mixed)
        share = on_mixed / num_mixed if num_mixed else 0.0
        # What is left of a mixed instance's step beside the weights and its decodes.
        alone = max(0.0, 1.0 - cost.decode.overhead_s / self._limit_s(cost))
        prefill = num_prefill + num_mixed * alone * max(0.0, 1.0 - share)
        decode = num_decode + num_mixed
        enough = self._tuning.enough
        return min(min(prefill / max(1e-3, demand.prefill), enough), min(decode / need, enough))

    def _target(
        self,
        members: Sequence[RoleInstance],
        view: RoleView,
        cost: CostModel,
        demand: Demand,
    ) -> tuple[tuple[float, tuple[int, int, int]], tuple[float, tuple[int, int, int]]]:
        """The best split with its headroom, and today's."""
        counts = {role: sum(item.role is role for item in members) for role in Role}
        today = (counts[_P], counts[_M], counts[_D])
        here = (self._headroom(today, cost, demand), today)
        best = here
        config = view.config
        for split in _splits(len(members), mixed=config.allow_mixed):
            if split[0] + split[1] < config.min_prefill or split[1] + split[2] < config.min_decode:
                continue
            headroom = self._headroom(split, cost, demand)
            if headroom > best[0] + 1e-9 or (
                headroom > best[0] - 1e-9 and _moves(split, today) < _moves(best[1], today)
            ):
                best = (headroom, split)
        return best, here

    def _towards(
        self,
        members: Sequence[RoleInstance],
        view: RoleView,
        demand: Demand,
        here: tuple[float, tuple[int, int, int]],
        best: tuple[float, tuple[int, int, int]],
        wanted: int,
    ) -> FlipProposal | None:
        """The first move from today's split to the best one."""
        if best[1] == here[1] or best[0] < here[0] * (1.0 + view.config.gain) + 1e-6:
            return None
        surplus = [a - b for a, b in zip(here[1], best[1], strict=True)]
        roles = (_P, _M, _D)
        source = max(range(3), key=lambda i: surplus[i])
        sink = min(range(3), key=lambda i: surplus[i])
        candidates = [
            item
            for item in members
            if item.role is roles[source] and not item.pinned and not item.switching
        ]
        if not candidates:
            return None
        to_prefill = roles[sink].takes_prefill and not roles[source].takes_prefill
        victim = min(candidates, key=lambda item: (_flip_cost(item, to_prefill), item.instance_id))
        text = " : ".join(str(n) for n in best[1])
        return FlipProposal(
            victim.instance_id,
            roles[sink],
            f"demand is {demand.prefill:.2f} instances of prefill and {demand.decode:.2f} of "
            f"decode; {text} (prefill : mixed : decode) fits it best",
            inputs={
                "demand_prefill": demand.prefill,
                "demand_decode": demand.decode,
                "headroom_now": here[0],
                "headroom_then": best[0],
            },
            predicted_before=min(1.0, here[0]),
            predicted_after=min(1.0, best[0]),
            urgent=here[0] < self._tuning.urgent,
            desired_instances=wanted,
        )


def _flip_cost(item: RoleInstance, to_prefill: bool) -> float:
    """What a switch leaves behind: decodes that go on beside prompts, or prompts before decodes."""
    load = item.load
    return float(load.num_decoding if to_prefill else load.num_waiting_tokens)


def _splits(num: int, *, mixed: bool) -> Iterator[tuple[int, int, int]]:
    for num_prefill in range(num + 1):
        for num_mixed in range((num - num_prefill if mixed else 0) + 1):
            yield num_prefill, num_mixed, num - num_prefill - num_mixed


def _moves(one: tuple[int, int, int], other: tuple[int, int, int]) -> int:
    return sum(abs(a - b) for a, b in zip(one, other, strict=True))


def _tighter(known: float | None, new: float | None) -> float | None:
    """The target to plan for: the tightest, forgotten slowly once nobody asks for it."""
    if new is None:
        return known
    if known is None or new <= known:
        return new
    return known + 0.01 * (new - known)
