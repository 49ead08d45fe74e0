"""The index of the KV pool: lookups and events per second, and memory.

    python -m benchmarks.kv_index                              # a million blocks, 1,250 holders
    python -m benchmarks.kv_index --output benchmarks/results/kv_index.json

Made up, with a fixed seed: four holders in five are instances (device tier), the fifth is a pool
node (host tier and disk). Conversations, a few to some dozens of blocks long, continue one of
``--roots`` shared prefixes, some of them asked for far more often than others. A conversation has 1
to 20 holders; the first has all of it, about half of the others have lost, or demoted to disk, a
part of its end. A root is held by all that hold one of its conversations: hundreds. All holders
tell of it in events, with key objects of their own, as they come off a wire.

Prompts of ``--prompt-blocks`` blocks are new requests below a root, next turns of a conversation,
branches in the middle of one, and strangers. They are made up just before they are looked up, a few
at a time, with key objects never seen before, as if just hashed.

The forms of a lookup:

* ``lookup``: ``KVIndex.lookup``: how long the prefixes are, and who has each (compact);
* ``lookup + 4 holders``: and ``num_blocks`` for four holders;
* ``lookup + best 8``: and its eight longest matches as ``PrefixMatch``;
* ``lookup + all``: and all matches, hundreds for a prompt below a root;
* ``longest``: only how much of it anybody has.

One thread; medians over ``--repetitions``, all forms in turn. ``per cpu s`` is by processor time,
which other load on the machine changes less. Python's garbage collector works as always.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from baton.core.blocks import BlockKey
from benchmarks import machine
from kvpool.index import KVIndex
from kvpool.tiers import KVEvent, KVEventBatch, KVEventKind, KVSnapshot, Tier

SCHEMA = "baton.benchmark.kv_index/1"
ROOT_BLOCKS = (4, 24)
CONVERSATION_BLOCKS = (8, 80)
PROMPTS_BY_KIND = {"new below a root": 35, "next turn": 45, "branch": 10, "stranger": 10}
"""Of a hundred."""
FRESH = 50
"""Prompts made at once: their keys are still in the processor's caches, as after hashing them."""

Prompt = list[BlockKey]


@dataclasses.dataclass(frozen=True)
class Conversation:
    root: Prompt
    own: Prompt


class World:
    """Holders, what they have, and what is asked for."""

    def __init__(self, *, num_blocks: int, num_holders: int, num_roots: int, seed: int) -> None:
        self._random = random.Random(seed)
        self.holders = [f"holder-{number}" for number in range(num_holders)]
        self._next_seq = dict.fromkeys(self.holders, 0)
        roots = [self.new_keys(self._random.randint(*ROOT_BLOCKS)) for _ in range(num_roots)]
        weights = [1 / (rank + 3) for rank in range(num_roots)]
        missing = num_blocks - sum(map(len, roots))
        self.conversations: list[Conversation] = []
        while missing > 0:
            length = min(missing, self._random.randint(*CONVERSATION_BLOCKS))
            root = self._random.choices(roots, weights)[0]
            self.conversations.append(Conversation(root, self.new_keys(length)))
            missing -= length

    def new_keys(self, count: int) -> Prompt:
        return [self._random.randbytes(16) for _ in range(count)]

    def batches(self) -> Iterator[KVEventBatch]:
        """What the holders tell, conversation by conversation."""
        draw = self._random
        has_root: set[tuple[str, int]] = set()
        for conversation in self.conversations:
            count = 1 + min(19, int(draw.expovariate(0.25)))
            for rank, number in enumerate(
                draw.sample(range(len(self.holders)), min(count, len(self.holders)))
            ):
                holder = self.holders[number]
                own = copies(conversation.own)
                first = Tier.HOST if number % 5 == 4 else Tier.DEVICE
                stored = own
                if (holder, id(conversation.root)) not in has_root:
                    has_root.add((holder, id(conversation.root)))
                    stored = copies(conversation.root) + own
                events = [KVEvent(KVEventKind.STORED, first, tuple(stored))]
                lost = tuple(own[draw.randrange(len(own)) :])
                if rank and draw.random() < 0.5:
                    to = Tier.DISK if first is Tier.HOST else None
                    kind = KVEventKind.DEMOTED if to is not None else KVEventKind.REMOVED
                    events.append(KVEvent(kind, first, lost, to))
                yield KVEventBatch(holder, 0, self._next_seq[holder], tuple(events))
                self._next_seq[holder] += len(events)

    def prompts(self, count: int, num_blocks: int) -> list[Prompt]:
        kinds = self._random.choices(list(PROMPTS_BY_KIND), list(PROMPTS_BY_KIND.values()), k=count)
        return [self._prompt(kind, num_blocks) for kind in kinds]

    def _prompt(self, kind: str, num_blocks: int) -> Prompt:
        one = self._random.choice(self.conversations)
        known = one.root + one.own
        if kind == "new below a root":
            known = one.root
        elif kind == "branch":
            known = known[: self._random.randint(len(one.root), len(known))]
        elif kind == "stranger":
            known = []
        known = copies(known[:num_blocks])
        return known + self.new_keys(num_blocks - len(known))


def copies(keys: Prompt) -> Prompt:
    """Equal keys in objects of their own."""
    return [bytes(bytearray(key)) for key in keys]


