from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from baton.core.cluster import Role
from controller.columns import Columns
from controller.events import PlaceQuery
from controller.policies.base import Choice, NoChoice, choose, mix64, paths
from controller.policies.least_loaded import LeastLoaded
from kvpool.layout import KVLayout
from tests.controller.controller_helpers import NUM_BLOCKS, idle_load, make_info


class Rows:
    """Columns with ready, idle instances by name."""

    def __init__(self, **roles: str) -> None:
        self.columns = Columns()
        self.row: dict[str, int] = {}
        for name, role in roles.items():
            self.add(name, role)

    def add(self, name: str, role: str, **info: object) -> None:
        row = self.columns.add(make_info(name, role, **info))  # type: ignore[arg-type]
        self.columns.set_placeable(row, True)
        self.columns.set_load(row, idle_load())
        self.row[name] = row

    def choose(self, draw: int = 0, **query: object) -> tuple[str, str]:
        choice = self.decide(draw, **query)
        assert isinstance(choice, Choice), choice
        return self.names((choice.prefill, choice.decode))

    def decide(self, draw: int = 0, **query: object) -> Choice | NoChoice:
        values = {"num_prompt_tokens": 10, "max_new_tokens": 10, **query}
        made = PlaceQuery("r", **values)  # type: ignore[arg-type]
        return choose(LeastLoaded(), made, self.columns.view, 0.0, draw)

    def names(self, rows: tuple[int, int]) -> tuple[str, str]:
        names = self.columns.view.names
        return names[rows[0]], names[rows[1]]


def test_roles_decide_sides() -> None:
    rows = Rows(p="prefill", d="decode")
    assert rows.choose() == ("p", "d")
    assert rows.decide() == Choice(
        rows.row["p"],
        rows.row["d"],
        None,
        1,
        "least loaded: prefill p at 0.000, decode d at 0.000",
    )


def test_least_loaded_on_both_sides() -> None:
    rows = Rows(p0="prefill", p1="prefill", d0="decode", d1="decode")
    rows.columns.set_load(rows.row["p0"], idle_load(num_waiting_tokens=500))
    rows.columns.set_load(rows.row["d1"], idle_load(num_running=3))
    assert rows.choose() == ("p1", "d0")
    choice = rows.decide()
    assert isinstance(choice, Choice)
    assert choice.num_candidates == 4
    assert choice.fallback is not None
    assert rows.names(choice.fallback) == ("p0", "d1")


def test_in_flight_corrections_count_at_once() -> None:
    rows = Rows(p0="prefill", p1="prefill", d0="decode", d1="decode")
    rows.columns.count(rows.row["p0"], prefill=1, tokens=200)
    rows.columns.count(rows.row["d0"], decode=1)
    assert all(rows.choose(draw) == ("p1", "d1") for draw in range(20))


