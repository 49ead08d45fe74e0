"""A flood of offline work beside online work: what online attainment loses, what the flood gets.

    python -m benchmarks.offline_flood --traces DIR [--where simulator,emulated] [--load 0.6]

Azure Conversation, lengths divided by four, at ``--load`` of what eight instances can do, policy
``slo`` with a split of 4:4. Then the same requests and, from second 1 on, a flood of offline
ones (Azure Code; priority -1), more than there is room for; a part of them has a deadline that can
be kept. Twice without and twice with the flood on the emulated cluster, which tells the spread.

Online attainment may move by 1 point in the simulator, and by 2 on the emulated cluster; and no
offline request with a deadline that the room allows may end past it. A run takes at most
(seconds x dilation + drain), 150 s with the defaults: 12 minutes in all. The flood ends with the
run: what is still open then has not failed, and is not counted as such.

Writes offline_flood.json and .md into benchmarks/results.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from baton.core.slo import ServiceLevel, Slo
from baton.engine.profile_file import load_profile
from baton.simulator.workload import Trace, read_trace, rescale
from benchmarks.emulated import PROFILE, ROOT, Setup, run, simulate
from benchmarks.emulated_rows import ONLINE, describe, in_class, share, shorten, take, write
from benchmarks.sim_check import capacity

OFFLINE, BY_DEADLINE = "offline", "offline-deadline"
POINTS = {"simulator": 0.01, "emulated": 0.02}
REPETITIONS = {"simulator": 1, "emulated": 2}


def flood(trace: Trace, rate: float, seconds: float, every: int, until_s: float) -> Trace:
    """Offline requests at ``rate``; every ``every``-th of those that arrive before ``until_s`` has
    a deadline."""
    start = len(trace) // 2
    some = trace[start : start + max(2, round(rate * seconds))]
    return tuple(
        dataclasses.replace(
            r,
            arrival_s=r.arrival_s + 1.0,
            service_class=BY_DEADLINE if not i % every and r.arrival_s < until_s else OFFLINE,
        )
        for i, r in enumerate(rescale(some, rate, "poisson", seed=1))
    )


def merged(*traces: Trace) -> Trace:
    """In order of arrival."""
    return tuple(sorted((r for trace in traces for r in trace), key=lambda r: r.arrival_s))


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """One place: with the flood and without."""

    where: str
    alone: float
    beside: float
    spread: float
    """Largest difference between equal runs, in points of 1."""
    offline_tokens_per_s: float
    num_deadlines: int
    num_past_deadline: int

    @property
    def moved(self) -> float:
        """Above 0: online attainment fell."""
        return self.alone - self.beside

    @property
    def passes(self) -> bool:
        """Within the points allowed, and no deadline missed."""
        return self.moved <= POINTS[self.where] and not self.num_past_deadline


def judge(
    where: str, alone: Sequence[Mapping[str, Any]], beside: Sequence[Mapping[str, Any]]
) -> Verdict:
    """From the records of runs without and with the flood."""
    online = [[one["classes"][ONLINE]["attainment"] for one in runs] for runs in (alone, beside)]
    tokens, total, past = [], 0, 0
    for one in beside:
        levels = one["classes"]
        tokens.append(
            sum(levels[name]["output_tokens_per_s"] or 0.0 for name in levels if name != ONLINE)
        )
        if BY_DEADLINE in levels:
            total += levels[BY_DEADLINE]["requests"]
            past += levels[BY_DEADLINE]["past_deadline"]
    return Verdict(
        where,
        statistics.fmean(online[0]),
        statistics.fmean(online[1]),
        max(max(values) - min(values) for values in online),
        statistics.fmean(tokens),
        total,
        past,
    )


def table(verdicts: Sequence[Verdict]) -> str:
    """For people."""
    lines = [
        "| where | online attainment | beside the flood | moved (points) | between equal runs "
        "| offline tokens/s | past their deadline | |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    lines += [
        f"| {v.where} | {share(v.alone)} | {share(v.beside)} | {-100 * v.moved:+.1f} | "
        f"{100 * v.spread:.1f} | {v.offline_tokens_per_s:.0f} | "
        f"{v.num_past_deadline} of {v.num_deadlines} | {'' if v.passes else 'misses'} |"
        for v in verdicts
    ]
    return "\n".join(lines) + "\n"


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--traces", type=Path, required=True)
    add("--where", default="simulator,emulated")
    add("--profile", type=Path, default=PROFILE)
    add("--dilation", type=float, default=4.0)
    add("--seconds", type=float, default=30.0, help="of online work, undilated")
    add("--load", type=float, default=0.6, help="online work, as a share of capacity")
    add("--flood", type=float, default=1.0, help="offline work, as a share of capacity")
    add("--deadline", type=float, default=15.0, help="seconds, undilated")
    add("--deadline-every", type=int, default=20, help="one of so many offline ones has one")
    add("--roles", choices=("auto", "off"), default="off")
    add("--out", type=Path, default=ROOT / "results" / "offline_flood.json")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """See the module's docstring; the exit status says whether all is within."""
    args = _arguments(argv)
    profile = load_profile(args.profile)
    conv = shorten(read_trace(args.traces / "azure_conv.csv"), 0.25)
    code = shorten(read_trace(args.traces / "azure_code.csv"), 0.25)
    most = capacity(profile, conv[len(conv) // 2 :], 4, 4)
    online = in_class(take(conv, most * args.load, args.seconds))
    flood_rate = capacity(profile, code[len(code) // 2 :], 4, 4) * args.flood
    # Deadlines that end with the online work, so that they are kept beside it or not at all.
    until_s = max(1.0, args.seconds - args.deadline)
    offline = flood(code, flood_rate, args.seconds, args.deadline_every, until_s)
    setup = Setup(
        4,
        4,
        profile=args.profile.resolve(),
        dilation=args.dilation,
        roles_mode=args.roles,
        levels=(
            ServiceLevel(ONLINE, Slo(1.0, 0.05)),
            ServiceLevel(OFFLINE, priority=-1),
            ServiceLevel(BY_DEADLINE, priority=-1, deadline_s=args.deadline),
        ),
    )
    limit_s = (args.seconds + 10.0) * args.dilation
    verdicts, records = [], []
    for where in args.where.split(","):
        do: Callable[..., dict[str, Any]] = simulate if where == "simulator" else run
        runs: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
        for _ in range(REPETITIONS[where]):
            for flooded in (False, True):
                trace = merged(online, offline) if flooded else online
                record = do(setup, trace, limit_s=limit_s)
                print(describe(record), file=sys.stderr, flush=True)
                runs[flooded].append(record)
                records.append({"flooded": flooded, **record})
        verdicts.append(judge(where, runs[False], runs[True]))
    text = table(verdicts)
    settings = {k: v for k, v in vars(args).items() if not isinstance(v, Path)}
    settings |= {"profile": profile.name, "online_rate": most * args.load, "rate": flood_rate}
    rows = [
        {**dataclasses.asdict(one), "moved": one.moved, "passes": one.passes} for one in verdicts
    ]
    write(args.out, "offline_flood", {"settings": settings, "verdicts": rows, "runs": records})
    args.out.with_suffix(".md").write_text(text)
    print(text)
    return 0 if all(one.passes for one in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
