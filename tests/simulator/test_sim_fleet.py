from __future__ import annotations

import dataclasses
import itertools

import pytest

from baton.core.cluster import Role
from baton.core.config import ControllerConfig
from baton.core.cost_model import StepShape, chunk_context
from baton.core.policy_config import RolesConfig
from baton.core.slo import ServiceLevel, Slo
from baton.simulator.fleet import Fleet
from baton.simulator.runs import Load, Scenario, build, find_goodput, run_once, static_best
from baton.simulator.workload import TraceRequest, follow, rescale
from controller.columns import PlacementView
from controller.events import PlaceQuery
from controller.planner import FlipProposal, RoleView, ScriptedPlanner
from controller.policies.base import Scores
from controller.policies.least_loaded import LeastLoaded
from tests.simulator.sim_kit import (
    COST,
    MESSAGE_S,
    PROFILE,
    SLO,
    check_over,
    make_fleet,
    steady,
    trace_of,
)

EXACT = 1e-6


def chunk_s(start: int, num_tokens: int) -> float:
    return COST.step_s(StepShape(num_tokens, chunk_context(start, num_tokens)))


def test_one_request_on_1p1d_takes_what_the_cost_model_says() -> None:
    prompt, output = 2500, 5
    fleet = make_fleet(1, 1)
    [outcome] = fleet.run(trace_of((0.0, prompt, output)))
    # Gateway to controller and back, and on to the instances; then chunks of at most 1,024.
    done_s = 2 * MESSAGE_S
    link_free_s = 0.0
    token_s = COST.kv_bytes_per_token / COST.handoff.bytes_per_s
    for start, num in ((0, 1024), (1024, 1024), (2048, 452)):
        done_s += chunk_s(start, num)
        # Each goes over the link as soon as it is there, and the link is free.
        link_free_s = max(link_free_s, done_s) + num * token_s
    assert outcome.ttft_s == pytest.approx(done_s + MESSAGE_S, abs=EXACT)
    # Token 0 came with the prompt; four more, each with one more token to read.
    end_s = link_free_s + COST.handoff.latency_s
    end_s += sum(COST.step_s(StepShape(0, 0, 1, prompt + i)) for i in range(output - 1))
    assert outcome.end_s == pytest.approx(end_s + MESSAGE_S, abs=EXACT)
    assert outcome.tpot_s == pytest.approx((end_s - done_s) / (output - 1), abs=EXACT)
    assert outcome.good
    assert fleet.instances["i1"].handed_tokens == prompt
    check_over(fleet, 1)


def test_one_request_on_a_mixed_instance_hands_nothing_over() -> None:
    fleet = make_fleet(0, 0, num_mixed=1)
    [outcome] = fleet.run(trace_of((3.0, 1000, 3)))
    ttft_s = 3 * MESSAGE_S + chunk_s(0, 1000)
    decodes_s = sum(COST.step_s(StepShape(0, 0, 1, 1000 + i)) for i in range(2))
    assert outcome.ttft_s == pytest.approx(ttft_s, abs=EXACT)
    assert outcome.end_s - 3.0 == pytest.approx(ttft_s + decodes_s, abs=EXACT)
    assert fleet.instances["i0"].handed_tokens == 0
    check_over(fleet, 1)


def test_a_single_token_needs_no_decode_side() -> None:
    fleet = make_fleet(1, 1)
    [outcome] = fleet.run(trace_of((0.0, 100, 1)))
    assert outcome.tpot_s is None
    assert outcome.good
    assert outcome.prefill == outcome.decode == "i0"
    check_over(fleet, 1)


