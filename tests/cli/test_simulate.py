"""``baton simulate`` from flags to table, JSON and picture."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from baton.cli.simulation_plot import role_counts
from tests.cli.generate_kit import ROOT

PROFILE = ROOT / "benchmarks" / "profiles" / "ascend-910b-qwen2.5-7b.yaml"
PNG = b"\x89PNG\r\n\x1a\n"

RATHER_EMPTY = """
from controller.policies.least_loaded import LeastLoaded

class Mine(LeastLoaded):
    name = "mine"
"""


def simulate(
    *args: str, cwd: Path, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "baton.cli.main", "simulate", *args],
        cwd=cwd,
        capture_output=True,
        timeout=120,
        check=False,
        env={"PYTHONPATH": f"{ROOT}:{cwd}", "PATH": "/usr/bin:/bin", **(env or {})},
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [
        {"arrival_s": i * 0.5, "prompt_tokens": 1500 + 100 * (i % 7), "output_tokens": 10 + i % 9}
        for i in range(60)
    ]
    (tmp_path / "one.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "two.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:20]))
    (tmp_path / "mine.py").write_text(RATHER_EMPTY)
    return tmp_path


SETTING = ("--profile", str(PROFILE), "--instances", "2", "--slo", "ttft=1.0,tpot=0.05")


def run_json(folder: Path, *args: str) -> dict[str, Any]:
    done = simulate(*SETTING, "--json", *args, cwd=folder)
    assert done.returncode == 0, done.stderr.decode()
    [line] = done.stdout.decode().splitlines()
    found: dict[str, Any] = json.loads(line)
    return found


def without_clock(found: dict[str, Any]) -> dict[str, Any]:
    for record in found["policies"]:
        assert record.pop("seconds") > 0
    return found


def test_one_object_with_a_record_per_policy_and_the_inputs(folder: Path) -> None:
    found = run_json(
        folder,
        "--trace", "one.jsonl,two.jsonl", "--policy", "slo,least-loaded,static-best,mine:Mine",
        "--find-goodput", "0.9", "--rate-scale", "2,1", "--arrivals", "poisson", "--seed", "3",
        "--plot", "picture.png",
    )  # fmt: skip
    inputs = found["inputs"]
    assert inputs["traces"] == ["one.jsonl", "two.jsonl"]
    assert inputs["num_requests"] == 80
    assert inputs["profile"] == "ascend-910b-qwen2.5-7b"
    assert (inputs["prefill"], inputs["decode"]) == (1, 1)
    assert inputs["slo"] == {"ttft_s": 1.0, "tpot_s": 0.05}
    assert (inputs["arrivals"], inputs["seed"]) == ("poisson", 3)
    records = {record["policy"]: record for record in found["policies"]}
    assert list(records) == ["slo", "least-loaded", "static-best", "mine:Mine"]
    for record in records.values():
        assert record["goodput_rate"] > 0
        assert record["at_rate"] == record["goodput_rate"]
        rates = [point["rate"] for point in record["curve"]]
        assert rates == sorted(rates)
        [at] = [p for p in record["curve"] if p["rate"] == record["goodput_rate"]]
        assert at["attainment"] >= 0.9
        assert not at["cut_short"]
        for name in ("percentiles", "flips", "utilisation", "kv_traffic_bytes", "steps"):
            assert record[name] == at[name]
        assert {"ttft_p50_s", "ttft_p90_s", "ttft_p99_s", "tpot_p50_s"} <= set(at["percentiles"])
        assert all(0.0 < share <= 1.0 for share in at["utilisation"].values())
    assert records["static-best"]["split"] == "1:1"
    assert records["mine:Mine"]["curve"] == records["least-loaded"]["curve"]
    full = [p["rate"] for p in records["least-loaded"]["curve"] if not p["cut_short"]]
    for scale in (1, 2):
        assert any(rate == pytest.approx(scale * inputs["trace_rate"]) for rate in full)
    # One prefill and one decode instance: all prompts are handed over.
    tokens = sum(1500 + 100 * (i % 7) for i in (*range(60), *range(20)))
    assert records["least-loaded"]["kv_traffic_bytes"] == tokens * 57_344
    assert (folder / "picture.png").read_bytes().startswith(PNG)


def test_equal_inputs_give_equal_numbers_in_any_number_of_processes(folder: Path) -> None:
    args = ("--trace", "one.jsonl", "--policy", "slo,colocated", "--rate-scale", "1,6")
    alone = without_clock(run_json(folder, *args, "--jobs", "1"))
    assert without_clock(run_json(folder, *args, "--jobs", "2")) == alone


def test_the_table_names_policies_and_rates(folder: Path) -> None:
    done = simulate(
        *SETTING, "--trace", "one.jsonl", "--policy", "slo,least-loaded", "--rate-scale", "1",
        "--plot", "picture.svg", cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    assert done.stderr == b""  # no progress bar where nobody looks
    text = done.stdout.decode()
    assert "60 requests of one.jsonl" in text
    for word in ("slo", "least-loaded", "2.00", "attainment"):
        assert word in text
    assert b"<svg" in (folder / "picture.svg").read_bytes()


def test_with_host_tiers_prefixes_are_found_again(folder: Path) -> None:
    rows = [
        {"arrival_s": 9.0 * i, "prompt_tokens": 1100, "output_tokens": 3, "hash_ids": [1, 2, i + 9]}
        for i in range(4)
    ]
    (folder / "turns.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = ("--trace", "turns.jsonl", "--policy", "least-loaded")
    [record] = run_json(folder, *args, "--host-tokens", "100000")["policies"]
    # Ids 1 and 2, thrice; they name 512 tokens each.
    assert record["hit_rate"] == pytest.approx(3 * 1024 / (4 * 1100))
    found = run_json(folder, *args)
    assert found["inputs"]["host_tokens"] is None
    assert found["policies"][0]["hit_rate"] == 0.0


REFUSALS = {
    "host-tokens": (["--host-tokens", "-1"], "0 or more"),
    "policy": (["--policy", "slo,best"], "least-loaded"),
    "class": (["--policy", "mine:Yours"], "Yours"),
    "best-of-what": (["--policy", "static-best"], "--find-goodput"),
    "slo": (["--slo", "latency=1"], "ttft=SECONDS"),
    "slo-number": (["--slo", "ttft=fast"], "'fast'"),
    "share": (["--find-goodput", "90"], "--find-goodput"),
    "arrivals": (["--arrivals", "sometimes"], "compressed, poisson"),
    "format": (["--format", "csv"], "azure, mooncake, baton"),
    "wrong-format": (["--format", "mooncake"], "one.jsonl"),
    "scale": (["--rate-scale", "1,-2"], "--rate-scale"),
    "sizes": (["--prefill", "2"], "one or the other"),
    "plot": (["--plot", "picture.pdf"], ".svg"),
    "plot-folder": (["--plot", "nowhere/picture.png"], "folder"),
    "profile": (["--profile", "none.yaml"], "none.yaml"),
    "trace": (["--trace", "none.jsonl"], "none.jsonl"),
    "jobs": (["--jobs", "0"], "--jobs"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_bad_input_gets_one_sentence_and_status_2(folder: Path, name: str) -> None:
    args, says = REFUSALS[name]
    done = simulate("--trace", "one.jsonl", *SETTING, *args, cwd=folder)
    assert done.returncode == 2
    assert done.stdout == b""
    [line] = done.stderr.decode().splitlines()
    assert line.startswith("baton: ")
    assert says in line


def test_without_matplotlib_it_says_what_to_install(folder: Path) -> None:
    (folder / "matplotlib.py").write_text("raise ImportError('not here')")
    done = simulate("--trace", "one.jsonl", *SETTING, "--plot", "picture.png", cwd=folder)
    assert done.returncode == 2
    assert b"baton-serve[plot]" in done.stderr


def test_it_runs_without_torch(folder: Path) -> None:
    (folder / "torch.py").write_text("raise ImportError('not here')")
    done = simulate("--trace", "two.jsonl", *SETTING, cwd=folder)
    assert done.returncode == 0, done.stderr.decode()


def test_roles_are_counted_over_time() -> None:
    log = [
        (0.0, "a", "prefill"),
        (0.0, "b", "decode"),
        (2.0, "a", "mixed"),
        (5.0, "b", "prefill"),
    ]
    times, counts = role_counts(log)
    assert times == [0.0, 2.0, 5.0]
    assert counts == {"prefill": [1, 0, 1], "mixed": [0, 1, 1], "decode": [1, 1, 0]}
