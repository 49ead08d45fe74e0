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
import functools
import math
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from baton.core.cluster import Role
from baton.core.cost_model import CostModel
from baton.core.policy_config import RolesConfig
from controller.events import PlaceQuery, RequestEnded
from controller.planner import FlipProposal, RoleAdvice, RoleInstance, RoleView

_P, _D, _M = Role.PREFILL, Role.DECODE, Role.MIXED
_MAX_STEPS = 64
"""Of up to so many instances, every split is tried."""

Split = tuple[int, int, int]
"""Prefill, mixed and decode instances."""
Splits = npt.NDArray[np.int64]
"""Shape [splits, 3]."""
Headrooms = npt.NDArray[np.float64]


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
        cached = query.prefix[0].num_tokens if query.prefix else 0
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

    def _headroom(self, splits: Splits, cost: CostModel, demand: Demand) -> Headrooms:
        """Of each split: the smaller of both sides', weighted."""
        num_prefill, num_mixed, num_decode = splits.T.astype(np.float64)
        weight = self._tuning.decode_weight
        need = max(1e-3, demand.decode * weight)
        # Decodes go where nothing else is done first.
        on_mixed = np.minimum(np.maximum(0.0, need - num_decode), num_mixed)
        share = on_mixed / np.maximum(1.0, num_mixed)
        # What is left of a mixed instance's step beside the weights and its decodes.
        alone = max(0.0, 1.0 - cost.decode.overhead_s / self._limit_s(cost))
        prefill = num_prefill + num_mixed * alone * np.maximum(0.0, 1.0 - share)
        decode = num_decode + num_mixed
        enough = self._tuning.enough
        sides = np.minimum(prefill / max(1e-3, demand.prefill), decode / need)
        return np.asarray(np.minimum(sides, enough), dtype=np.float64)

    def _target(
        self,
        members: Sequence[RoleInstance],
        view: RoleView,
        cost: CostModel,
        demand: Demand,
    ) -> tuple[tuple[float, Split], tuple[float, Split]]:
        """The best split with its headroom, and today's."""
        counts = {role: sum(item.role is role for item in members) for role in Role}
        today = (counts[_P], counts[_M], counts[_D])
        here = (float(self._headroom(np.array([today]), cost, demand)[0]), today)
        num, config = len(members), view.config
        # Of many instances a few dozen steps first, and then those around the best.
        step = max(1, num // _MAX_STEPS)
        best = self._best(here, _splits(num, step, config.allow_mixed), config, cost, demand)
        while step > 1:
            step, near = max(1, step // 4), step
            around = _splits(num, step, config.allow_mixed, best[1], near)
            best = self._best(best, around, config, cost, demand, today)
        return best, here

    def _best(
        self,
        known: tuple[float, Split],
        splits: Splits,
        config: RolesConfig,
        cost: CostModel,
        demand: Demand,
        today: Split | None = None,
    ) -> tuple[float, Split]:
        """The one of the most headroom, or ``known``; of equals, that with the fewest moves from
        ``today`` (without: from ``known``)."""
        ok = (splits[:, 0] + splits[:, 1] >= config.min_prefill) & (
            splits[:, 1] + splits[:, 2] >= config.min_decode
        )
        splits = np.vstack([[known[1]], splits[ok]])
        headroom = self._headroom(splits, cost, demand)
        headroom[0] = known[0]
        moves = np.abs(splits - np.array(today or known[1])).sum(axis=1)
        good = np.flatnonzero(headroom > headroom.max() - 1e-9)
        found = int(good[moves[good].argmin()])
        num_prefill, num_mixed, num_decode = splits[found].tolist()
        return float(headroom[found]), (num_prefill, num_mixed, num_decode)

    def _towards(
        self,
        members: Sequence[RoleInstance],
        view: RoleView,
        demand: Demand,
        here: tuple[float, Split],
        best: tuple[float, Split],
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


@functools.lru_cache(maxsize=64)
def _splits(num: int, step: int, mixed: bool, around: Split | None = None, near: int = 0) -> Splits:
    """Ways to split ``num`` instances, in steps; ``around`` one, only so ``near``."""

    def counts(middle: int, most: int) -> range:
        if around is None:
            return range(0, most + 1, step)
        return range(max(0, middle - near), min(most, middle + near) + 1, step)

    first, second = (0, 0) if around is None else around[:2]
    found = [
        (num_prefill, num_mixed, num - num_prefill - num_mixed)
        for num_prefill in counts(first, num)
        for num_mixed in counts(second, num - num_prefill if mixed else 0)
    ]
    return np.array(found, dtype=np.int64).reshape(-1, 3)


def _tighter(known: float | None, new: float | None) -> float | None:
    """The target to plan for: the tightest, forgotten slowly once nobody asks for it."""
    if new is None:
        return known
    if known is None or new <= known:
        return new
    return known + 0.01 * (new - known)
