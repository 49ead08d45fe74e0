"""Who waits and who is turned away: overload, offline work, tenants, in the pure core."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from baton.core.config import ControllerConfig
from baton.core.cost_model import CostModel, LinkCosts, StepCosts
from baton.core.errors import Code
from baton.core.policy_config import AdmissionConfig
from baton.core.slo import Slo
from controller import events
from controller.admission import DrainRate, OnlinePressure, retry_after_s
from controller.policies.base import Choice
from tests.controller.controller_helpers import Bench, failed, only, placed

COSTS = CostModel(
    prefill=StepCosts(0.0, 0.005, 0.0),
    decode=StepCosts(0.001, 0.0, 0.0),
    handoff=LinkCosts(0.0, 1e12),
    kv_bytes_per_token=1.0,
)
"""A prompt of 200 tokens takes a second."""
FAST = {"num_prompt_tokens": 200, "slo": Slo(ttft_s=2.0)}


def pair(*, policy: str = "slo", **settings: object) -> Bench:
    admission = AdmissionConfig(**settings)  # type: ignore[arg-type]
    bench = Bench(ControllerConfig(policy=policy, admission=admission), costs=COSTS)
    bench.join("p", "prefill")
    bench.join("d", "decode")
    return bench


def live(bench: Bench, seconds: float) -> list[events.Placed]:
    """Time passes, and instances say that they are there; what was answered meanwhile."""
    answers: list[events.Placed] = []
    while seconds > 0:
        step_s = min(1.0, seconds)
        answers += only(bench.advance(step_s), events.Placed)
        seconds -= step_s
        for name in bench.sessions:
            bench.beat(name)
    return answers


# Shedding by prediction


def test_what_cannot_meet_its_target_is_shed_with_a_time_to_come_back() -> None:
    bench = pair(max_ttft_factor=1.5)
    for index in range(3):
        placed(bench.place_one(f"r{index}", **FAST))  # predicted: 1, 2, 3 s
    failure = failed(bench.place_one("late", **FAST))
    assert failure.code is Code.OVERLOADED
    assert failure.retry_after_s == 2.0, "then the queue is short enough for the target"
    assert "2 s" in failure.message
    trace = bench.core.explain("late")
    assert trace is not None
    assert trace.attempts["late", 0].reason.startswith("shed")
    bench.advance(2.0)
    placed(bench.place_one("late", attempt=0, **FAST))


@pytest.mark.parametrize(
    "query",
    [
        {"slo": Slo()},
        {"attempt": 1},
        {"slo": Slo(ttft_s=60.0)},
        {"priority": -1},
    ],
    ids=["no target", "a replay", "a patient class", "offline"],
)
def test_others_are_not_shed(query: dict[str, object]) -> None:
    bench = pair(max_ttft_factor=1.5)
    for index in range(9):
        placed(bench.place_one(f"r{index}", **{**FAST, **query}))


def test_nothing_is_shed_by_default_nor_without_predictions() -> None:
    for bench in (pair(), pair(policy="least-loaded", max_ttft_factor=1.5)):
        for index in range(9):
            placed(bench.place_one(f"r{index}", **FAST))


def test_what_has_waited_elsewhere_counts() -> None:
    bench = pair(max_ttft_factor=1.0)
    placed(bench.place_one("soon", **FAST, waited_s=0.9))
    bench = pair(max_ttft_factor=1.0)
    assert failed(bench.place_one("late", **FAST, waited_s=1.1)).code is Code.OVERLOADED


def test_retry_after_is_bounded() -> None:
    assert [retry_after_s(value) for value in (None, 0.0, 2.2, math.inf)] == [5.0, 1.0, 3.0, 60.0]


# Limits of open requests


def test_beyond_the_limit_requests_wait_for_an_end() -> None:
    bench = pair(max_open_per_instance=1)
    placed(bench.place_one("first"))
    assert bench.place_one("second") is None
    assert bench.core.placements.num_queued == 1
    result = only(bench.end("first"), events.Placed)[0].results[0]
    assert placed(result).request_id == "second"
    assert bench.core.placements.num_queued == 0


def test_who_waited_too_long_for_room_is_shed() -> None:
    bench = pair(max_open_per_instance=1)
    bench.place_one("first")
    bench.place_one("second")
    failure = failed(only(bench.advance(3.1), events.Placed)[0].results[0])
    assert failure.code is Code.OVERLOADED
    assert failure.retry_after_s is not None
    assert 1 <= failure.retry_after_s <= 60


def test_a_newcomer_does_not_overtake_those_that_wait() -> None:
    bench = pair(max_open_per_instance=1)
    bench.place_one("first")
    bench.place_one("second")
    bench.join("d2", "decode")
    bench.join("p2", "prefill")
    assert set(bench.core.state.open) == {"first", "second"}
    bench.place_one("third")
    bench.place_one("urgent", priority=1)
    bench.end("first")
    assert "urgent" in bench.core.state.open
    bench.end("second")
    assert "third" in bench.core.state.open


def test_who_was_admitted_is_not_held_up() -> None:
    """A replay has its place among the open ones; a decode side is owed to who has prefill."""
    bench = pair(max_open_per_instance=1)
    bench.place_one("first")
    bench.place_one("waits")
    placed(bench.place_one("replayed", attempt=1))
    assert placed(bench.place_one("first", bind_to="p")).decode.instance_id == "d"


def test_a_full_queue_drops_the_lowest_priority_first() -> None:
    config = ControllerConfig(
        max_queued_placements=2, admission=AdmissionConfig(max_open_per_instance=1)
    )
    bench = Bench(config)
    bench.join("m")
    bench.place_one("open")
    for name, priority in (("low", 0), ("high", 2)):
        assert bench.place_one(name, priority=priority) is None
    dropped = only(bench.place(events.PlaceQuery("middle", priority=1)), events.Placed)[0]
    assert failed(dropped.results[0]).code is Code.OVERLOADED
    refused = failed(bench.place_one("lowest", priority=-2))
    assert "too many" in refused.message
    order = [name for name in _in_order(bench, "open", 3) if name != "open"]
    assert order == ["high", "middle"]


def test_a_flood_loses_its_own_last_not_anothers_first() -> None:
    config = ControllerConfig(
        max_queued_placements=3, admission=AdmissionConfig(max_open_per_instance=1)
    )
    bench = Bench(config)
    bench.join("m")
    bench.place_one("open")
    for index in range(3):
        bench.place_one(f"flood{index}", tenant="flood")
    dropped = only(
        bench.place(events.PlaceQuery("small", 0, 10, 10, tenant="small")), events.Placed
    )
    assert [failed(item.results[0]).code for item in dropped] == [Code.OVERLOADED]
    assert _in_order(bench, "open", 4) == ["open", "flood0", "small", "flood1"]


def _in_order(bench: Bench, first: str, count: int) -> list[str]:
    """End what is open, one at a time; the order in which they got their places."""
    order = [first]
    while len(order) < count and (new := set(bench.core.state.open) or {""}):
        bench.end(order[-1])
        new = set(bench.core.state.open) - set(order)
        if not new:
            break
        order.append(new.pop())
    return order


def test_tenants_share_by_the_weight_of_their_class() -> None:
    config = ControllerConfig(admission=AdmissionConfig(max_open_per_instance=1))
    bench = Bench(config, weights={"gold": 3.0})
    bench.join("m")
    bench.place_one("open")
    for index in range(12):
        bench.place_one(f"p{index}", tenant="plain")
        bench.place_one(f"g{index}", tenant="rich", service_class="gold")
    order = _in_order(bench, "open", 13)[1:]
    assert sum(name.startswith("g") for name in order) == 9


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["flood"] * 9 + ["small"]), max_size=80), st.integers(1, 3))
def test_nobody_starves_and_nobody_is_lost(tenants: list[str], room: int) -> None:
    """A tenant with a tenth of the load waits for as many dispatches of others as it has requests
    before that one, and one more; whatever comes is answered once."""
    config = ControllerConfig(
        queue_timeout_s=1000.0, admission=AdmissionConfig(max_open_per_instance=room)
    )
    bench = Bench(config)
    bench.join("m")
    names = [f"{index}-{tenant}" for index, tenant in enumerate(tenants)]
    for name, tenant in zip(names, tenants, strict=True):
        bench.place_one(name, tenant=tenant)
        assert bench.core.state.columns.view.open_prefill.max() <= room
    order = list(bench.core.state.open)
    for _ in names:
        if bench.core.state.open:
            bench.end(next(iter(bench.core.state.open)))
        assert bench.core.state.columns.view.open_prefill.max() <= room
        order += [name for name in bench.core.state.open if name not in order]
    assert sorted(order) == sorted(names), "nothing is lost"
    assert not bench.core.state.open
    waited = [name for name in order if name not in names[:room]]
    turns = [index for index, name in enumerate(waited) if name.endswith("small")]
    assert all(turn <= 2 * number + 1 for number, turn in enumerate(turns))


# Offline work


def test_offline_work_waits_while_online_requests_wait() -> None:
    bench = pair(max_open_per_instance=1)
    bench.place_one("open")
    bench.place_one("offline", priority=-1)
    bench.place_one("online")
    bench.end("open")
    assert set(bench.core.state.open) == {"online"}
    bench.end("online")
    assert set(bench.core.state.open) == {"offline"}


def test_offline_work_takes_free_places_only_and_waits_for_more() -> None:
    bench = pair()
    for index in range(14):
        bench.place_one(f"r{index}", priority=-1)
    assert len(bench.core.state.open) == 10, "max_num_seqs"
    live(bench, 10.0)
    assert bench.core.placements.num_queued == 4, "longer than queue_timeout_s"
    placed(bench.place_one("online"))
    bench.end("r0")
    bench.end("r1")
    assert bench.core.placements.num_queued == 3


def test_offline_work_goes_one_at_a_time_while_targets_are_near() -> None:
    bench = pair()
    for index in range(2):
        bench.place_one(f"online{index}", **FAST)
    bench.place_one("offline0", priority=-1)
    assert bench.place_one("offline1", priority=-1) is None
    for index in range(2):
        bench.end(f"online{index}")
    bench.advance(1.1)
    assert set(bench.core.state.open) == {"offline0", "offline1"}, "it ended by itself"


def test_offline_work_goes_one_at_a_time_while_targets_are_missed() -> None:
    bench = pair()
    for index in range(6):
        bench.place_one(f"r{index}")
        ended = events.RequestEnded(
            f"r{index}", "stop", attempts=(events.AttemptEnded(f"r{index}", 0),), met=False
        )
        bench.feed(events.OutcomesReported("g", (ended,)))
    bench.place_one("offline0", priority=-1)
    assert bench.place_one("offline1", priority=-1) is None
    live(bench, 10.5)
    assert set(bench.core.state.open) == {"offline0", "offline1"}


def test_offline_work_rises_in_time_for_its_deadline() -> None:
    bench = pair(max_open_per_instance=1)
    bench.place_one("open")
    bench.place_one("offline", priority=-1, deadline_s=4.0)
    bench.advance(2.1)
    bench.place_one("online")
    bench.end("open")
    assert set(bench.core.state.open) == {"offline"}, "it was there before the online one"
    bench.end("offline")
    assert set(bench.core.state.open) == {"online"}


def test_offline_work_waits_no_longer_than_it_may() -> None:
    bench = pair(max_open_per_instance=1, offline_wait_s=20.0)
    bench.place_one("open")
    for budget_s, wait_s in ((None, 20.0), (8.0, 8.0)):
        assert bench.place_one("offline", priority=-1, budget_s=budget_s) is None
        assert not live(bench, wait_s - 0.1)
        assert failed(live(bench, 0.2)[0].results[0]).code is Code.OVERLOADED


def test_pressure_ends_by_itself() -> None:
    pressure = OnlinePressure(AdmissionConfig())
    query = events.PlaceQuery("r", slo=Slo(ttft_s=1.0))
    assert pressure.over_at_s(0.0) is None
    pressure.placed(query, Choice(0, 1, None, 1, "", predicted_ttft_s=0.5), 0.0)
    assert pressure.over_at_s(0.0) is None
    pressure.placed(query, Choice(0, 1, None, 1, "", predicted_ttft_s=0.9), 0.0)
    over_at = pressure.over_at_s(0.0)
    assert over_at is not None
    assert pressure.over_at_s(over_at) is None
    for index in range(20):
        pressure.ended(index > 1, 10.0)
    assert pressure.over_at_s(10.0) is not None, "18 of 20 is less than 95 %"
    for _ in range(30):
        pressure.ended(True, 11.0)
    assert pressure.over_at_s(11.0) is None, "48 of 50 is not"


def test_drain_rate() -> None:
    rate = DrainRate()
    assert rate.seconds_for(10, 0.0) is None
    for index in range(11):
        rate.ended(index * 0.5)
    assert rate.seconds_for(22, 5.0) == pytest.approx(10.0)
    assert rate.seconds_for(22, 100.0) is None
