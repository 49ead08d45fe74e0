"""What ``baton simulate`` does: runs in parallel, a table or JSON, a plot."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import math
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from baton.cli.admin import make_console
from baton.cli.simulation_flags import Plan, SimulateFlags, make_plan
from baton.simulator.runs import (
    STATIC_BEST,
    Load,
    Result,
    find_goodput,
    run_once,
    static_best,
)
from baton.simulator.workload import rescale

SCHEMA = "baton.simulation/1"

Report = Callable[[str], None]
"""Told what is being run, in a few words."""


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """A part of the work that is done in one process."""

    policy: str
    scale: float | None
    """Of the trace's own rate; ``None``: search for the goodput."""


@dataclasses.dataclass(frozen=True, slots=True)
class Done:
    """What a job found."""

    results: tuple[Result, ...]
    seconds: float
    goodput_rate: float | None = None
    at: Result | None = None
    """The run that counts."""
    split: str = ""


def simulate(flags: SimulateFlags) -> None:
    """Run the command. Raises ConfigError for flags that make no sense."""
    plan = make_plan(flags)
    jobs = jobs_of(plan)
    found = run_jobs(plan, jobs)
    records = [_record(plan, policy, jobs, found) for policy in plan.policies]
    if flags.plot is not None:
        from baton.cli.simulation_plot import draw

        draw(records, plan.target, len(plan.trace), flags.plot.expanduser())
    if flags.as_json:
        print(json.dumps({"schema": SCHEMA, "inputs": plan.inputs(), "policies": records}))
    else:
        _print_table(plan, records)


def jobs_of(plan: Plan) -> list[Job]:
    """The longest first, so that the processes end at about the same time."""
    jobs: list[Job] = []
    if plan.target is not None:
        jobs = [Job(policy, None) for policy in plan.policies]
        jobs.sort(key=lambda job: job.policy != STATIC_BEST)
    fixed = [policy for policy in plan.policies if policy != STATIC_BEST]
    return jobs + [Job(policy, scale) for scale in plan.scales for policy in fixed]


def run_job(plan: Plan, job: Job, report: Report) -> Done:
    """Do one. The same arguments give the same results, whatever else runs."""
    started = time.perf_counter()

    def load_at(rate: float) -> Load:
        report(f"{job.policy} at {rate:.2f} requests/s")
        return Load(rescale(plan.trace, rate, plan.arrivals, seed=plan.seed))

    scenario = plan.scenario(job.policy)
    if job.scale is not None:
        rate = job.scale * plan.own_rate
        result = run_once(scenario, load_at(rate).trace, rate)
        return Done((result,), time.perf_counter() - started, at=result)
    assert plan.target is not None
    search = static_best if job.policy == STATIC_BEST else find_goodput
    found = search(scenario, load_at, target=plan.target, guess=plan.guess())
    seconds = time.perf_counter() - started
    return Done(found.curve, seconds, found.goodput_rate, found.at, found.split)


# Processes.

_plan: Plan | None = None
_messages: Any = None


def _begin(plan: Plan, messages: Any) -> None:
    """In each process, once."""
    global _plan, _messages
    # Ctrl-C goes to all processes of the terminal: end without a word.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    _plan, _messages = plan, messages


def _run(job: Job) -> Done:
    assert _plan is not None
    return run_job(_plan, job, _messages.put)