def forms(index: KVIndex, candidates: list[str]) -> dict[str, Callable[[Prompt], object]]:
    """The ways to ask."""

    def some_holders(keys: Prompt) -> None:
        matches = index.lookup(keys)
        for holder in candidates:
            matches.num_blocks(holder)

    return {
        "lookup": index.lookup,
        "lookup + 4 holders": some_holders,
        "lookup + best 8": lambda keys: index.lookup(keys).best(8),
        "lookup + all": lambda keys: list(index.lookup(keys)),
        "longest": index.longest,
    }


def build(world: World, index: KVIndex) -> dict[str, float]:
    """Tell the index everything. Returns how long it took, without making the events up."""
    for holder in world.holders:
        index.replace(KVSnapshot(holder, 0, 0, ()))
    spent_s, num_events, num_keys = 0.0, 0, 0
    for batch in world.batches():
        num_events += len(batch.events)
        num_keys += sum(len(event.keys) for event in batch.events)
        begun = time.perf_counter()
        applied = index.apply(batch)
        spent_s += time.perf_counter() - begun
        assert applied, "the holder's events follow on each other"
    return {
        "num_events": num_events,
        "num_changes": num_keys,
        "events_per_s": round(num_events / spent_s),
        "changes_per_s": round(num_keys / spent_s),
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    world = World(
        num_blocks=args.blocks, num_holders=args.holders, num_roots=args.roots, seed=args.seed
    )
    process = psutil.Process()
    before = process.memory_info().rss
    index = KVIndex()
    built = build(world, index)
    grown = process.memory_info().rss - before
    rates: dict[str, list[tuple[float, float]]] = {}
    for _ in range(args.repetitions):
        for form, ask in forms(index, world.holders[:4]).items():
            spent_s, cpu_s = 0.0, 0.0
            for _ in range(args.prompts // FRESH):
                prompts = world.prompts(FRESH, args.prompt_blocks)
                begun, cpu_begun = time.perf_counter(), time.thread_time()
                for keys in prompts:
                    ask(keys)
                spent_s += time.perf_counter() - begun
                cpu_s += time.thread_time() - cpu_begun
            count = args.prompts // FRESH * FRESH
            rates.setdefault(form, []).append((count / spent_s, count / cpu_s))
    answers = [index.lookup(keys) for keys in world.prompts(2000, args.prompt_blocks)]
    holders_by_block = sum(sum(index.counts(one).values()) for one in index.holders())
    num_blocks, num_sets = index.num_blocks, index.num_sets
    gone = world.holders[:5]
    begun = time.perf_counter()
    for holder in gone:
        index.drop(holder)
    drop_s = (time.perf_counter() - begun) / len(gone)
    return {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine.describe(),
        "settings": {
            name: getattr(args, name)
            for name in ("blocks", "holders", "roots", "prompt_blocks", "prompts", "seed")
        },
        "content": {
            "num_blocks": num_blocks,
            "places_per_block": round(holders_by_block / num_blocks, 2),
            "num_sets": num_sets,
            "found_blocks_mean": round(statistics.mean(one.longest for one in answers), 1),
            "matches_mean": round(statistics.mean(len(one) for one in answers), 1),
            "matches_median": statistics.median(len(one) for one in answers),
            "lengths_mean": round(
                statistics.mean(len({match.num_blocks for match in one}) for one in answers), 2
            ),
        },
        "apply": built,
        "drop_ms": round(1000 * drop_s, 2),
        "bytes_per_block": round(grown / args.blocks),
        "lookups": [
            {
                "form": form,
                "per_s": round(statistics.median(rate for rate, _ in each)),
                "lowest_per_s": round(min(each)[0]),
                "highest_per_s": round(max(each)[0]),
                "per_cpu_s": round(statistics.median(rate for _, rate in each)),
            }
            for form, each in rates.items()
        ],
    }


def table(report: dict[str, Any]) -> str:
    settings, content = report["settings"], report["content"]
    lines = [
        machine.in_words(report["machine"]),
        f"{content['num_blocks']:,} blocks, {settings['holders']:,} holders, "
        f"{content['places_per_block']} places per block, {content['num_sets']:,} different sets; "
        f"{report['bytes_per_block']} bytes per block",
        f"prompts of {settings['prompt_blocks']} blocks: {content['found_blocks_mean']} found, "
        f"{content['matches_mean']} matches (median {content['matches_median']:g}) "
        f"of {content['lengths_mean']} lengths",
        "",
        f"{'':20} {'per second':>12} {'lowest':>12} {'highest':>12} {'per cpu s':>12}",
    ]
    for one in report["lookups"]:
        numbers = (one["per_s"], one["lowest_per_s"], one["highest_per_s"], one["per_cpu_s"])
        lines.append(f"{one['form']:20} " + " ".join(f"{number:12,}" for number in numbers))
    lines.append(f"{'events applied':20} {report['apply']['events_per_s']:12,}")
    lines.append(f"{'blocks changed':20} {report['apply']['changes_per_s']:12,}")
    lines.append(f"a holder dropped: {report['drop_ms']} ms")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="kv_index",
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--blocks", type=int, default=1_000_000)
    add("--holders", type=int, default=1250)
    add("--roots", type=int, default=200, help="prefixes that conversations share")
    add("--prompt-blocks", type=int, default=64)
    add("--prompts", type=int, default=10_000, help="looked up per repetition")
    add("--repetitions", type=int, default=5)
    add("--seed", type=int, default=1)
    add("--output", type=Path, help="write the numbers there as JSON")
    args = parser.parse_args()
    report = measure(args)
    print(table(report))
    if args.output is not None:
        args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