@pytest.mark.parametrize(
    ("policy", "mixed"),
    [
        ("slo", 0),
        ("least-loaded", 0),
        ("round-robin", 0),
        ("prefix-affinity", 0),
        ("colocated", 4),
        ("slo", 2),
    ],
)
def test_every_request_ends_once_and_leaves_nothing(policy: str, mixed: int) -> None:
    """Under more than the cluster bears, so that queues and memory fill."""
    sides = 0 if policy == "colocated" else 2
    fleet = make_fleet(sides, sides, num_mixed=mixed, policy=policy)
    trace = steady(300, 0.01, 900, 40)
    outcomes = fleet.run(trace)
    assert not [o for o in outcomes if o.error]
    assert sorted(o.arrival_s for o in outcomes) == [r.arrival_s for r in trace]
    assert sum(o.num_prompt_tokens for o in outcomes) == sum(r.num_prompt_tokens for r in trace)
    check_over(fleet, len(trace))


def test_a_prompt_that_fits_nowhere_is_an_error_and_a_miss() -> None:
    fleet = make_fleet(1, 1)
    outcomes = fleet.run(trace_of((0.0, 100, 5), (0.1, PROFILE.max_model_len, 5)))
    assert [bool(o.error) for o in sorted(outcomes, key=lambda o: o.arrival_s)] == [False, True]
    assert not next(o for o in outcomes if o.error).good
    check_over(fleet, 2)


def test_equal_runs_have_equal_outcomes() -> None:
    trace = rescale(steady(200, 1.0, 700, 30), 12.0, "poisson", seed=4)
    scenario = Scenario(PROFILE, "slo", 2, 2, SLO)
    first, second = build(scenario), build(scenario)
    assert first.run(trace) == second.run(trace)
    assert first.role_log == second.role_log
    other = build(scenario).run(rescale(trace, 12.0, "poisson", seed=5))
    assert other != first.outcomes


class _Late(LeastLoaded):
    """Binds decode after prefill, always."""

    def __init__(self) -> None:
        self.bound_to: list[str] = []

    def score(self, query: PlaceQuery, view: PlacementView, now: float, draw: int) -> Scores:
        if query.bind_to is not None:
            self.bound_to.append(query.bind_to)
        return dataclasses.replace(super().score(query, view, now, draw), tentative=True)


def test_decode_may_be_bound_after_prefill() -> None:
    policy = _Late()
    fleet = make_fleet(2, 3, policy=policy)
    trace = steady(60, 0.05, 800, 20)
    outcomes = fleet.run(trace)
    assert not [o for o in outcomes if o.error]
    assert sorted(policy.bound_to) == sorted(o.prefill for o in outcomes)
    assert {o.prefill for o in outcomes} == {"i0", "i1"}
    assert {o.decode for o in outcomes} <= {"i2", "i3", "i4"}
    handed = sum(i.handed_tokens for i in fleet.instances.values())
    assert handed == sum(r.num_prompt_tokens for r in trace)
    check_over(fleet, len(trace))


def test_late_binding_costs_messages_and_the_handoff_but_not_the_first_token() -> None:
    request = trace_of((0.0, 2500, 5))
    [early] = make_fleet(1, 1).run(request)
    [late] = make_fleet(1, 1, policy=_Late()).run(request)
    assert late.ttft_s == early.ttft_s
    assert late.end_s > early.end_s


def restless(view: RoleView, now: float) -> FlipProposal:
    """Turn the instance of the larger side that had its role for the longest time."""
    sides = [[i for i in view.instances if i.role is r] for r in (Role.PREFILL, Role.DECODE)]
    larger = max(sides, key=lambda side: len(side))
    longest = min(larger, key=lambda item: (item.since_s, item.instance_id))
    role = Role.DECODE if longest.role is Role.PREFILL else Role.PREFILL
    return FlipProposal(longest.instance_id, role, "always", urgent=True)


def test_flips_at_every_turn_lose_no_request_and_empty_no_pool() -> None:
    roles = RolesConfig(mode="auto", interval_s=0.05, cooldown_s=0.02)
    fleet = make_fleet(
        2,
        2,
        controller=ControllerConfig(dead_after_s=1e5, queue_timeout_s=1e5, roles=roles),
        planner=ScriptedPlanner(restless),
    )
    trace = steady(400, 0.03, 900, 30)
    outcomes = fleet.run(trace)
    assert len(fleet.role_log) - len(fleet.instances) > 50
    assert not [o for o in outcomes if o.error]
    check_over(fleet, len(trace))
    check_pools(fleet)


