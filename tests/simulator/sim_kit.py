"""Small clusters in virtual time, for tests."""

from __future__ import annotations

import dataclasses
from typing import Any

from baton.core.cluster import Role
from baton.core.config import ControllerConfig
from baton.core.cost_model import CostModel, LinkCosts, Profile, StepCosts
from baton.core.slo import ServiceLevel, Slo
from baton.simulator.fleet import Fleet, FleetConfig
from baton.simulator.workload import Trace, TraceRequest
from controller.core import ControllerCore
from controller.policies.base import PlacementPolicy

COST = CostModel(
    prefill=StepCosts(0.010, 1e-4, 1e-9),
    decode=StepCosts(0.020, 1e-3, 1e-8),
    handoff=LinkCosts(0.002, 1e9),
    kv_bytes_per_token=50_000.0,
)
PROFILE = Profile(
    name="test",
    source="made up",
    cost=COST,
    kv_capacity_tokens=64_000,
    max_model_len=16_384,
    max_num_seqs=32,
    max_num_batched_tokens=1024,
    block_size=64,
)
MESSAGE_S = 0.0005
SLO = Slo(1.0, 0.05)


def trace_of(*requests: tuple[float, int, int]) -> Trace:
    """(arrival, prompt tokens, output tokens)."""
    return tuple(TraceRequest(*request) for request in requests)


def steady(num: int, gap_s: float, prompt: int, output: int) -> Trace:
    """Lengths vary a little, so that steps differ."""
    return tuple(
        TraceRequest(i * gap_s, prompt + 37 * (i % 5), max(1, output + (i % 7) - 3))
        for i in range(num)
    )


def make_fleet(
    num_prefill: int,
    num_decode: int,
    *,
    num_mixed: int = 0,
    policy: PlacementPolicy | str = "least-loaded",
    levels: dict[str, ServiceLevel] | None = None,
    controller: ControllerConfig | None = None,
    config: dict[str, Any] | None = None,
    **core: Any,
) -> Fleet:
    """``config``: of the fleet; ``core``: arguments of the controller's core."""
    settings = controller or ControllerConfig(dead_after_s=1e5, queue_timeout_s=1e5)
    if isinstance(policy, str):
        settings = dataclasses.replace(settings, policy=policy)
    else:
        core["policy"] = policy
    roles = (Role.PREFILL,) * num_prefill + (Role.DECODE,) * num_decode + (Role.MIXED,) * num_mixed
    return Fleet(
        FleetConfig(
            profile=PROFILE,
            roles=roles,
            controller=settings,
            message_s=MESSAGE_S,
            levels=levels if levels is not None else {"": ServiceLevel(slo=SLO)},
            **(config or {}),
        ),
        lambda made: ControllerCore(made, epoch=1, costs=COST, **core),
    )


def check_over(fleet: Fleet, num_requests: int) -> None:
    """Every request ended once, and nothing is left of any of them."""
    assert len(fleet.outcomes) == num_requests
    fleet.settle()
    assert len(fleet.outcomes) == num_requests
    assert not fleet.core.state.open
    assert fleet.core.placements.num_queued == 0
    view = fleet.core.state.columns.view
    assert not view.open_prefill.any()
    assert not view.open_decode.any()
    for instance in fleet.instances.values():
        instance.engine.check_integrity()
        assert instance.engine.request_ids() == []
        load = instance.load()
        assert load.num_free_blocks + load.num_cached_blocks == PROFILE.num_blocks
