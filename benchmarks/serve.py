"""An open-loop load on a running server: TTFT, TPOT, ITL, end to end, attainment, goodput.

    python benchmarks/serve.py --url http://127.0.0.1:8000 --model demo-model \\
        --num-requests 200 --rate 4 --arrivals poisson --input-len 256 --output-len 64 \\
        --slo ttft=1.0,tpot=0.05 --json results.json
    python benchmarks/serve.py ... --trace conversation.jsonl --format mooncake --length-scale 0.05
    python benchmarks/serve.py compare --model deploy/demo-model

``compare`` starts a cluster and measures it beside the same model in ``transformers``, in one run:
see ``benchmarks/compare_transformers.py``.

Requests are sent when they are due, whatever became of the earlier ones (with ``--concurrency`` at
most so many at a time: a closed loop, in which TTFT counts from the sending). All are drawn from
``--seed``. A request counts as finished only if every token that it asked for has come.

``--json FILE`` writes one object (``-``: to standard output, tables go to standard error)::

    schema        "baton.benchmark.serve/1"
    command       the arguments; started_at: ISO 8601, UTC
    machine       of the client: cpu, cores, memory_bytes, versions; with --machine also
                  copy_bytes_per_s and gemm_flop_per_s by number of threads
    workload      source, requests, offered_rate, prompt_tokens_mean, output_tokens_mean, seed
    requests      total, finished, failed, failures {kind: count}, examples {kind: text}
    duration_s    first request due to last ended; prompt_tokens, output_tokens: of the finished
    request_rate, output_tokens_per_s, total_tokens_per_s
    ttft_s, tpot_s, itl_s, e2e_s
                  {mean, p50, p90, p99, max, count}, of the finished; tokens of one message have
                  gaps of zero between them; a single token has no TPOT
    slo           ttft_s, tpot_s (null: no target)
    attainment    requests that finished within every target / all requests, failed ones included
    goodput       such requests per second
    client        cpu_s, cpu_share (of one core), lateness_s: how late requests were sent
    per_request   with --per-request: due_s, sent_s, arrival_s, prompt_tokens, wanted_tokens,
                  token_times_s, failure

Failure kinds: ``shed`` (429, 503, UNAVAILABLE, RESOURCE_EXHAUSTED), ``timeout``, ``connection``,
``http_CODE``, ``grpc_CODE``, ``error_CODE`` (inside the stream), ``unfinished`` (no finish reason),
``short`` (fewer tokens than asked for), ``miscounted`` (usage and tokens disagree).
Exit status: 0 if all requests finished, 1 if some failed, 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc.aio
from rich.console import Console

from benchmarks import machine
from benchmarks.grpc_sender import GrpcSender
from benchmarks.http_sender import HttpSender
from benchmarks.load import LoadResult, run_load
from benchmarks.outcome import Sender
from benchmarks.progress import LoadProgress
from benchmarks.report import SCHEMA, lines, parse_slo, per_request, summarize, table
from benchmarks.traces import MOONCAKE_BLOCK_TOKENS, read_trace
from benchmarks.workload import Item, PromptMaker, read_prompts, reshape, synthetic, with_texts


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exits with 2 if it is wrong."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:8000", help="of the HTTP server")
    add("--model", required=True, help="the served model's name")
    add("--grpc", metavar="HOST:PORT", help="speak gRPC to this address instead")
    add("--trace", type=Path, help="replay this trace")
    add("--format", choices=("azure", "mooncake"), help="of the trace")
    add("--num-requests", type=int, help="how many (of a trace: at most; else 100)")
    add("--rate", type=float, default=1.0, help="requests per second; inf: all at once")
    add("--arrivals", choices=("poisson", "constant", "burst"), default="poisson")
    add("--burstiness", type=float, default=0.25, help="of burst; 1 is poisson, less is burstier")
    length = "N, uniform:LOW:HIGH or lognormal:MEDIAN:SIGMA, in tokens"
    add("--input-len", default="256", help=length)
    add("--output-len", default="64", help=length)
    add("--prompts", type=Path, help="text prompts, one a line, instead of random token ids")
    add("--concurrency", type=int, help="at most so many requests at a time")
    add("--rate-scale", type=float, default=1.0, help="replay so many times faster")
    add("--length-scale", type=float, default=1.0, help="scale prompts and outputs")
    add("--clip-input", type=int, help="longest prompt, in tokens")
    add("--clip-output", type=int, help="longest output, in tokens")
    add("--vocab-size", type=int, help="draw ids below this (else the server is asked)")
    add("--temperature", type=float, default=0.0)
    add("--seed", type=int, default=0)
    add("--slo", type=parse_slo, default="ttft=1.0,tpot=0.1", help="targets in seconds")
    add("--timeout", type=float, default=600.0, help="seconds that a request may take")
    add("--json", metavar="FILE", help="write the result there; - is standard output")
    add("--per-request", action="store_true", help="each request's times in the JSON too")
    add("--machine", action="store_true", help="measure the machine's limits first (2 s)")
    args = parser.parse_args(argv)
    if (args.trace is None) != (args.format is None):
        parser.error("--trace and --format belong together")
    for name in ("num_requests", "concurrency", "clip_input", "clip_output", "timeout"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            parser.error(f"--{name.replace('_', '-')} must be positive, got {value}")
    return args


def workload(args: argparse.Namespace) -> list[Item]:
    """The requests that the arguments ask for. Raises ValueError or OSError."""
    if args.trace is not None:
        items = read_trace(args.trace, args.format, args.seed)
    else:
        items = synthetic(
            args.num_requests or 100,
            rate=args.rate,
            arrivals=args.arrivals,
            input_len=args.input_len,
            output_len=args.output_len,
            seed=args.seed,
            burstiness=args.burstiness,
        )
    items = reshape(
        items,
        rate_scale=args.rate_scale,
        length_scale=args.length_scale,
        clip_input=args.clip_input,
        clip_output=args.clip_output,
        limit=args.num_requests,
    )
    return with_texts(items, read_prompts(args.prompts)) if args.prompts else items


def describe_workload(args: argparse.Namespace, items: Sequence[Item]) -> dict[str, Any]:
    """For the result's header."""
    span_s = items[-1].at_s
    return {
        "source": f"{args.format}:{args.trace.name}" if args.trace else args.arrivals,
        "requests": len(items),
        "offered_rate": (len(items) - 1) / span_s if span_s > 0 else None,
        "prompt_tokens_mean": statistics.fmean(item.input_len for item in items),
        "output_tokens_mean": statistics.fmean(item.output_len for item in items),
        "seed": args.seed,
    }


