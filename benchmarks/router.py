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
import dataclasses
import datetime
import hashlib
import heapq
import itertools
import json
import random
import statistics
import time
from collections import defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from baton.core.blocks import BlockKey
from baton.core.cluster import InstanceInfo, InstanceLoad, Role, StepSample
from baton.core.config import ControllerConfig
from baton.core.cost_model import CostModel, LinkCosts, StepCosts, StepShape, chunk_context
from baton.core.slo import percentile
from baton.engine.profile_file import load_profile
from baton.simulator.workload import MOONCAKE_HASH_TOKENS, read_trace
from benchmarks import machine
from controller import events, wire
from controller.block_directory import BlockDirectory
from controller.collector import collect_rarely
from controller.core import ControllerCore
from kvpool.tiers import KVEvent, KVEventBatch, KVEventKind, KVSnapshot, Tier
from protos.baton.internal.v1 import controller_pb2

SCHEMA = "baton.benchmark.router/1"
PROFILE = Path(__file__).parent / "profiles" / "ascend-910b-qwen2.5-7b.yaml"
TTFT_S, TPOT_S = 10.0, 0.1
PER_MACHINE = 8
HOST_TOKENS = 2_000_000
"""Of a machine's host tier."""
MAX_BATCH = 256
MAX_SAMPLES = 8
"""Of steps, in one heartbeat."""
OUTCOMES_EVERY_S = 0.01
"""A gateway's outcomes go in one message."""


@dataclasses.dataclass(slots=True)
class Asked:
    """A request of the trace, on its way."""

    request_id: str
    arrival_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    keys: list[BlockKey]
    sent_s: float = 0.0
    """When the question that is open reached its gateway."""
    bind_to: str | None = None


class Holder:
    """What an instance or a pool node holds; tells the index of it."""

    def __init__(self, name: str, tier: Tier, capacity: int, directory: BlockDirectory) -> None:
        self.name, self._tier, self._capacity = name, tier, capacity
        self._index = directory.index
        self._keys: dict[BlockKey, None] = {}
        self._seq = 0
        self._index.replace(KVSnapshot(name, 1, 0, ()))

    def take(self, keys: list[BlockKey]) -> KVEventBatch:
        """Have these now; leaves go first when something has to."""
        known = self._keys
        new = tuple(key for key in keys if key not in known)
        for key in reversed(keys):
            known.pop(key, None)
            known[key] = None
        made = [KVEvent(KVEventKind.STORED, self._tier, new)] if new else []
        num_over = len(known) - self._capacity
        if num_over > 0:
            gone = tuple(itertools.islice(known, num_over))
            for key in gone:
                del known[key]
            made.append(KVEvent(KVEventKind.REMOVED, self._tier, gone))
        batch = KVEventBatch(self.name, 1, self._seq, tuple(made))
        self._seq = batch.next_seq
        return batch


class Instance:
    """As fast as the cost model says, one prompt after the other."""

    def __init__(self, info: InstanceInfo, holder: Holder, node: Holder) -> None:
        self.info, self.holder, self.node = info, holder, node
        self.incarnation = 0
        self.session_id = 0
        self.free_s = 0.0
        self.prompts: deque[tuple[float, int]] = deque()
        """(done at, tokens) of prompts that are not computed yet."""
        self.num_decoding = 0
        self.context = 0

    def load(self, now: float, cost: CostModel) -> InstanceLoad:
        while self.prompts and self.prompts[0][0] <= now:
            self.prompts.popleft()
        num_used = self.context // self.info.block_size
        return InstanceLoad(
            num_waiting=len(self.prompts),
            num_running=self.num_decoding,
            num_waiting_tokens=sum(tokens for _, tokens in self.prompts),
            num_free_blocks=max(0, self.info.num_blocks - num_used),
            num_decoding=self.num_decoding,
            num_context_tokens=self.context,
            samples=self._samples(cost),
        )

    def _samples(self, cost: CostModel) -> tuple[StepSample, ...]:
        shapes: list[StepShape] = []
        if self.prompts:
            step = self.info.max_num_batched_tokens
            shapes = [StepShape(step, chunk_context(i * step, step)) for i in range(MAX_SAMPLES)]
        elif self.num_decoding:
            shapes = [
                StepShape(0, 0, self.num_decoding, self.context + i) for i in range(MAX_SAMPLES)
            ]
        return tuple(StepSample(shape, cost.step_s(shape)) for shape in shapes)


