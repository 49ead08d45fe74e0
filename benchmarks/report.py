"""From outcomes to numbers, by the definitions of ``baton/core/slo.py``, and to a table."""

from __future__ import annotations

import dataclasses
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from baton.core.slo import Slo, attainment, percentile
from benchmarks.load import LoadResult

SCHEMA = "baton.benchmark.serve/1"
PERCENTILES = (50, 90, 99)
Summary = dict[str, Any]


def parse_slo(text: str) -> Slo:
    """``ttft=1.0,tpot=0.05``, either or both. Raises ValueError."""
    targets: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name not in ("ttft", "tpot") or name in targets:
            raise ValueError(f"{part!r} is not a target; give ttft=SECONDS,tpot=SECONDS")
        targets[name] = float(value)
        if targets[name] <= 0:
            raise ValueError(f"{name} must be positive, got {value}")
    return Slo(ttft_s=targets.get("ttft"), tpot_s=targets.get("tpot"))


def distribution(values: Sequence[float]) -> Summary:
    """Mean, percentiles, maximum and count; None where there are no values."""
    summary: Summary = {"mean": statistics.fmean(values) if values else None}
    for q in PERCENTILES:
        summary[f"p{q}"] = percentile(values, q)
    summary["max"] = max(values, default=None)
    summary["count"] = len(values)
    return summary


def summarize(result: LoadResult, slo: Slo) -> Summary:
    """All numbers of a run; failed and shed requests count as misses of the service level."""
    outcomes = result.outcomes
    timings = [timing for outcome in outcomes if (timing := outcome.timing) is not None]
    failures = Counter(outcome.failure for outcome in outcomes if outcome.failure is not None)
    good = sum(timing.meets(slo) for timing in timings)
    duration_s = result.duration_s
    num_output = sum(timing.num_output_tokens for timing in timings)
    num_prompt = sum(o.num_prompt_tokens for o in outcomes if o.timing is not None)
    per_second = 1 / duration_s if duration_s > 0 else 0.0
    return {
        "requests": {
            "total": len(outcomes),
            "finished": len(timings),
            "failed": len(outcomes) - len(timings),
            "failures": dict(failures.most_common()),
            "examples": _examples(result),
        },
        "duration_s": duration_s,
        "prompt_tokens": num_prompt,
        "output_tokens": num_output,
        "request_rate": len(timings) * per_second,
        "output_tokens_per_s": num_output * per_second,
        "total_tokens_per_s": (num_output + num_prompt) * per_second,
        "ttft_s": distribution([timing.ttft_s for timing in timings]),
        "tpot_s": distribution([t.tpot_s for t in timings if t.tpot_s is not None]),
        "itl_s": distribution([gap for o in outcomes if o.timing for gap in o.gaps_s]),
        "e2e_s": distribution([timing.e2e_s for timing in timings]),
        "slo": dataclasses.asdict(slo),
        "attainment": attainment(good, len(outcomes)),
        "goodput": good * per_second,
        "client": {
            "cpu_s": result.client_cpu_s,
            "cpu_share": result.client_cpu_s * per_second,
            "lateness_s": distribution([o.sent_s - o.due_s for o in outcomes]),
        },
    }


def _examples(result: LoadResult) -> dict[str, str]:
    """For each kind of failure what one of them said."""
    examples: dict[str, str] = {}
    for outcome in result.outcomes:
        if outcome.failure is not None and outcome.detail:
            examples.setdefault(outcome.failure, outcome.detail)
    return examples


def per_request(result: LoadResult) -> list[Summary]:
    """One row per request; times are seconds since the start of the run."""
    rows: list[Summary] = []
    for outcome in result.outcomes:
        rows.append(
            {
                "due_s": outcome.due_s - result.start_s,
                "sent_s": outcome.sent_s - result.start_s,
                "arrival_s": outcome.arrival_s - result.start_s,
                "prompt_tokens": outcome.num_prompt_tokens,
                "wanted_tokens": outcome.num_wanted,
                "token_times_s": [at_s - result.start_s for at_s in outcome.token_times_s],
                "failure": outcome.failure,
            }
        )
    return rows


def table(summary: Summary, title: str) -> Table:
    """For people: milliseconds where they read better."""
    view = Table(title=title, title_justify="left")
    view.add_column("")
    for name in ("mean", *(f"p{q}" for q in PERCENTILES), "max"):
        view.add_column(name, justify="right")
    for key, name in (("ttft_s", "TTFT"), ("tpot_s", "TPOT"), ("itl_s", "ITL"), ("e2e_s", "e2e")):
        cells = [summary[key][column] for column in ("mean", "p50", "p90", "p99", "max")]
        view.add_row(
            f"{name} (ms)", *("-" if cell is None else f"{cell * 1000:,.1f}" for cell in cells)
        )
    return view


def lines(summary: Summary) -> list[str]:
    """The rest, in words."""
    requests, slo, client = summary["requests"], summary["slo"], summary["client"]
    share = summary["attainment"]
    targets = [f"{k.removesuffix('_s').upper()} <= {v} s" for k, v in slo.items() if v is not None]
    late = client["lateness_s"]["p99"] or 0.0
    told = [
        f"requests     {requests['finished']} of {requests['total']} finished in "
        f"{summary['duration_s']:.1f} s ({summary['request_rate']:.2f} per s)",
        f"tokens       {summary['output_tokens_per_s']:,.1f} out per s, "
        f"{summary['total_tokens_per_s']:,.1f} in and out per s",
        f"attainment   {'-' if share is None else f'{share:.1%}'} of "
        f"{', '.join(targets) or 'no targets (finished is enough)'}",
        f"goodput      {summary['goodput']:.2f} good requests per s",
        f"client       {client['cpu_share']:.1%} of a core; p99 sent {late * 1000:.1f} ms late",
    ]
    for kind, count in requests["failures"].items():
        told.append(f"FAILED       {count} x {kind}: {requests['examples'].get(kind, '')}")
    return told
