"""``baton simulate``: what a cluster would make of a trace, without one."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer

from baton.cli.common import with_clear_errors


def simulate(
    trace: Annotated[
        str, typer.Option(metavar="FILE[,FILE]", help="what arrives; several follow one another")
    ],
    profile: Annotated[Path, typer.Option(help="YAML file with the costs of an instance")],
    slo: Annotated[
        str, typer.Option(metavar="ttft=S,tpot=S", help="targets in seconds; one may be left out")
    ],
    trace_format: Annotated[
        str | None, typer.Option("--format", help="azure, mooncake or baton; default: by its name")
    ] = None,
    instances: Annotated[
        int | None, typer.Option(help="so many, half of them prefill at the start")
    ] = None,
    prefill: Annotated[int | None, typer.Option(help="prefill instances at the start")] = None,
    decode: Annotated[int | None, typer.Option(help="decode instances at the start")] = None,
    policy: Annotated[
        str,
        typer.Option(
            metavar="NAME[,NAME...]",
            help="placement policies to compare: slo, least-loaded, round-robin, prefix-affinity, "
            "colocated, package.module:Class, or static-best: the best split in hindsight",
        ),
    ] = "slo",
    arrivals: Annotated[
        str, typer.Option(help="compressed: the trace's own, faster; poisson: gaps drawn anew")
    ] = "compressed",
    rate_scale: Annotated[
        str | None,
        typer.Option(metavar="X[,X...]", help="rates to run, as multiples of the trace's; 1"),
    ] = None,
    find_goodput: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="find the highest rate with this attainment"),
    ] = None,
    host_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="keep and share prefixes; each machine (8 instances) has room for N tokens of KV "
            "beside its instances' own; default: no prefix is kept",
        ),
    ] = None,
    freeze_roles: Annotated[
        bool, typer.Option("--freeze-roles", help="no policy switches roles")
    ] = False,
    seed: Annotated[int, typer.Option(help="of all chance")] = 0,
    jobs: Annotated[int | None, typer.Option(help="processes; default: the processors")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="one JSON object")] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="draw attainment and roles: .png or .svg")
    ] = None,
) -> None:
    """Try policies, splits and sizes on a trace in virtual time, with the product's own code."""

    def run() -> None:
        from baton.cli.simulation import simulate as run_simulate
        from baton.cli.simulation_flags import SimulateFlags

        flags = SimulateFlags(
            traces=trace,
            format=trace_format,
            profile=profile,
            instances=instances,
            prefill=prefill,
            decode=decode,
            policies=policy,
            slo=slo,
            arrivals=arrivals,
            rate_scale=rate_scale,
            find_goodput=find_goodput,
            host_tokens=host_tokens,
            freeze_roles=freeze_roles,
            seed=seed,
            jobs=jobs,
            as_json=json_output,
            plot=plot,
        )
        run_simulate(flags)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _exit_as_shells_say)
    with_clear_errors(run)


def _exit_as_shells_say(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)
