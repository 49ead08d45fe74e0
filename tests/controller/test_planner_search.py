"""The planner's search over splits, against trying every one."""

from __future__ import annotations

import random

import numpy as np
import pytest

from baton.core.cluster import InstanceLoad, Role
from baton.core.cost_model import CostModel, LinkCosts, StepCosts
from baton.core.policy_config import RolesConfig
from controller.planner import RoleInstance, RoleView
from controller.slo_planner import Demand, SloPlanner
from tests.controller.controller_helpers import make_info

COST = CostModel(
    StepCosts(0.01, 1e-4, 0.0), StepCosts(0.01, 1e-4, 1e-8), LinkCosts(0.001, 1e10), 50_000.0
)


def members(num: int, draw: random.Random) -> list[RoleInstance]:
    roles = [draw.choice(list(Role)) for _ in range(num)]
    return [
        RoleInstance(make_info(f"i{i}", role), 0, True, False, False, InstanceLoad(), 0.0)
        for i, role in enumerate(roles)
    ]


def search(num: int, seed: int) -> tuple[SloPlanner, Demand, RolesConfig, float]:
    draw = random.Random(seed)
    planner = SloPlanner(lambda _: COST)
    demand = Demand(draw.uniform(0, num), draw.uniform(0, num), 0.05, 1000.0)
    config = RolesConfig(allow_mixed=draw.random() < 0.7)
    instances = members(num, draw)
    (headroom, split), _ = planner._target(
        instances, RoleView(tuple(instances), 0, config), COST, demand
    )
    assert sum(split) == num
    return planner, demand, config, headroom


def every(num: int, config: RolesConfig) -> list[tuple[int, int, int]]:
    return [
        (p, m, num - p - m)
        for p in range(num + 1)
        for m in range((num - p if config.allow_mixed else 0) + 1)
        if p + m >= config.min_prefill and num - p >= config.min_decode
    ]


@pytest.mark.parametrize("seed", range(60))
def test_few_instances_get_the_very_best_split(seed: int) -> None:
    num = random.Random(seed).randint(2, 12)
    planner, demand, config, headroom = search(num, seed)
    best = max(float(h) for h in planner._headroom(np.array(every(num, config)), COST, demand))
    assert headroom >= best - 1e-9


@pytest.mark.parametrize("seed", range(8))
def test_many_instances_get_one_that_is_hardly_worse(seed: int) -> None:
    num = 300
    planner, demand, config, headroom = search(num, seed)
    splits = np.array(every(num, config))
    best = float(planner._headroom(splits, COST, demand).max())
    assert headroom >= 0.98 * best
