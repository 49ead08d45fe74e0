"""What must hold of the policy ``slo`` however it is tuned."""

from __future__ import annotations

import dataclasses
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from baton.core.cluster import InstanceLoad, Role
from baton.core.cost_model import CostModel, LinkCosts, StepCosts
from baton.core.slo import NO_TARGETS, Slo
from controller import events
from controller.columns import Columns
from controller.events import PlaceQuery, PrefixMatch
from controller.policies.base import Choice, NoChoice, choose
from controller.policies.least_loaded import LeastLoaded
from controller.policies.slo import SloAware
from tests.controller.controller_helpers import Bench, idle_load, make_info, placed

COST = CostModel(
    prefill=StepCosts(0.01, 1e-3, 0.0),
    decode=StepCosts(0.02, 1e-3, 0.0),
    handoff=LinkCosts(0.001, 1e9),
    kv_bytes_per_token=1000.0,
)
SLO = Slo(1.0, 0.05)
NOW = 50.0


def slower(factor: float) -> CostModel:
    return COST.dilated(factor)


class Rows:
    """Columns of ready instances whose costs are known."""

    def __init__(self, costs: CostModel | None = COST, **roles: str) -> None:
        self.columns = Columns()
        self.row: dict[str, int] = {}
        for name, role in roles.items():
            self.add(name, role, costs)

    def add(self, name: str, role: str, costs: CostModel | None = COST) -> int:
        info = dataclasses.replace(make_info(name, role), num_blocks=1000, max_model_len=16_000)
        row = self.row[name] = self.columns.add(info)
        self.columns.set_placeable(row, True)
        self.columns.set_load(row, idle_load())
        if costs is not None:
            self.columns.set_costs(row, costs)
        return row

    def busy(self, name: str, queue_s: float = 0.0, decodes: int = 0, context: int = 0) -> None:
        row = self.row[name]
        if queue_s:
            self.columns.extend_prefill(row, NOW, queue_s)
        self.columns.count(row, decode=decodes, context=context)

    def choice(self, draw: int = 0, now: float = NOW, **query: Any) -> Choice:
        values = {"num_prompt_tokens": 100, "max_new_tokens": 100, "slo": SLO, **query}
        found = choose(SloAware(), PlaceQuery("r", **values), self.columns.view, now, draw)
        assert isinstance(found, Choice), found
        return found

    def pair(self, draw: int = 0, **query: Any) -> tuple[str, str]:
        found, names = self.choice(draw, **query), self.columns.view.names
        return names[found.prefill], names[found.decode]


@pytest.mark.parametrize("slo", [SLO, Slo(1.0), NO_TARGETS])
def test_the_prefill_instance_that_meets_the_target_is_taken(slo: Slo) -> None:
    rows = Rows(late="prefill", soon="prefill", later="prefill", d="decode")
    rows.busy("late", 5.0)
    rows.busy("soon", 0.2)
    rows.busy("later", 2.0)
    for draw in range(10):
        assert rows.pair(draw, slo=slo) == ("soon", "d")


def test_what_passed_already_is_of_the_target() -> None:
    """Fast but busy, or slow and idle: with time left both meet it, later only the fast one."""
    rows = Rows(d="decode")
    rows.add("fast", "prefill", slower(0.5))
    rows.add("slow", "prefill", slower(9.0))
    rows.busy("fast", 0.2)
    assert rows.choice(waited_s=0.0).predicted_ttft_s == pytest.approx(0.2 + 0.055)
    found = rows.choice(waited_s=0.5)
    assert rows.columns.view.names[found.prefill] == "fast"
    assert found.predicted_ttft_s == pytest.approx(0.5 + 0.2 + 0.055)


def test_a_cached_prefix_shortens_the_prediction_and_attracts() -> None:
    rows = Rows(a="prefill", b="prefill", d="decode")
    without = rows.choice(num_prompt_tokens=800)
    found = rows.choice(num_prompt_tokens=800, prefix=(PrefixMatch("b", "device", 640),))
    assert rows.columns.view.names[found.prefill] == "b"
    assert found.predicted_ttft_s is not None
    assert without.predicted_ttft_s is not None
    assert found.predicted_ttft_s < without.predicted_ttft_s / 2
    # Not at any price.
    rows.busy("b", 3.0)
    found = rows.choice(num_prompt_tokens=800, prefix=(PrefixMatch("b", "device", 640),))
    assert rows.columns.view.names[found.prefill] == "a"


def test_a_decode_instance_that_would_miss_is_avoided_while_another_meets() -> None:
    rows = Rows(p="prefill", full="decode", free="decode")
    rows.busy("full", decodes=40)
    rows.busy("free", decodes=5)
    for draw in range(10):
        assert rows.pair(draw)[1] == "free"
        # The emptier one, too, where nobody asks for anything.
        assert rows.pair(draw, slo=NO_TARGETS)[1] == "free"


def test_a_slow_instance_decodes_only_where_nothing_else_meets_the_target() -> None:
    rows = Rows(p="prefill", fast="decode")
    rows.add("slow", "decode", slower(4.0))
    rows.busy("fast", decodes=25)
    assert rows.pair()[1] == "fast"


def test_a_burst_of_equal_requests_is_spread() -> None:
    """Between two heartbeats, by what the controller itself has placed."""
    bench = Bench(costs=COST)
    for name, role in (("p0", "prefill"), ("p1", "prefill"), ("d0", "decode"), ("d1", "decode")):
        bench.join(name, role)
    where: dict[str, int] = {}
    for number in range(12):
        query = {"num_prompt_tokens": 300, "max_new_tokens": 50, "slo": Slo(10.0, 0.5)}
        pair = placed(bench.place_one(f"r{number}", **query))
        for target in (pair.prefill, pair.decode):
            where[target.instance_id] = where.get(target.instance_id, 0) + 1
    assert where == {"p0": 6, "p1": 6, "d0": 6, "d1": 6}


