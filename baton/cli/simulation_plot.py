"""Plots of ``baton simulate``: attainment over rate, and roles over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_COLORS = ("#1f6feb", "#d1495b", "#2e933c", "#e08e0b", "#7d53de", "#00848a", "#6b6b6b")
ROLES = {"prefill": "#1f6feb", "mixed": "#b8b8b8", "decode": "#e08e0b"}

RoleLog = Sequence[Sequence[Any]]
"""(seconds, instance, role it has from then on), in order of time."""


def draw(
    records: Sequence[dict[str, Any]], target: float | None, num_requests: int, path: Path
) -> None:
    """Write the picture; its format follows from the name."""
    changing = next((r for r in records if r["flips"]), None)
    if changing is None:
        changing = next((r for r in records if r["policy"] == "slo" and r["role_log"]), None)
    figure = Figure(figsize=(8, 7 if changing else 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2 if changing else 1, 1, squeeze=False)[:, 0]
    attainment_over_rate(axes[0], records, target)
    if changing:
        roles_over_time(axes[1], changing["role_log"], num_requests / changing["at_rate"])
        axes[1].set_title(f"{changing['policy']} at {changing['at_rate']:.2f} requests/s")
    # No time in it: equal runs give equal files.
    figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)


def attainment_over_rate(
    axes: Axes, records: Sequence[dict[str, Any]], target: float | None
) -> None:
    """A line per policy, without the runs that were cut short: those only missed the target."""
    for index, record in enumerate(records):
        color = _COLORS[index % len(_COLORS)]
        full = [(p["rate"], p["attainment"]) for p in record["curve"] if not p["cut_short"]]
        label = f"{record['policy']} {record['split']}".strip()
        if record["goodput_rate"] is not None:
            label += f": {record['goodput_rate']:.2f}"
            axes.axvline(record["goodput_rate"], color=color, alpha=0.25, linewidth=1)
        rates, shares = zip(*full, strict=True) if full else ((), ())
        axes.plot(rates, shares, marker="o", markersize=3.5, color=color, label=label)
    if target is not None:
        axes.axhline(target, color="black", linewidth=0.8, linestyle="--")
    axes.set_xlabel("requests per second")
    axes.set_ylabel("attainment")
    axes.grid(alpha=0.25)
    axes.legend(fontsize="small")


def roles_over_time(axes: Axes, role_log: RoleLog, end_s: float) -> None:
    """How many instances have each role, stacked, at least until ``end_s``."""
    times, counts = role_counts(role_log)
    times.append(max(end_s, times[-1]))
    for series in counts.values():
        series.append(series[-1])
    axes.stackplot(
        times, *counts.values(), labels=list(counts), colors=list(ROLES.values()), step="post"
    )
    axes.set_xlabel("seconds")
    axes.set_ylabel("instances")
    axes.margins(0)
    axes.legend(fontsize="small", loc="upper right")


def role_counts(role_log: RoleLog) -> tuple[list[float], dict[str, list[int]]]:
    """Times, and from each on the number of instances by role."""
    roles: dict[str, str] = {}
    times: list[float] = []
    counts: dict[str, list[int]] = {role: [] for role in ROLES}
    for at, name, role in role_log:
        roles[name] = role
        if not times or at > times[-1]:
            times.append(at)
            for series in counts.values():
                series.append(0)
        for known, series in counts.items():
            series[-1] = sum(1 for one in roles.values() if one == known)
    return times, counts
