"""Round trips of plans between a driver and its ranks, without a model.

    python -m benchmarks.plan_transport --json FILE

Starts 1, 2 and 4 processes that take a step and answer as ranks do, over the socket and with the
encoding that ranks use: rank 0 sends a result of 64 rows, the others an empty answer. One round
trip is what a step costs besides computing: encode, send to all, decode there, answer, decode.
Plans: a decode step of 64 rows with 64 blocks each, the same with 256 blocks, one row, and a
prefill of 512 tokens. A machine with fewer free cores than processes measures its scheduler.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from baton.core.config import EngineConfig
from baton.core.request import SamplingParams
from baton.engine.parallel.launch import RankHandle
from baton.engine.parallel.mesh import Axes
from baton.engine.parallel.ranks import Meeting, Ranks
from baton.engine.parallel.spec import RankSpec
from baton.engine.parallel.wire import (
    Kind,
    connect,
    decode_result,
    decode_step,
    encode_result,
    encode_step,
    new_secret,
)
from baton.engine.plan import RowResult, SequenceStep, SlotBegin, StepPlan, StepResult
from benchmarks import machine

SCHEMA = "baton.benchmark.plan_transport/1"
WARM_UP = 200
TIMEOUT_S = 60.0


def decode_plan(num_rows: int, num_blocks: int) -> StepPlan:
    """One token of each row."""
    tables = [tuple(range(i, 2048 + i, 2048 // num_blocks)) for i in range(num_rows)]
    start = 16 * num_blocks - 1
    rows = [SequenceStep(i, start, None, table, sample=True) for i, table in enumerate(tables)]
    return StepPlan(0, (), tuple(rows))


def prefill_plan(num_tokens: int) -> StepPlan:
    """One prompt at once."""
    tokens = tuple(range(1000, 1000 + num_tokens))
    row = SequenceStep(0, 0, tokens, tuple(range(num_tokens // 16)), sample=True)
    return StepPlan(0, (SlotBegin(0, SamplingParams(), tokens, ()),), (row,))


PLANS = {
    "decode 64 rows, 64 blocks each": decode_plan(64, 64),
    "decode 64 rows, 256 blocks each": decode_plan(64, 256),
    "decode 1 row, 64 blocks": decode_plan(1, 64),
    "prefill 512 tokens": prefill_plan(512),
}


def echo(path: str, rank: int, secret: bytes) -> None:
    """Answer steps as a rank does, and compute nothing."""
    link = connect(path, rank, secret, TIMEOUT_S)
    if rank == 0:
        link.send(Kind.DONE)
    while True:
        kind, body = link.receive(wait=True)
        if kind is Kind.EXIT:
            return
        answer = b""
        if kind is Kind.STEP:
            plan, _ = decode_step(body)
            if plan is not None and rank == 0:
                rows = tuple(RowResult(row.start) for row in plan.rows)
                answer = encode_result(StepResult(plan.step, rows, 0.0))
        link.send(Kind.DONE, answer)


class EchoRank:
    """A process that echoes."""

    def __init__(self, spec: RankSpec, ends: concurrent.futures.Executor) -> None:
        command = [sys.executable, "-m", "benchmarks.plan_transport", "--echo", str(spec.rank)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE)
        assert self._process.stdin is not None
        with self._process.stdin as stdin:
            stdin.write(spec.secret + spec.socket_path.encode())
        self._ended = ends.submit(lambda: f"ended with {self._process.wait()}")

    @property
    def ended(self) -> concurrent.futures.Future[str]:
        return self._ended

    def kill(self) -> None:
        self._process.kill()


class EchoLauncher:
    """Starts them."""

    def __init__(self) -> None:
        self._ends = concurrent.futures.ThreadPoolExecutor(8)

    def start(self, spec: RankSpec) -> RankHandle:
        return EchoRank(spec, self._ends)

    def close(self) -> None:
        self._ends.shutdown()


def measure(num_ranks: int, repetitions: int) -> list[dict[str, Any]]:
    """Round trips of each plan, ms."""
    meeting = Meeting(new_secret())
    axes = Axes(tp=num_ranks)
    specs = [
        RankSpec("echo", rank, axes, "", EngineConfig(), meeting.path, meeting.secret)
        for rank in range(num_ranks)
    ]
    ranks = Ranks(
        specs,
        meeting,
        EchoLauncher(),
        on_lost=None,
        start_timeout_s=TIMEOUT_S,
        step_timeout_s=TIMEOUT_S,
    )
    found = []
    try:
        for name, plan in PLANS.items():
            times = []
            for i in range(WARM_UP + repetitions):
                started = time.perf_counter()
                body = encode_step(plan, (plan.num_tokens,))
                decode_result(ranks.call(Kind.STEP, [body] * num_ranks)[0])
                if i >= WARM_UP:
                    times.append((time.perf_counter() - started) * 1000)
            times.sort()
            found.append(
                {
                    "ranks": num_ranks,
                    "plan": name,
                    "plan_bytes": len(body),
                    "p50_ms": times[len(times) // 2],
                    "p99_ms": times[len(times) * 99 // 100],
                }
            )
    finally:
        ranks.close()
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--repetitions", type=int, default=2000)
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--echo", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.echo is not None:
        told = sys.stdin.buffer.read()
        echo(told[32:].decode(), args.echo, told[:32])
        return
    results = []
    for num_ranks in args.ranks:
        for line in measure(num_ranks, args.repetitions):
            results.append(line)
            print(
                f"{line['ranks']} ranks, {line['plan']} ({line['plan_bytes']} bytes): "
                f"p50 {line['p50_ms']:.3f} ms, p99 {line['p99_ms']:.3f} ms"
            )
    if args.json is not None:
        document = {"schema": SCHEMA, "machine": machine.describe(), "results": results}
        args.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