@pytest.mark.parametrize("draw", range(5))
def test_where_nothing_is_measured_load_decides(draw: int) -> None:
    rows = Rows(None, p0="prefill", p1="prefill", d0="decode", d1="decode")
    rows.columns.set_load(rows.row["p0"], idle_load(num_waiting_tokens=500))
    rows.columns.set_load(rows.row["d1"], idle_load(num_running=5))
    query = PlaceQuery("r", num_prompt_tokens=10, max_new_tokens=10, slo=SLO)
    ours = choose(SloAware(), query, rows.columns.view, NOW, draw)
    theirs = choose(LeastLoaded(), query, rows.columns.view, NOW, draw)
    assert isinstance(ours, Choice)
    assert isinstance(theirs, Choice)
    assert (ours.prefill, ours.decode) == (theirs.prefill, theirs.decode)
    assert ours.predicted_ttft_s is None


instance = st.fixed_dictionaries(
    {
        "role": st.sampled_from(Role),
        "state": st.sampled_from(["ready", "ready", "ready", "draining", "gone"]),
        "speed": st.sampled_from([None, 0.1, 1.0, 10.0]),
        "queue_s": st.sampled_from([0.0, 0.3, 5.0, 1e4]),
        "decodes": st.integers(0, 60),
        "context": st.integers(0, 10**6),
        "waiting": st.integers(0, 10**5),
    }
)
query = st.fixed_dictionaries(
    {
        "num_prompt_tokens": st.integers(1, 9000),
        "max_new_tokens": st.integers(1, 3000),
        "slo": st.builds(Slo, st.none() | st.floats(1e-3, 100.0), st.none() | st.floats(1e-3, 1.0)),
        "waited_s": st.floats(0.0, 20.0),
        "prefix": st.lists(
            st.builds(
                PrefixMatch,
                st.integers(0, 9).map(lambda i: f"i{i}"),
                st.sampled_from(["device", "host", "disk", "remote"]),
                st.integers(1, 9000),
            ),
            max_size=4,
        ).map(lambda found: tuple(sorted(found, key=lambda match: -match.num_tokens))),
        "bind_to": st.none() | st.integers(0, 9).map(lambda i: f"i{i}"),
        "exclude": st.lists(st.integers(0, 9).map(lambda i: f"i{i}"), max_size=3).map(tuple),
    }
)


@settings(max_examples=300, deadline=None)
@given(st.lists(instance, min_size=1, max_size=10), query, st.integers(0, 10**6))
def test_only_ready_instances_of_the_right_role_whatever_the_numbers(
    described: list[dict[str, Any]], asked: dict[str, Any], draw: int
) -> None:
    def columns() -> Columns:
        rows = Rows()
        for index, item in enumerate(described):
            speed = item["speed"]
            row = rows.add(f"i{index}", item["role"], None if speed is None else slower(speed))
            rows.busy(f"i{index}", item["queue_s"], item["decodes"], item["context"])
            load = InstanceLoad(num_waiting_tokens=item["waiting"], num_free_blocks=10)
            rows.columns.set_load(row, load)
            rows.columns.set_placeable(row, item["state"] == "ready")
        for index, item in enumerate(described):
            if item["state"] == "gone":
                rows.columns.remove(rows.row[f"i{index}"])
        return rows.columns

    asking = PlaceQuery("r", **asked)
    view = columns().view
    found = choose(SloAware(), asking, view, NOW, draw)
    assert choose(SloAware(), asking, columns().view, NOW, draw) == found, "equal again"
    if isinstance(found, NoChoice):
        assert found.reason
        return
    pairs = [(found.prefill, found.decode), *([found.fallback] if found.fallback else [])]
    single = asking.max_new_tokens <= 1 and asking.bind_to is None
    for prefill, decode in pairs:
        sides = [described[int(view.names[row][1:])] for row in (prefill, decode)]
        # The bound one has the prompt's KV; whether it takes more prompts is of no interest.
        if asking.bind_to is None:
            assert sides[0]["state"] == "ready"
            assert sides[0]["role"].takes_prefill
        else:
            assert view.names[prefill] == asking.bind_to
            assert sides[0]["state"] != "gone"
        assert sides[1]["state"] == "ready"
        assert single or sides[1]["role"].takes_decode


@pytest.mark.parametrize("how", ["drained", "silent", "dead", "superseded"])
def test_a_life_that_is_over_or_ends_gets_nothing(how: str) -> None:
    """However much faster it was."""
    bench = Bench(costs=COST)
    for name, role in (("p0", "prefill"), ("p1", "prefill"), ("d", "decode")):
        bench.join(name, role)
    row = bench.core.state.columns.view.row_of["p0"]
    bench.core.state.columns.set_costs(row, slower(1e-3))
    query = {"num_prompt_tokens": 100, "max_new_tokens": 20, "slo": SLO}
    first = placed(bench.place_one("before", **query))
    assert first.prefill.instance_id == "p0"
    if how == "drained":
        bench.feed(events.Drain(bench.next_id(), "p0"))
    else:
        bench.hang_up("p0")
    if how == "dead":
        for name in ("p1", "d"):
            bench.beat(name)
        bench.advance(2.0)
    if how == "superseded":
        bench.register(make_info("p0", "prefill"))
    for number in range(5):
        pair = placed(bench.place_one(f"r{number}", **query))
        assert pair.prefill.instance_id == "p1"
    bench.hang_up("p1")
    assert bench.place_one("none", **query) is None, "it waits"
