"""The hard shift on running clusters: roles that move against every split that does not.

    python -m benchmarks.emulated_shift --traces DIR [--device emulated|cpu] [--simulate]
        [--instances 8] [--dilation 4] [--seconds 22] [--factor 1.0] [--static slo,least-loaded]

Azure Code, then Azure Conversation with prompt and output lengths exchanged (decode-heavy), Poisson
arrivals, lengths divided by four, outputs cut at 512. Each phase is scaled so that its own best
static split stands at 90 % in the simulator, then both by ``--factor``. ``slo`` starts with half
the instances on each side and switches roles; every static split runs the same requests with the
same policy, and with ``least-loaded``, roles off. A run ends after ``--limit`` seconds (four
minutes) at the latest: what has not finished is a miss. With the defaults all 15 runs take about an
hour. ``--simulate`` does the same in the simulator alone, in a minute.

``--device cpu``: the real engine with the demo model, ``--instances`` 4, one thread each. Costs are
fitted by ``baton profile`` first (or ``--profile``), times instances per core and ``--slowdown``;
targets and rates follow from them. With the demo model's steps of a few milliseconds gateway and
client take much of the cores: ``--model`` of ``qwen3-small`` is more like a device. Undilated; 7
runs of at most four minutes.

Writes emulated_shift.json, .md and .png (or real_shift, sim_shift) into benchmarks/results.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from baton.cli.simulation_plot import roles_over_time
from baton.core.cost_model import Profile
from baton.core.slo import ServiceLevel, Slo
from baton.engine.profile_file import load_profile, save_profile
from baton.simulator.runs import Load, static_best
from baton.simulator.workload import Trace, exchanged, follow, mean_rate, read_trace
from benchmarks.emulated import DEMO_MODEL, PROFILE, ROOT, Setup, run, simulate
from benchmarks.emulated_rows import ONLINE, describe, in_class, share, shorten, take, write

_GUESSES = (60.0, 8.0)
"""Requests per second, about where a phase's goodput is found."""


@dataclasses.dataclass(frozen=True, slots=True)
class Shift:
    """The requests, undilated, and when the second phase begins."""

    trace: Trace
    starts_s: tuple[float, ...]
    rates: tuple[float, ...]
    splits: tuple[str, ...]
    """The best static split of each phase, in the simulator."""


def phases(folder: Path, scale: float, clip_output: int) -> tuple[Trace, Trace]:
    """Code, and Conversation with lengths exchanged; the second halves of the traces."""
    code = shorten(read_trace(folder / "azure_code.csv"), scale)
    conv = read_trace(folder / "azure_conv.csv")
    return code, shorten(exchanged(conv), scale, clip_output=clip_output)


def make_shift(
    setup: Setup,
    traces: Sequence[Trace],
    seconds: float,
    factor: float,
    seed: int,
    rates: Sequence[float] = (),
) -> Shift:
    """Scale the phases (to ``rates``, where they are known), and put one behind the other."""
    undilated = dataclasses.replace(setup, dilation=1.0)
    scenario, _ = undilated.scenario()
    found, splits = list(rates), []
    for trace, guess in zip(traces, _GUESSES, strict=True) if not rates else ():

        def at(rate: float, trace: Trace = trace) -> Load:
            return Load(in_class(take(trace, rate, seconds, seed=seed)))

        best = static_best(scenario, at, guess=guess * len(scenario.roles) / 8)
        found.append(best.goodput_rate)
        splits.append(best.split)
    parts = [
        take(trace, rate * factor, seconds, seed=seed)
        for trace, rate in zip(traces, found, strict=True)
    ]
    starts = (0.0, parts[0][-1].arrival_s + 0.5 / mean_rate(parts[0]))
    return Shift(in_class(follow(*parts)), starts, tuple(found), tuple(splits))


def setups(base: Setup, static: Sequence[str]) -> list[Setup]:
    """The elastic one first, then every split with each of the policies."""
    num = base.prefill + base.decode
    found = [dataclasses.replace(base, policy="slo", roles_mode="auto")]
    for policy in static:
        for num_prefill in range(num - 1, 0, -1):
            found.append(
                dataclasses.replace(
                    base,
                    policy=policy,
                    roles_mode="off",
                    prefill=num_prefill,
                    decode=num - num_prefill,
                )
            )
    return found


