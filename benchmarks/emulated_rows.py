"""What became of the requests of a run, real or simulated, as numbers; and slices of traces."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from baton.core.slo import ServiceLevel, Slo, Timing, attainment
from baton.simulator.workload import Trace, rescale
from benchmarks import machine
from benchmarks.report import distribution

ONLINE = "online"


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """What became of one request, undilated; times after the start of the trace."""

    arrival_s: float
    service_class: str
    num_output_tokens: int
    first_s: float | None
    last_s: float | None
    """``None``: it failed."""
    failure: str = ""

    @property
    def timing(self) -> Timing | None:
        """``None`` if it failed."""
        if self.first_s is None or self.last_s is None:
            return None
        return Timing(self.arrival_s, self.first_s, self.last_s, self.num_output_tokens)


def summarize(
    rows: Sequence[Row], levels: Sequence[ServiceLevel], starts_s: Sequence[float] = (0.0,)
) -> dict[str, Any]:
    """By class: attainment (of phases too), TTFT, TPOT, tokens per second, deadlines."""
    found: dict[str, Any] = {}
    for level in levels:
        own = [row for row in rows if row.service_class == level.service_class]
        if not own:
            continue
        timings = [timing for row in own if (timing := row.timing) is not None]
        bounds = (*starts_s, float("inf"))
        phases = [
            _numbers([r for r in own if low <= r.arrival_s < high], level.slo)
            for low, high in itertools.pairwise(bounds)
        ]
        span_s = max(t.last_token_s for t in timings) - own[0].arrival_s if timings else 0.0
        one: dict[str, Any] = {
            **_numbers(own, level.slo),
            "failed": len(own) - len(timings),
            "failures": sorted({row.failure for row in own if row.failure}),
            "phases": phases,
            "e2e_s": distribution([t.e2e_s for t in timings]),
            "output_tokens_per_s": (
                sum(t.num_output_tokens for t in timings) / span_s if span_s > 0 else None
            ),
        }
        if level.deadline_s is not None:
            one["past_deadline"] = len(own) - sum(t.e2e_s <= level.deadline_s for t in timings)
        found[level.service_class] = one
    return found


def _numbers(rows: Sequence[Row], slo: Slo) -> dict[str, Any]:
    timings = [timing for row in rows if (timing := row.timing) is not None]
    return {
        "requests": len(rows),
        "attainment": attainment(sum(timing.meets(slo) for timing in timings), len(rows)),
        "ttft_s": distribution([t.ttft_s for t in timings]),
        "tpot_s": distribution([t.tpot_s for t in timings if t.tpot_s is not None]),
    }


def in_class(trace: Trace, service_class: str = ONLINE) -> Trace:
    """The same requests, of a class."""
    return tuple(dataclasses.replace(r, service_class=service_class) for r in trace)


def shorten(trace: Trace, scale: float, *, clip_output: int | None = None) -> Trace:
    """Prompts and outputs shorter by a factor (and outputs clipped), arrivals as they are."""

    def length(tokens: int, clip: int | None = None) -> int:
        scaled = max(1, round(tokens * scale))
        return scaled if clip is None else min(scaled, clip)

    return tuple(
        dataclasses.replace(
            r,
            num_prompt_tokens=length(r.num_prompt_tokens),
            num_output_tokens=length(r.num_output_tokens, clip_output),
            hash_ids=(),
        )
        for r in trace
    )


def take(trace: Trace, rate: float, seconds: float, *, share: float = 0.5, seed: int = 0) -> Trace:
    """So many seconds at ``rate`` with Poisson arrivals: requests from ``share`` of it on."""
    start = int(len(trace) * share)
    count = max(2, round(rate * seconds))
    return rescale(trace[start : start + count], rate, "poisson", seed=seed)


def share(value: float | None) -> str:
    """As people read it; of nothing: a dash."""
    return "-" if value is None else f"{value:.1%}"


def describe(record: Mapping[str, Any]) -> str:
    """One run in one line."""
    parts = [f"{record['where']:9} {record['policy']} {record['split']} {record['rate']:.2f}/s"]
    for name, one in record["classes"].items():
        ttft, tpot = one["ttft_s"], one["tpot_s"]
        numbers = [ttft["p50"], ttft["p90"], tpot["p50"], tpot["p90"]]
        text = "/".join("-" if v is None else f"{v * 1000:.0f}" for v in numbers)
        phases = "/".join(share(phase["attainment"]) for phase in one["phases"])
        parts.append(
            f"{name}: {share(one['attainment'])} ({phases}), TTFT p50/p90, TPOT p50/p90 {text} ms, "
            f"{one['failed']} of {one['requests']} failed"
        )
    flips = record["flips"]
    parts.append(f"flips {flips if isinstance(flips, int) else len(flips)}")
    host = record["host"]
    for key in ("host_share", "cpu_share", "late_share"):
        if host.get(key) is not None:
            parts.append(f"{key} {host[key]:.1%} (worst {host['max_' + key]:.1%})")
    return "; ".join(parts)


def write(path: Path, name: str, values: Mapping[str, Any]) -> None:
    """One JSON object, with the machine it was measured on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"schema": f"baton.benchmark.{name}/1", "machine": machine.describe(), **values}
    path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
