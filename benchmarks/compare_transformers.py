"""Tokens/s, TTFT and TPOT of a Baton cluster and of the same model in ``transformers``.

    python benchmarks/serve.py compare --model deploy/demo-model
    python benchmarks/serve.py compare ... -- --prefill 1 --decode 1   # for baton serve

One run measures both, in turn, several times each, and reports medians: the machine's other load
then falls on both alike. Per concurrency C, C requests are always open at Baton (a closed loop of
streamed HTTP requests through the cluster, ``benchmarks/load.py``); ``transformers`` generates in
batches of C, called in this process, with SDPA attention, and with the number of threads and the
way to compute experts that are fastest here, found by trying them. Prompts are random token ids of
equal length, no two alike; both run in fp32, greedily, to exactly the same number of tokens. The
share of equal outputs is reported.

Writes ``compare_transformers.json`` and ``.md`` into ``--out`` (default: benchmarks/results).
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import os
import shlex
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from baton.core.slo import Slo
from benchmarks import machine
from benchmarks.cluster import Cluster, serving
from benchmarks.http_sender import HttpSender
from benchmarks.load import LoadResult, run_load
from benchmarks.progress import LoadProgress
from benchmarks.reference import Reference
from benchmarks.report import summarize
from benchmarks.workload import Item, PromptMaker

SCHEMA = "baton.benchmark.compare_transformers/1"
SYSTEMS = ("baton", "transformers")
RESULTS = Path(__file__).resolve().parent / "results"
TIMEOUT_S = 300.0


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse; what comes after ``--`` is for ``baton serve``."""
    own, serve_options = _split(list(argv))
    parser = argparse.ArgumentParser(
        prog="serve.py compare",
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="folder of the model")
    add("--concurrency", type=int, nargs="+", default=[1, 4, 16])
    add("--repetitions", type=int, default=5, help="of each; medians are reported")
    add("--waves", type=int, default=2, help="requests per repetition: so many times C, 4 at least")
    add("--input-len", type=int, default=256)
    add("--output-len", type=int, default=64)
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args(own)
    args.serve_options = serve_options
    return args


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    if "--" not in argv:
        return argv, []
    at = argv.index("--")
    return argv[:at], argv[at + 1 :]


def measure_baton(
    args: argparse.Namespace,
    cluster: Cluster,
    prompts: list[list[int]],
    concurrency: int,
    progress: LoadProgress,
) -> LoadResult:
    """A closed loop of ``concurrency`` streams."""
    items = [Item(0.0, len(prompt), args.output_len) for prompt in prompts]

    async def run() -> LoadResult:
        sender = HttpSender(cluster.url, args.model.resolve().name)
        return await run_load(
            items,
            lambda index, item: prompts[index],
            sender,
            timeout_s=TIMEOUT_S,
            concurrency=concurrency,
            on_change=progress.on_change,
        )

    return asyncio.run(run())


def measure_transformers(
    args: argparse.Namespace, reference: Reference, prompts: list[list[int]], concurrency: int
) -> LoadResult:
    """Batches of ``concurrency``, one after the other."""
    outcomes = []
    cpu_s = sum(os.times()[:2])
    for start in range(0, len(prompts), concurrency):
        outcomes += reference.generate(prompts[start : start + concurrency], args.output_len)
    end_s = max(outcome.end_s or 0.0 for outcome in outcomes)
    return LoadResult(outcomes, outcomes[0].due_s, end_s, sum(os.times()[:2]) - cpu_s)


