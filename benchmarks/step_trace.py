"""When each step was planned, computed and committed: is step n+1 planned while n runs?

    python -m benchmarks.step_trace --model deploy/demo-model

Drives the real engine loop with a batch of decoding sequences and records every call of
``schedule``, ``execute`` and ``commit`` with its thread. Writes ``step_trace.json`` into ``--out``
(default: benchmarks/results), in the trace-event format that Perfetto and chrome://tracing open,
and prints how much of the planning fell into the execution of the step before.

The runner is a rank in a process of its own, as with several ranks. ``--inline`` takes the runner
of a single rank, a thread: on a CPU its operations are so short that both threads wait for the
interpreter's lock all the time, and who gets it first after a step decides what the trace shows.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from baton.core.blocks import block_salt
from baton.core.clock import SystemClock
from baton.core.config import EngineConfig
from baton.core.request import Part, SamplingParams, Submission
from baton.engine.checkpoint import Checkpoint, open_checkpoint
from baton.engine.engine import Engine
from baton.engine.events import Event, TokensReady
from baton.engine.loop import EngineLoop
from baton.engine.models.config import kv_layout, resolve_max_model_len
from baton.engine.parallel.launch import ProcessLauncher
from baton.engine.parallel.runner import RankedRunner
from baton.engine.plan import Runner, StepPlan, StepResult
from baton.engine.runners import make_runner

RESULTS = Path(__file__).resolve().parent / "results"


class Recorder:
    """Calls with their begin, end and thread; microseconds since the start."""

    def __init__(self) -> None:
        self._start_s = time.perf_counter()
        self.events: list[dict[str, Any]] = []

    def timed(self, name: str, call: Callable[[], Any], step: Callable[[Any], int | None]) -> Any:
        """Run ``call``; recorded where it belongs to a step."""
        begin_s = time.perf_counter()
        value = call()
        end_s = time.perf_counter()
        number = step(value)
        if number is not None:
            self.events.append(
                {
                    "name": f"{name} {number}",
                    "cat": name,
                    "ph": "X",
                    "ts": (begin_s - self._start_s) * 1e6,
                    "dur": (end_s - begin_s) * 1e6,
                    "pid": 1,
                    "tid": threading.current_thread().name,
                    "args": {"step": number},
                }
            )
        return value

    def spans(self, name: str) -> dict[int, tuple[float, float]]:
        """step → (begin, end)."""
        return {
            event["args"]["step"]: (event["ts"], event["ts"] + event["dur"])
            for event in self.events
            if event["cat"] == name
        }


class RecordedEngine(Engine):
    """An engine that records its own calls."""

    recorder: Recorder

    def schedule(self, now: float) -> StepPlan | None:
        """See ``Engine``."""
        plan: StepPlan | None = self.recorder.timed(
            "schedule", lambda: super(RecordedEngine, self).schedule(now), _step_of
        )
        return plan

    def commit(self, plan: StepPlan, result: StepResult, now: float) -> list[Event]:
        """See ``Engine``."""
        events: list[Event] = self.recorder.timed(
            "commit",
            lambda: super(RecordedEngine, self).commit(plan, result, now),
            lambda _: plan.step,
        )
        return events


class RecordedRunner:
    """A runner that records its steps."""

    def __init__(self, runner: Runner[StepPlan, StepResult], recorder: Recorder) -> None:
        self._runner = runner
        self._recorder = recorder

    def execute(self, plan: StepPlan) -> StepResult:
        """See ``Runner``."""
        result: StepResult = self._recorder.timed(
            "execute", lambda: self._runner.execute(plan), lambda _: plan.step
        )
        return result

    def close(self) -> None:
        """See ``Runner``."""
        self._runner.close()


def _runner(
    checkpoint: Checkpoint, config: EngineConfig, *, inline: bool
) -> Runner[StepPlan, StepResult]:
    if inline:
        return make_runner(checkpoint, config)
    runner = RankedRunner(checkpoint, config, launcher=ProcessLauncher())
    runner.warm_up()
    return runner


def _step_of(plan: StepPlan | None) -> int | None:
    return None if plan is None else plan.step


async def record(args: argparse.Namespace) -> Recorder:
    """Run all sequences to their ends."""
    checkpoint = open_checkpoint(args.model)
    blocks_each = -(-(args.input_len + args.output_len) // 16) + 1
    config = EngineConfig(max_num_seqs=args.batch, num_blocks=args.batch * blocks_each + 8)
    recorder = Recorder()
    engine = RecordedEngine(
        config,
        max_model_len=resolve_max_model_len(checkpoint.config, config),
        salt=block_salt(
            model_fingerprint=checkpoint.fingerprint,
            layout=kv_layout(checkpoint.config, config).canonical.text,
        ),
    )
    engine.recorder = recorder
    open_requests = set(range(args.batch))
    done = asyncio.Event()

    def on_events(events: Sequence[Event]) -> None:
        for event in events:
            if isinstance(event, TokensReady) and event.finish_reason is not None:
                open_requests.discard(int(event.request_id))
        if not open_requests:
            done.set()

    def on_failed(request_ids: Sequence[str], error: BaseException) -> None:
        raise RuntimeError(f"a step failed: {error}")

    loop = EngineLoop(
        engine,
        RecordedRunner(_runner(checkpoint, config, inline=args.inline), recorder),
        clock=SystemClock(),
        on_events=on_events,
        on_failed=on_failed,
        max_in_flight=2,
    )
    running = asyncio.ensure_future(loop.run())
    try:
        for number in range(args.batch):
            prompt = tuple(
                (number * 31 + i) % checkpoint.config.vocab_size for i in range(args.input_len)
            )
            sampling = SamplingParams(
                temperature=1.0, seed=number, max_tokens=args.output_len, ignore_eos=True
            )
            engine.submit(Submission(str(number), 0, prompt, sampling), Part.WHOLE, 0.0)
        loop.wake()
        await asyncio.wait_for(done.wait(), args.timeout)
    finally:
        await loop.stop()
        await running
    return recorder


def summary(recorder: Recorder) -> dict[str, float]:
    """Of the decode steps: the last half of all."""
    planned, executed = recorder.spans("schedule"), recorder.spans("execute")
    committed = recorder.spans("commit")
    steps = sorted(executed)[len(executed) // 2 : -1]
    inside, waits = [], []
    for step in steps:
        begin, end = planned[step]
        before = executed[step - 1]
        inside.append(max(0.0, min(end, before[1]) - max(begin, before[0])) / (end - begin))
        waits.append(executed[step][0] - before[1])
    return {
        "steps": len(steps),
        "share_of_planning_inside_the_step_before": statistics.mean(inside),
        "schedule_us": statistics.median(planned[s][1] - planned[s][0] for s in steps),
        "commit_us": statistics.median(committed[s][1] - committed[s][0] for s in steps),
        "execute_us": statistics.median(executed[s][1] - executed[s][0] for s in steps),
        "runner_idle_between_steps_us": statistics.median(waits),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step_trace",
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", type=Path, required=True)
    add("--batch", type=int, default=16)
    add("--input-len", type=int, default=64)
    add("--output-len", type=int, default=48)
    add("--inline", action="store_true", help="the runner as a thread of this process")
    add("--timeout", type=float, default=300.0, help="seconds")
    add("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    recorder = asyncio.run(record(args))
    found = summary(recorder)
    args.out.mkdir(parents=True, exist_ok=True)
    trace = {"traceEvents": recorder.events, "otherData": found}
    (args.out / "step_trace.json").write_text(json.dumps(trace) + "\n")
    for name, value in found.items():
        print(f"{name}: {value:.2f}")


if __name__ == "__main__":
    main()
