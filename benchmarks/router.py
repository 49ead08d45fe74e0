"""The decision path at scale: 1,250 instances, a real trace's prefixes, one process.

    python -m benchmarks.router --trace mooncake_conversation.jsonl
        [--instances 1250] [--rate 5000] [--copies 4] [--json benchmarks/results/router.json]

What runs is the controller's own: gateways' ``PlaceBatch`` messages are parsed, the index is asked
who has the beginnings of the prompts, ``ControllerCore`` decides with the ``slo`` policy, and the
replies are serialized. Between batches come heartbeats of all instances, batches of outcomes, the
requests for late bindings, and, timed apart (``blocks``), the reports of what the caches hold.
What does not run: gRPC's sockets.

Around it, a small model of the cluster in virtual time: requests of the trace arrive at ``--rate``
(Poisson), at ``--gateways`` gateways, each of which sends what came while its last batch was
decided, as the product's do. The controller is one server: each piece of work takes as long as it
really took. So a latency is from a request's arrival at its gateway to its answer, waiting
included. ``--clock cpu`` takes processor time instead, on a machine that others use too. Instances
take the profile's times divided by a factor, so that the fleet bears the rate at ``--load``; they
hold what they computed or were handed, least recently used out first, and their machines' host
tiers hold the prompts as well. Heartbeats bring samples of steps.

``--copies`` conversations of equal shape but other content run beside each other; all share the
trace's first block, as a common system prompt. The first half of each fills caches and index, the
second is measured.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
from pathlib import Path
from typing import Any

from baton.core.slo import percentile
from benchmarks import machine
from benchmarks.router_fleet import PROFILE
from benchmarks.router_world import World

SCHEMA = "baton.benchmark.router/1"


def report_of(world: World, args: argparse.Namespace) -> dict[str, Any]:
    spent = {kind: sum(each) for kind, each in sorted(world.clocks.spent.items())}
    span_s = world.span_s
    num = len(world.latencies)
    busy_s = sum(spent.values()) - spent.get("blocks", 0.0)
    ms = [1000 * value for value in world.latencies]
    batch_ms = [1000 * value for value in world.batches]
    index = world.directory.index
    return {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine.describe(),
        "settings": {
            key: value for key, value in vars(args).items() if key not in ("trace", "json")
        }
        | {"trace": args.trace.name, "profile": PROFILE.name, "speed": round(world.speed, 2)},
        "content": {
            "decisions": num,
            "late_bindings": world.num_late,
            "failed": world.num_failed,
            "prompt_tokens_mean": round(statistics.fmean(a.num_prompt_tokens for a in world.asked)),
            "keys_mean": round(statistics.fmean(len(a.keys) for a in world.asked), 1),
            "index_blocks": index.num_blocks,
            "index_holders": index.num_holders,
            "matches_mean": round(statistics.fmean(world.matches), 1),
            "found_at_the_chosen_share": round(world.num_found / world.num_asked_tokens, 3),
            "batch_mean": round(statistics.fmean(world.sizes), 2),
            "batch_max": max(world.sizes),
            "open_at_the_end": len(world.core.state.open),
        },
        "offered_per_s": round(num / span_s),
        "busy_share": round(busy_s / span_s, 3),
        "decisions_per_s": round(num / busy_s),
        "us_per_decision": {kind: round(1e6 * value / num, 1) for kind, value in spent.items()},
        "latency_ms": {f"p{q}": round(percentile(ms, q) or 0.0, 3) for q in (50, 90, 99)}
        | {"max": round(max(ms), 3)},
        "batch_ms": {f"p{q}": round(percentile(batch_ms, q) or 0.0, 3) for q in (50, 90, 99)}
        | {"max": round(max(batch_ms), 3)},
    }  # fmt: skip


def table(report: dict[str, Any]) -> str:
    content = report["content"]
    latency = ", ".join(f"{key} {value:.2f}" for key, value in report["latency_ms"].items())
    batch = ", ".join(f"{key} {value:.2f}" for key, value in report["batch_ms"].items())
    return "\n".join([
        machine.in_words(report["machine"]),
        f"{content['decisions']:,} decisions, {report['settings']['instances']:,} instances, "
        f"{content['index_blocks']:,} blocks in the index; a prompt matches "
        f"{content['matches_mean']} times; batches of {content['batch_mean']}",
        f"{report['decisions_per_s']:,} decisions/s; offered {report['offered_per_s']:,}/s, "
        f"busy {report['busy_share']:.0%}",
        f"latency (ms): {latency}",
        f"batches (ms): {batch}",
        f"us per decision: {report['us_per_decision']}",
    ])  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="router",
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--trace", type=Path, required=True, help="mooncake_conversation.jsonl")
    add("--instances", type=int, default=1250, help="half prefill, half decode")
    add("--rate", type=float, default=5000.0, help="requests per second")
    add("--load", type=float, default=0.7, help="of the prefill instances, without caches")
    add("--copies", type=int, default=4, help="of the trace, with other content")
    add("--gateways", type=int, default=4)
    add("--heartbeat-s", type=float, default=1.0)
    add("--policy", default="slo")
    add("--clock", choices=("wall", "cpu"), default="wall")
    add("--seed", type=int, default=1)
    add("--json", type=Path, help="write the numbers there")
    args = parser.parse_args(argv)
    world = World(args)
    world.run()
    report = report_of(world, args)
    print(table(report))
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