def run_jobs(plan: Plan, jobs: list[Job]) -> list[Done]:
    """All of them, in order of ``jobs``; progress on standard error where that is a terminal."""
    columns = (
        SpinnerColumn(),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    progress = Progress(
        *columns, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True
    )
    with progress:
        bar = progress.add_task("", total=len(jobs))

        def report(text: str) -> None:
            progress.update(bar, description=text)

        num = min(plan.jobs, len(jobs))
        if num > 1:
            return _in_processes(plan, jobs, num, report, lambda: progress.advance(bar))
        done = []
        for job in jobs:
            done.append(run_job(plan, job, report))
            progress.advance(bar)
        return done


def _in_processes(
    plan: Plan, jobs: list[Job], num: int, report: Report, advance: Callable[[], None]
) -> list[Done]:
    # Forked copies of a process that draws a progress bar in a thread may hang.
    context = multiprocessing.get_context("spawn")
    messages: Any = context.Queue()
    pool = concurrent.futures.ProcessPoolExecutor(
        num, mp_context=context, initializer=_begin, initargs=(plan, messages)
    )
    try:
        with pool:
            futures = [pool.submit(_run, job) for job in jobs]
            for future in futures:
                # Wakes the loop below even where a process died.
                future.add_done_callback(lambda _: messages.put(None))
            num_left = len(futures)
            while num_left:
                text = messages.get()
                if text is None:
                    num_left -= 1
                    advance()
                else:
                    report(text)
            return [future.result() for future in futures]
    except BaseException:
        for child in multiprocessing.active_children():
            child.terminate()
        raise


# What is shown.


def _record(plan: Plan, policy: str, jobs: list[Job], found: list[Done]) -> dict[str, Any]:
    own = [(job, done) for job, done in zip(jobs, found, strict=True) if job.policy == policy]
    search = next((done for job, done in own if job.scale is None), None)
    points = [result for _, done in own for result in done.results]
    points.sort(key=lambda r: r.rate)
    # The run at the goodput; without a search, the one at the highest rate.
    at = search.at if search is not None else points[-1]
    return {
        "policy": policy,
        "split": search.split if search is not None else "",
        "goodput_rate": search.goodput_rate if search is not None else None,
        "curve": [_point(plan, result) for result in points],
        "at_rate": at.rate if at is not None else None,
        **(_measures(plan, at) if at is not None else dict.fromkeys(_MEASURES)),
        "role_log": [list(entry) for entry in at.role_log] if at is not None else [],
        "total_steps": sum(result.num_steps for result in points),
        "seconds": sum(done.seconds for _, done in own),
    }


def _point(plan: Plan, result: Result) -> dict[str, Any]:
    return {
        "rate": result.rate,
        "attainment": result.attainment,
        "cut_short": result.cut_short,
        **_measures(plan, result),
    }


_MEASURES = (
    "percentiles",
    "flips",
    "utilisation",
    "kv_traffic_bytes",
    "kv_fetched_bytes",
    "hit_rate",
    "steps",
)


def _measures(plan: Plan, result: Result) -> dict[str, Any]:
    token_bytes = plan.profile.cost.kv_bytes_per_token
    return {
        "percentiles": result.percentiles,
        "flips": result.num_flips,
        "utilisation": result.utilisation,
        "kv_traffic_bytes": int(result.handed_tokens * token_bytes),
        "kv_fetched_bytes": {
            tier: int(count * token_bytes) for tier, count in result.fetched_tokens.items()
        },
        "hit_rate": result.num_cached_tokens / max(1, result.num_prompt_tokens),
        "steps": result.num_steps,
    }


def _print_table(plan: Plan, records: list[dict[str, Any]]) -> None:
    console = make_console()
    targets = ", ".join(
        f"{name} {value:g} s"
        for name, value in (("TTFT", plan.slo.ttft_s), ("TPOT", plan.slo.tpot_s))
        if value is not None
    )
    console.print(
        f"{len(plan.trace)} requests of {' and '.join(plan.trace_names)} ({plan.arrivals}), "
        f"{plan.num_prefill} prefill and {plan.num_decode} decode instances of "
        f"{plan.profile.name}, {targets}"
    )
    table = Table(box=None, padding=(0, 1, 0, 0))
    titles = ("policy", "requests/s", "attainment", "TTFT p50", "p90", "p99", "TPOT p50", "p90")
    hits = ("hits",) if plan.pool is not None else ()
    for title in (*titles, "p99", "flips", "busy", "KV moved", *hits):
        table.add_column(title, justify="left" if title == "policy" else "right", no_wrap=True)
    for record in records:
        for row in _rows(plan, record):
            table.add_row(*row)
    console.print(table)


def _rows(plan: Plan, record: dict[str, Any]) -> list[list[str]]:
    """The goodput, and each rate that was asked for."""
    name = record["policy"] + (f" {record['split']}" if record["split"] else "")
    if record["goodput_rate"] == 0.0:
        return [[name, "none", f"< {plan.target:g}"]]
    wanted = [scale * plan.own_rate for scale in plan.scales]
    rows = []
    for point in record["curve"]:
        best = record["goodput_rate"] is not None and point["rate"] == record["at_rate"]
        if not best and not any(math.isclose(point["rate"], rate) for rate in wanted):
            continue
        times = [_seconds(point["percentiles"].get(f"{w}_p{q}_s")) for w, q in _TIMES]
        busy = " ".join(f"{k} {v:.0%}" for k, v in sorted(point["utilisation"].items()))
        rows.append([
            f"[bold]{name}[/bold] goodput" if best else name,
            f"{point['rate']:.2f}",
            f"{point['attainment']:.1%}",
            *times,
            str(point["flips"]),
            busy,
            f"{point['kv_traffic_bytes'] / 1e9:.1f} GB",
            *([f"{point['hit_rate']:.1%}"] if plan.pool is not None else ()),
        ])  # fmt: skip
    return rows


_TIMES = tuple((what, q) for what in ("ttft", "tpot") for q in (50, 90, 99))


def _seconds(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f} s" if value >= 1.0 else f"{1000 * value:.0f} ms"
