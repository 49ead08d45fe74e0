"""Placement over columns against the straightforward way: one pair after the other, in floats."""

from __future__ import annotations

import dataclasses
import math
import random

import numpy as np
import pytest

from baton.core.cluster import InstanceLoad
from baton.core.cost_model import CostModel, LinkCosts, StepCosts
from baton.core.slo import Slo
from controller.columns import TIERS, Columns, PlacementView
from controller.events import PlaceQuery, PrefixMatch
from controller.policies.base import NoChoice, choose
from controller.policies.slo import SloAware
from tests.controller.controller_helpers import make_info

NOW = 100.0
MISS = 1e3
AVOID = 1e6
PATIENCE = 30.0


def some_costs(draw: random.Random) -> CostModel:
    def vary(value: float) -> float:
        return value * draw.uniform(0.5, 2.0)

    def link(bytes_per_s: float) -> LinkCosts:
        return LinkCosts(vary(0.001), vary(bytes_per_s))

    return CostModel(
        StepCosts(vary(0.01), vary(1e-4), vary(1e-9)),
        StepCosts(vary(0.02), vary(1e-3), vary(1e-8)),
        link(2e9),
        50_000.0,
        {"host": link(1e10), "disk": link(1e9)},
    )


def some_fleet(draw: random.Random) -> Columns:
    """Instances on three machines, two groups that cannot hand over to each other, some unready."""
    columns = Columns()
    columns.set_pool_nodes({f"pool-{i}": f"machine-{i}" for i in range(3)})
    for number in range(draw.randint(1, 14)):
        info = make_info(
            f"i{number}",
            draw.choice(["prefill", "decode", "mixed"]),
            max_model_len=draw.choice([1600, 1600, 500]),
            fingerprint=draw.choice(["f", "f", "f", "g"]),
        )
        info = dataclasses.replace(info, node_id=f"machine-{number % 3}")
        row = columns.add(info)
        columns.set_placeable(row, draw.random() < 0.9)
        columns.set_load(row, InstanceLoad(num_free_blocks=draw.randint(0, 100)))
        columns.set_costs(row, some_costs(draw))
        decodes = draw.choice([0, 0, 3, 20])
        columns.count(row, prefill=draw.randint(0, 3), decode=decodes, context=400 * decodes)
        columns.extend_prefill(row, NOW - draw.choice([0.0, 5.0]), draw.uniform(0.0, 2.0))
    return columns


def some_query(draw: random.Random, num_instances: int) -> PlaceQuery:
    holders = [
        PrefixMatch(f"i{draw.randrange(num_instances)}", "device", draw.randint(1, 60) * 16)
        for _ in range(draw.randint(0, 5))
    ] + [
        PrefixMatch(f"pool-{draw.randrange(4)}", draw.choice(TIERS), draw.randint(1, 60) * 16)
        for _ in range(draw.randint(0, 4))
    ]
    return PlaceQuery(
        "r",
        num_prompt_tokens=draw.randint(2, 1000),
        max_new_tokens=draw.choice([1, 20, 400]),
        slo=Slo(draw.choice([None, 0.2, 1.0]), draw.choice([None, 0.03, 0.1])),
        waited_s=draw.choice([0.0, 0.3]),
        exclude=tuple(f"i{draw.randrange(num_instances)}" for _ in range(draw.randint(0, 2))),
        prefix=tuple(sorted(holders, key=lambda match: -match.num_tokens)),
        bind_to=f"i{draw.randrange(num_instances)}" if draw.random() < 0.2 else None,
    )


