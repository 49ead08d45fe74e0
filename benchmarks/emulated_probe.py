"""What a running cluster did and cost, read from outside: metrics, processes, roles."""

from __future__ import annotations

import dataclasses
import urllib.request
from collections.abc import Mapping
from typing import Any

import psutil
from prometheus_client.parser import text_string_to_metric_families

from baton.client.admin import AdminClient

_COUNTERS = {
    "steps": "baton_engine_steps_total",
    "tokens": "baton_engine_tokens_total",
    "execute_s": "baton_engine_execute_seconds_total",
    "host_s": "baton_engine_host_seconds_total",
    "emulated_host_s": "baton_emulated_host_seconds_total",
    "late_s": "baton_emulated_late_seconds_total",
    "faults": "baton_emulated_faults_total",
    "preemptions": "baton_preemptions_total",
}
"""Name here to name of the metric; those of emulated devices alone are 0 elsewhere."""


@dataclasses.dataclass(frozen=True, slots=True)
class Reading:
    """Totals at one moment."""

    counters: Mapping[str, Mapping[str, float]]
    """By instance, and by the names of ``_COUNTERS`` with ``cpu_s`` of the process."""
    others_cpu_s: Mapping[str, float]
    """Of gateways and pool nodes, by their ids."""


def read(controller: str) -> Reading:
    """Ask the controller at this address who there is, and each instance for its metrics."""
    with AdminClient(controller) as admin:
        status = admin.status()
    counters = {}
    for item in status.instances:
        if item.state == "dead":
            continue
        url = f"http://{item.metrics_address}/metrics"
        with urllib.request.urlopen(url, timeout=30) as reply:
            text = reply.read().decode()
        values: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                values[sample.name] = values.get(sample.name, 0.0) + sample.value
        found = {name: values.get(metric, 0.0) for name, metric in _COUNTERS.items()}
        found["cpu_s"] = _cpu_s(item.pid)
        counters[item.instance_id] = found
    return Reading(counters, {item.member_id: _cpu_s(item.pid) for item in status.members})


def _cpu_s(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def costs(before: Reading, after: Reading, wall_s: float) -> dict[str, Any]:
    """What the hosts did between two readings, as shares of the time that steps took.

    ``host_share``: planning, committing and the emulation's own work; ``cpu_share``: all that the
    instances' processes computed, messages and handoffs too (on a real device: the model as well);
    ``late_share``: how much longer than asked emulated steps were. ``max_``: of the worst instance.
    """
    per_instance = {}
    for name, end in after.counters.items():
        start = before.counters.get(name, {})
        one = {key: value - start.get(key, 0.0) for key, value in end.items()}
        per_instance[name] = one
    total = {key: sum(one[key] for one in per_instance.values()) for key in (*_COUNTERS, "cpu_s")}
    found: dict[str, Any] = {
        "steps": int(total["steps"]),
        "tokens": int(total["tokens"]),
        "preemptions": int(total["preemptions"]),
        "faults": int(total["faults"]),
        "step_s": _share(total["execute_s"], total["steps"]),
        "cpu_per_step_s": _share(total["cpu_s"], total["steps"]),
        "busy": {name: one["execute_s"] / wall_s for name, one in per_instance.items()},
        "others_cpu_share": {
            name: (cpu_s - before.others_cpu_s.get(name, 0.0)) / wall_s
            for name, cpu_s in after.others_cpu_s.items()
        },
    }
    shares = {
        "host_share": ("host_s", "emulated_host_s"),
        "cpu_share": ("cpu_s",),
        "late_share": ("late_s",),
    }
    for name, parts in shares.items():
        found[name] = _share(sum(total[part] for part in parts), total["execute_s"])
        each = [
            _share(sum(one[part] for part in parts), one["execute_s"])
            for one in per_instance.values()
        ]
        found[f"max_{name}"] = max((share for share in each if share is not None), default=None)
    return found


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None


def initial_roles(controller: str) -> dict[str, str]:
    """Role of each instance now."""
    with AdminClient(controller) as admin:
        return {item.instance_id: item.role for item in admin.roles(log_limit=0).instances}


def flips(controller: str) -> list[dict[str, Any]]:
    """All switches that were made, oldest first; ``wall_s``: when they were over."""
    with AdminClient(controller) as admin:
        log = admin.roles().log
    return [
        {
            "wall_s": flip.wall_s,
            "seconds": flip.seconds,
            "instance": flip.instance_id,
            "from": flip.from_role,
            "to": flip.to_role,
            "who": flip.who,
            "reason": flip.reason,
            "urgent": flip.urgent,
            "predicted": [flip.predicted_before, flip.predicted_after],
            "attainment": [flip.attainment_before, flip.attainment_after],
        }
        for flip in log
        if flip.state == "done"
    ]