def table(runs: Sequence[Mapping[str, Any]]) -> str:
    """Attainment of all, and the verdict."""
    lines = [
        "| policy | split | attainment | code | conversation, exchanged | flips | p90 TTFT (s) | "
        "p90 TPOT (ms) | host share | wrong tokens |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for one in runs:
        level = one["classes"][ONLINE]
        host = one["host"].get("cpu_share")
        flips = one["flips"] if isinstance(one["flips"], int) else len(one["flips"])
        elastic = one["roles_mode"] == "auto"
        lines.append(
            f"| {one['policy']}{', elastic' if elastic else ''} | {one['split']} | "
            f"{level['attainment']:.1%} | "
            + " | ".join(share(phase["attainment"]) for phase in level["phases"])
            + f" | {flips} | {level['ttft_s']['p90'] or 0:.2f} | "
            f"{(level['tpot_s']['p90'] or 0) * 1000:.0f} | "
            f"{share(host)} | {one.get('tokens', {}).get('wrong', 0)} |"
        )
    elastic, *static = (one["classes"][ONLINE]["attainment"] for one in runs)
    best = max(static, default=0.0)
    lines += ["", f"slo, elastic: {elastic:.1%}; best static split: {best:.1%}."]
    return "\n".join(lines) + "\n"


def draw(runs: Sequence[Mapping[str, Any]], starts_s: Sequence[float], path: Path) -> None:
    """Attainment of each run, and who had which role when."""
    figure = Figure(figsize=(9, 7), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1)
    names = [
        f"{one['policy']}\n{'elastic' if one['roles_mode'] == 'auto' else one['split']}"
        for one in runs
    ]
    values = [one["classes"][ONLINE]["attainment"] for one in runs]
    above.bar(names, values, color=["#1f6feb", *["#b8b8b8"] * (len(runs) - 1)])
    above.tick_params(axis="x", labelsize=6)
    above.set_ylabel("attainment")
    end_s = runs[0]["wall_s"] / runs[0]["dilation"]
    roles_over_time(below, runs[0]["role_log"], end_s)
    for start_s in starts_s[1:]:
        below.axvline(start_s, color="black", linestyle="--", linewidth=0.8)
    below.set_title("roles of slo, elastic; dashed: the shift")
    figure.savefig(path, dpi=120)


# The real engine.


def fitted(folder: Path, engine: Mapping[str, Any], model: Path = DEMO_MODEL) -> Path:
    """What ``baton profile`` fits to this engine, here."""
    path = folder / "fitted.yaml"
    command = [sys.executable, "-m", "baton.cli.main", "profile", "--model", str(model)]
    for name, value in engine.items():
        if name in ("num_blocks", "max_model_len", "max_num_seqs", "max_num_batched_tokens"):
            command += [f"--{name.replace('_', '-')}", str(value)]
    subprocess.run([*command, "--out", str(path)], check=True)
    return path


def slowed(profile: Profile, num_instances: int, slowdown: float) -> Profile:
    """So many instances share these cores, and ``slowdown`` for gateway, client and memory."""
    cores = len(os.sched_getaffinity(0))
    factor = slowdown * max(1.0, num_instances / cores)
    return dataclasses.replace(profile, cost=profile.cost.dilated(factor))


def targets(profile: Profile, longest: int) -> Slo:
    """What a machine with room to spare keeps: a TTFT of twice the longest prompt's time, and a
    TPOT of twice a full batch's."""
    cost, seqs = profile.cost, profile.max_num_seqs
    prefill_s = cost.prefill_s(longest, chunk=profile.max_num_batched_tokens)
    return Slo(round(2 * prefill_s, 3), round(2 * cost.decode_s(seqs, seqs * 300), 4))


REAL_ENGINE = {
    "num_blocks": 1024,
    "max_model_len": 2048,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 256,
}


def _base(args: argparse.Namespace, folder: Path, traces: Sequence[Trace]) -> Setup:
    half = args.instances // 2
    common: dict[str, Any] = {
        "prefill": args.instances - half,
        "decode": half,
        "heartbeat_s": args.heartbeat,
        "interval_s": args.interval,
        "cooldown_s": args.cooldown,
    }
    if args.device == "emulated":
        level = ServiceLevel(ONLINE, Slo(1.0, 0.05))
        return Setup(
            profile=(args.profile or PROFILE).resolve(),
            dilation=args.dilation,
            levels=(level,),
            **common,
        )
    model = args.model or DEMO_MODEL
    found = args.profile or fitted(folder, REAL_ENGINE, model)
    profile = slowed(load_profile(found), args.instances, args.slowdown)
    longest = max(r.num_prompt_tokens for trace in traces for r in trace)
    path = folder / "slowed.yaml"
    save_profile(profile, path)
    level = ServiceLevel(ONLINE, targets(profile, longest))
    return Setup(
        profile=path,
        emulated=False,
        model=model,
        levels=(level,),
        engine=REAL_ENGINE,
        **common,
    )


def _rates(text: str) -> tuple[float, ...]:
    first, second = (float(part) for part in text.split(","))
    return first, second


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--traces", type=Path, required=True)
    add("--device", choices=("emulated", "cpu"), default="emulated")
    add("--simulate", action="store_true", help="in the simulator alone")
    add("--instances", type=int)
    add("--profile", type=Path)
    add("--model", type=Path, help="for --device cpu; default: the demo model")
    add("--slowdown", type=float, default=1.5, help="of real instances by all else on these cores")
    add("--dilation", type=float, default=4.0)
    add("--seconds", type=float, default=22.0, help="of each phase, undilated")
    add("--length-scale", type=float, default=0.25)
    add("--clip-output", type=int, default=512)
    add("--rates", type=_rates, default=(), help="of the phases, instead of a search: A,B")
    add("--factor", type=float, default=1.0)
    add("--heartbeat", type=float, default=1.0, help="seconds of this machine; so are these two")
    add("--interval", type=float, default=1.0)
    add("--cooldown", type=float, default=4.0)
    add("--static", default="slo,least-loaded")
    add("--limit", type=float, default=240.0, help="seconds of this machine for each run")
    add("--seed", type=int, default=0)
    add("--out", type=Path, help="of the JSON; .md and .png go beside it")
    args = parser.parse_args(argv)
    if args.instances is None:
        args.instances = 8 if args.device == "emulated" else 4
    if args.out is None:
        name = "sim" if args.simulate else "emulated" if args.device == "emulated" else "real"
        args.out = ROOT / "results" / f"{name}_shift.json"
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """See the module's docstring."""
    args = _arguments(argv)
    with tempfile.TemporaryDirectory(prefix="baton-shift-") as folder:
        traces = phases(args.traces, args.length_scale, args.clip_output)
        base = _base(args, Path(folder), traces)
        shift = make_shift(base, traces, args.seconds, args.factor, args.seed, args.rates)
        print(
            f"rates {shift.rates}, best static splits {shift.splits}, {len(shift.trace)} requests, "
            f"targets {base.levels[0].slo}",
            file=sys.stderr,
        )
        do: Callable[..., dict[str, Any]] = simulate if args.simulate else run
        runs = []
        for setup in setups(base, args.static.split(",")):
            record = do(setup, shift.trace, starts_s=shift.starts_s, limit_s=args.limit)
            print(describe(record), file=sys.stderr, flush=True)
            runs.append(record)
        text = table(runs)
        slo = base.levels[0].slo
        settings = {
            "instances": args.instances,
            "profile": load_profile(base.profile).name,
            "profile_source": load_profile(base.profile).source,
            "ttft_s": slo.ttft_s,
            "tpot_s": slo.tpot_s,
            "phase_rates": shift.rates,
            "phase_splits": shift.splits,
            "starts_s": shift.starts_s,
            "requests": len(shift.trace),
            **{k: v for k, v in vars(args).items() if not isinstance(v, Path)},
        }
        write(args.out, "shift", {"settings": settings, "runs": runs})
        args.out.with_suffix(".md").write_text(text)
        draw(runs, shift.starts_s, args.out.with_suffix(".png"))
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