class Plain:
    """What the policy's text says, for one row at a time."""

    def __init__(self, query: PlaceQuery, view: PlacementView) -> None:
        self.query, self.view = query, view

    def device(self, row: int) -> int:
        mine = [m.num_tokens for m in self.query.prefix if self.view.row_of.get(m.holder) == row]
        return min(max(mine, default=0), self.query.num_prompt_tokens - 1)

    def pool(self, row: int) -> tuple[int, int]:
        """Tokens of the longest that any pool node has, and from which tier here."""
        best = (0, 0)
        for match in self.query.prefix:
            if match.tier == "device":
                continue
            here = self.view.node_of.get(match.holder) == self.view.node[row]
            tier = TIERS.index(match.tier) if here else len(TIERS) - 1
            best = max(best, (min(match.num_tokens, self.query.num_prompt_tokens - 1), -tier))
        return best[0], -best[1]

    def compute_s(self, row: int, start: int) -> float:
        view, num = self.view, self.query.num_prompt_tokens - start
        steps = math.ceil(num / view.max_num_batched_tokens[row])
        seconds = steps * view.prefill_overhead_s[row] + num * view.prefill_item_s[row]
        seconds += num * (start + num / 2) * view.prefill_context_s[row]
        return float(seconds) * self.stretch(row)

    def stretch(self, row: int) -> float:
        view, limit_s = self.view, self.query.slo.tpot_s
        if limit_s is None or not view.open_decode[row]:
            return 1.0
        largest = float(view.max_num_batched_tokens[row])
        overhead_s = max(view.prefill_overhead_s[row], view.decode_overhead_s[row])
        beside_s = view.open_decode[row] * view.decode_item_s[row]
        beside_s += view.open_context[row] * view.decode_context_s[row]
        item_s = view.prefill_item_s[row]
        chunk = min(max((limit_s - overhead_s - beside_s) / item_s, 16.0), largest)
        alone_s = view.prefill_overhead_s[row] / largest + item_s
        return float(((overhead_s + beside_s) / chunk + item_s) / alone_s)

    def ttft_s(self, row: int) -> tuple[float, float]:
        view, device = self.view, self.device(row)
        own_s, wait_s = self.compute_s(row, device), 0.0
        pool, tier = self.pool(row)
        if pool > device:
            fetch_s = view.tier_latency_s[tier, row]
            fetch_s += (pool - device) * view.tier_token_s[tier, row]
            rest_s = self.compute_s(row, pool)
            if fetch_s + rest_s < own_s:
                own_s, wait_s = rest_s, float(fetch_s)
        queue_s = max(0.0, float(view.prefill_free_at_s[row]) - NOW)
        return self.query.waited_s + max(queue_s, wait_s) + own_s, own_s

    def tpot_s(self, row: int) -> float:
        view, query = self.view, self.query
        context = view.open_context[row] + query.num_prompt_tokens + query.num_expected_tokens / 2
        seconds = (
            view.decode_overhead_s[row] + (view.open_decode[row] + 1) * view.decode_item_s[row]
        )
        return float(seconds + context * view.decode_context_s[row])

    def same(self, row: int) -> float:
        seconds = self.query.num_prompt_tokens * self.view.handoff_token_s[row]
        seconds += self.view.handoff_latency_s[row]
        return float(seconds) / max(1.0, self.query.num_expected_tokens - 1.0)

    def prefill_cost(self, row: int) -> float:
        view, query, target_s = self.view, self.query, self.query.slo.ttft_s
        ttft_s = self.ttft_s(row)[0]
        takes = np.flatnonzero(view.placeable & view.takes_prefill)
        if target_s is None:
            return ttft_s
        fits = any(query.waited_s + self.ttft_s(int(other))[1] <= target_s for other in takes)
        if fits and all(self.ttft_s(int(other))[0] > target_s for other in takes):
            # Queues make it late wherever it goes: behind the longest.
            queue_s = max(0.0, float(view.prefill_free_at_s[row]) - NOW)
            patience_s = PATIENCE * target_s
            return MISS + patience_s + (-queue_s if queue_s < patience_s else queue_s)
        return ttft_s + MISS * (ttft_s > target_s)

    def cost(self, prefill: int, decode: int) -> float:
        slo, tpot_s = self.query.slo, self.tpot_s(decode)
        late = slo.tpot_s is not None and tpot_s + self.same(decode) > slo.tpot_s
        cost = self.prefill_cost(prefill) + tpot_s + MISS * late
        cost -= self.same(prefill) if prefill == decode else 0.0
        avoided = [self.view.row_of.get(name) for name in self.query.exclude]
        return cost + AVOID * ((prefill in avoided) + (decode in avoided))

    def pairs(self) -> list[tuple[int, int]]:
        view, query = self.view, self.query
        bound = view.row_of.get(query.bind_to) if query.bind_to is not None else None
        found = []
        for prefill in view.row_of.values():
            for decode in view.row_of.values():
                if bound is not None and prefill != bound:
                    continue
                single = query.max_new_tokens <= 1 and bound is None
                if single and prefill != decode:
                    continue
                sides = [(prefill, view.takes_prefill, bound is None)]
                sides.append((decode, view.takes_prefill if single else view.takes_decode, True))
                if all(
                    not wanted
                    or (
                        view.placeable[row]
                        and takes[row]
                        and view.max_tokens[row] >= query.num_total_tokens
                    )
                    for row, takes, wanted in sides
                ) and (view.group[prefill] == view.group[decode]):
                    found.append((prefill, decode))
        return found


