"""Elastic roles in simulation: xLLM's figure 21 with published settings, and harder shifts.

    python -m benchmarks.sim_elastic --traces DIR [--workloads code,conv,code+conv,shift]
        [--arrivals compressed,poisson] [--seeds 3] [--half second] [--requests N] [--jobs 2]

8 instances of the derived 910B profile, TTFT 1 s, TPOT 50 ms, goodput at 90 % attainment (failed
and shed requests are misses). Policies were tuned on the first half of each trace; the second half
is reported. All policies share queue discipline, chunking and shedding: they are the engine's.
``compressed`` divides the trace's times, so its bursts stay; seeds then only vary which requests
come first (the half is rotated). ``shift``: Code followed by Conversation with prompt and output
lengths exchanged, each phase scaled so that its own best static split stands at 90 %, then both by
one factor, which is the goodput; 90 % are needed in each phase.

Writes benchmarks/results/sim_elastic.json, .md and .png.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import datetime
import functools
import itertools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from baton.core.slo import Slo
from baton.engine.profile_file import load_profile
from baton.simulator.bound import oracle_attainment
from baton.simulator.runs import Goodput, Load, Scenario, find_goodput, static_best
from baton.simulator.workload import (
    Arrivals,
    Trace,
    exchanged,
    follow,
    mean_rate,
    read_trace,
    rescale,
    rotate,
    split,
)

ROOT = Path(__file__).resolve().parent
PROFILE = ROOT / "profiles" / "ascend-910b-qwen2.5-7b.yaml"
SLO = Slo(1.0, 0.05)
NUM = 8
POLICIES = (
    "slo",
    "slo-frozen",
    "static-best",
    "least-loaded",
    "round-robin",
    "prefix-affinity",
    "colocated",
    "oracle",
)


@dataclasses.dataclass(frozen=True)
class Workload:
    """One column of the table: traces, and how the rate is applied to them."""

    name: str
    phases: tuple[Trace, ...]
    arrivals: Arrivals
    seed: int
    phase_rates: tuple[float, ...] = ()
    """With these, the rate is a factor on them; else it is the mean rate of the whole."""

    def at(self, rate: float) -> Load:
        """The load at a rate, or at a factor on the phases' rates."""
        if self.phase_rates:
            parts = [
                rescale(trace, rate * own, self.arrivals, seed=self.seed + 100 * i)
                for i, (trace, own) in enumerate(zip(self.phases, self.phase_rates, strict=True))
            ]
            starts = [0.0]
            for part in parts[:-1]:
                starts.append(starts[-1] + part[-1].arrival_s + 0.5 / mean_rate(part))
            return Load(follow(*parts), tuple(starts))
        whole = follow(*self.phases)
        return Load(rescale(whole, rate, self.arrivals, seed=self.seed))


def scenario(policy: str) -> Scenario:
    """Half the instances on each side, as the fixed policies have it."""
    name = policy.removesuffix("-frozen")
    return Scenario(
        load_profile(PROFILE), name, NUM // 2, NUM // 2, SLO, freeze_roles=policy != "slo"
    )


def solve(workload: Workload, policy: str, guess: float) -> Goodput:
    """The goodput of one policy on one workload."""
    if policy == "static-best":
        return static_best(scenario("least-loaded"), workload.at, guess=guess)
    if policy == "oracle":
        return _oracle(workload, guess)
    return find_goodput(scenario(policy), workload.at, guess=guess)


def _oracle(workload: Workload, guess: float) -> Goodput:
    profile = load_profile(PROFILE)

    def good(rate: float) -> bool:
        load = workload.at(rate)
        if len(load.starts_s) == 1:
            return oracle_attainment(load.trace, profile, SLO, NUM) >= 0.9
        # Each phase for itself: what one leaves over cannot harm the next.
        bounds = (*load.starts_s, float("inf"))
        parts = [
            tuple(r for r in load.trace if low <= r.arrival_s < high)
            for low, high in itertools.pairwise(bounds)
        ]
        return all(oracle_attainment(part, profile, SLO, NUM) >= 0.9 for part in parts)

    low, high = guess / 64, guess * 64
    while high - low > 0.005 * high:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if good(middle) else (low, middle)
    return Goodput("oracle", low, None, ())


