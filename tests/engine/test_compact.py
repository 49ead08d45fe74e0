"""The compact engine decides what the engine decides: the same histories, step for step."""

from __future__ import annotations

import random
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from baton.core.blocks import BlockKey, block_keys
from baton.core.config import EngineConfig
from baton.core.cost_model import CostModel, StepShape
from baton.core.request import Part, SamplingParams, Submission
from baton.core.slo import Slo
from baton.engine.compact import CompactEngine
from baton.engine.engine import Engine
from baton.engine.events import (
    CacheChanged,
    Event,
    Preempted,
    PrefillProgress,
    PrefixComplete,
    Reserved,
    TokensReady,
)
from baton.engine.plan import RowResult, StepPlan, StepResult, shape_of
from baton.engine.states import SequenceState
from tests.engine.machine_nodes import COSTS

MAX_MODEL_LEN = 40
SALT = b"salt"

configs = st.builds(
    lambda size, blocks, seqs, budget, cache: EngineConfig(
        block_size=size,
        num_blocks=blocks,
        max_num_seqs=seqs,
        max_num_batched_tokens=seqs + budget,
        async_scheduling=False,
        enable_prefix_cache=cache,
    ),
    size=st.integers(1, 4),
    blocks=st.integers(8, 60),
    seqs=st.integers(1, 8),
    budget=st.integers(0, 30),
    cache=st.booleans(),
)


class Pair:
    """An engine and a compact one, to which the same is done; what they tell must be the same."""

    def __init__(self, config: EngineConfig, rng: random.Random, costs: CostModel | None) -> None:
        arguments = {"max_model_len": MAX_MODEL_LEN, "salt": SALT, "track_cache": True}
        self.engine = Engine(config, **arguments)  # type: ignore[arg-type]
        self.compact = CompactEngine(config, **arguments)  # type: ignore[arg-type]
        for engine in (self.engine, self.compact):
            engine.set_cost_model(costs)
        self.config = config
        self.rng = rng
        self.now = 0.0
        self.tokens: dict[str, int] = {}
        self.plan: StepPlan | None = None
        self.in_step = False
        self.told: list[object] = []
        self.num_leapt = 0

    def submit(self) -> None:
        rng = self.rng
        number = len(self.tokens) + 1
        name = f"r{number}"
        length = rng.randint(1, self.engine.max_model_len - 1)
        prompt = (rng.randint(0, 1), *range(100, 99 + length))
        submission = Submission(
            request_id=name,
            attempt=0,
            prompt_ids=prompt,
            sampling=SamplingParams(temperature=0.0, max_tokens=rng.randint(1, 30)),
            priority=rng.choice((0, 0, 1, -1)),
            slo=Slo(rng.choice((None, 0.3)), rng.choice((None, 0.02, 0.03))),
            rise_after_s=rng.choice((None, 5.0, 20.0)),
        )
        self.tokens[name] = 1000 + number
        keys = self.keys(prompt)
        part = rng.choice(tuple(Part))
        fetch = part is not Part.DECODE and bool(keys) and rng.random() < 0.2
        for engine in (self.engine, self.compact):
            engine.submit(submission, part, self.now, keys=keys, fetch=fetch)

    def keys(self, prompt: Sequence[int]) -> list[BlockKey]:
        return block_keys(prompt, block_size=self.config.block_size, salt=SALT)

    def pick(self, *states: SequenceState) -> str | None:
        names = [i for i in self.engine.request_ids() if self.engine.state_of(i) in states]
        return self.rng.choice(names) if names else None

    def abort(self) -> None:
        name = self.pick(*SequenceState)
        if name is not None:
            assert self.engine.abort(name)
            assert self.compact.abort(name)

    def release(self) -> None:
        name = self.pick(SequenceState.HELD)
        if name is not None:
            assert self.engine.release(name)
            assert self.compact.release(name)

    def bring(self) -> None:
        """What a sequence waits for comes, or does not."""
        rng = self.rng
        name = self.pick(SequenceState.PENDING_KV, SequenceState.PENDING_BLOCKS)
        if name is None:
            return
        first, valid = self.tokens[name], rng.randint(0, MAX_MODEL_LEN)
        fails = rng.random() < 0.2
        known = rng.random() < 0.5
        for engine in (self.engine, self.compact):
            sequence = engine._sequences[name]
            if sequence.part is not Part.DECODE:
                engine.fetched(name, valid)
            elif fails:
                engine.kv_failed(name, valid, first if known else None)
            else:
                engine.kv_arrived(name, first)

    def admit(self) -> None:
        self.compare(self.engine.admit(self.now), self.compact.admit(self.now))

    def begin(self) -> None:
        if self.in_step:
            return
        self.plan = self.engine.schedule(self.now)
        shape = self.compact.step_shape(self.now)
        expected = None if self.plan is None else shape_of(self.plan)
        assert shape == expected
        self.in_step = shape is not None
        if shape is not None:
            self.told.append(shape)
        self.check()

    def finish(self) -> None:
        if not self.in_step:
            return
        self.in_step = False
        self.now += 1.0
        self.compare(self.commit(), self.compact.finish_step(self.now))

    def commit(self) -> list[Event]:
        assert self.plan is not None
        names = [row.sequence.request_id for row in self.engine._scheduler._plans[0][1]]
        rows = tuple(
            RowResult(self.tokens[name] if row.sample else None)
            for name, row in zip(names, self.plan.rows, strict=True)
        )
        return self.engine.commit(self.plan, StepResult(self.plan.step, rows, 0.0), self.now)

    def leap(self) -> None:
        """Steps of which the compact engine says that nothing happens in them."""
        if self.in_step:
            return
        for _ in range(2):  # the second tells what the first one's reservations evicted
            self.admit()
        count = self.rng.randint(0, self.compact.can_leap())
        for _ in range(count):
            self.plan = self.engine.schedule(self.now)
            assert self.plan is not None
            assert all(row.num_tokens == 1 and row.sample for row in self.plan.rows)
            assert not self.plan.begins
            assert _plain(self.commit()) == []
        self.compact.leap(count, self.now)
        self.num_leapt += count

    def compare(self, ours: list[Event], theirs: list[Event]) -> None:
        assert _plain(theirs) == _plain(ours)
        self.told += _plain(ours)
        self.check()

    def check(self) -> None:
        ours, theirs = self.engine, self.compact
        assert theirs.block_statistics() == ours.block_statistics()
        assert theirs.load() == ours.load()
        names = ours.request_ids()
        assert [theirs.state_of(i) for i in names] == [ours.state_of(i) for i in names]
        assert theirs.request_ids() == names
        for stem in range(2):
            keys = self.keys((stem, *range(100, 99 + MAX_MODEL_LEN)))
            assert theirs.num_cached_blocks(keys) == ours.num_cached_blocks(keys)
        theirs.check_integrity()
        ours.check_integrity()


