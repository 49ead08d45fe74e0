"""What a cluster costs when nobody asks anything of it."""

from __future__ import annotations

import contextlib
import dataclasses
import time

import psutil

from tests.cluster.harness import Cluster

IDLE_LIMIT = 0.15
"""Of one core, all processes together, Ray's own included."""


@dataclasses.dataclass(frozen=True, slots=True)
class Usage:
    """One process over the measured time."""

    name: str
    pid: int
    cpu: float
    """Fraction of one core."""
    rss_bytes: int


def measure_idle(cluster: Cluster, *, seconds: float) -> list[Usage]:
    """CPU and memory of every process of the cluster over ``seconds`` without requests."""
    processes = cluster.processes()
    before = {p.pid: _cpu_s(p) for p in processes}
    started = time.monotonic()
    time.sleep(seconds)
    elapsed_s = time.monotonic() - started
    usage = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            cpu = (_cpu_s(process) - before[process.pid]) / elapsed_s
            usage.append(Usage(_name(process), process.pid, cpu, process.memory_info().rss))
    return sorted(usage, key=lambda item: -item.cpu)


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _name(process: psutil.Process) -> str:
    words = process.cmdline()
    if not words:
        return process.name()
    if words[0].startswith("ray::"):
        return words[0]
    scripts = [w.rpartition("/")[2] for w in words if w.endswith(".py") or "/ray/" in w]
    return scripts[0] if scripts else " ".join(w.rpartition("/")[2] for w in words[:4])
