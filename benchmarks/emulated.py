"""A trace on a cluster of emulated instances, in dilated time, and the same in the simulator.

    python -m benchmarks.emulated --trace azure_conv.csv --rate 12 --seconds 30 --dilation 4 \\
        --profile benchmarks/profiles/emulated-two-cores.yaml --prefill 4 --decode 4 \\
        --policy slo --roles auto --slo ttft=1.0,tpot=0.05 [--json FILE] [--simulate]

Starts ``baton serve --device emulated``, replays a slice of the trace over gRPC with prompts of
random token ids and exact output lengths, and checks tokens against ``emulated_tokens``. Everything
is dilated: arrivals, steps, transfers, targets; times in the result are divided by the same number.
The controller's own times (heartbeat, interval, cooldown) are as given, in seconds of this machine.

How much to dilate: as much as it takes for host work to stay under 5 % of a step; ``host`` in the
result tells (``host_share``: planning, committing and the emulation's own work; ``cpu_share``: all
that an instance's process computes).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from baton.core.cost_model import Profile
from baton.core.slo import ServiceLevel, Slo
from baton.engine.checkpoint import open_checkpoint
from baton.engine.fingerprints import emulated_tokens
from baton.engine.profile_file import load_profile
from baton.simulator.runs import Scenario, build
from baton.simulator.workload import Trace, TraceRequest, mean_rate, read_trace
from benchmarks import emulated_probe
from benchmarks.cluster import Cluster, serving
from benchmarks.emulated_rows import (
    ONLINE,
    Row,
    describe,
    in_class,
    shorten,
    summarize,
    take,
    write,
)
from benchmarks.grpc_sender import GrpcSender
from benchmarks.load import LoadResult, run_load
from benchmarks.report import distribution, parse_slo
from benchmarks.workload import Item, PromptMaker

ROOT = Path(__file__).resolve().parent
DEMO_MODEL = ROOT.parent / "deploy" / "demo-model"
PROFILE = ROOT / "profiles" / "emulated-two-cores.yaml"
HOST_SHARE_AT_MOST = 0.05
_QUIET_S = 600.0
"""Longer than any silence of a run that is late, but not lost."""


@dataclasses.dataclass(frozen=True, slots=True)
class Setup:
    """One cluster. Times of levels are undilated; the controller's are this machine's."""

    prefill: int
    decode: int
    mixed: int = 0
    profile: Path = PROFILE
    dilation: float = 1.0
    policy: str = "slo"
    roles_mode: str = "off"
    levels: tuple[ServiceLevel, ...] = (ServiceLevel(ONLINE, Slo(1.0, 0.05)),)
    """The first is the default."""
    heartbeat_s: float = 1.0
    interval_s: float = 1.0
    cooldown_s: float = 10.0
    emulated: bool = True
    """Else the model is computed on the CPU, and ``profile`` is what was fitted to it."""
    model: Path = DEMO_MODEL
    engine: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """More settings of the engine."""
    pool: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"host_bytes": 0})

    @property
    def split(self) -> str:
        """As people write it."""
        text = f"{self.prefill}:{self.decode}"
        return f"{text}+{self.mixed}" if self.mixed else text

    def settings(self) -> dict[str, Any]:
        """The file for ``baton serve --config``."""
        d = self.dilation
        # Prompts share nothing. One plan at a time, as in the simulator: with a plan ahead, what
        # arrives during a step waits for one step more, and TPOT of short outputs shows it.
        engine: dict[str, Any] = {"enable_prefix_cache": False, "async_scheduling": False}
        if self.emulated:
            engine |= {"device": "emulated", "profile": str(self.profile), "time_dilation": d}
        classes = {}
        for level in self.levels:
            one = {
                "ttft_s": _times(level.slo.ttft_s, d),
                "tpot_s": _times(level.slo.tpot_s, d),
                "priority": level.priority,
                "deadline_s": _times(level.deadline_s, d),
            }
            classes[level.service_class] = {k: v for k, v in one.items() if v is not None}
        return {
            "prefill": self.prefill,
            "decode": self.decode,
            "mixed": self.mixed,
            "engine": engine | dict(self.engine),
            "pool": dict(self.pool),
            "service": {"classes": classes, "default": self.levels[0].service_class},
            "controller": {
                "policy": self.policy,
                "profile": None if self.emulated else str(self.profile),
                "heartbeat_s": self.heartbeat_s,
                # Two cores and many processes: late is not dead.
                "dead_after_s": 30.0 + self.heartbeat_s,
                "queue_timeout_s": _QUIET_S,
                "roles": {
                    "mode": self.roles_mode,
                    "interval_s": self.interval_s,
                    "cooldown_s": self.cooldown_s,
                },
            },
            "gateway": {
                "gap_timeout_s": _QUIET_S,
                "default_timeout_s": 6 * _QUIET_S,
                "replay_timeout_s": 30.0,
            },
        }

    def scenario(self) -> tuple[Scenario, Profile]:
        """The same for the simulator, in dilated time too."""
        profile = load_profile(self.profile)
        sizes = {
            name: value
            for name, value in self.engine.items()
            if name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "block_size")
        }
        if self.engine.get("num_blocks"):
            size = self.engine.get("block_size", profile.block_size)
            sizes["kv_capacity_tokens"] = self.engine["num_blocks"] * size
        profile = dataclasses.replace(profile, cost=profile.cost.dilated(self.dilation), **sizes)
        levels = tuple(_dilated(level, self.dilation) for level in self.levels)
        scenario = Scenario(
            profile,
            self.policy,
            self.prefill,
            self.decode,
            levels[0].slo,
            freeze_roles=self.roles_mode != "auto",
            heartbeat_s=self.heartbeat_s,
            interval_s=self.interval_s,
            cooldown_s=self.cooldown_s,
            levels=levels,
            # Clients of these benchmarks say how much they want.
            max_tokens_told=None,
        )
        return scenario, profile


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _dilated(level: ServiceLevel, d: float) -> ServiceLevel:
    slo = Slo(_times(level.slo.ttft_s, d), _times(level.slo.tpot_s, d))
    return dataclasses.replace(level, slo=slo, deadline_s=_times(level.deadline_s, d))


# On the real cluster.


def run(
    setup: Setup,
    trace: Trace,
    *,
    starts_s: Sequence[float] = (0.0,),
    limit_s: float = 900.0,
    num_checked: int = 100,
) -> dict[str, Any]:
    """Start the cluster, replay, stop it; see :func:`replay`."""
    with cluster_of(setup) as cluster:
        return replay(
            cluster, setup, trace, starts_s=starts_s, limit_s=limit_s, num_checked=num_checked
        )


@contextlib.contextmanager
def cluster_of(setup: Setup) -> Iterator[Cluster]:
    """Start it, and stop it at the end."""
    with tempfile.TemporaryDirectory(prefix="baton-emulated-") as folder:
        config = Path(folder) / "config.yaml"
        config.write_text(json.dumps(setup.settings()))  # JSON is YAML
        name = f"emulated-{Path(folder).name[-8:]}"
        with serving(setup.model, ("--config", str(config), "--cluster", name)) as cluster:
            yield cluster


def replay(
    cluster: Cluster,
    setup: Setup,
    trace: Trace,
    *,
    starts_s: Sequence[float] = (0.0,),
    limit_s: float = 900.0,
    num_checked: int = 100,
) -> dict[str, Any]:
    """The record of one run. ``trace`` is undilated, and so are times in the record.

    ``limit_s``: of this machine; what has not finished then is a miss.
    """
    d = setup.dilation
    items = [
        Item(r.arrival_s * d, r.num_prompt_tokens, r.num_output_tokens, (), None, r.service_class)
        for r in trace
    ]
    roles = emulated_probe.initial_roles(cluster.controller)
    before = emulated_probe.read(cluster.controller)
    started_s = time.time()
    result, maker = asyncio.run(_replay(cluster.grpc, setup, items, limit_s))
    wall_s = time.time() - started_s
    after = emulated_probe.read(cluster.controller)
    flips = [
        flip for flip in emulated_probe.flips(cluster.controller) if flip["wall_s"] >= started_s
    ]
    rows = _rows(result, d)
    log: list[list[Any]] = [[0.0, name, role] for name, role in sorted(roles.items())]
    log += [[(flip["wall_s"] - started_s) / d, flip["instance"], flip["to"]] for flip in flips]
    lateness = distribution([o.sent_s - o.due_s for o in result.outcomes])
    return {
        "where": "emulated" if setup.emulated else "real",
        "policy": setup.policy,
        "roles_mode": setup.roles_mode,
        "split": setup.split,
        "dilation": d,
        "rate": mean_rate(trace),
        "wall_s": wall_s,
        "classes": summarize(rows, setup.levels, starts_s),
        "host": emulated_probe.costs(before, after, wall_s),
        "client_cpu_share": result.client_cpu_s / wall_s,
        "lateness_s": {"p50": lateness["p50"], "p99": lateness["p99"], "max": lateness["max"]},
        "role_log": log,
        "flips": flips,
        "tokens": _check(setup, result, maker, items, num_checked),
    }


async def _replay(
    address: str, setup: Setup, items: Sequence[Item], limit_s: float
) -> tuple[LoadResult, PromptMaker]:
    ends_s = time.perf_counter() + limit_s
    sender = GrpcSender(address, setup.model.name, ends_s=ends_s)
    try:
        maker = PromptMaker(await sender.vocab_size(), seed=17)
        result = await run_load(items, maker.prompt, sender, timeout_s=limit_s)
    finally:
        await sender.close()
    return result, maker


def _rows(result: LoadResult, d: float) -> list[Row]:
    rows = []
    for outcome in result.outcomes:
        first = last = None
        if (timing := outcome.timing) is not None:
            first = (timing.first_token_s - result.start_s) / d
            last = (timing.last_token_s - result.start_s) / d
        rows.append(
            Row(
                (outcome.due_s - result.start_s) / d,
                outcome.service_class,
                outcome.num_wanted,
                first,
                last,
                f"{outcome.failure}: {outcome.detail}" if outcome.failure else "",
            )
        )
    return rows


def _check(
    setup: Setup, result: LoadResult, maker: PromptMaker, items: Sequence[Item], num: int
) -> dict[str, int]:
    """Tokens of some requests against what they must be. On a real engine nothing is checked."""
    if not setup.emulated:
        return {"checked": 0, "wrong": 0}
    model = open_checkpoint(str(setup.model))
    vocab_size, avoid = model.config.vocab_size, model.eos_token_ids
    finished = [i for i, outcome in enumerate(result.outcomes) if outcome.failure is None]
    sample = random.Random(3).sample(finished, min(num, len(finished)))
    wrong = 0
    for index in sample:
        prompt = maker.prompt(index, items[index])
        assert not isinstance(prompt, str)
        count = items[index].output_len
        right = emulated_tokens(prompt, count, vocab_size=vocab_size, avoid=avoid)
        wrong += result.outcomes[index].token_ids != right
    return {"checked": len(sample), "wrong": wrong}


# In the simulator.


def simulate(
    setup: Setup,
    trace: Trace,
    *,
    starts_s: Sequence[float] = (0.0,),
    limit_s: float | None = None,
) -> dict[str, Any]:
    """The same cluster and trace in virtual time; the same record, as far as it applies.

    ``limit_s``: of dilated time, as in :func:`run`.
    """
    d = setup.dilation
    scenario, _ = setup.scenario()
    fleet = build(scenario)
    if limit_s is not None:
        fleet.config = dataclasses.replace(fleet.config, max_virtual_s=limit_s)
    started = time.perf_counter()
    dilated = tuple(dataclasses.replace(r, arrival_s=r.arrival_s * d) for r in trace)
    rows = []
    missing = Counter(dilated)
    for o in fleet.run(dilated):
        ok = not o.error and o.ttft_s is not None
        first = (o.arrival_s + (o.ttft_s or 0.0)) / d if ok else None
        last = o.end_s / d if ok else None
        rows.append(
            Row(o.arrival_s / d, o.service_class, o.num_output_tokens, first, last, o.error)
        )
        missing[
            TraceRequest(
                o.arrival_s,
                o.num_prompt_tokens,
                o.num_output_tokens,
                service_class=o.service_class,
            )
        ] -= 1
    rows += [
        Row(r.arrival_s / d, r.service_class, r.num_output_tokens, None, None, "unfinished")
        for r in missing.elements()
    ]
    rows.sort(key=lambda row: row.arrival_s)
    end_s = min(fleet.now, limit_s or fleet.now)
    busy = {name: item.busy_s / max(1e-9, end_s) for name, item in fleet.instances.items()}
    return {
        "where": "simulator",
        "policy": setup.policy,
        "roles_mode": setup.roles_mode,
        "split": setup.split,
        "dilation": d,
        "rate": mean_rate(trace),
        "wall_s": end_s,
        "took_s": time.perf_counter() - started,
        "classes": summarize(rows, setup.levels, starts_s),
        "host": {"busy": busy},
        "role_log": [[at / d, name, str(role)] for at, name, role in fleet.role_log],
        "flips": len(fleet.role_log) - len(fleet.instances),
    }


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--trace", type=Path, required=True)
    add("--rate", type=float, required=True, help="requests per second, undilated")
    add("--seconds", type=float, default=30.0, help="of the trace, undilated")
    add("--length-scale", type=float, default=1.0)
    add("--profile", type=Path, default=PROFILE)
    add("--dilation", type=float, default=4.0)
    add("--prefill", type=int, default=4)
    add("--decode", type=int, default=4)
    add("--mixed", type=int, default=0)
    add("--policy", default="slo")
    add("--roles", choices=("auto", "advise", "off"), default="off")
    add("--slo", type=parse_slo, default=Slo(1.0, 0.05))
    add("--simulate", action="store_true", help="and the same in the simulator")
    add("--json", type=Path)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """See the module's docstring."""
    args = _arguments(argv)
    setup = Setup(
        args.prefill,
        args.decode,
        args.mixed,
        profile=args.profile.resolve(),
        dilation=args.dilation,
        policy=args.policy,
        roles_mode=args.roles,
        levels=(ServiceLevel(ONLINE, args.slo),),
    )
    whole = shorten(read_trace(args.trace), args.length_scale)
    trace = in_class(take(whole, args.rate, args.seconds))
    runs = [run(setup, trace)]
    if args.simulate:
        runs.append(simulate(setup, trace))
    for one in runs:
        print(describe(one), flush=True)
    if args.json is not None:
        write(args.json, "emulated", {"runs": runs})
    tokens = runs[0]["tokens"]
    return 1 if tokens["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
