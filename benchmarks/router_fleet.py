"""The cluster of the router benchmark: requests, instances, and what they hold. See there."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import random
from collections import deque
from pathlib import Path

from baton.core.blocks import BlockKey
from baton.core.cluster import InstanceInfo, InstanceLoad, StepSample
from baton.core.cost_model import CostModel, LinkCosts, StepCosts, StepShape, chunk_context
from baton.simulator.workload import MOONCAKE_HASH_TOKENS, read_trace
from controller.block_directory import BlockDirectory
from kvpool.tiers import KVEvent, KVEventBatch, KVEventKind, KVSnapshot, Tier

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