def _plain(events: Sequence[Event]) -> list[object]:
    """What both tell; of the cache only how much of it changed."""
    told: list[object] = []
    offered: list[tuple[str, int]] = []
    changes = [0, 0]
    for event in events:
        match event:
            case TokensReady():
                cached = event.num_cached_tokens if event.index == 0 else None
                if event.index == 0 or event.finish_reason is not None:
                    told.append((event.request_id, event.index, event.finish_reason, cached))
            case PrefillProgress():
                told.append((event.request_id, event.num_computed_tokens, event.final))
            case Reserved():
                told.append((event.request_id, len(event.blocks), event.num_cached_tokens))
            case Preempted():
                told.append(event)
            case PrefixComplete():
                offered.append((event.request_id, len(event.keys)))
            case CacheChanged():
                for entered, _ in event.changes:
                    changes[entered] += 1
    return [*told, *sorted(offered), *([tuple(changes)] if any(changes) else [])]


def play(config: EngineConfig, seed: int, costs: CostModel | None = None) -> Pair:
    rng = random.Random(seed)
    pair = Pair(config, rng, costs)
    moves = [pair.submit] * 3 + [pair.bring] * 3 + [pair.abort, pair.release, pair.admit]
    busy = rng.choice((1, 4, 12))
    for _ in range(60):
        if len(pair.engine.request_ids()) < 25:
            rng.choice(moves)()
        for _ in range(rng.randint(0, busy)):
            rng.choice((pair.begin, pair.finish, pair.leap))()
            if rng.random() < 0.3:
                pair.admit()
    return pair


@settings(deadline=None)
@given(config=configs, seed=st.integers(0, 2**32))
def test_the_same_history_has_the_same_steps_and_events(config: EngineConfig, seed: int) -> None:
    play(config, seed)


@settings(deadline=None)
@given(config=configs, seed=st.integers(0, 2**32))
def test_and_under_targets(config: EngineConfig, seed: int) -> None:
    play(config, seed, COSTS)


def test_such_histories_know_preemption_hits_and_leaps() -> None:
    """Or the tests above would show little."""
    config = EngineConfig(
        block_size=4,
        num_blocks=25,
        max_num_seqs=6,
        max_num_batched_tokens=30,
        async_scheduling=False,
    )
    pairs = [play(config, seed) for seed in range(20)]
    told = [item for pair in pairs for item in pair.told]
    assert any(isinstance(item, Preempted) for item in told)
    assert any(isinstance(item, StepShape) and item.num_decodes > 2 for item in told)
    assert sum(pair.compact.block_statistics().num_hits for pair in pairs) > 100
    assert sum(pair.num_leapt for pair in pairs) > 10
