"""Host time of a decode step: schedule, prepare, collect and commit, without the model.

    python -m benchmarks.host_step                 # writes benchmarks/results/host_step.json
    python -m benchmarks.host_step --profile 64    # where the time goes at batch 64

A real ``Engine`` decodes batches of 1 to 256 sequences with contexts of about 300 tokens, one plan
ahead as in an instance. Between its plans and their results there is no model: tokens are made up.
Timed per step:

* ``schedule``: ``Engine.schedule``;
* ``prepare``: what ``InlineRunner.execute`` does before the model: slots, ``build_inputs``;
* ``collect``: what it does after it on the host: parameters of the draw, rows of the result. The
  draw itself is the device's;
* ``commit``: ``Engine.commit``.

``total`` is their sum, ``cpu`` the processor time of the step, which other load on the machine
changes less. Each batch size is measured several times, all sizes in turn; the numbers are medians
over steps, and of these over repetitions, in milliseconds.
"""

from __future__ import annotations

import argparse
import cProfile
import datetime
import json
import pstats
import random
import statistics
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch

from baton.core.config import EngineConfig
from baton.core.request import Part, SamplingParams, Submission
from baton.engine.checkpoint import open_checkpoint
from baton.engine.engine import Engine
from baton.engine.models.config import kv_layout
from baton.engine.plan import RowResult, StepPlan, StepResult
from baton.engine.slot_state import SlotState
from baton.engine.step_inputs import build_inputs
from benchmarks import machine

SCHEMA = "baton.benchmark.host_step/1"
PARTS = ("schedule", "prepare", "collect", "commit")
ROOT = Path(__file__).resolve().parent
BLOCK_SIZE = 16
ROW_QUANTUM = 4
"""Most that ``linear`` finds on a CPU; it only pads."""
SHORTEST, LONGEST = 200, 400
"""Context where the measurement starts; more tokens than one step's budget are fine."""
WARM_UP_STEPS = 20


