"""The benchmarks on emulated clusters: one tiny cluster, and what is made of records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from baton.core.slo import ServiceLevel, Slo
from baton.simulator.workload import Trace, TraceRequest
from benchmarks import emulated, emulated_shift, offline_flood, sim_check
from benchmarks.emulated_rows import ONLINE, Row, in_class, shorten, summarize, take

PROFILE = {
    "name": "tiny",
    "source": "derived: none, for a test",
    "prefill": {"overhead_s": 0.002, "item_s": 1e-5, "context_s": 0.0},
    "decode": {"overhead_s": 0.003, "item_s": 0.0, "context_s": 1e-7},
    "handoff": {"latency_s": 0.001, "bytes_per_s": 1e10},
    "kv_bytes_per_token": 1000,
    "kv_capacity_tokens": 8000,
    "max_model_len": 4000,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 256,
    "block_size": 16,
}


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(json.dumps(PROFILE))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two traces in the form of Azure's."""
    for name, prompt, output in (("azure_code", 300, 12), ("azure_conv", 120, 40)):
        lines = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
        lines += [
            f"2023-11-16 18:15:{i // 10:02d}.{i % 10}000000,{prompt + i % 7},{output + i % 5}"
            for i in range(200)
        ]
        (tmp_path / f"{name}.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_the_command_replays_a_trace_on_a_cluster_and_in_the_simulator(
    profile: Path, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.json"
    given = ["--trace", str(folder / "azure_conv.csv"), "--profile", str(profile)]
    given += ["--rate", "8", "--seconds", "2", "--dilation", "2", "--prefill", "1", "--decode", "1"]
    given += ["--roles", "auto", "--simulate", "--json", str(out)]
    assert emulated.main(given) == 0
    document = json.loads(out.read_text())
    assert document["schema"] == "baton.benchmark.emulated/1"
    real, simulated = document["runs"]
    assert (real["where"], simulated["where"]) == ("emulated", "simulator")
    assert real["tokens"] == {"checked": 16, "wrong": 0}
    for record in (real, simulated):
        online = record["classes"][ONLINE]
        assert (online["requests"], online["failed"]) == (16, 0)
        assert online["ttft_s"]["p50"] > 0
        assert online["tpot_s"]["p50"] > 0
        assert 0 <= online["attainment"] <= 1
        assert len(record["role_log"]) >= 2
    host = real["host"]
    assert host["steps"] > 0
    assert host["faults"] == 0
    assert host["cpu_share"] > host["host_share"] > 0
    assert set(host["busy"]) == {"prefill-0", "decode-0"}


def test_the_shift_is_simulated_for_the_elastic_and_every_static_split(
    profile: Path, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "shift.json"
    given = ["--traces", str(folder), "--profile", str(profile), "--simulate", "--seconds", "2"]
    given += ["--instances", "3", "--rates", "9,5", "--static", "slo", "--out", str(out)]
    assert emulated_shift.main(given) == 0
    runs = json.loads(out.read_text())["runs"]
    assert [(one["roles_mode"], one["split"]) for one in runs] == [
        ("auto", "2:1"),
        ("off", "2:1"),
        ("off", "1:2"),
    ]
    assert out.with_suffix(".png").stat().st_size > 0
    assert "best static split" in out.with_suffix(".md").read_text()


def test_what_did_not_finish_is_a_miss() -> None:
    level = ServiceLevel("a", Slo(1.0, 0.1), deadline_s=3.0)
    rows = [
        Row(0.0, "a", 11, 0.5, 1.0),  # 0.05 s a token
        Row(1.0, "a", 11, 1.5, 4.5),  # too slow, and past its deadline
        Row(2.0, "a", 11, None, None, "timeout"),
        Row(3.0, "other", 1, 3.0, 3.0),
    ]
    found = summarize(rows, [level], (0.0, 1.0))["a"]
    assert (found["requests"], found["failed"], found["attainment"]) == (3, 1, 1 / 3)
    assert [phase["attainment"] for phase in found["phases"]] == [1.0, 0.0]
    assert found["past_deadline"] == 2
    assert found["failures"] == ["timeout"]


def _trace(num: int) -> Trace:
    return tuple(TraceRequest(i / 2, 400 + i, 100) for i in range(num))


def test_slices_of_traces_keep_lengths_and_say_their_class() -> None:
    some = in_class(take(shorten(_trace(100), 0.25, clip_output=20), 4.0, 5.0))
    assert len(some) == 20
    assert {r.service_class for r in some} == {ONLINE}
    assert some[0].num_prompt_tokens == round(450 / 4)
    assert {r.num_output_tokens for r in some} == {20}


def test_errors_are_allowed_up_to_twice_the_spread_of_real_runs() -> None:
    def numbers(ttft_s: float, attainment: float = 1.0) -> dict[str, Any]:
        quantiles = {"p50": ttft_s, "p90": 2 * ttft_s}
        return {"ttft_s": quantiles, "tpot_s": quantiles, "attainment": attainment}

    close = sim_check.compare("r", [numbers(1.0)], numbers(1.09), 0.1, points=0.03)
    assert [one.passes for one in close] == [True] * 5
    apart = sim_check.compare("r", [numbers(1.0)], numbers(1.2, 0.9), 0.1, points=0.03)
    assert [one.passes for one in apart] == [False] * 5
    wide = [numbers(0.8), numbers(1.0), numbers(1.2)]
    assert [one.passes for one in sim_check.compare("r", wide, numbers(1.2), 0.1)] == [True] * 4
    assert "misses" in sim_check.table(apart)
    assert "misses" not in sim_check.table(close)


def test_the_flood_is_judged_by_online_attainment_and_deadlines() -> None:
    def record(attainment: float, past: int) -> dict[str, Any]:
        return {
            "classes": {
                ONLINE: {"attainment": attainment},
                offline_flood.BY_DEADLINE: {
                    "output_tokens_per_s": 5.0,
                    "requests": 4,
                    "past_deadline": past,
                },
            }
        }

    alone = [record(0.97, 0), record(0.95, 0)]
    good = offline_flood.judge("emulated", alone, [record(0.95, 0), record(0.95, 0)])
    assert good.passes
    assert good.offline_tokens_per_s == 5.0
    assert round(good.spread, 6) == 0.02
    assert not offline_flood.judge("emulated", alone, [record(0.9, 0)]).passes
    assert not offline_flood.judge("emulated", alone, [record(0.96, 1)]).passes
    assert "of 8" in offline_flood.table([good])


def test_a_flood_begins_after_the_online_work_and_some_of_it_has_deadlines() -> None:
    offline = offline_flood.flood(_trace(100), 10.0, 4.0, every=5, until_s=2.0)
    assert len(offline) == 40
    assert offline[0].arrival_s == 1.0
    dated = [r for r in offline if r.service_class == offline_flood.BY_DEADLINE]
    assert dated
    assert max(r.arrival_s for r in dated) <= 3.0
    both = offline_flood.merged(offline, in_class(_trace(4)))
    assert [r.arrival_s for r in both] == sorted(r.arrival_s for r in both)