def measure(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """All repetitions of all; the document of the result."""
    config = json.loads((args.model / "config.json").read_text())
    host = machine.measure()
    console.print(machine.in_words(host), highlight=False)
    reference = Reference(args.model, len(os.sched_getaffinity(0)))
    counts = {c: max(4, args.waves * c) // c * c for c in args.concurrency}
    runs: dict[tuple[str, int], list[LoadResult]] = {}
    equal = total = 0
    maker = PromptMaker(config["vocab_size"], args.seed)
    drawn = 0

    def draw(count: int) -> list[list[int]]:
        nonlocal drawn
        made = []
        for _ in range(count):
            prompt = maker.prompt(drawn, Item(0.0, args.input_len, args.output_len))
            assert isinstance(prompt, list)
            made.append(prompt)
            drawn += 1
        return made

    reference.choose(draw(max(args.concurrency)), args.output_len)
    console.print(f"transformers: {reference.threads} threads, experts: {reference.experts}")
    with serving(args.model, args.serve_options) as cluster:
        for repetition in range(-1, args.repetitions):  # the first warms both up
            for concurrency, count in counts.items():
                prompts = draw(count)
                title = f"C={concurrency}, " + (
                    "warm-up" if repetition < 0 else f"{repetition + 1} of {args.repetitions}"
                )
                console.print(title, highlight=False)
                with LoadProgress(console, count, title) as progress:
                    ours = measure_baton(args, cluster, prompts, concurrency, progress)
                theirs = measure_transformers(args, reference, prompts, concurrency)
                for a, b in zip(ours.outcomes, theirs.outcomes, strict=True):
                    if a.failure is not None:
                        raise RuntimeError(f"a request failed: {a.failure} {a.detail}")
                    equal += a.token_ids == b.token_ids
                    total += 1
                if repetition >= 0:
                    runs.setdefault(("baton", concurrency), []).append(ours)
                    runs.setdefault(("transformers", concurrency), []).append(theirs)
    return {
        "schema": SCHEMA,
        "command": command_line(),
        "started_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": host,
        "model": args.model.resolve().name,
        "serve_options": args.serve_options,
        "workload": {
            "input_len": args.input_len,
            "output_len": args.output_len,
            "requests": {str(c): count for c, count in counts.items()},
            "repetitions": args.repetitions,
            "seed": args.seed,
        },
        "transformers": {
            "threads": reference.threads,
            "experts": reference.experts,
            "attention": "sdpa",
        },
        "equal_outputs": equal / total,
        "rows": [
            {"system": system, "concurrency": c, **medians(runs[system, c])}
            for c in counts
            for system in SYSTEMS
        ],
    }


def medians(results: Sequence[LoadResult]) -> dict[str, Any]:
    """Over repetitions: median of each number, and the lowest and highest tokens/s."""
    summaries = [summarize(result, Slo()) for result in results]
    rates = [summary["output_tokens_per_s"] for summary in summaries]
    row: dict[str, Any] = {
        "output_tokens_per_s": statistics.median(rates),
        "output_tokens_per_s_range": [min(rates), max(rates)],
    }
    for name in ("ttft_s", "tpot_s"):
        for column in ("p50", "p99"):
            values = [s[name][column] for s in summaries if s[name][column] is not None]
            row[f"{name}_{column}"] = statistics.median(values) if values else None
    return row


def command_line() -> str:
    """What made the numbers, to be run from the root of the repository."""
    return shlex.join(["python", "benchmarks/serve.py", *sys.argv[1:]])


def markdown(document: dict[str, Any]) -> str:
    """The table for the README."""
    work, theirs = document["workload"], document["transformers"]
    text = [
        "| C | system | tokens/s | TTFT p50 (ms) | TTFT p99 (ms) | TPOT p50 (ms) |",
        "|---:|---|---:|---:|---:|---:|",
    ]
    for row in document["rows"]:
        latencies = (row["ttft_s_p50"], row["ttft_s_p99"], row["tpot_s_p50"])
        cells = " | ".join("-" if v is None else f"{v * 1000:,.1f}" for v in latencies)
        rate = f"{row['output_tokens_per_s']:,.1f}"
        text.append(f"| {row['concurrency']} | {row['system']} | {rate} | {cells} |")
    text += [
        "",
        f"`{document['command']}`, {document['started_at'][:10]}. "
        f"{document['model']}, fp32, greedy, {work['input_len']} random tokens in, "
        f"{work['output_len']} out, C requests at a time; medians of {work['repetitions']} "
        f"interleaved repetitions. `transformers`: batches of C, {theirs['threads']} threads, "
        f"SDPA, experts: {theirs['experts']}; called in the process, while Baton "
        f"streams over HTTP. Equal outputs: {document['equal_outputs']:.1%}.",
        "",
        f"Machine: {machine.in_words(document['machine'])}.",
        "",
    ]
    return "\n".join(text)


def main(argv: Sequence[str]) -> int:
    """``serve.py compare``; the exit status."""
    args = arguments(argv)
    console = Console(stderr=True)
    try:
        document = measure(args, console)
    except (OSError, RuntimeError, ValueError) as error:
        console.print(f"serve.py compare: {error}", style="red", markup=False)
        return 1
    args.out.mkdir(parents=True, exist_ok=True)
    text = markdown(document)
    (args.out / "compare_transformers.json").write_text(json.dumps(document, indent=2) + "\n")
    (args.out / "compare_transformers.md").write_text(text)
    print(text)
    return 0
