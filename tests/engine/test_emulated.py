"""The emulated runner: tokens are a function of the prompt, and of nothing but right blocks."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import Any

import pytest

from baton.core.clock import SystemClock
from baton.core.config import EngineConfig
from baton.core.cost_model import CostModel, LinkCosts, StepCosts, StepShape
from baton.core.request import Part, SamplingParams, Submission
from baton.engine.emulated import EmulatedRunner, Emulation
from baton.engine.engine import Engine
from baton.engine.events import TokensReady
from baton.engine.fingerprints import emulated_tokens
from baton.engine.plan import SequenceStep, SlotBegin, StepPlan, shape_of
from baton.engine.step_samples import StepSamples

VOCABULARY = 300
EOS = (7, 0)
BLOCK_SIZE = 4
NUM_BLOCKS = 64
COST = CostModel(
    prefill=StepCosts(1e-6, 1e-8, 0.0),
    decode=StepCosts(1e-6, 0.0, 1e-9),
    handoff=LinkCosts(0.25, 1000.0),
    kv_bytes_per_token=10.0,
    tiers={"disk": LinkCosts(0.5, 100.0)},
)


class Instance:
    """A runner and the memory of its blocks."""

    def __init__(self, cost: CostModel = COST) -> None:
        self.memory = bytearray(NUM_BLOCKS * BLOCK_SIZE * 8)
        self.runner = EmulatedRunner(
            cost,
            memoryview(self.memory),
            num_blocks=NUM_BLOCKS,
            block_size=BLOCK_SIZE,
            vocab_size=VOCABULARY,
            avoid=EOS,
        )
        self.step = 0

    def run(self, *rows: SequenceStep, begins: Sequence[SlotBegin] = ()) -> list[int | None]:
        result = self.runner.execute(StepPlan(self.step, tuple(begins), rows))
        self.step += 1
        return [row.token_id for row in result.rows]

    def block(self, index: int) -> memoryview:
        size = BLOCK_SIZE * 8
        return memoryview(self.memory)[index * size : (index + 1) * size]

    def prefill(
        self, slot: int, prompt: Sequence[int], table: Sequence[int], chunk: int = 1000
    ) -> int:
        token = None
        for start in range(0, len(prompt), chunk):
            part = tuple(prompt[start : start + chunk])
            end = start + len(part)
            row = SequenceStep(
                slot, start, part, tuple(table[: blocks(end)]), sample=end == len(prompt)
            )
            [token] = self.run(row, begins=[begin(slot, prompt)] if not start else ())
        assert token is not None
        return token

    def decode(
        self, slot: int, start: int, table: Sequence[int], count: int, first: int | None = None
    ) -> list[int]:
        """``first``: the token at ``start`` where another instance drew it."""
        tokens: list[int] = []
        for position in range(start, start + count):
            known = None if first is None or tokens else (first,)
            row = SequenceStep(
                slot, position, known, tuple(table[: blocks(position + 1)]), sample=True
            )
            begins = [] if known is None else [begin(slot, range(start))]
            [token] = self.run(row, begins=begins)
            assert token is not None
            tokens.append(token)
        return tokens


def blocks(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK_SIZE)


def begin(slot: int, prompt: Sequence[int]) -> SlotBegin:
    return SlotBegin(slot, SamplingParams(), tuple(prompt), ())


def prompt_of(length: int, seed: int = 1) -> list[int]:
    return [random.Random(seed * 1000 + i).randrange(VOCABULARY) for i in range(length)]


def expected(prompt: Sequence[int], count: int) -> list[int]:
    return emulated_tokens(prompt, count, vocab_size=VOCABULARY, avoid=EOS)


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 5, 8, 100])
@pytest.mark.parametrize("length", [1, 2, 4, 5, 17])
def test_tokens_do_not_depend_on_chunks(length: int, chunk: int) -> None:
    instance, prompt, table = Instance(), prompt_of(length), [9, 3, 60, 1, 0, 33, 5, 6, 7]
    first = instance.prefill(0, prompt, table, chunk)
    rest = instance.decode(0, length, table, 12)
    assert [first, *rest] == expected(prompt, 13)
    assert instance.runner.num_faults == 0


def test_end_tokens_are_never_drawn() -> None:
    tokens = emulated_tokens([1], 3000, vocab_size=10, avoid=EOS)
    assert set(tokens) == set(range(10)) - set(EOS)


def hand_over(prompt: Sequence[int], tables: tuple[list[int], list[int]]) -> tuple[Instance, int]:
    """A decode instance with the blocks of a prefill instance, and token 0."""
    prefill, decode = Instance(), Instance()
    first = prefill.prefill(0, prompt, tables[0])
    for source, target in zip(tables[0], tables[1], strict=True):
        decode.block(target)[:] = prefill.block(source)
    return decode, first


def test_tokens_are_the_same_after_a_handoff() -> None:
    prompt, own = prompt_of(14), [5, 6, 7, 8, 9, 10]
    decode, first = hand_over(prompt, ([1, 2, 3, 4, 20, 21], own))
    assert [first, *decode.decode(2, 14, own, 9, first)] == expected(prompt, 10)


def test_every_byte_of_a_transferred_block_counts() -> None:
    prompt, own = prompt_of(12), [5, 6, 7, 8, 9]
    right = expected(prompt, 6)
    for place in range(3 * BLOCK_SIZE * 8):
        decode, first = hand_over(prompt, ([1, 2, 3, 4, 20], own))
        decode.block(own[place // (BLOCK_SIZE * 8)])[place % (BLOCK_SIZE * 8)] ^= 0x10
        tokens = decode.decode(0, 12, own, 5, first)
        assert tokens != right[1:], f"byte {place} was not read"
        assert decode.runner.num_faults


@pytest.mark.parametrize("what", ["zeroed", "other", "swapped", "missing"])
def test_a_wrong_block_gives_wrong_tokens(what: str) -> None:
    prompt, own = prompt_of(12), [5, 6, 7, 8, 9]
    decode, first = hand_over(prompt, ([1, 2, 3, 4, 20], own))
    if what == "zeroed":
        decode.block(6)[:] = bytes(BLOCK_SIZE * 8)
    elif what == "other":
        other, _ = hand_over(prompt_of(12, seed=2), ([1, 2, 3, 4, 20], own))
        decode.block(6)[:] = other.block(6)
    elif what == "swapped":
        own = [5, 7, 6, 8, 9]
    else:
        own = [5, 6, 40, 8, 9]
    assert decode.decode(0, 12, own, 5, first) != expected(prompt, 6)[1:]


def test_a_block_of_another_prompt_is_no_prefix_of_this_one() -> None:
    instance, prompt = Instance(), prompt_of(12)
    instance.prefill(0, prompt_of(12, seed=2), [5, 6, 7])
    row = SequenceStep(1, 8, tuple(prompt[8:]), (5, 6, 8), sample=True)
    [token] = instance.run(row, begins=[begin(1, prompt)])
    assert [token] != expected(prompt, 1)


def test_a_block_given_away_too_early_spoils_who_still_reads_it() -> None:
    instance, prompt, table = Instance(), prompt_of(9), [5, 6, 7, 8]
    tokens = [instance.prefill(0, prompt, table), *instance.decode(0, 9, table, 2)]
    instance.prefill(1, prompt_of(3, seed=3), [5])
    tokens += instance.decode(0, 11, table, 3)
    right = expected(prompt, 6)
    assert tokens[:3] == right[:3]
    assert tokens[3:] != right[3:]


def test_a_fault_spoils_no_other_sequence_of_the_step() -> None:
    instance, tables = Instance(), {0: [1, 2, 3, 4], 1: [11, 12, 13, 14], 2: [21, 22, 23, 24]}
    prompts = {slot: prompt_of(8, seed=slot) for slot in tables}
    for slot, table in tables.items():
        instance.prefill(slot, prompts[slot], table)
    instance.block(11)[BLOCK_SIZE * 4] ^= 1
    rows = [SequenceStep(s, 8, None, tuple(t[:3]), sample=True) for s, t in tables.items()]
    found = instance.run(*rows)
    right = [expected(prompts[slot], 2)[1] for slot in tables]
    assert (found[0], found[2]) == (right[0], right[2])
    assert found[1] != right[1]


def test_a_real_engine_gets_the_same_tokens_through_cache_and_preemption() -> None:
    config = EngineConfig(
        block_size=BLOCK_SIZE, num_blocks=20, max_num_seqs=6, max_num_batched_tokens=9
    )
    instance = Instance()
    engine = Engine(config, max_model_len=60, salt=b"e")
    shared = prompt_of(11, seed=5)
    prompts = {f"r{i}": (*shared, *prompt_of(i, seed=i)) for i in range(8)}
    for name, prompt in prompts.items():
        sampling = SamplingParams(max_tokens=15, temperature=0.7, seed=3)
        engine.submit(Submission(name, 0, prompt, sampling), Part.WHOLE, 0.0)
    found: dict[str, list[int]] = {name: [] for name in prompts}
    for now in range(2000):
        engine.admit(float(now))
        plan = engine.schedule(float(now))
        if plan is None:
            break
        for event in engine.commit(plan, instance.runner.execute(plan), float(now)):
            if isinstance(event, TokensReady):
                found[event.request_id] += event.token_ids
    assert engine.load().num_preemptions > 0
    assert found == {name: expected(prompt, 15) for name, prompt in prompts.items()}
    assert instance.runner.num_faults == 0


def test_a_step_takes_what_the_profile_says_and_a_wait_ends_with_the_runner() -> None:
    slow = Instance(COST.dilated(2e4))  # 20 ms and more
    clock = SystemClock()
    started = clock.now()
    slow.prefill(0, prompt_of(9), [1, 2, 3])
    assert clock.now() - started >= 2e4 * COST.step_s(StepShape(9, 36))
    slow.runner.close()
    slow.runner.close()


def test_transfers_take_what_the_profile_says_times_the_dilation() -> None:
    emulation = Emulation(COST.dilated(3.0))
    assert emulation.handoff_s(50) == pytest.approx(3 * (0.25 + 500 / 1000))
    assert emulation.fetch_s({"disk": 10, "device": 99}) == pytest.approx(3 * (0.5 + 100 / 100))


def test_the_shape_of_a_plan_counts_chunks_and_decodes() -> None:
    rows = (
        SequenceStep(0, 4, (1, 2, 3), (0, 1), sample=False),
        SequenceStep(1, 9, None, (2, 3, 4), sample=True),
        SequenceStep(2, 5, (8,), (5, 6), sample=True),
    )
    assert shape_of(StepPlan(0, (), rows)) == StepShape(3, 4 + 5 + 6, 2, 14)


def test_samples_are_of_every_kind_and_given_once() -> None:
    samples = StepSamples(4)
    shapes = [StepShape(num_decodes=n, decode_context=n) for n in range(1, 30)]
    for shape in [StepShape(100, 50), *shapes, StepShape(7, 8, 9, 10)]:
        samples.add(shape, 0.5)
    taken = [sample.shape for sample in samples.take()]
    assert len(taken) == 4
    assert {StepShape(100, 50), StepShape(7, 8, 9, 10), shapes[-1]} < set(taken)
    assert samples.take() == ()


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"device": "emulated"}, "needs a profile"),
        ({"profile": "x"}, "for device emulated"),
        ({"time_dilation": 2.0}, "for device emulated"),
        ({"device": "emulated", "profile": "x", "tp": 2}, "tp = ep = dp = 1"),
        ({"device": "emulated", "profile": "x", "time_dilation": 0.0}, "time_dilation"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        dataclasses.replace(EngineConfig(), **values)