class Clocks:
    """Seconds of each kind of work, and of each piece of it."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.on = False
        self.spent: dict[str, list[float]] = defaultdict(list)

    def timed(self, kind: str, work: Callable[[], Any]) -> tuple[Any, float]:
        started = self._clock()
        result = work()
        seconds = self._clock() - started
        if self.on:
            self.spent[kind].append(seconds)
        return result, seconds


def requests_of(path: Path, copies: int, rate: float, block: int, seed: int) -> list[Asked]:
    """Copies interleaved: their first halves, then their second halves; Poisson arrivals."""
    trace = read_trace(path, "mooncake", seed=seed)
    draw = random.Random(seed)
    asked: list[Asked] = []
    at = 0.0
    per_piece = MOONCAKE_HASH_TOKENS // block
    made: dict[tuple[int, int], list[BlockKey]] = {}

    def piece(copy: int, number: int) -> list[BlockKey]:
        copy = 0 if number == 0 else copy
        if (copy, number) not in made:
            texts = (f"{copy}.{number}.{i}".encode() for i in range(per_piece))
            made[copy, number] = [hashlib.blake2b(t, digest_size=16).digest() for t in texts]
        return made[copy, number]

    half = len(trace) // 2
    for part in (trace[:half], trace[half:]):
        for item, copy in itertools.product(part, range(copies)):
            at += draw.expovariate(rate)
            keys = [key for number in item.hash_ids for key in piece(copy, number)]
            del keys[(item.num_prompt_tokens - 1) // block :]
            asked.append(
                Asked(
                    f"req-{len(asked):08}",
                    at,
                    item.num_prompt_tokens,
                    item.num_output_tokens,
                    keys,
                )
            )
    return asked


def scaled(cost: CostModel, factor: float) -> CostModel:
    def steps(costs: StepCosts) -> StepCosts:
        return StepCosts(*(value / factor for value in dataclasses.astuple(costs)))

    link = LinkCosts(cost.handoff.latency_s, cost.handoff.bytes_per_s * factor)
    return dataclasses.replace(
        cost, prefill=steps(cost.prefill), decode=steps(cost.decode), handoff=link
    )


class World:
    """The fleet, its gateways, and the controller."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        profile = load_profile(PROFILE)
        self.block = profile.block_size
        self.asked = requests_of(args.trace, args.copies, args.rate, self.block, args.seed)
        num_prefill = args.instances // 2
        work_s = statistics.fmean(
            profile.cost.prefill_s(a.num_prompt_tokens, chunk=profile.max_num_batched_tokens)
            for a in self.asked
        )
        self.speed = args.rate * work_s / (args.load * num_prefill)
        self.cost = scaled(profile.cost, self.speed)
        self.chunk = profile.max_num_batched_tokens
        config = ControllerConfig(policy=args.policy, dead_after_s=1e6)
        self.core = ControllerCore(config, epoch=1, costs=self.cost)
        self.directory = BlockDirectory()
        self.clocks = Clocks(time.process_time if args.clock == "cpu" else time.perf_counter)
        self.now = 0.0
        self.order = itertools.count(1)
        self.due: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self.instances: dict[str, Instance] = {}
        self.pending: list[deque[Asked]] = [deque() for _ in range(args.gateways)]
        self.outcomes: list[list[controller_pb2.Outcome]] = [[] for _ in range(args.gateways)]
        self.latencies: list[float] = []
        self.batches: list[float] = []
        self.sizes: list[int] = []
        self.matches: list[int] = []
        self.num_found = self.num_asked_tokens = self.num_late = self.num_failed = 0
        self._join(num_prefill, profile.max_model_len, profile.max_num_seqs, profile.num_blocks)

    def _join(self, num_prefill: int, max_len: int, max_seqs: int, num_blocks: int) -> None:
        node: Holder | None = None
        for number in range(self.args.instances):
            # Both roles on each machine.
            role = Role.PREFILL if number % 2 == 0 else Role.DECODE
            machine_id = f"machine-{number // PER_MACHINE}"
            if number % PER_MACHINE == 0 or node is None:
                name = f"pool-{number // PER_MACHINE}"
                node = Holder(name, Tier.HOST, HOST_TOKENS // self.block, self.directory)
                member = events.MemberInfo("pool", name, f"{machine_id}:7000", node_id=machine_id)
                self.core.on_event(events.MemberSeen(100_000 + number, member), 0.0)
            name = f"{role}-{number}"
            info = InstanceInfo(
                instance_id=name,
                incarnation=0,
                role=role,
                address=f"{machine_id}:{8000 + number}",
                metrics_address="",
                node_id=machine_id,
                pid=1,
                model="m",
                model_fingerprint="f",
                kv_layout="l",
                block_size=self.block,
                num_blocks=num_blocks,
                max_model_len=max_len,
                max_num_seqs=max_seqs,
                max_num_batched_tokens=self.chunk,
            )
            holder = Holder(name, Tier.DEVICE, num_blocks, self.directory)
            instance = self.instances[name] = Instance(info, holder, node)
            instance.session_id = number + 1
            for command in self.core.on_event(events.RegisterInstance(number + 1, info), 0.0):
                if isinstance(command, events.Registered):
                    instance.incarnation = command.incarnation
            self._heartbeat(instance)
            first = self.args.heartbeat_s * number / self.args.instances
            self.at(first, self._beat, instance)

    def at(self, time_s: float, call: Callable[..., None], *args: Any) -> None:
        heapq.heappush(self.due, (time_s, next(self.order), call, args))

    # The controller's work: each takes its own time of the one server.

    def serve(self, kind: str, work: Callable[[], Any]) -> Any:
        result, seconds = self.clocks.timed(kind, work)
        self.now += seconds
        return result

    def _heartbeat(self, instance: Instance) -> None:
        event = events.Heartbeat(
            instance.session_id, instance.info.instance_id, instance.incarnation,
            instance.load(self.now, self.cost),
        )  # fmt: skip
        self.obey(self.serve("heartbeats", lambda: self.core.on_event(event, self.now)))

    def _beat(self, instance: Instance) -> None:
        self._heartbeat(instance)
        self.at(self.now + self.args.heartbeat_s, self._beat, instance)

    def _tick(self) -> None:
        due = self.core.next_deadline()
        if due is not None and due <= self.now:
            self.obey(self.serve("ticks", lambda: self.core.on_tick(self.now)))

    def obey(self, commands: list[events.Command]) -> None:
        """Instances agree to whatever they are told."""
        for command in commands:
            if isinstance(command, events.SendDirective):
                name = self.core.state.sessions[command.session_id][0]
                instance = self.instances[name]
                ack = events.Ack(command.directive_id, True)
                event = events.Heartbeat(
                    instance.session_id,
                    name,
                    instance.incarnation,
                    instance.load(self.now, self.cost),
                    (ack,),
                )
                self.at(self.now, self._acked, event)

    def _acked(self, event: events.Heartbeat) -> None:
        self.obey(self.serve("heartbeats", lambda: self.core.on_event(event, self.now)))

    def _blocks(self, holder: Holder, keys: list[BlockKey]) -> None:
        batch = holder.take(keys)
        _, _ = self.clocks.timed("blocks", lambda: self.directory.index.apply(batch))

    # A gateway.

    def _send(self, gateway: int) -> None:
        waiting = self.pending[gateway]
        batch = [waiting.popleft() for _ in range(min(MAX_BATCH, len(waiting)))]
        message = controller_pb2.PlaceBatch(gateway_id=f"gateway-{gateway}")
        for item in batch:
            request = message.requests.add(
                request_id=item.request_id,
                num_prompt_tokens=item.num_prompt_tokens,
                max_new_tokens=4096,
                budget_s=3.0,
                model="m",
                ttft_s=TTFT_S,
                tpot_s=TPOT_S,
                waited_s=self.now - item.arrival_s,
                block_keys=item.keys,
            )
            if item.bind_to is not None:
                request.bind_to = item.bind_to
        data = message.SerializeToString()
        began = self.now
        parsed = self.serve("wire", lambda: controller_pb2.PlaceBatch.FromString(data))
        call_id = next(self.order)
        event: events.PlaceRequests = self.serve(
            "lookup",
            lambda: wire.place_requests(call_id, parsed, self.directory.prefix_lookup(self.block)),
        )
        commands = self.serve("decide", lambda: self.core.on_event(event, self.now))
        self.obey(commands)
        [placed] = [c for c in commands if isinstance(c, events.Placed)]

        def reply() -> bytes:
            answer = controller_pb2.PlaceBatchReply(
                replies=[
                    wire.place_reply(parsed.requests[index], result)
                    for index, result in placed.results.items()
                ]
            )
            return answer.SerializeToString()

        self.serve("wire", reply)
        if self.clocks.on:
            self.batches.append(self.now - began)
            self.sizes.append(len(batch))
            self.latencies += [self.now - item.sent_s for item in batch]
            self.matches += [len(q.prefix) for q in event.queries if q.bind_to is None]
        for index, item in enumerate(batch):
            self._placed(gateway, item, event.queries[index], placed.results.get(index))
        if waiting:
            self.at(self.now, self._send_if_free, gateway)

    def _send_if_free(self, gateway: int) -> None:
        if self.pending[gateway]:
            self._send(gateway)

    def _arrive(self, gateway: int, item: Asked) -> None:
        self.pending[gateway].append(item)
        if len(self.pending[gateway]) == 1:
            # Whatever is due until now joins it: the server was busy.
            self.at(self.now, self._send_if_free, gateway)

    # The cluster.

    def _placed(self, gateway: int, item: Asked, query: events.PlaceQuery, result: Any) -> None:
        if result is None or isinstance(result, events.Failure):
            self.num_failed += 1
            return
        prefill = self.instances[result.prefill.instance_id]
        decode = self.instances[result.decode.instance_id]
        if item.bind_to is not None:
            self.num_late += self.clocks.on
            self._handed(gateway, item, decode)
            return
        matches = [m.num_tokens for m in query.prefix if m.holder == prefill.info.instance_id]
        cached = max(matches, default=0)
        if self.clocks.on:
            self.num_found += cached
            self.num_asked_tokens += item.num_prompt_tokens
        seconds = self.cost.prefill_s(item.num_prompt_tokens, cached, chunk=self.chunk)
        prefill.free_s = max(prefill.free_s, self.now) + seconds
        prefill.prompts.append((prefill.free_s, item.num_prompt_tokens - cached))
        self.at(prefill.free_s, self._computed, gateway, item, prefill, decode, result.tentative)

    def _computed(
        self, gateway: int, item: Asked, prefill: Instance, decode: Instance, tentative: bool
    ) -> None:
        self._blocks(prefill.holder, item.keys)
        self._blocks(prefill.node, item.keys)
        if tentative:
            item.bind_to, item.sent_s = prefill.info.instance_id, self.now
            self._arrive(gateway, item)
        else:
            self._handed(gateway, item, decode)

    def _handed(self, gateway: int, item: Asked, decode: Instance) -> None:
        self._blocks(decode.holder, item.keys)
        decode.num_decoding += 1
        decode.context += item.num_prompt_tokens
        token_s = self.cost.decode_s(decode.num_decoding, decode.context)
        end_s = self.now + item.num_output_tokens * token_s
        self.at(end_s, self._ended, gateway, item, decode, token_s)

    def _ended(self, gateway: int, item: Asked, decode: Instance, token_s: float) -> None:
        decode.num_decoding -= 1
        decode.context -= item.num_prompt_tokens
        waiting = self.outcomes[gateway]
        waiting.append(
            controller_pb2.Outcome(
                request_id=item.request_id,
                outcome="length",
                prompt_tokens=item.num_prompt_tokens,
                completion_tokens=item.num_output_tokens,
                ttft_s=0.1,
                tpot_s=token_s,
                met=True,
                attempts=[controller_pb2.AttemptOutcome(request_id=item.request_id)],
            )
        )
        if len(waiting) == 1:
            self.at(self.now + OUTCOMES_EVERY_S, self._report, gateway)

    def _report(self, gateway: int) -> None:
        ended, self.outcomes[gateway] = self.outcomes[gateway], []
        batch = controller_pb2.OutcomeBatch(gateway_id=f"gateway-{gateway}", outcomes=ended)
        data = batch.SerializeToString()
        parsed = self.serve("wire", lambda: controller_pb2.OutcomeBatch.FromString(data))
        self.obey(
            self.serve("outcomes", lambda: self.core.on_event(wire.outcomes(parsed), self.now))
        )

    def run(self) -> None:
        """Fill with the first half, then measure."""
        half = len(self.asked) // 2
        self._offer(self.asked[:half])
        # As the controller's process does; what this file made would not be there.
        collect_rarely()
        self.clocks.on = True
        self.num_failed = 0
        began_s = self.now
        self._offer(self.asked[half:])
        self.span_s = self.now - began_s

    def _offer(self, asked: list[Asked]) -> None:
        """Have them arrive from now on, until all are answered."""
        shift_s = self.now - asked[0].arrival_s
        arrivals = iter(enumerate(asked))
        coming = next(arrivals, None)
        while coming is not None or any(self.pending):
            if coming is not None:
                number, item = coming
                at = item.arrival_s + shift_s
                if not self.due or at < self.due[0][0]:
                    # The server may be busy until later; then it waits at its gateway.
                    self.now = max(self.now, at)
                    item.arrival_s = item.sent_s = at
                    self._arrive(number % self.args.gateways, item)
                    coming = next(arrivals, None)
                    continue
            due_s, _, call, args = heapq.heappop(self.due)
            self.now = max(self.now, due_s)
            call(*args)
            self._tick()


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
