"""The KV pool in simulation: Mooncake's conversation trace on host tiers of all sizes.

    python -m benchmarks.sim_mooncake --trace FILE [--sizes 1,0.5,0.25,0.1,0] [--seeds 3]
        [--policies slo,least-loaded,prefix-affinity] [--instances-per-node 8]
        [--arrivals compressed] [--half second] [--requests N] [--jobs 2]

8 instances of the derived 910B profile with blocks of 512 tokens (what the trace's ids name), TTFT
10 s, TPOT 100 ms, goodput at 90 % attainment (failed and shed requests are misses). The fixed
policies have 4 prefill and 4 decode instances; ``slo`` begins so. All share pool, engine and
queue discipline. Policies were tuned on the first half of the trace; the second half is reported,
and caches are cold when it begins.

A size is a share of what holds all different blocks of the half's prompts and outputs. The ideal:
every block of every earlier prompt is there at once. Times are jittered within the trace's bins of
3 s, from the seed.

Writes benchmarks/results/sim_mooncake.json, .md and .png.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import datetime
import functools
import gc
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from baton.core.slo import Slo
from baton.engine.profile_file import load_profile
from baton.simulator.pool import PoolSettings
from baton.simulator.reuse import ideal_reuse
from baton.simulator.runs import Load, Scenario, find_goodput
from baton.simulator.workload import (
    MOONCAKE_HASH_TOKENS,
    Arrivals,
    Trace,
    mean_rate,
    read_trace,
    rescale,
    split,
)

ROOT = Path(__file__).resolve().parent
PROFILE = ROOT / "profiles" / "ascend-910b-qwen2.5-7b.yaml"
SLO = Slo(10.0, 0.1)
NUM = 8
POLICIES = ("slo", "least-loaded", "prefix-affinity")
SIZES = (1.0, 0.5, 0.25, 0.1, 0.0)
PRECISION = 0.03
Row = dict[str, Any]


@functools.lru_cache(maxsize=4)
def _trace(path: Path, half: str, num: int | None, seed: int) -> Trace:
    trace = split(read_trace(path, "mooncake", seed=seed))[half == "second"]
    return trace[:num] if num else trace


def scenario(policy: str, host_tokens: int, instances_per_node: int) -> Scenario:
    """``host_tokens``: of all machines together."""
    profile = dataclasses.replace(load_profile(PROFILE), block_size=MOONCAKE_HASH_TOKENS)
    num_nodes = -(-NUM // instances_per_node)
    pool = PoolSettings(host_tokens // num_nodes, instances_per_node)
    return Scenario(profile, policy, NUM // 2, NUM // 2, SLO, pool=pool)


def _job(task: Row) -> list[Row]:
    """One policy and seed, from the largest tier on: each size's search begins near the last."""
    gc.set_threshold(100_000, 20, 50)  # a seventh of the time otherwise
    trace = _trace(Path(task["trace"]), task["half"], task["requests"], task["seed"])
    ideal = ideal_reuse(trace)
    arrivals: Arrivals = task["arrivals"]
    rows: list[Row] = []
    guess, factor = mean_rate(trace), 1.5
    for size in task["sizes"]:
        started = time.perf_counter()
        host_tokens = int(size * ideal.num_blocks * MOONCAKE_HASH_TOKENS)
        found = find_goodput(
            scenario(task["policy"], host_tokens, task["instances_per_node"]),
            lambda rate: Load(rescale(trace, rate, arrivals, seed=task["seed"])),
            guess=guess,
            precision=PRECISION,
            factor=factor,
        )
        best = found.at
        hit_rate = None
        if best is not None:
            guess, factor = found.goodput_rate, 1.15
            hit_rate = best.num_cached_tokens / best.num_prompt_tokens
        rows.append(
            {
                "policy": task["policy"],
                "seed": task["seed"],
                "size": size,
                "host_tokens": host_tokens,
                "goodput_rate": found.goodput_rate,
                "hit_rate": hit_rate,
                "ideal_hit_rate": ideal.hit_rate,
                "fetched_tokens": best.fetched_tokens if best else {},
                "handed_tokens": best.handed_tokens if best else 0,
                "flips": best.num_flips if best else None,
                "percentiles": best.percentiles if best else {},
                "utilisation": best.utilisation if best else {},
                "curve": [[r.rate, r.attainment, r.cut_short] for r in found.curve],
                "steps": sum(r.num_steps for r in found.curve),
                "seconds": time.perf_counter() - started,
            }
        )
        _tell(rows[-1])
    return rows


def _tell(row: Row) -> None:
    print(
        f"{row['policy']:16} seed {row['seed']}  size {row['size']:4.0%}  "
        f"{row['goodput_rate']:6.2f} hits {row['hit_rate'] or 0.0:.1%} of "
        f"{row['ideal_hit_rate']:.1%}  flips {row['flips']} ({row['seconds']:.0f} s)",
        file=sys.stderr,
        flush=True,
    )


