"""Simulated runs: one at one rate, and the highest rate that keeps the target."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from baton.core.cluster import Role
from baton.core.config import ControllerConfig
from baton.core.cost_model import Profile
from baton.core.policy_config import RolesConfig
from baton.core.slo import ServiceLevel, Slo, percentile
from baton.simulator.fleet import Fleet, FleetConfig
from baton.simulator.outcome import Outcome
from baton.simulator.pool import PoolSettings
from baton.simulator.workload import Trace
from controller.core import ControllerCore
from controller.planner import NullPlanner, RolePlanner
from controller.policies import make_policy
from controller.slo_planner import PlannerTuning, SloPlanner

RateTrace = Callable[[float], "Load"]
"""A trace at a rate (requests per second), or with its phases' rates times a factor."""

STATIC_BEST = "static-best"
"""Not a policy: the best of all static splits in hindsight, placed by ``least-loaded``."""


@dataclasses.dataclass(frozen=True, slots=True)
class Load:
    """What arrives, and when its phases begin."""

    trace: Trace
    starts_s: tuple[float, ...] = (0.0,)


@dataclasses.dataclass(frozen=True, slots=True)
class Scenario:
    """One policy on one cluster."""

    profile: Profile
    policy: str
    num_prefill: int
    num_decode: int
    slo: Slo
    freeze_roles: bool = False
    heartbeat_s: float = 0.5
    cooldown_s: float = 1.0
    interval_s: float = 0.25
    gain: float = 0.05
    allow_mixed: bool = True
    tuning: PlannerTuning = dataclasses.field(default_factory=PlannerTuning)
    levels: tuple[ServiceLevel, ...] = ()
    max_tokens_told: int | None = 4096
    pool: PoolSettings | None = None

    @property
    def roles(self) -> tuple[Role, ...]:
        """As the cluster starts."""
        if self.policy == "colocated":
            return (Role.MIXED,) * (self.num_prefill + self.num_decode)
        return (Role.PREFILL,) * self.num_prefill + (Role.DECODE,) * self.num_decode

    @property
    def is_elastic(self) -> bool:
        """Whether roles may change."""
        return self.policy == "slo" and not self.freeze_roles


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
    """One run."""

    policy: str
    rate: float
    attainment: float
    num_requests: int
    cut_short: bool
    """Ended as soon as the target was out of reach: ``attainment`` is then an upper bound."""
    percentiles: dict[str, float]
    num_flips: int
    utilisation: dict[str, float]
    """Share of time in steps, by the role that instances had at the end."""
    handed_tokens: int
    num_steps: int
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    """Of these, found in the instance's own cache or in the pool."""
    fetched_tokens: dict[str, int] = dataclasses.field(default_factory=dict)
    """From the pool, by tier."""
    phases: tuple[float, ...] = ()
    """Attainment in each phase, where the trace has several."""
    role_log: tuple[tuple[float, str, str], ...] = ()

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


def build(scenario: Scenario) -> Fleet:
    """The cluster, before anything arrives."""
    controller = ControllerConfig(
        policy=scenario.policy,
        heartbeat_s=scenario.heartbeat_s,
        dead_after_s=1e5,
        queue_timeout_s=1e5,
        trace_capacity=1,
        roles=RolesConfig(
            mode="auto" if scenario.is_elastic else "off",
            interval_s=scenario.interval_s,
            cooldown_s=scenario.cooldown_s,
            gain=scenario.gain,
            allow_mixed=scenario.allow_mixed,
        ),
    )
    cost = scenario.profile.cost

    def make_core(config: ControllerConfig) -> ControllerCore:
        planner: RolePlanner = NullPlanner()
        if scenario.is_elastic:
            planner = SloPlanner(lambda _: cost, tuning=scenario.tuning)
        return ControllerCore(
            config, epoch=1, policy=make_policy(scenario.policy), costs=cost, planner=planner
        )

    levels = {level.service_class: level for level in scenario.levels}
    levels.setdefault("", ServiceLevel(slo=scenario.slo))
    return Fleet(
        FleetConfig(
            profile=scenario.profile,
            roles=scenario.roles,
            controller=controller,
            levels=levels,
            max_tokens_told=scenario.max_tokens_told,
            pool=scenario.pool,
        ),
        make_core,
    )


class _Tally:
    """Misses by phase; knows when the target is out of reach."""

    def __init__(self, trace: Trace, starts_s: Sequence[float], target: float | None) -> None:
        self._starts_s = starts_s
        self.totals = [0] * len(starts_s)
        for request in trace:
            self.totals[self._phase(request.arrival_s)] += 1
        self.misses = [0] * len(starts_s)
        self._allowed = [
            total if target is None else int((1.0 - target) * total + 1e-9) for total in self.totals
        ]

    def _phase(self, arrival_s: float) -> int:
        return bisect.bisect_right(self._starts_s, arrival_s) - 1

    def out_of_reach(self, fleet: Fleet) -> bool:
        """After each outcome."""
        outcome = fleet.outcomes[-1]
        if outcome.good:
            return False
        phase = self._phase(outcome.arrival_s)
        self.misses[phase] += 1
        return self.misses[phase] > self._allowed[phase]


