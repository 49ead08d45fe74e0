"""Placement knows which host tier is on which machine, as pool nodes come and go."""

from __future__ import annotations

import dataclasses

from baton.core.config import ControllerConfig
from baton.core.cost_model import CostModel, LinkCosts, StepCosts
from controller import events
from tests.controller.controller_helpers import Bench, make_info, placed

COSTS = CostModel(
    prefill=StepCosts(0.0, 1e-3, 0.0),
    decode=StepCosts(0.01, 0.0, 0.0),
    handoff=LinkCosts(0.0, 1e9),
    kv_bytes_per_token=1000.0,
    tiers={"host": LinkCosts(0.0, 1e9), "remote": LinkCosts(0.0, 2e6)},
)


def test_a_host_tier_is_near_for_the_instances_of_its_machine() -> None:
    bench = Bench(ControllerConfig(policy="slo"), costs=COSTS)
    for machine in ("x", "y"):
        for role in ("prefill", "decode"):
            name = f"{role}-{machine}"
            bench.register(dataclasses.replace(make_info(name, role), node_id=machine))
            bench.open(name)
    session = bench.next_id()
    prefix = (events.PrefixMatch("pool-y", "host", 500),)

    def prefill_of(request_id: str) -> str:
        found = placed(bench.place_one(request_id, num_prompt_tokens=600, prefix=prefix))
        bench.end(request_id)
        bench.advance(1.0)
        for name in bench.sessions:
            bench.beat(name)
        return found.prefill.instance_id

    member = events.MemberInfo("pool", "pool-y", node_id="y")
    bench.feed(events.MemberSeen(session, member))
    assert {prefill_of(f"near-{i}") for i in range(8)} == {"prefill-y"}
    bench.feed(events.MemberGone(session))
    far = {prefill_of(f"far-{i}") for i in range(8)}
    assert far == {"prefill-x", "prefill-y"}, "its machine is not known: it is as far for both"