def main(argv: list[str] | None = None) -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--sizes", default=",".join(f"{size:g}" for size in SIZES))
    parser.add_argument("--policies", default=",".join(POLICIES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--instances-per-node", type=int, default=NUM)
    parser.add_argument("--arrivals", choices=("compressed", "poisson"), default="compressed")
    parser.add_argument("--half", choices=("first", "second"), default="second")
    parser.add_argument("--requests", type=int, help="default: all of the half")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "sim_mooncake.json")
    args = parser.parse_args(argv)
    started = time.perf_counter()
    sizes = sorted((float(size) for size in args.sizes.split(",")), reverse=True)
    common = {
        "trace": str(args.trace),
        "half": args.half,
        "requests": args.requests,
        "sizes": sizes,
        "arrivals": args.arrivals,
        "instances_per_node": args.instances_per_node,
    }
    rows: list[Row] = []
    with concurrent.futures.ProcessPoolExecutor(args.jobs) as pool:
        tasks = [
            {**common, "policy": policy, "seed": seed}
            for seed in range(args.seeds)
            for policy in args.policies.split(",")
        ]
        for future in concurrent.futures.as_completed([pool.submit(_job, t) for t in tasks]):
            rows += future.result()
    record = {
        "schema": "baton.benchmark.sim_mooncake/1",
        "when": datetime.date.today().isoformat(),
        "settings": {
            **{name: value for name, value in common.items() if name != "trace"},
            "seeds": args.seeds,
            "instances": NUM,
            "profile": PROFILE.name,
            "ttft_s": SLO.ttft_s,
            "tpot_s": SLO.tpot_s,
            "target": 0.9,
            "precision": PRECISION,
        },
        "seconds": time.perf_counter() - started,
        "results": sorted(rows, key=lambda r: (r["policy"], -r["size"], r["seed"])),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    text = table(record)
    args.out.with_suffix(".md").write_text(text)
    plot(record, args.out.with_suffix(".png"))
    print(text)
    return 0


def _series(record: Row, policy: str, size: float, name: str) -> list[float]:
    """By seed."""
    rows = [r for r in record["results"] if r["policy"] == policy and r["size"] == size]
    return [row[name] or 0.0 for row in sorted(rows, key=lambda r: r["seed"])]


def _spread(values: list[float], form: str) -> str:
    middle, least, most = statistics.median(values), min(values), max(values)
    return f"{middle:{form}} ({least:{form}}..{most:{form}})"


def _kinds(record: Row) -> tuple[list[str], list[float]]:
    policies = list(dict.fromkeys(r["policy"] for r in record["results"]))
    return sorted(policies, key=lambda p: p != "slo"), record["settings"]["sizes"]


def table(record: Row) -> str:
    """Medians over seeds with their range."""
    policies, sizes = _kinds(record)
    lines = [
        "Medians over seeds (least..most). Hits: prompt tokens found, at the goodput rate.",
        "",
        "| host tiers | TB | policy | goodput (1/s) | slo / it | hit rate | of the ideal |",
        "|---:|---:|---|---:|---:|---:|---:|",
    ]
    kv_bytes = load_profile(PROFILE).cost.kv_bytes_per_token
    for size in sizes:
        for policy in policies:
            rates = _series(record, policy, size, "goodput_rate")
            hits = _series(record, policy, size, "hit_rate")
            ideals = _series(record, policy, size, "ideal_hit_rate")
            tokens = statistics.median(_series(record, policy, size, "host_tokens"))
            shares = [hit / ideal for hit, ideal in zip(hits, ideals, strict=True)]
            ratio = ""
            if "slo" in policies and all(rates):
                slo = _series(record, "slo", size, "goodput_rate")
                ratio = _spread([a / b for a, b in zip(slo, rates, strict=True)], ".2f")
            lines.append(
                f"| {size:.0%} | {tokens * kv_bytes / 1e12:.2f} | {policy} | "
                f"{_spread(rates, '.2f')} | {ratio} | {_spread(hits, '.1%')} | "
                f"{_spread(shares, '.1%')} |"
            )
    ideal = statistics.median(r["ideal_hit_rate"] for r in record["results"])
    lines += ["", f"Ideal hit rate (nothing is ever forgotten): {ideal:.1%}."]
    return "\n".join(lines) + "\n"


def plot(record: Row, path: Path) -> None:
    """Goodput and hit rate over the size of the host tiers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    policies, sizes = _kinds(record)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    places = range(len(sizes))
    for policy in policies:
        for axis, name in ((left, "goodput_rate"), (right, "hit_rate")):
            values = [_series(record, policy, size, name) for size in sizes]
            middles = [statistics.median(v) for v in values]
            below = [m - min(v) for m, v in zip(middles, values, strict=True)]
            above = [max(v) - m for m, v in zip(middles, values, strict=True)]
            axis.errorbar(places, middles, (below, above), marker="o", capsize=3, label=policy)
    ideal = statistics.median(r["ideal_hit_rate"] for r in record["results"])
    right.axhline(ideal, color="grey", linestyle="--", label="ideal")
    left.set_ylabel("goodput, requests per s")
    right.set_ylabel("prompt tokens found")
    for axis in (left, right):
        axis.set_xticks(list(places), [f"{size:.0%}" for size in sizes])
        axis.set_xlabel("host tiers, share of what holds everything")
        axis.set_ylim(bottom=0.0)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