def run_once(
    scenario: Scenario,
    trace: Trace,
    rate: float,
    *,
    give_up_below: float | None = None,
    starts_s: Sequence[float] = (0.0,),
) -> Result:
    """One run. ``give_up_below``: end it once attainment, in any phase, must end up below that.

    ``starts_s``: when the phases of the trace begin; the first at 0.
    """
    fleet = build(scenario)
    tally = _Tally(trace, starts_s, give_up_below)
    outcomes = fleet.run(trace, stop=tally.out_of_reach)
    cut_short = len(outcomes) < len(trace)
    span_s = max(1e-9, fleet.now)
    utilisation: dict[str, list[float]] = {}
    for instance in fleet.instances.values():
        utilisation.setdefault(instance.role, []).append(instance.busy_s / span_s)
    return Result(
        policy=scenario.policy,
        rate=rate,
        attainment=1.0 - sum(tally.misses) / len(trace),
        num_requests=len(trace),
        cut_short=cut_short,
        percentiles=percentiles(outcomes),
        num_flips=len(fleet.role_log) - len(fleet.instances),
        utilisation={role: sum(v) / len(v) for role, v in utilisation.items()},
        handed_tokens=sum(i.handed_tokens for i in fleet.instances.values()),
        num_steps=sum(i.num_steps for i in fleet.instances.values()),
        num_prompt_tokens=sum(o.num_prompt_tokens for o in outcomes),
        num_cached_tokens=sum(o.num_cached_tokens for o in outcomes),
        fetched_tokens={} if fleet.pool is None else fleet.pool.fetched_tokens(),
        phases=tuple(
            1.0 - bad / max(1, total) for bad, total in zip(tally.misses, tally.totals, strict=True)
        ),
        role_log=tuple((at, name, str(role)) for at, name, role in fleet.role_log),
    )


def percentiles(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """p50, p90, p99 of TTFT and TPOT, in seconds."""
    values = {
        "ttft": [o.ttft_s for o in outcomes if o.ttft_s is not None],
        "tpot": [o.tpot_s for o in outcomes if o.tpot_s is not None],
    }
    found: dict[str, float] = {}
    for name, numbers in values.items():
        for q in (50, 90, 99):
            value = percentile(numbers, q)
            if value is not None:
                found[f"{name}_p{q}_s"] = value
    return found


@dataclasses.dataclass(frozen=True, slots=True)
class Goodput:
    """The highest rate at which a target was met, and what was tried."""

    policy: str
    goodput_rate: float
    at: Result | None
    curve: tuple[Result, ...]
    split: str = ""


def find_goodput(
    scenario: Scenario,
    trace_at: RateTrace,
    *,
    target: float = 0.9,
    guess: float = 10.0,
    precision: float = 0.01,
    factor: float = 1.5,
) -> Goodput:
    """Bracket from ``guess`` by factors, then bisect to ``precision`` (relative)."""
    curve: list[Result] = []

    def good(rate: float) -> bool:
        load = trace_at(rate)
        result = run_once(scenario, load.trace, rate, give_up_below=target, starts_s=load.starts_s)
        curve.append(result)
        return not result.cut_short and min(result.phases) >= target

    low, high = 0.0, 0.0
    rate = guess
    while True:
        if good(rate):
            low = rate
            if high:
                break
            rate *= factor
        else:
            high = rate
            if low:
                break
            rate /= factor
            if rate < guess * 1e-3:
                return Goodput(scenario.policy, 0.0, None, tuple(curve))
    while high - low > precision * high:
        middle = (low + high) / 2
        if good(middle):
            low = middle
        else:
            high = middle
    best = next(r for r in curve if r.rate == low)
    return Goodput(scenario.policy, low, best, tuple(sorted(curve, key=lambda r: r.rate)))


def static_best(
    scenario: Scenario, trace_at: RateTrace, *, target: float = 0.9, guess: float = 10.0
) -> Goodput:
    """Every split of the same number of instances, least-loaded; the best in hindsight."""
    num = scenario.num_prefill + scenario.num_decode
    best: Goodput | None = None
    for num_prefill in range(num - 1, 0, -1):
        one = dataclasses.replace(
            scenario,
            policy="least-loaded",
            num_prefill=num_prefill,
            num_decode=num - num_prefill,
            freeze_roles=True,
        )
        start = guess
        if best is not None and best.goodput_rate > 0:
            # Worth the search only if it beats the best so far.
            start = best.goodput_rate * 1.01
            load = trace_at(start)
            probe = run_once(one, load.trace, start, give_up_below=target, starts_s=load.starts_s)
            if probe.cut_short or min(probe.phases) < target:
                continue
        found = find_goodput(one, trace_at, target=target, guess=start)
        if best is None or found.goodput_rate > best.goodput_rate:
            best = dataclasses.replace(
                found, policy=STATIC_BEST, split=f"{num_prefill}:{num - num_prefill}"
            )
    assert best is not None
    return best
