"""The cluster around the router benchmark: traffic, instances and what they hold. See there."""

from __future__ import annotations

import argparse
import heapq
import itertools
import statistics
import time
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any

from baton.core.blocks import BlockKey
from baton.core.cluster import InstanceInfo, Role
from baton.core.config import ControllerConfig
from baton.engine.profile_file import load_profile
from benchmarks.router_fleet import (
    HOST_TOKENS,
    MAX_BATCH,
    OUTCOMES_EVERY_S,
    PER_MACHINE,
    PROFILE,
    TPOT_S,
    TTFT_S,
    Asked,
    Holder,
    Instance,
    requests_of,
    scaled,
)
from controller import events, wire
from controller.block_directory import BlockDirectory
from controller.collector import collect_rarely
from controller.core import ControllerCore
from kvpool.tiers import Tier
from protos.baton.internal.v1 import controller_pb2


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