class Bench:
    """An engine full of decoding sequences, and the host's half of its runner."""

    def __init__(self, model: Path, batch: int, *, num_steps: int, temperature: float) -> None:
        blocks_each = -(-(LONGEST + WARM_UP_STEPS + num_steps + 8) // BLOCK_SIZE)
        config = EngineConfig(
            block_size=BLOCK_SIZE,
            num_blocks=blocks_each * batch + 64,
            max_num_seqs=batch,
            max_num_batched_tokens=max(2048, batch),
        )
        checkpoint = open_checkpoint(model)
        self._layout = kv_layout(checkpoint.config, config)
        self._vocab_size = checkpoint.config.vocab_size
        self._state = SlotState(batch, self._vocab_size, torch.device("cpu"))
        self._engine = Engine(config, max_model_len=4096, salt=b"host_step")
        self._planned: deque[StepPlan] = deque()
        self._random = random.Random(batch)
        for number in range(batch):
            length = self._random.randint(SHORTEST, LONGEST)
            prompt = tuple(self._random.randrange(self._vocab_size) for _ in range(length))
            sampling = SamplingParams(temperature=temperature, seed=number, max_tokens=4096)
            self._engine.submit(Submission(f"r{number}", 0, prompt, sampling), Part.WHOLE, 0.0)
        self.times: dict[str, list[float]] = {}
        self._plan()
        while any(row.token_ids is not None for row in self._planned[-1].rows) or (
            len(self._planned[-1].rows) < batch
        ):
            self.step()
        for _ in range(WARM_UP_STEPS):
            self.step()
        self.times = {part: [] for part in (*PARTS, "total", "cpu")}

    def _plan(self) -> None:
        plan = self._engine.schedule(0.0)
        assert plan is not None
        self._planned.append(plan)

    def step(self) -> None:
        """Plan step n + 1, then run and commit step n."""
        cpu = time.thread_time()
        marks = [time.perf_counter()]
        self._plan()
        marks.append(time.perf_counter())
        plan = self._planned.popleft()
        first_tokens = self._prepare(plan)
        marks.append(time.perf_counter())
        drawn = [7] * len(plan.rows)  # the model and the draw would be here
        begun = time.perf_counter()
        result = self._collect(plan, first_tokens, drawn)
        collected = time.perf_counter() - begun
        begun = time.perf_counter()
        self._engine.commit(plan, result, 0.0)
        committed = time.perf_counter() - begun
        if self.times:
            spent = (marks[1] - marks[0], marks[2] - marks[1], collected, committed)
            for part, seconds in zip(PARTS, spent, strict=True):
                self.times[part].append(seconds)
            self.times["total"].append(sum(spent))
            self.times["cpu"].append(time.thread_time() - cpu)

    @torch.inference_mode()
    def _prepare(self, plan: StepPlan) -> tuple[int, ...]:
        for begin in plan.begins:
            self._state.begin(begin)
        inputs = build_inputs(
            plan.rows,
            self._layout,
            self._state.last_token,
            device=torch.device("cpu"),
            dtype=torch.float32,
            row_quantum=ROW_QUANTUM,
        )
        return inputs.first_tokens

    def _collect(
        self, plan: StepPlan, first_tokens: tuple[int, ...], drawn: list[int]
    ) -> StepResult:
        rows = plan.rows
        sampled = [i for i, row in enumerate(rows) if row.sample]
        lasts = [first_tokens[i] + rows[i].num_tokens - 1 for i in sampled]
        assert len(lasts) == len(sampled)
        slots = np.array([rows[i].slot for i in sampled], dtype=np.int64)
        uniforms = np.array([rows[i].uniform for i in sampled])
        assert len(slots) == len(uniforms)
        asked = [i for i in sampled if self._state.sampling(rows[i].slot).logprobs is not None]
        assert not asked
        tokens = dict(zip(sampled, drawn, strict=False))
        results = tuple(RowResult(token_id=tokens.get(i)) for i in range(len(rows)))
        return StepResult(plan.step, results, 0.0)

    def measure(self, num_steps: int) -> dict[str, float]:
        """Medians in milliseconds."""
        for _ in range(num_steps):
            self.step()
        return {part: 1000 * statistics.median(times) for part, times in self.times.items()}


def profile(args: argparse.Namespace, batch: int) -> str:
    """The functions that take most of the steps' time. Profiling itself slows small ones most."""
    bench = Bench(args.model, batch, num_steps=args.steps, temperature=args.temperature)
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(args.steps):
        bench.step()
    profiler.disable()
    statistics_ = pstats.Stats(profiler)
    statistics_.strip_dirs().sort_stats("tottime").print_stats(25)
    return f"batch {batch}, {args.steps} steps"


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All batch sizes in turn, ``--repetitions`` times."""
    runs: dict[int, list[dict[str, float]]] = {batch: [] for batch in args.batch}
    for _ in range(args.repetitions):
        for batch in args.batch:
            bench = Bench(args.model, batch, num_steps=args.steps, temperature=args.temperature)
            runs[batch].append(bench.measure(args.steps))
    results = []
    for batch, each in runs.items():
        parts = {part: statistics.median(run[part] for run in each) for part in each[0]}
        totals = [run["total"] for run in each]
        entry = {"batch": batch, **{f"{part}_ms": round(ms, 4) for part, ms in parts.items()}}
        entry["total_ms_lowest"] = round(min(totals), 4)
        entry["total_ms_highest"] = round(max(totals), 4)
        entry["per_sequence_us"] = round(1000 * parts["total"] / batch, 2)
        results.append(entry)
    return {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine.describe(),
        "settings": {
            "model": args.model.name,
            "steps": args.steps,
            "repetitions": args.repetitions,
            "temperature": args.temperature,
            "block_size": BLOCK_SIZE,
            "context_at_start": [SHORTEST, LONGEST],
        },
        "results": results,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="host_step",
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", type=Path, default=ROOT.parent / "deploy" / "demo-model")
    add("--batch", type=int, nargs="+", default=[1, 16, 64, 128, 256])
    add("--steps", type=int, default=100, help="measured per repetition")
    add("--repetitions", type=int, default=7)
    add("--temperature", type=float, default=1.0, help="0: no draws")
    add("--profile", type=int, metavar="BATCH", help="profile instead; writes no file")
    add("--json", type=Path, default=ROOT / "results" / "host_step.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.profile is not None:
        print(profile(args, args.profile))
        return
    report = measure(args)
    for entry in report["results"]:
        print(" ".join(f"{name}={value}" for name, value in entry.items()))
    args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
