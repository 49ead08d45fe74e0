"""The KV pool in virtual time: what is found where, by hand and against the ideal."""

from __future__ import annotations

import dataclasses
import random

import pytest

from baton.core.cost_model import CostModel, LinkCosts, Profile, StepCosts
from baton.core.errors import ConfigError
from baton.core.slo import Slo
from baton.simulator.fleet import Fleet
from baton.simulator.pool import PoolSettings
from baton.simulator.reuse import ideal_reuse, prompt_keys
from baton.simulator.runs import Scenario, build, run_once
from baton.simulator.workload import Trace, TraceRequest
from kvpool.tiers import KVSnapshot, Tier

PROFILE = Profile(
    name="tiny",
    source="derived for tests",
    cost=CostModel(
        prefill=StepCosts(0.01, 1e-4, 0.0),
        decode=StepCosts(0.02, 0.0, 0.0),
        handoff=LinkCosts(0.001, 20e9),
        kv_bytes_per_token=50_000.0,
        tiers={"host": LinkCosts(0.001, 20e9), "remote": LinkCosts(0.001, 10e9)},
    ),
    kv_capacity_tokens=512 * 200,
    max_model_len=512 * 100,
    max_num_seqs=64,
    max_num_batched_tokens=2048,
    block_size=512,
)
PLENTY = 512 * 10_000

BY_HAND: Trace = (
    TraceRequest(0.0, 1124, 5, (1, 2, 3)),
    TraceRequest(60.0, 1500, 5, (1, 2, 4)),  # two blocks came before
    TraceRequest(120.0, 1024, 5, (1, 2)),  # the last token is computed, so one of two
    TraceRequest(180.0, 1100, 5, (9, 10, 11)),  # none
)
FOUND = (0, 1024, 512, 0)


def scenario(pool: PoolSettings, **changes: object) -> Scenario:
    base = Scenario(PROFILE, "round-robin", 2, 1, Slo(10.0, 0.1), pool=pool)
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def run(made: Scenario, trace: Trace) -> Fleet:
    fleet = build(made)
    fleet.run(trace)
    fleet.settle(60.0)
    return fleet


def found(fleet: Fleet) -> tuple[int, ...]:
    in_order = sorted(fleet.outcomes, key=lambda outcome: outcome.arrival_s)
    return tuple(outcome.num_cached_tokens for outcome in in_order)


def check_released(fleet: Fleet) -> None:
    assert fleet.pool is not None
    fleet.pool.check_empty()
    for instance in fleet.instances.values():
        instance.engine.check_integrity()
        load = instance.engine.load()
        left = (load.num_waiting, load.num_running, load.num_pending_kv, load.num_held)
        assert left == (0, 0, 0, 0), instance.name


def shared_trace(num_requests: int, seed: int, gap_s: float) -> Trace:
    """Conversations that go on: each turn's prompt begins with the one before."""
    draw = random.Random(seed)
    talks: list[tuple[int, ...]] = [(0,) * 0]
    requests = []
    for index in range(num_requests):
        talk = draw.choice(talks)
        added = tuple(1000 * (index + 1) + i for i in range(draw.randint(1, 6)))
        talks.append(talk + added)
        # The last piece is partly filled.
        num_prompt = 512 * (len(talk) + len(added)) - draw.randint(1, 511)
        if num_prompt < PROFILE.max_model_len - 512:
            requests.append(
                TraceRequest(gap_s * index, num_prompt, draw.randint(1, 40), talk + added)
            )
    return tuple(requests)


# What is found.


def test_ideal_by_hand() -> None:
    reuse = ideal_reuse(BY_HAND)
    assert reuse.num_prompt_tokens == 1124 + 1500 + 1024 + 1100
    assert reuse.num_hit_tokens == sum(FOUND)
    # Ids 1, 2, 9, 10; no other block becomes full.
    assert reuse.num_blocks == 4


def test_keys_name_what_is_shared_and_nothing_else() -> None:
    one, other = TraceRequest(0.0, 1500, 600, (1, 2, 4)), TraceRequest(0.0, 1500, 600, (1, 2, 5))
    first, second = prompt_keys("a", one, 512), prompt_keys("b", other, 512)
    assert len(first) == (1500 + 600) // 512
    assert first[:2] == second[:2]
    assert not set(first[2:]) & set(second[2:])
    unnamed = TraceRequest(0.0, 1500, 600)
    assert not set(prompt_keys("a", unnamed, 512)) & set(prompt_keys("b", unnamed, 512))
    with pytest.raises(ConfigError, match="block_size"):
        prompt_keys("a", one, 100)


