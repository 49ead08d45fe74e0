"""The machine that a number was measured on: what it is, and what it could do at best.

python -m benchmarks.machine
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

COPY_BYTES = 128 * 1024 * 1024
GEMM_SIZE = 1024
REPETITIONS = 5
PACKAGES = ("torch", "transformers", "ray", "grpcio", "uvicorn", "numpy")


def describe() -> dict[str, Any]:
    """What there is; instantaneous."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "versions": versions,
    }


def measure() -> dict[str, Any]:
    """:func:`describe` and the limits: about two seconds at full load.

    ``copy_bytes_per_s`` counts a byte copied once (it is read and written); ``gemm_flop_per_s``
    is a square fp32 matrix product, per number of threads. Medians.
    """
    import numpy as np
    import torch

    source = np.ones(COPY_BYTES, dtype=np.uint8)
    target = np.zeros_like(source)
    copy_s = _median_s(lambda: np.copyto(target, source))
    threads_before = torch.get_num_threads()
    a = torch.ones(GEMM_SIZE, GEMM_SIZE)
    b = torch.ones(GEMM_SIZE, GEMM_SIZE)
    gemm: dict[str, float] = {}
    try:
        for threads in sorted({1, len(os.sched_getaffinity(0))}):
            torch.set_num_threads(threads)
            gemm[str(threads)] = 2 * GEMM_SIZE**3 / _median_s(lambda: torch.mm(a, b))
    finally:
        torch.set_num_threads(threads_before)
    return {
        **describe(),
        "copy_bytes_per_s": COPY_BYTES / copy_s,
        "gemm_flop_per_s": gemm,
    }


def in_words(machine: dict[str, Any]) -> str:
    """One line for the head of a table."""
    versions = machine["versions"]
    text = (
        f"{machine['cores']} cores ({machine['cpu']}), {machine['memory_bytes'] / 2**30:.0f} GiB, "
        f"Python {versions['python']}, torch {versions['torch']}, Ray {versions['ray']}"
    )
    if "copy_bytes_per_s" in machine:
        rates = ", ".join(
            f"{rate / 1e9:.0f} GFLOP/s fp32 on {threads} thread{'s' if threads != '1' else ''}"
            for threads, rate in machine["gemm_flop_per_s"].items()
        )
        text += f"; copies {machine['copy_bytes_per_s'] / 1e9:.1f} GB/s, {rates}"
    return text


def _median_s(action: Callable[[], object]) -> float:
    action()  # page in, wake the threads
    times: list[float] = []
    for _ in range(REPETITIONS):
        start_s = time.perf_counter()
        action()
        times.append(time.perf_counter() - start_s)
    return statistics.median(times)


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    limits = measure()
    print(json.dumps(limits, indent=2))
    print(in_words(limits))
