"""The simulator against running clusters: the same arrivals and lengths in both, and the errors.

    python -m benchmarks.sim_check --traces DIR [--real] [--emulated] [--repetitions 5]

``--real``: the real engine, one prefill and one decode instance, on a model whose steps take 50 ms
and more (``qwen3-100m`` of ``benchmarks/shapes.py``, random weights; or ``--model``). ``baton
profile`` fits the costs here first. Three rates, each run ``--repetitions`` times, rates in turn;
medians are compared. Within 15 %, or twice the spread between two real runs (their mean distance).
About 25 minutes, of which profiling takes three.

``--emulated``: eight emulated instances, dilated (``--dilation``; host work is reported and
should stay under 5 % of a step): ``slo`` static 4:4 on Azure Conversation, and with flips on
the hard shift of ``benchmarks/emulated_shift.py``, with errors also of those requests that
arrive in the ten seconds after the shift. Three rates each. Within 10 %, and 3 points of
attainment. About 20 minutes.

TTFT is what prefill instances make, TPOT what decode instances make. Writes sim_check_real.json or
sim_check_emulated.json, and .md, into benchmarks/results.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from baton.core.cost_model import Profile
from baton.core.slo import ServiceLevel, Slo
from baton.engine.profile_file import load_profile
from baton.simulator.workload import Trace, mean_rate, read_trace
from benchmarks import shapes
from benchmarks.emulated import PROFILE, ROOT, Setup, cluster_of, replay, run, simulate
from benchmarks.emulated_rows import ONLINE, describe, in_class, share, shorten, take, write
from benchmarks.emulated_shift import fitted, make_shift, phases

NUMBERS = (("ttft_s", "p50"), ("ttft_s", "p90"), ("tpot_s", "p50"), ("tpot_s", "p90"))
ROLES = {"ttft_s": "prefill", "tpot_s": "decode"}
REAL_ENGINE = {
    "num_blocks": 512,
    "max_model_len": 2048,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 256,
}
LOADS = (0.3, 0.5, 0.7)
"""Shares of what the busier of the two instances can do."""
SHIFT_FACTORS = (0.6, 0.8, 1.0)
STATIC_SHARES = (0.5, 0.7, 0.9)
"""Of the rate at which prefill or decode instances are full."""
AFTER_SHIFT_S = 10.0


@dataclasses.dataclass(frozen=True, slots=True)
class Check:
    """One number of one run."""

    run: str
    number: str
    real: float
    simulated: float
    spread: float | None
    """Between two real runs, as a share; ``None`` where there was one run."""
    allowed: float
    """As a share; for attainment in points of 1."""

    @property
    def error(self) -> float:
        """Signed: above 0, the simulator says more."""
        if self.number.endswith("attainment"):
            return self.simulated - self.real
        return self.simulated / self.real - 1.0

    @property
    def passes(self) -> bool:
        """Whether it is within what is allowed."""
        return abs(self.error) <= self.allowed


def spread(values: Sequence[float]) -> float | None:
    """Mean distance of two runs, as a share of the median; ``None`` of one."""
    if len(values) < 2:
        return None
    distances = [abs(a - b) for a, b in itertools.combinations(values, 2)]
    return statistics.fmean(distances) / statistics.median(values)


def compare(
    name: str,
    real: Sequence[Mapping[str, Any]],
    simulated: Mapping[str, Any],
    at_least: float,
    *,
    points: float | None = None,
) -> list[Check]:
    """Numbers of one class (or phase) of several equal real runs and of one simulated."""
    checks = []
    for key, quantile in NUMBERS:
        values = [one[key][quantile] for one in real]
        told = simulated[key][quantile]
        if told is None or None in values:
            continue
        apart = spread(values)
        allowed = max(at_least, 2 * (apart or 0.0))
        label = f"{ROLES[key]}: {quantile} {key.removesuffix('_s').upper()}"
        checks.append(Check(name, label, statistics.median(values), told, apart, allowed))
    if points is not None:
        values = [one["attainment"] for one in real]
        checks.append(
            Check(
                name, "attainment", statistics.median(values), simulated["attainment"], None, points
            )
        )
    return checks


def capacity(profile: Profile, trace: Trace, num_prefill: int, num_decode: int) -> float:
    """Requests per second at which prefill or decode instances have no time left, whichever is
    first."""
    cost, seqs = profile.cost, profile.max_num_seqs
    prefill_s = statistics.fmean(cost.prefill_s(r.num_prompt_tokens) for r in trace)
    tokens = statistics.fmean(r.num_output_tokens for r in trace)
    context = statistics.fmean(r.num_prompt_tokens + r.num_output_tokens / 2 for r in trace)
    decode_s = tokens * cost.decode_s(seqs, seqs * context) / seqs
    return min(num_prefill / prefill_s, num_decode / max(1e-9, decode_s))


def check_real(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """1P1D on the real engine."""
    model = args.model
    if model is None:
        model = folder / "qwen3-100m"
        shapes.make("qwen3-100m", model)
    path = args.profile or fitted(folder, REAL_ENGINE, model)
    profile = load_profile(path)
    conv = shorten(read_trace(args.traces / "azure_conv.csv"), args.length_scale, clip_output=64)
    half = conv[len(conv) // 2 :][:500]
    most = capacity(profile, half, 1, 1)
    setup = Setup(
        1,
        1,
        profile=path,
        emulated=False,
        model=model,
        policy="least-loaded",
        levels=(ServiceLevel(ONLINE, Slo()),),
        engine=REAL_ENGINE,
    )
    traces = {load: in_class(take(conv, most * load, args.seconds)) for load in LOADS}
    runs: dict[float, list[dict[str, Any]]] = {load: [] for load in LOADS}
    with cluster_of(setup) as cluster:
        replay(cluster, setup, in_class(take(conv, most * 0.3, 10.0)))  # warms caches and threads
        for _ in range(args.repetitions):
            for load, trace in traces.items():
                record = replay(cluster, setup, trace)
                print(describe(record), file=sys.stderr, flush=True)
                runs[load].append(record)
    checks, records = [], []
    for load, trace in traces.items():
        simulated = simulate(setup, trace)
        print(describe(simulated), file=sys.stderr, flush=True)
        real = [one["classes"][ONLINE] for one in runs[load]]
        name = f"1:1, {mean_rate(trace):.2f}/s"
        checks += compare(name, real, simulated["classes"][ONLINE], 0.15)
        records += [*runs[load], simulated]
    return {
        "profile": profile_record(profile),
        "step_s": statistics.median(one["host"]["step_s"] for own in runs.values() for one in own),
        "checks": checks,
        "runs": records,
    }


def profile_record(profile: Profile) -> dict[str, Any]:
    """What it says, for JSON."""
    return {"name": profile.name, "source": profile.source, **dataclasses.asdict(profile.cost)}


def check_emulated(args: argparse.Namespace) -> dict[str, Any]:
    """Eight instances: static, and elastic across a shift."""
    path = (args.profile or PROFILE).resolve()
    profile = load_profile(path)
    level = ServiceLevel(ONLINE, Slo(1.0, 0.05))
    static = Setup(4, 4, profile=path, dilation=args.dilation, levels=(level,))
    conv = shorten(read_trace(args.traces / "azure_conv.csv"), 0.25)
    most = capacity(profile, conv[len(conv) // 2 :], 4, 4)
    checks: list[Check] = []
    records: list[dict[str, Any]] = []

    def both(
        name: str, setup: Setup, trace: Trace, starts_s: Sequence[float], across: int | None
    ) -> None:
        real = run(setup, trace, starts_s=starts_s, limit_s=args.limit)
        simulated = simulate(setup, trace, starts_s=starts_s, limit_s=args.limit)
        for record in (real, simulated):
            print(describe(record), file=sys.stderr, flush=True)
            records.append(record)
        pair = (real["classes"][ONLINE], simulated["classes"][ONLINE])
        checks.extend(compare(name, [pair[0]], pair[1], 0.10, points=0.03))
        if across is not None:
            inside = [one["phases"][across] for one in pair]
            text = f"{name}, {AFTER_SHIFT_S:.0f} s from the shift on"
            checks.extend(compare(text, inside[:1], inside[1], 0.10, points=0.03))

    for load in STATIC_SHARES:
        trace = in_class(take(conv, most * load, args.seconds))
        both(f"static 4:4, {mean_rate(trace):.1f}/s", static, trace, (0.0,), None)
    elastic = dataclasses.replace(static, roles_mode="auto", cooldown_s=4.0)
    for factor in SHIFT_FACTORS:
        shift = make_shift(elastic, phases(args.traces, 0.25, 512), 22.0, factor, 0)
        begins = shift.starts_s[1]
        starts = (0.0, begins, begins + AFTER_SHIFT_S)
        name = f"elastic, shift, {mean_rate(shift.trace):.1f}/s"
        both(name, elastic, shift.trace, starts, 1)
    return {
        "profile": profile_record(profile),
        "dilation": args.dilation,
        "checks": checks,
        "runs": records,
    }


def table(checks: Sequence[Check]) -> str:
    """Errors, and what is allowed."""
    lines = [
        "| run | what | cluster | simulator | error | between real runs | allowed | |",
        "|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for one in checks:
        numbers = [share(one.real), share(one.simulated)]
        if not one.number.endswith("attainment"):
            numbers = [f"{value * 1000:.1f} ms" for value in (one.real, one.simulated)]
        lines.append(
            f"| {one.run} | {one.number} | {numbers[0]} | {numbers[1]} | {one.error:+.1%} | "
            f"{share(one.spread)} | {one.allowed:.1%} | {'' if one.passes else 'misses'} |"
        )
    missed = sum(not one.passes for one in checks)
    return "\n".join([*lines, "", f"{len(checks) - missed} of {len(checks)} within."]) + "\n"


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--traces", type=Path, required=True)
    add("--real", action="store_true")
    add("--emulated", action="store_true")
    add("--model", type=Path, help="for --real")
    add("--profile", type=Path)
    add("--repetitions", type=int, default=5)
    add("--seconds", type=float, default=30.0, help="of each trace, undilated")
    add("--length-scale", type=float, default=0.15, help="for --real")
    add("--dilation", type=float, default=4.0)
    add("--limit", type=float, default=240.0, help="seconds of this machine for an emulated run")
    add("--out", type=Path, default=ROOT / "results", help="folder")
    args = parser.parse_args(argv)
    if not (args.real or args.emulated):
        parser.error("give --real or --emulated")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """See the module's docstring; the exit status says whether all is within."""
    args = _arguments(argv)
    good = True
    with tempfile.TemporaryDirectory(prefix="baton-sim-check-") as folder:
        for name, wanted in (("real", args.real), ("emulated", args.emulated)):
            if not wanted:
                continue
            found = check_real(args, Path(folder)) if name == "real" else check_emulated(args)
            checks: list[Check] = found.pop("checks")
            rows = [
                {**dataclasses.asdict(one), "error": one.error, "passes": one.passes}
                for one in checks
            ]
            path = args.out / f"sim_check_{name}.json"
            write(path, "sim_check", {"checks": rows, **found})
            text = table(checks)
            path.with_suffix(".md").write_text(text)
            print(text)
            good = good and all(one.passes for one in checks)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