def test_kv_pressure_counts() -> None:
    rows = Rows(p="prefill", d0="decode", d1="decode")
    rows.columns.set_load(rows.row["d0"], idle_load(num_free_blocks=NUM_BLOCKS // 2))
    assert all(rows.choose(draw) == ("p", "d1") for draw in range(20))


def test_same_instance_preferred_on_ties() -> None:
    rows = Rows(m0="mixed", m1="mixed")
    pairs = {rows.choose(draw) for draw in range(50)}
    assert pairs == {("m0", "m0"), ("m1", "m1")}


def test_mixed_loses_when_busy() -> None:
    rows = Rows(m="mixed", p="prefill", d="decode")
    rows.columns.set_load(rows.row["m"], idle_load(num_running=5))
    assert rows.choose() == ("p", "d")


def test_ties_are_spread_and_repeatable() -> None:
    rows = Rows(p0="prefill", p1="prefill", d0="decode", d1="decode")
    pairs = [rows.choose(draw) for draw in range(100)]
    assert len(set(pairs)) == 4
    assert pairs == [rows.choose(draw) for draw in range(100)]


def test_exclusion_is_soft() -> None:
    rows = Rows(p0="prefill", p1="prefill", d="decode")
    rows.columns.set_load(rows.row["p1"], idle_load(num_waiting_tokens=10_000))
    assert rows.choose(exclude=("p0", "gone")) == ("p1", "d")
    assert rows.choose(exclude=("p0", "p1"))[0] == "p0"
    assert rows.choose(exclude=("d",)) == ("p0", "d")
    choice = rows.decide(exclude=("d",))
    assert isinstance(choice, Choice)
    assert "avoid" in choice.reason


def test_single_token_requests_stay_on_one_instance() -> None:
    rows = Rows(p="prefill")
    assert rows.choose(max_new_tokens=1) == ("p", "p")
    assert rows.decide() == NoChoice("no ready instance takes decode")
    rows.add("d", "decode")
    assert rows.choose(max_new_tokens=1) == ("p", "p")


@pytest.mark.parametrize("change", [{"fingerprint": "x"}, {"layout": "x"}])
def test_pairs_share_model_and_layout(change: dict[str, str]) -> None:
    rows = Rows(p="prefill")
    rows.add("other", "decode", **change)
    assert isinstance(rows.decide(), NoChoice)
    assert paths(rows.columns.view) == (True, True, False)
    rows.add("d", "decode")
    rows.columns.set_load(rows.row["d"], idle_load(num_running=9))
    assert rows.choose() == ("p", "d")
    assert paths(rows.columns.view) == (True, True, True)


def test_layouts_may_differ_in_the_number_of_shards() -> None:
    whole = KVLayout("bfloat16", block_size=16, num_layers=2, num_kv_heads=6, head_dim=8)
    halves = dataclasses.replace(whole, num_kv_heads=3, num_shards=2)
    fewer_heads = dataclasses.replace(whole, num_kv_heads=3)
    rows = Rows()
    rows.add("p", "prefill", layout=whole.text)
    rows.add("other", "decode", layout=fewer_heads.text)
    assert rows.decide() == NoChoice("no ready prefill and decode instance can exchange KV blocks")
    rows.add("d", "decode", layout=halves.text)
    rows.columns.set_load(rows.row["d"], idle_load(num_running=9))
    assert rows.choose() == ("p", "d")
    assert paths(rows.columns.view) == (True, True, True)


def test_best_group_wins() -> None:
    rows = Rows(p="prefill", d="decode")
    rows.columns.set_load(rows.row["d"], idle_load(num_running=9))
    rows.add("p2", "prefill", fingerprint="x")
    rows.add("d2", "decode", fingerprint="x")
    assert rows.choose() == ("p2", "d2")
    choice = rows.decide()
    assert isinstance(choice, Choice)
    assert choice.num_candidates == 2
    assert choice.fallback is not None
    assert rows.names(choice.fallback) == ("p", "d")


def test_length_filters() -> None:
    rows = Rows()
    rows.add("short", "mixed", max_model_len=100)
    rows.add("long", "mixed", max_model_len=200)
    assert rows.choose(num_prompt_tokens=150) == ("long", "long")
    too_long = rows.decide(num_prompt_tokens=191)
    assert isinstance(too_long, NoChoice)
    assert too_long.hopeless
    assert "200" in too_long.reason
    assert rows.choose(num_prompt_tokens=190) == ("long", "long")


def test_blocks_bound_the_length_too() -> None:
    rows = Rows()
    rows.add("m", "mixed", max_model_len=10**6)
    assert rows.choose(num_prompt_tokens=16 * NUM_BLOCKS - 10) == ("m", "m")
    assert isinstance(rows.decide(num_prompt_tokens=16 * NUM_BLOCKS - 9), NoChoice)


def test_not_placeable_is_not_hopeless() -> None:
    rows = Rows(m="mixed")
    rows.columns.set_placeable(rows.row["m"], False)
    assert rows.decide() == NoChoice("no ready instance takes prefill")
    empty = Rows().decide()
    assert empty == NoChoice("no ready instance takes prefill")


def test_fallback_avoids_both() -> None:
    rows = Rows(m0="mixed", m1="mixed", m2="mixed")
    for draw in range(20):
        choice = rows.decide(draw)
        assert isinstance(choice, Choice)
        assert choice.fallback is not None
        assert not {choice.prefill, choice.decode} & set(choice.fallback)


def test_rows_are_reused_and_grow() -> None:
    rows = Rows(**{f"m{i}": "mixed" for i in range(50)})
    assert len(rows.columns.view.live) >= 50
    rows.columns.count(rows.row["m7"], prefill=1, decode=1, tokens=5)
    rows.columns.remove(rows.row["m7"])
    rows.add("new", "mixed")
    assert rows.row["new"] == rows.row["m7"]
    assert rows.columns.view.fresh_tokens.sum() == 0
    assert rows.columns.view.live.sum() == 50


def test_policies_cannot_write() -> None:
    view = Rows(m="mixed").columns.view
    with pytest.raises(ValueError):
        view.placeable[0] = False


def test_role_follows() -> None:
    rows = Rows(m="mixed", n="mixed")
    rows.columns.set_role(rows.row["m"], Role.PREFILL)
    rows.columns.set_role(rows.row["n"], Role.DECODE)
    assert rows.choose() == ("m", "n")


def test_mix64_spreads() -> None:
    draws = np.array([mix64(i) % 8 for i in range(8000)])
    counts = np.bincount(draws)
    assert counts.min() > 800
    assert len({mix64(i) for i in range(1000)}) == 1000