async def vocab_size(args: argparse.Namespace, sender: HttpSender | GrpcSender) -> int:
    """From the arguments or the server; ValueError if neither knows."""
    if args.vocab_size is not None:
        return int(args.vocab_size)
    if args.prompts is not None:
        return 2**31  # no ids are drawn
    if isinstance(sender, GrpcSender):
        return await sender.vocab_size()
    size = (await sender.model_info()).get("vocab_size")
    if not isinstance(size, int):
        raise ValueError("the server does not tell its vocabulary: give --vocab-size")
    return size


async def run(args: argparse.Namespace, items: Sequence[Item], console: Console) -> LoadResult:
    """Send everything and wait for it to end."""
    sender: HttpSender | GrpcSender
    if args.grpc:
        sender = GrpcSender(args.grpc, args.model, temperature=args.temperature)
    else:
        sender = HttpSender(args.url, args.model, temperature=args.temperature)
    try:
        maker = PromptMaker(
            await vocab_size(args, sender),
            args.seed,
            block_tokens=round(MOONCAKE_BLOCK_TOKENS * args.length_scale),
        )
        return await _show(args, items, maker, sender, console)
    finally:
        await sender.close()


async def _show(
    args: argparse.Namespace,
    items: Sequence[Item],
    maker: PromptMaker,
    sender: Sender,
    console: Console,
) -> LoadResult:
    with LoadProgress(console, len(items)) as progress:
        return await run_load(
            items,
            maker.prompt,
            sender,
            timeout_s=args.timeout,
            concurrency=args.concurrency,
            on_change=progress.on_change,
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; the exit status."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["compare"]:
        # Only here: torch and transformers are nothing to a client of a running server.
        from benchmarks import compare_transformers

        return compare_transformers.main(given[1:])
    args = arguments(given)
    console = Console(stderr=True)
    started_at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    try:
        items = workload(args)
        host = machine.measure() if args.machine else machine.describe()
        result = asyncio.run(run(args, items, console))
    except (ValueError, LookupError, OSError, grpc.aio.AioRpcError) as error:
        console.print(f"serve.py: {error}", style="red", markup=False)
        return 2
    except KeyboardInterrupt:
        console.print("interrupted")
        return 130
    summary = summarize(result, args.slo)
    shown = Console(stderr=args.json == "-")
    shown.print(table(summary, f"{args.model} at {args.grpc or args.url}"))
    shown.print("\n".join(lines(summary)), markup=False, highlight=False)
    if args.json:
        document = {
            "schema": SCHEMA,
            "command": given,
            "started_at": started_at,
            "machine": host,
            "workload": describe_workload(args, items),
            **summary,
        }
        if args.per_request:
            document["per_request"] = per_request(result)
        text = json.dumps(document, indent=2, allow_nan=False) + "\n"
        if args.json == "-":
            sys.stdout.write(text)
        else:
            Path(args.json).write_text(text)
    return 1 if summary["requests"]["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
