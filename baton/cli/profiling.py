"""``baton profile``: measure the engine here, fit the cost model, write it as YAML."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import secrets
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from baton.cli.settings import load_settings, parse_settings
from baton.core.cluster import StepSample
from baton.core.config import EngineConfig
from baton.core.cost_fit import fit_step_costs, relative_error
from baton.core.cost_model import CostModel, LinkCosts, Profile, StepCosts
from baton.core.errors import ConfigError
from baton.engine.checkpoint import Checkpoint, open_checkpoint
from baton.engine.models.config import kv_layout, resolve_max_model_len
from baton.engine.profile_file import save_profile
from baton.engine.profiling import StepGrid, measure_steps
from baton.engine.runners import make_runner
from kvpool.arena import BlockArena
from kvpool.transport import BlockCopy
from kvpool.transports.shm import ShmTransport

_MESSAGES_S = 0.002
"""What a handoff's messages take beside its bytes; assumed, the steps say nothing of it."""
_LINK_BLOCKS = 256
_LINK_ROUNDS = 7

_Told = Callable[[int, int], None]


def run_profile(
    model: str | None,
    out: Path | None,
    config: Path | None,
    name: str | None,
    engine: dict[str, Any],
    num_rounds: int,
) -> None:
    """Measure, fit, write. ``engine``: settings of ``EngineConfig``, ``None`` where not given.

    Raises ConfigError for what the user must change, mostly before anything is measured.
    """
    if out is None:
        raise ConfigError("out is missing: give --out FILE", param="out")
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"--out {out}: there is no such folder", param="out")
    folder, settings = _settings(model, config, engine)
    checkpoint = open_checkpoint(folder)
    max_len = resolve_max_model_len(checkpoint.config, settings)
    started = time.monotonic()
    samples, grid = _measure(checkpoint, settings, max_len, num_rounds)
    made = _fit(checkpoint, settings, max_len, samples, name)
    errors = _errors(made, samples, grid)
    save_profile(made, out, (*_head(settings, len(samples), num_rounds), *errors))
    Console(stderr=True).print(f"{out}: {len(samples)} steps, {time.monotonic() - started:.0f} s")
    print("\n".join(errors))


def _settings(
    model: str | None, config: Path | None, engine: dict[str, Any]
) -> tuple[str, EngineConfig]:
    """The model, and the engine of the file with the flags that were given."""
    settings = load_settings(config, {"model": model})
    values = dataclasses.asdict(settings.engine)
    values |= {name: value for name, value in engine.items() if value is not None}
    parsed = parse_settings({"model": settings.model, "engine": values}, source="flags").engine
    if parsed.device == "emulated":
        raise ConfigError("device emulated has a profile already", param="device")
    if parsed.dp > 1:
        raise ConfigError("dp must be 1: measure one group of ranks", param="dp")
    if parsed.num_blocks is None:
        raise ConfigError("num_blocks is missing: give --num-blocks", param="num_blocks")
    return settings.model, parsed


def _measure(
    checkpoint: Checkpoint, engine: EngineConfig, max_len: int, num_rounds: int
) -> tuple[list[StepSample], StepGrid]:
    grid = StepGrid(engine, max_len)
    runner = make_runner(checkpoint, engine)
    try:
        with _progress() as told:
            return measure_steps(runner, grid, num_rounds=num_rounds, progress=told), grid
    finally:
        runner.close()


def _fit(
    checkpoint: Checkpoint,
    engine: EngineConfig,
    max_len: int,
    samples: Sequence[StepSample],
    name: str | None,
) -> Profile:
    link = _measure_link(engine, checkpoint)
    link = LinkCosts(_round(link.latency_s + _MESSAGES_S), _round(link.bytes_per_s))
    prefill, decode = (
        StepCosts(_round(costs.overhead_s), _round(costs.item_s), _round(costs.context_s))
        for costs in (fit_step_costs(samples, "prefill"), fit_step_costs(samples, "decode"))
    )
    cost = CostModel(
        prefill=prefill,
        decode=decode,
        handoff=link,
        kv_bytes_per_token=kv_layout(checkpoint.config, engine).block_bytes / engine.block_size,
        tiers={"host": link},
    )
    model = checkpoint.path.resolve().name
    return Profile(
        name=name or model,
        source=f"fitted to {len(samples)} kinds of steps of {model} on {_machine()}",
        cost=cost,
        kv_capacity_tokens=engine.kv_blocks * engine.block_size,
        max_model_len=max_len,
        max_num_seqs=engine.max_num_seqs,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        block_size=engine.block_size,
    )


def _measure_link(engine: EngineConfig, checkpoint: Checkpoint) -> LinkCosts:
    """Between two instances of this machine: a pull of one block, and one of many."""
    layout = kv_layout(checkpoint.config, engine)
    count = min(_LINK_BLOCKS, engine.kv_blocks)
    with contextlib.ExitStack() as stack:
        shm = "/dev/shm" if os.path.isdir("/dev/shm") else None
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="baton-", dir=shm))
        source, target = (
            BlockArena.create(
                folder,
                "profile",
                side,
                secrets.randbits(63),
                os.getpid(),
                count,
                layout.block_bytes,
                layout.text,
            )
            for side in ("source", "target")
        )
        stack.callback(source.close)
        stack.callback(target.close)
        transport = ShmTransport()
        stack.callback(transport.close)
        endpoint = transport.export(source)

        def pull_s(num_blocks: int) -> float:
            copies = [BlockCopy(i, source.generation(i), i) for i in range(num_blocks)]
            return min(
                transport.pull(endpoint, target, copies, timeout_s=60.0).seconds
                for _ in range(_LINK_ROUNDS)
            )

        one, many = pull_s(1), pull_s(count)
    rest = max(many - one, 1e-9)
    return LinkCosts(one, max(1, count - 1) * layout.block_bytes / rest)


def _errors(made: Profile, samples: Sequence[StepSample], grid: StepGrid) -> list[str]:
    """How far the fit is from what was measured, a line for each kind of step."""
    cost = made.cost
    mixed = samples[len(samples) - len(grid.mixed) :]
    lines = [
        f"mean error of prefill steps {relative_error(samples, 'prefill', cost.prefill):.1%}, "
        f"of decode steps {relative_error(samples, 'decode', cost.decode):.1%}"
    ]
    if mixed:
        off = [abs(cost.step_s(sample.shape) / sample.seconds - 1) for sample in mixed]
        lines[0] += f", of mixed steps (not fitted to) {sum(off) / len(off):.1%}"
    return lines


def _head(engine: EngineConfig, num_steps: int, num_rounds: int) -> tuple[str, ...]:
    return (
        f"Made by baton profile: {num_steps} kinds of steps, medians of {num_rounds}.",
        f"Engine: device {engine.device}, {engine.dtype}, tp {engine.tp}, ep {engine.ep}, "
        f"{engine.num_threads} threads.",
        "handoff and host: a pull over shared memory, and 2 ms for messages, which are assumed.",
    )


def _round(value: float) -> float:
    """More digits than were measured help nobody."""
    return float(f"{value:.4g}")


def _machine() -> str:
    """CPU and cores, without names of people or places."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, IndexError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), cpu)
    return f"{cpu}, {len(os.sched_getaffinity(0))} cores"


@contextlib.contextmanager
def _progress() -> Iterator[_Told]:
    """On standard error: a bar on a terminal, one line elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        print("baton: measuring steps", file=sys.stderr, flush=True)
        yield lambda done, total: None
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("measuring steps", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