@functools.lru_cache(maxsize=8)
def traces(folder: Path, half: str, num: int | None) -> tuple[Trace, Trace]:
    """Code and Conversation."""
    found = []
    for name in ("azure_code.csv", "azure_conv.csv"):
        trace = split(read_trace(folder / name))[half == "second"]
        found.append(trace[:num] if num else trace)
    return found[0], found[1]


def make_workload(
    name: str, code: Trace, conv: Trace, arrivals: Arrivals, seed: int, rates: tuple[float, ...]
) -> Workload:
    """By name. With ``compressed`` arrivals a seed turns the trace: another request comes first."""
    if arrivals == "compressed":
        code, conv = rotate(code, seed / 7.0), rotate(conv, seed / 7.0)
    phases: dict[str, tuple[Trace, ...]] = {
        "code": (code,),
        "conv": (conv,),
        "code+conv": (code, conv),
        "shift": (code, exchanged(conv)),
        "phase-0": (code,),
        "phase-1": (exchanged(conv),),
    }
    return Workload(name, phases[name], arrivals, seed, rates if name == "shift" else ())


def _job(task: dict[str, Any]) -> dict[str, Any]:
    code, conv = traces(Path(task["folder"]), task["half"], task["requests"])
    workload = make_workload(
        task["workload"], code, conv, task["arrivals"], task["seed"], tuple(task["rates"])
    )
    started = time.perf_counter()
    found = solve(workload, task["policy"], task["guess"])
    best = found.at
    return {
        **{k: v for k, v in task.items() if k != "folder"},
        "goodput_rate": found.goodput_rate,
        "split": found.split,
        "flips": best.num_flips if best else None,
        "percentiles": best.percentiles if best else {},
        "utilisation": best.utilisation if best else {},
        "curve": [[r.rate, r.attainment, r.cut_short] for r in found.curve],
        "steps": sum(r.num_steps for r in found.curve),
        "seconds": time.perf_counter() - started,
    }


_GUESS = {
    "code": 30.0,
    "conv": 50.0,
    "code+conv": 35.0,
    "shift": 1.0,
    "phase-0": 30.0,
    "phase-1": 60.0,
}


