"""A cluster's decisions, logged while all that can happen to a controller happens in seconds.

    python -m tests.cluster.decisions FILE

records a cluster of emulated instances into FILE: ``tests/controller/recorded_decisions.jsonl``. Do
it again when what is decided, or how a log is written, has changed on purpose.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from controller.event_log_file import EventLog, LoggedRun, read_log
from tests.cluster.emulated_kit import PROFILE, asks, emulated_cluster, send_at
from tests.cluster.harness import Cluster, wait_until

SETTINGS: dict[str, dict[str, Any]] = {
    "controller": {
        "heartbeat_s": 0.5,
        "queue_timeout_s": 30.0,
        "roles": {"cooldown_s": 1.0, "interval_s": 0.25},
        "admission": {"max_open_per_instance": 8},
    },
    "service": {
        "classes": {
            "interactive": {"ttft_s": 2.0, "tpot_s": 0.06, "weight": 2.0},
            "batch": {"priority": -1, "deadline_s": 60.0},
        },
        "default": "interactive",
    },
}
_SLOW_PREFILL = {"overhead_s": 0.01, "item_s": 1e-3, "context_s": 0.0}


@contextlib.contextmanager
def logged_cluster(folder: Path, log: Path) -> Iterator[Cluster]:
    """Two pairs whose prompts take long, so that queues grow and decode is bound late."""
    settings = {**SETTINGS, "controller": {**SETTINGS["controller"], "event_log": str(log)}}
    profile = {**PROFILE, "prefill": _SLOW_PREFILL}
    sizes = ("--prefill", "2", "--decode", "2")
    with emulated_cluster(folder, sizes, settings=settings, profile=profile) as cluster:
        yield cluster


def eventful(cluster: Cluster) -> None:
    """Bursts, late bindings, the planner's switches and an operator's, a drain and a death."""
    asyncio.run(_bursts(cluster))
    before = {item.instance_id: item for item in cluster.live_instances()}
    asyncio.run(_operated(cluster))
    victim = before["decode-1"]
    os.kill(victim.pid, signal.SIGKILL)

    def back() -> bool:
        lives = {
            i.instance_id: i.incarnation for i in cluster.live_instances() if i.state == "ready"
        }
        return lives.get("decode-1", victim.incarnation) != victim.incarnation

    wait_until(back, timeout_s=60.0, what="decode-1 is back")
    asyncio.run(send_at(cluster, [(0.0, ask) for ask in asks(3, prompt=60, output=8, seed=4)]))


async def _bursts(cluster: Cluster) -> None:
    heavy = [(0.1 * i, ask) for i, ask in enumerate(asks(20, prompt=900, output=10, seed=1))]
    long = [(0.1 * i, ask) for i, ask in enumerate(asks(16, prompt=20, output=80, seed=2))]
    offline = [(0.5 * i, ask) for i, ask in enumerate(asks(3, prompt=100, output=10, seed=3))]
    await asyncio.gather(send_at(cluster, heavy), send_at(cluster, offline, service_class="batch"))
    await send_at(cluster, long)


async def _operated(cluster: Cluster) -> None:
    """While requests run."""
    running = asyncio.ensure_future(
        send_at(
            cluster, [(0.2 * i, a) for i, a in enumerate(asks(10, prompt=200, output=20, seed=5))]
        )
    )
    for line in (
        ("roles", "pause", "--for", "60"),
        ("role", "decode-0", "mixed", "--force"),
        ("role", "decode-0", "decode", "--force"),
        ("roles", "unpin", "decode-0"),
        ("role", "prefill-9", "mixed"),
        ("roles", "resume"),
        ("drain", "prefill-1"),
        ("drain", "prefill-1", "--undo"),
    ):
        result = await asyncio.to_thread(cluster.command, *line)
        assert result.returncode == 0 or "prefill-9" in line, result.stderr
    await running


def record(folder: Path) -> LoggedRun:
    """One life of a controller, from its start to its end."""
    log = folder / "decisions.jsonl"
    with logged_cluster(folder, log) as cluster:
        eventful(cluster)
    [run] = read_log(log)
    return run


def main() -> None:
    """See the module docstring."""
    target = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        run = record(Path(folder))
    target.unlink(missing_ok=True)
    made = EventLog(target)
    # Where it was written is of no interest.
    config = dataclasses.replace(run.start.config, event_log=None)
    made.write(dataclasses.replace(run.start, config=config))
    for entry in run.entries:
        made.write(entry)
    made.close()
    print(f"{target}: {len(run.entries)} entries, {target.stat().st_size} bytes")


if __name__ == "__main__":
    main()