@pytest.mark.parametrize("seed", range(200))
def test_the_choice_is_the_cheapest_of_all_pairs(seed: int) -> None:
    draw = random.Random(seed)
    columns = some_fleet(draw)
    view = columns.view
    query = some_query(draw, len(view.row_of))
    plain = Plain(query, view)
    choice = choose(SloAware(), query, view, NOW, seed)
    pairs = plain.pairs()
    if isinstance(choice, NoChoice):
        assert pairs == []
        return
    assert choice.num_candidates == len(pairs)
    costs = {pair: plain.cost(*pair) for pair in pairs}
    pair = (choice.prefill, choice.decode)
    assert costs[pair] == pytest.approx(min(costs.values()), abs=1e-6)
    if query.bind_to is None:
        assert choice.predicted_ttft_s == pytest.approx(plain.ttft_s(pair[0])[0])
        assert choice.prefill_s == pytest.approx(plain.ttft_s(pair[0])[1])
    assert choice.predicted_tpot_s == pytest.approx(plain.tpot_s(pair[1]))
    if choice.fallback is not None:
        others = [p for p in pairs if not set(p) & set(pair)]
        best = min((costs[p] for p in others), default=math.inf)
        if not set(choice.fallback) & set(pair):
            assert costs[choice.fallback] == pytest.approx(best, abs=1e-6)


def test_who_may_take_what_follows_roles_states_and_members() -> None:
    """What is remembered between decisions is forgotten when it changes."""
    columns = Columns()
    query = PlaceQuery("r", num_prompt_tokens=100, max_new_tokens=50)
    costs = some_costs(random.Random(1))

    def add(name: str, role: str, length: int = 1000) -> int:
        row = columns.add(make_info(name, role, max_model_len=length))
        columns.set_placeable(row, True)
        columns.set_costs(row, costs)
        return row

    def chosen() -> tuple[str, str] | str:
        choice = choose(SloAware(), query, columns.view, NOW, 0)
        if isinstance(choice, NoChoice):
            return choice.reason
        return columns.view.names[choice.prefill], columns.view.names[choice.decode]

    prefill, decode = add("a", "prefill"), add("b", "decode")
    assert chosen() == ("a", "b")
    columns.set_role(prefill, make_info("a", "decode").role)
    assert chosen() == "no ready instance takes prefill"
    columns.set_role(decode, make_info("b", "mixed").role)
    assert chosen() == ("b", "b")
    columns.set_placeable(decode, False)
    assert chosen() == "no ready instance takes prefill"
    for number in range(20):  # more rows than there were
        add(f"c{number}", "mixed", length=120)
    assert chosen() == "no ready instance takes prefill"
    columns.set_placeable(decode, True)
    assert chosen() == ("b", "b")
    columns.remove(decode)
    columns.remove(prefill)
    assert "longest sequence" in str(chosen())
    columns.set_info(columns.view.row_of["c7"], make_info("c7", "mixed"))
    assert chosen() == ("c7", "c7")