def main(argv: list[str] | None = None) -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--traces", type=Path, required=True)
    parser.add_argument("--workloads", default="code,conv,code+conv,shift")
    parser.add_argument("--arrivals", default="compressed,poisson")
    parser.add_argument("--policies", default=",".join(POLICIES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--half", choices=("first", "second"), default="second")
    parser.add_argument("--requests", type=int, help="of each trace; default: all of the half")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "sim_elastic.json")
    args = parser.parse_args(argv)
    started = time.perf_counter()
    common = {"folder": str(args.traces), "half": args.half, "requests": args.requests}
    results: list[dict[str, Any]] = []
    with concurrent.futures.ProcessPoolExecutor(args.jobs) as pool:

        def run(tasks: list[dict[str, Any]]) -> list[dict[str, Any]]:
            done = []
            futures = [pool.submit(_job, {**common, **task}) for task in tasks]
            for future in concurrent.futures.as_completed(futures):
                row = future.result()
                done.append(row)
                print(
                    f"{time.perf_counter() - started:6.0f} s  {row['workload']:10} "
                    f"{row['arrivals']:10} seed {row['seed']}  {row['policy']:15} "
                    f"{row['goodput_rate']:7.2f} {row['split']:4} flips {row['flips']} "
                    f"({row['seconds']:.0f} s)",
                    file=sys.stderr,
                    flush=True,
                )
            return done

        names = args.workloads.split(",")
        cases = [(a, s) for a in args.arrivals.split(",") for s in range(args.seeds)]
        rates: dict[tuple[str, int], tuple[float, ...]] = {}
        if "shift" in names:
            phases = run([
                {"workload": f"phase-{i}", "arrivals": a, "seed": s, "policy": "static-best",
                 "rates": (), "guess": _GUESS[f"phase-{i}"]}
                for a, s in cases for i in (0, 1)
            ])  # fmt: skip
            by = {(r["arrivals"], r["seed"], r["workload"]): r["goodput_rate"] for r in phases}
            rates = {(a, s): (by[a, s, "phase-0"], by[a, s, "phase-1"]) for a, s in cases}
        results = run([
            {"workload": w, "arrivals": a, "seed": s, "policy": p,
             "rates": rates.get((a, s), ()), "guess": _GUESS[w]}
            for w in names for a, s in cases for p in args.policies.split(",")
        ])  # fmt: skip
    record = {
        "schema": "baton.benchmark.sim_elastic/1",
        "when": datetime.date.today().isoformat(),
        "settings": {
            "instances": NUM,
            "profile": PROFILE.name,
            "ttft_s": SLO.ttft_s,
            "tpot_s": SLO.tpot_s,
            "target": 0.9,
            "half": args.half,
            "requests": args.requests,
            "seeds": args.seeds,
        },
        "seconds": time.perf_counter() - started,
        "results": sorted(
            results, key=lambda r: (r["workload"], r["arrivals"], r["seed"], r["policy"])
        ),
        "phase_rates": {f"{a}/{s}": r for (a, s), r in rates.items()},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    text = table(record)
    args.out.with_suffix(".md").write_text(text)
    plot(record, args.out.with_suffix(".png"))
    print(text)
    return 0


Cells = dict[tuple[str, str, str], list[float]]
"""Goodput by workload, arrivals and policy; a value for each seed."""


def cells_of(record: dict[str, Any]) -> Cells:
    """The results by what they are results of."""
    cells: Cells = {}
    for row in record["results"]:
        key = (row["workload"], row["arrivals"], row["policy"])
        cells.setdefault(key, []).append(row["goodput_rate"])
    return cells


def plot(record: dict[str, Any], path: Path) -> None:
    """Goodput of each policy over that of ``static-best``, workload by workload."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cells = cells_of(record)
    cases = list(dict.fromkeys(key[:2] for key in cells))
    policies = [p for p in POLICIES if any(key[2] == p for key in cells)]
    figure, axes = pyplot.subplots(figsize=(12, 4.5))
    width = 0.8 / len(policies)
    for i, policy in enumerate(policies):
        heights = []
        for case in cases:
            base = statistics.median(cells.get((*case, "static-best"), [0.0])) or float("nan")
            heights.append(statistics.median(cells.get((*case, policy), [0.0])) / base)
        axes.bar([x + i * width for x in range(len(cases))], heights, width, label=policy)
    axes.set_xticks([x + 0.4 - width / 2 for x in range(len(cases))])
    axes.set_xticklabels([f"{workload}\n{arrivals}" for workload, arrivals in cases])
    axes.set_ylabel("goodput over static-best")
    axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def table(record: dict[str, Any]) -> str:
    """Medians over seeds with their range, and the ratios that the bars are about."""
    cells = cells_of(record)
    lines = [
        "| workload | arrivals | policy | goodput (shift: factor) | least..most | slo / it |",
        "|---|---|---|---:|---:|---:|",
    ]
    for (workload, arrivals, policy), values in cells.items():
        slo = cells.get((workload, arrivals, "slo"))
        ratio = ""
        if slo:
            pairs = [a / b for a, b in zip(slo, values, strict=True) if b]
            ratio = f"{statistics.median(pairs):.2f} ({min(pairs):.2f})" if pairs else ""
        lines.append(
            f"| {workload} | {arrivals} | {policy} | {statistics.median(values):.2f} | "
            f"{min(values):.2f}..{max(values):.2f} | {ratio} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
