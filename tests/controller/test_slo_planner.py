"""What must hold of the planner however it is tuned, over clusters, loads and demands."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import hypothesis.strategies as st
from hypothesis import given, settings

from baton.core.cluster import InstanceLoad, Role
from baton.core.cost_model import CostModel, LinkCosts, StepCosts
from baton.core.policy_config import RolesConfig
from baton.core.slo import NO_TARGETS, Slo
from controller.events import PlaceQuery, RequestEnded
from controller.planner import FlipProposal, RoleInstance, RoleView
from controller.slo_planner import SloPlanner
from tests.controller.controller_helpers import idle_load, make_info

COST = CostModel(
    prefill=StepCosts(0.01, 1e-4, 0.0),
    decode=StepCosts(0.02, 1e-3, 0.0),
    handoff=LinkCosts(0.001, 1e9),
    kv_bytes_per_token=1000.0,
)
SLO = Slo(1.0, 0.05)
CONFIG = RolesConfig()
Ask = tuple[float, int, int]
"""When, prompt tokens, output tokens."""


def instance(name: str, role: Role, **more: object) -> RoleInstance:
    values = {"flip_group": 0, "ready": True, "pinned": False, "switching": False}
    made = {"load": idle_load(), "since_s": 0.0, **values, **more}
    info = dataclasses.replace(make_info(name, role), num_blocks=8000, max_num_seqs=32)
    return RoleInstance(info=info, **made)  # type: ignore[arg-type]


def group(prefill: int, mixed: int, decode: int) -> tuple[RoleInstance, ...]:
    roles = [Role.PREFILL] * prefill + [Role.MIXED] * mixed + [Role.DECODE] * decode
    return tuple(instance(f"i{number:02}", role) for number, role in enumerate(roles))


def told(asks: Iterable[Ask], slo: Slo = SLO, **query: object) -> SloPlanner:
    """A planner that knows costs, and of these requests."""
    planner = SloPlanner(lambda _: COST)
    planner.plan(RoleView(group(1, 0, 1), 0, CONFIG), 0.0)
    for number, (at_s, prompt, output) in enumerate(asks):
        # Outputs are learned from requests that ended.
        planner.ended(RequestEnded(f"e{number}", "stop", completion_tokens=output), at_s)
        values = {"num_prompt_tokens": prompt, "max_new_tokens": 10**6, "slo": slo, **query}
        planner.placed(PlaceQuery(f"r{number}", **values), at_s)  # type: ignore[arg-type]
    return planner


def steady(rate: float, seconds: float, prompt: int, output: int) -> list[Ask]:
    return [(i / rate, prompt, output) for i in range(int(rate * seconds))]


def pools(instances: Iterable[RoleInstance]) -> tuple[int, int]:
    ready = [item.role for item in instances if item.ready]
    return sum(r.takes_prefill for r in ready), sum(r.takes_decode for r in ready)


def switched(view: RoleView, proposal: FlipProposal) -> RoleView:
    """With what is proposed carried out."""
    after = tuple(
        dataclasses.replace(item, info=dataclasses.replace(item.info, role=proposal.role))
        if item.instance_id == proposal.instance_id
        else item
        for item in view.instances
    )
    return dataclasses.replace(view, instances=after)


loads = st.builds(
    InstanceLoad,
    num_waiting=st.integers(0, 50),
    num_waiting_tokens=st.integers(0, 200_000),
    num_decoding=st.integers(0, 30),
    num_context_tokens=st.integers(0, 100_000),
    num_offline_waiting_tokens=st.integers(0, 300_000),
    num_offline_decoding=st.integers(0, 40),
)
instances = st.lists(
    st.tuples(
        st.sampled_from(Role),
        loads,
        st.booleans(),
        st.sampled_from([False, False, True]),
        st.sampled_from([False, False, True]),
    ),
    min_size=1,
    max_size=10,
)
asked = st.lists(
    st.tuples(st.floats(0.0, 60.0), st.integers(1, 20_000), st.integers(1, 2_000)), max_size=60
).map(lambda found: sorted(found))
configs = st.builds(
    RolesConfig,
    min_prefill=st.integers(1, 3),
    min_decode=st.integers(1, 3),
    allow_mixed=st.booleans(),
    gain=st.sampled_from([0.0, 0.05, 0.3]),
)


@settings(max_examples=150, deadline=None)
@given(instances, asked, configs, st.integers(0, 100))
def test_a_proposal_is_one_that_can_be_carried_out(
    shapes: list[tuple[Role, InstanceLoad, bool, bool, bool]],
    asks: list[Ask],
    config: RolesConfig,
    num_queued: int,
) -> None:
    view = RoleView(
        tuple(
            instance(f"i{i}", role, load=load, ready=ready, pinned=pinned, switching=switching)
            for i, (role, load, ready, pinned, switching) in enumerate(shapes)
        ),
        num_queued,
        config,
    )
    planner = told(asks)
    proposal = planner.plan(view, 60.0)
    advice = planner.advice()
    assert told(asks).plan(view, 60.0) == proposal, "equal calls have equal answers"
    num_ready = sum(item.ready for item in view.instances)
    assert sum(advice.desired.values()) in (0, num_ready)
    if proposal is None:
        return
    [item] = [item for item in view.instances if item.instance_id == proposal.instance_id]
    assert item.ready
    assert not item.pinned
    assert not item.switching
    assert proposal.role is not item.role
    assert config.allow_mixed or proposal.role is not Role.MIXED
    before, after = pools(view.instances), pools(switched(view, proposal).instances)
    for least, was, then in zip(
        (config.min_prefill, config.min_decode), before, after, strict=True
    ):
        assert then >= least or then >= was, (before, after)
    assert proposal.reason
    assert proposal.predicted_before is not None
    assert proposal.predicted_after is not None
    assert proposal.predicted_after > proposal.predicted_before or proposal.predicted_before == 1.0


def test_a_group_in_which_something_switches_is_left_alone() -> None:
    asks = steady(30.0, 20.0, 2000, 20)
    view = RoleView(group(1, 0, 5), 0, CONFIG)
    assert told(asks).plan(view, 20.0) is not None
    busy = dataclasses.replace(view, busy_groups=frozenset({0}))
    assert told(asks).plan(busy, 20.0) is None


def test_nothing_is_proposed_where_nothing_is_known_or_promised() -> None:
    asks = steady(30.0, 20.0, 2000, 20)
    view = RoleView(group(1, 0, 5), 0, CONFIG)
    assert told(asks, slo=NO_TARGETS).plan(view, 20.0) is None
    assert told(asks, priority=-1).plan(view, 20.0) is None, "offline work moves nothing"
    assert told([]).plan(view, 20.0) is None
    blind = SloPlanner(lambda _: None)
    for number, (at_s, prompt, _) in enumerate(asks):
        blind.placed(PlaceQuery(f"r{number}", num_prompt_tokens=prompt, slo=SLO), at_s)
    assert blind.plan(view, 20.0) is None
    assert blind.advice().desired_instances is None


def test_offline_work_that_waits_is_no_demand() -> None:
    load = idle_load(num_waiting_tokens=10**6, num_offline_waiting_tokens=10**6)
    load = dataclasses.replace(load, num_decoding=9, num_offline_decoding=9)
    quiet, busy = (
        group(1, 0, 5),
        tuple(
            instance(f"i{i:02}", r, load=load)
            for i, r in enumerate([Role.PREFILL] + [Role.DECODE] * 5)
        ),
    )
    asks = steady(1.0, 20.0, 100, 5)
    plans = [told(asks).plan(RoleView(items, 0, CONFIG), 20.0) for items in (quiet, busy)]
    assert plans[0] == plans[1]


@settings(max_examples=40, deadline=None)
@given(st.floats(0.5, 10.0), st.integers(50, 5000), st.integers(5, 500), st.integers(2, 5))
def test_more_demand_wants_no_fewer_instances(
    rate: float, prompt: int, output: int, times: int
) -> None:
    wanted = []
    for factor in (1, times):
        planner = told(steady(rate * factor, 30.0, prompt, output))
        planner.plan(RoleView(group(2, 0, 2), 0, CONFIG), 30.0)
        count = planner.advice().desired_instances
        assert count is not None
        assert count >= 2
        wanted.append(count)
    assert wanted[1] >= wanted[0]


def test_a_queue_that_grows_is_demand_though_nothing_finishes() -> None:
    """Prompts wait and those few that end look fine (dynamo#10528): what arrives counts."""
    asks = steady(2.0, 20.0, 500, 20)
    idle = RoleView(group(2, 0, 6), 0, CONFIG)
    assert told(asks).plan(idle, 20.0) is None
    waiting = idle_load(num_waiting=40, num_waiting_tokens=400_000)
    items = tuple(
        dataclasses.replace(i, load=waiting) if i.role is Role.PREFILL else i
        for i in idle.instances
    )
    proposal = told(asks).plan(dataclasses.replace(idle, instances=items), 20.0)
    assert proposal is not None
    assert proposal.role.takes_prefill
    assert proposal.urgent


class Loop:
    """A cluster whose every proposal is carried out, one a cooldown."""

    def __init__(self, view: RoleView) -> None:
        self.view = view
        self.flips: list[tuple[float, FlipProposal]] = []
        self.planner = SloPlanner(lambda _: COST)
        self._num = 0
        self._ready_s = 0.0

    def run(self, asks: Iterable[Ask]) -> None:
        next_s = 0.0
        for at_s, prompt, output in asks:
            while next_s <= at_s:
                self._plan(next_s)
                next_s += 1.0
            self._num += 1
            self.planner.ended(RequestEnded("e", "stop", completion_tokens=output), at_s)
            query = PlaceQuery(
                f"r{self._num}", num_prompt_tokens=prompt, max_new_tokens=10**6, slo=SLO
            )
            self.planner.placed(query, at_s)

    def _plan(self, now: float) -> None:
        proposal = self.planner.plan(self.view, now)
        if proposal is not None and now >= self._ready_s:
            self.flips.append((now, proposal))
            self._ready_s = now + self.view.config.cooldown_s
            self.view = switched(self.view, proposal)


@settings(max_examples=25, deadline=None)
@given(
    st.floats(1.0, 20.0),
    st.integers(50, 4000),
    st.integers(5, 400),
    st.tuples(st.integers(1, 6), st.integers(0, 2), st.integers(1, 6)),
)
def test_roles_come_to_rest_under_a_steady_demand(
    rate: float, prompt: int, output: int, shape: tuple[int, int, int]
) -> None:
    loop = Loop(RoleView(group(*shape), 0, CONFIG))
    loop.run(steady(rate, 300.0, prompt, output))
    num = len(loop.view.instances)
    assert len(loop.flips) <= 2 * num, loop.flips
    assert not [p for at_s, p in loop.flips if at_s > 20.0 + 2 * num * CONFIG.cooldown_s]
    last: dict[str, Role] = {}
    for _, proposal in loop.flips:
        assert last.get(proposal.instance_id) is not proposal.role
        last[proposal.instance_id] = proposal.role


def test_less_and_less_of_the_same_moves_nothing() -> None:
    """What fits a demand fits the half of it: nothing goes back to what it was."""
    loop = Loop(RoleView(group(4, 0, 4), 0, CONFIG))
    loop.run(steady(10.0, 120.0, 1500, 60))
    settled = len(loop.flips)
    asks, at_s = [], 120.0
    while at_s < 400.0:
        asks.append((at_s, 1500, 60))
        at_s += 0.1 * 2 ** ((at_s - 120.0) / 60.0)
    loop.run(asks)
    assert len(loop.flips) <= settled + 1
    names = [proposal.instance_id for _, proposal in loop.flips]
    assert len(set(names)) == len(names)


def test_roles_follow_a_demand_that_changes_and_then_rest() -> None:
    loop = Loop(RoleView(group(4, 0, 4), 0, CONFIG))
    loop.run(steady(6.0, 100.0, 8000, 5))
    heavy = pools(loop.view.instances)
    assert heavy[0] > 4
    loop.run([(100.0 + at_s, prompt, n) for at_s, prompt, n in steady(6.0, 200.0, 20, 400)])
    light = pools(loop.view.instances)
    assert light[1] > heavy[1]
    assert min(*heavy, *light) >= 1
    assert max(at_s for at_s, _ in loop.flips) < 250.0