def test_the_planner_follows_a_load_that_turns() -> None:
    reading, writing = steady(400, 0.02, 1500, 4), steady(200, 0.05, 100, 150)
    scenario = Scenario(PROFILE, "slo", 2, 2, SLO)
    fleet = build(scenario)
    trace = follow(reading, writing, reading)
    outcomes = fleet.run(trace)
    assert len(fleet.role_log) > len(fleet.instances)
    assert not [o for o in outcomes if o.error]
    check_over(fleet, len(trace))
    check_pools(fleet)
    frozen = build(dataclasses.replace(scenario, freeze_roles=True))
    frozen.run(trace)
    assert len(frozen.role_log) == len(frozen.instances)


def check_pools(fleet: Fleet) -> None:
    """At no time was there nobody to prefill or nobody to decode."""
    roles: dict[str, Role] = {}
    for _, group in itertools.groupby(fleet.role_log, key=lambda entry: entry[0]):
        roles.update({name: role for _, name, role in group})
        assert any(role.takes_prefill for role in roles.values())
        assert any(role.takes_decode for role in roles.values())


def test_offline_work_fills_the_room_that_is_left() -> None:
    """It ends as well, and online requests hardly notice."""
    levels = {
        "": ServiceLevel(slo=SLO),
        "batch": ServiceLevel("batch", priority=-1),
    }
    online = steady(100, 0.1, 600, 20)
    flood = tuple(TraceRequest(0.05, 800, 30, service_class="batch") for _ in range(80))
    alone = make_fleet(1, 1, policy="slo", levels=levels).run(online)
    fleet = make_fleet(1, 1, policy="slo", levels=levels)
    both = fleet.run(tuple(sorted((*online, *flood), key=lambda r: r.arrival_s)))
    assert not [o for o in both if o.error]
    good = sum(o.good for o in both if not o.service_class)
    assert good >= sum(o.good for o in alone) - 1
    check_over(fleet, len(online) + len(flood))


def test_a_run_is_cut_short_once_the_target_is_out_of_reach() -> None:
    scenario = Scenario(PROFILE, "least-loaded", 1, 1, SLO)
    trace = rescale(steady(200, 1.0, 900, 20), 100.0, "compressed")
    full = run_once(scenario, trace, 100.0)
    cut = run_once(scenario, trace, 100.0, give_up_below=0.9)
    assert cut.cut_short
    assert not full.cut_short
    assert full.attainment < cut.attainment < 0.9


def test_goodput_lies_between_what_is_met_and_what_is_missed() -> None:
    trace = steady(150, 1.0, 900, 20)

    def at(rate: float) -> Load:
        return Load(rescale(trace, rate, "poisson", seed=1))

    scenario = Scenario(PROFILE, "least-loaded", 1, 1, SLO)
    found = find_goodput(scenario, at, target=0.9, guess=3.0)
    assert found.at is not None
    assert found.at.attainment >= 0.9
    assert found.at.rate == found.goodput_rate
    missed = [r.rate for r in found.curve if r.cut_short]
    assert found.goodput_rate < min(missed) <= found.goodput_rate * 1.02
    best = static_best(Scenario(PROFILE, "slo", 2, 1, SLO), at, target=0.9, guess=3.0)
    assert best.split in ("2:1", "1:2")
    assert best.goodput_rate >= found.goodput_rate * 0.99


def test_no_rate_is_low_enough_for_an_impossible_target() -> None:
    trace = steady(30, 1.0, 900, 20)
    scenario = Scenario(PROFILE, "least-loaded", 1, 1, Slo(1e-4, 0.05))
    found = find_goodput(scenario, lambda rate: Load(rescale(trace, rate, "compressed")))
    assert found.goodput_rate == 0.0
    assert found.at is None
