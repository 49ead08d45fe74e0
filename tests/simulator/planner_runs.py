"""The planner over minutes of virtual time: steady loads, and a shift that nobody sees in time.

On the published 910B profile, eight instances, four on each side to begin with.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import numpy as np

from baton.core.slo import Slo
from baton.engine.profile_file import load_profile
from baton.simulator.fleet import Fleet
from baton.simulator.outcome import Outcome
from baton.simulator.runs import Scenario, build
from baton.simulator.workload import Trace, TraceRequest
from tests.house.files import ROOT

PROFILE = load_profile(ROOT / "benchmarks" / "profiles" / "ascend-910b-qwen2.5-7b.yaml")
NUM_SIDE = 4
COOLDOWN_S = 10.0
SHIFT_AT_S = 60.0
END_S = 240.0


def poisson(rate: float, seconds: float, prompt: int, output: int, seed: int) -> Trace:
    """Lengths spread around these, as those of people are."""
    draw = np.random.default_rng(seed)
    count = int(rate * seconds)
    at_s = np.cumsum(draw.exponential(1.0 / rate, count))
    prompts = np.clip(prompt * draw.lognormal(0.0, 0.5, count), 1, 2 * prompt)
    outputs = np.clip(output * draw.lognormal(0.0, 0.5, count), 1, 4 * output)
    lengths = zip(at_s.tolist(), prompts.tolist(), outputs.tolist(), strict=True)
    return tuple(TraceRequest(t, int(p), max(1, int(o))) for t, p, o in lengths)


def run(trace: Trace, slo: Slo, *, frozen: bool = False, cooldown_s: float = COOLDOWN_S) -> Fleet:
    """To the end of all requests."""
    scenario = Scenario(
        PROFILE,
        "slo",
        NUM_SIDE,
        NUM_SIDE,
        slo,
        freeze_roles=frozen,
        heartbeat_s=1.0,
        interval_s=1.0,
        cooldown_s=cooldown_s,
    )
    fleet = build(scenario)
    fleet.run(trace)
    assert len(fleet.outcomes) == len(trace)
    assert not [outcome for outcome in fleet.outcomes if outcome.error]
    return fleet


def attained(fleet: Fleet, when: Callable[[Outcome], bool] = lambda _: True) -> float:
    """Share of the requests that met their targets."""
    found = [outcome.good for outcome in fleet.outcomes if when(outcome)]
    return sum(found) / len(found)


def flips_of(fleet: Fleet) -> list[tuple[float, str, str]]:
    """(when, which instance, its new role), without what they began as."""
    return [(at_s, name, str(role)) for at_s, name, role in fleet.role_log[2 * NUM_SIDE :]]


def shortest_gap_s(flips: Sequence[tuple[float, str, str]]) -> float:
    """Between two flips; endless where there are fewer."""
    times = [at_s for at_s, _, _ in flips]
    return min((b - a for a, b in itertools.pairwise(times)), default=float("inf"))


def returns(flips: Sequence[tuple[float, str, str]], start: dict[str, str]) -> list[str]:
    """Instances that went from one role to another and back, with the times; one line each."""
    history = {name: [(0.0, role)] for name, role in start.items()}
    for at_s, name, role in flips:
        history[name].append((at_s, role))
    return [
        f"{name}: {before} -> {there} at {at_s:.0f} s -> {after} at {back_s:.0f} s"
        for name, roles in history.items()
        for (_, before), (at_s, there), (back_s, after) in zip(
            roles, roles[1:], roles[2:], strict=False
        )
        if before == after
    ]


def start_roles() -> dict[str, str]:
    """Of :func:`run`."""
    return {f"i{i}": "prefill" if i < NUM_SIDE else "decode" for i in range(2 * NUM_SIDE)}


def hidden_shift(rate: float, seed: int = 1) -> Trace:
    """The shape of dynamo#10528: from one moment on prompts and outputs are long, and what ends
    for a while is what came before, so that those that finish look fine while the queue grows."""
    before = poisson(15.0, SHIFT_AT_S, 1000, 100, seed)
    after = poisson(rate, END_S - SHIFT_AT_S, 5000, 300, seed + 1)
    return before + tuple(dataclasses.replace(r, arrival_s=r.arrival_s + SHIFT_AT_S) for r in after)


SHIFT_SLO = Slo(2.0, 0.05)


def late(outcome: Outcome) -> bool:
    """Arrived long after the shift."""
    return outcome.arrival_s >= END_S - 90.0


def ended_soon_after(outcome: Outcome) -> bool:
    """What a planner that looks at finished requests sees while the queue grows."""
    return SHIFT_AT_S <= outcome.end_s < SHIFT_AT_S + 10.0