def test_blocks_may_be_smaller_than_a_trace_s_pieces() -> None:
    one, other = TraceRequest(0.0, 1400, 10, (1, 2, 4)), TraceRequest(0.0, 1500, 10, (1, 2, 4))
    first, second = prompt_keys("a", one, 128), prompt_keys("b", other, 128)
    assert len(first) == 1410 // 128
    assert first[: 1400 // 128] == second[: 1400 // 128], "what is full of the last piece counts"
    assert ideal_reuse((one, other), 128).num_hit_tokens == 1400 // 128 * 128


def test_one_host_tier_serves_all_instances_of_its_machine() -> None:
    fleet = run(scenario(PoolSettings(PLENTY)), BY_HAND)
    assert found(fleet) == FOUND
    # Prompts went to both prefill instances in turn: the second of one came from the host tier,
    # the third was in the cache of where the first had been.
    assert fleet.pool is not None
    assert fleet.pool.fetched_tokens() == {"host": 1024, "remote": 0}
    check_released(fleet)


def test_a_machine_fetches_from_another_and_keeps_it() -> None:
    fleet = run(scenario(PoolSettings(PLENTY, instances_per_node=1)), BY_HAND)
    assert found(fleet) == FOUND
    assert fleet.pool is not None
    assert fleet.pool.fetched_tokens() == {"host": 0, "remote": 1024}
    own = fleet.pool.nodes["pool-1"].table
    shared = fleet.pool.nodes["pool-0"].table.snapshot_keys()[:2]
    assert all(own.has(key) for key in shared)
    check_released(fleet)


def test_without_a_host_tier_only_own_caches_count() -> None:
    fleet = run(scenario(PoolSettings(0)), BY_HAND)
    assert found(fleet) == (0, 0, 512, 0)
    fleet = run(scenario(PoolSettings(0), policy="prefix-affinity"), BY_HAND)
    assert found(fleet) == FOUND, "the index brings prompts to where their beginning is"


def test_a_fetch_that_takes_longer_than_computing_is_not_made() -> None:
    slow = dataclasses.replace(
        PROFILE.cost, tiers={"host": LinkCosts(1.0, 20e9), "remote": LinkCosts(1.0, 20e9)}
    )
    profile = dataclasses.replace(PROFILE, cost=slow)
    fleet = run(scenario(PoolSettings(PLENTY), profile=profile), BY_HAND)
    assert found(fleet) == (0, 0, 512, 0)


def test_the_decode_side_is_not_sent_what_it_has() -> None:
    first, again = BY_HAND[0], dataclasses.replace(BY_HAND[0], arrival_s=60.0)
    cached = run(scenario(PoolSettings(PLENTY)), (first, again))
    assert sum(i.handed_tokens for i in cached.instances.values()) == 1124 + 1124 - 1024


@pytest.mark.parametrize("policy", ["slo", "least-loaded", "prefix-affinity", "colocated"])
@pytest.mark.parametrize("instances_per_node", [1, 8])
def test_no_tier_finds_more_than_the_ideal(policy: str, instances_per_node: int) -> None:
    trace = shared_trace(120, seed=3, gap_s=0.15)
    ideal = ideal_reuse(trace)
    small = dataclasses.replace(PROFILE, kv_capacity_tokens=512 * 110)
    rates = []
    for share in (2.0, 0.2, 0.05, 0.0):
        pool = PoolSettings(int(share * ideal.num_blocks * 512), instances_per_node)
        fleet = run(scenario(pool, policy=policy, profile=small, num_decode=2), trace)
        assert not any(outcome.error for outcome in fleet.outcomes)
        assert len(fleet.outcomes) == len(trace)
        check_released(fleet)
        rates.append(sum(found(fleet)) / ideal.num_prompt_tokens)
        assert rates[-1] <= ideal.hit_rate
    assert rates[0] > 0.9 * ideal.hit_rate
    assert rates[-1] < rates[0]


def test_runs_repeat() -> None:
    trace = shared_trace(60, seed=4, gap_s=0.1)
    made = scenario(PoolSettings(PLENTY, instances_per_node=2), policy="slo", num_decode=2)
    one, other = (run_once(made, trace, 10.0) for _ in range(2))
    assert one == other
    assert one.num_cached_tokens > 0


# The index may be wrong.


def test_promises_that_nobody_keeps_cost_nothing_but_time() -> None:
    fleet = build(scenario(PoolSettings(PLENTY, instances_per_node=1), policy="slo"))
    assert fleet.pool is not None
    keys = tuple(key for item in BY_HAND for key in prompt_keys("x", item, 512))
    blocks = ((Tier.HOST, tuple(dict.fromkeys(keys))),)
    for name in fleet.pool.nodes:
        fleet.pool.directory.index.replace(KVSnapshot(name, 1, 0, blocks))
    fleet.run(BY_HAND)
    fleet.settle(60.0)
    assert not any(outcome.error for outcome in fleet.outcomes)
    assert found(fleet)[0] == 0, "nothing was there for the first"
    assert all(got <= most for got, most in zip(found(fleet), FOUND, strict=True))
    check_released(fleet)


def test_an_index_that_hears_nothing_hides_other_machines_only() -> None:
    deaf = PoolSettings(PLENTY, instances_per_node=1, report_s=1e9)
    assert found(run(scenario(deaf), BY_HAND)) == (0, 0, 512, 0)
    deaf = PoolSettings(PLENTY, report_s=1e9)
    assert found(run(scenario(deaf), BY_HAND)) == FOUND
