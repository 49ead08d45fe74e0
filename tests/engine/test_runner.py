"""The runner: async rows, penalties and logprobs over steps, memory that is not its own."""

from __future__ import annotations

import mmap
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from baton.core.config import EngineConfig
from baton.core.errors import ConfigError
from baton.core.philox import uniforms
from baton.core.request import SamplingParams, TokenLogprobs
from baton.engine.checkpoint import open_checkpoint
from baton.engine.kv_cache import KVCache
from baton.engine.models.config import kv_layout
from baton.engine.plan import Runner, SequenceStep, SlotBegin, StepPlan, StepResult
from baton.engine.runner import InlineRunner
from tests.engine.tiny_models import DENSE, MOE, Bench, reference_logprobs, save

PROMPT = random.Random(5).choices(range(97), k=13)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("model")
    return folder, save(folder, MOE)


def uniform(seed: int, position: int) -> float:
    return float(uniforms([seed], [0], [position])[0])


def generate(
    bench: Bench,
    slot: int,
    sampling: SamplingParams,
    count: int,
    *,
    late: bool = True,
    output: tuple[int, ...] = (),
) -> list[int]:
    """Generate after ``PROMPT`` and ``output``; ``late``: leave decode tokens to the runner."""
    known = [*PROMPT, *output]
    bench.begin(slot, PROMPT, sampling, output)
    seed = sampling.seed
    tokens = [bench.token(bench.row(slot, known, uniform=uniform(seed, len(known))))]
    while len(tokens) < count:
        given = None if late else tokens[-1:]
        draw = uniform(seed, len(known) + len(tokens))
        tokens.append(bench.token(bench.row(slot, given, uniform=draw)))
    return tokens


MIXED = SamplingParams(
    temperature=0.9,
    top_k=40,
    top_p=0.95,
    repetition_penalty=1.2,
    presence_penalty=0.3,
    frequency_penalty=0.2,
    seed=11,
)


@pytest.mark.parametrize("sampling", [SamplingParams(seed=3), MIXED])
def test_seeds_reproduce(model: tuple[Path, Any], sampling: SamplingParams) -> None:
    """The same tokens from late rows, from given rows, and from a replay in another slot."""
    bench = Bench(model[0])
    first = generate(bench, 0, sampling, 24)
    assert generate(bench, 1, sampling, 24, late=False) == first
    assert generate(bench, 2, sampling, 14, output=tuple(first[:10])) == first[10:]
    other = SamplingParams(seed=4)
    assert generate(bench, 3, other, 24) != generate(bench, 4, SamplingParams(seed=3), 24)


def test_late_rows_take_their_own_slots_token(model: tuple[Path, Any]) -> None:
    """Sequences change rows between steps, and one joins with a prompt in between."""
    bench = Bench(model[0])
    alone = {slot: generate(bench, slot, SamplingParams(seed=slot), 8) for slot in (0, 1, 2)}
    together: dict[int, list[int]] = {slot: [] for slot in alone}
    for slot in (0, 1):
        bench.begin(slot + 4, PROMPT, SamplingParams(seed=slot))
        draw = uniform(slot, len(PROMPT))
        together[slot].append(bench.token(bench.row(slot + 4, PROMPT, uniform=draw)))
    bench.begin(6, PROMPT, SamplingParams(seed=2))
    for step in range(1, 8):
        slots = [0, 1, 2] if step % 2 else [2, 1, 0]
        rows = []
        for slot in slots:
            draw = uniform(slot, len(PROMPT) + len(together[slot]))
            given = PROMPT if slot == 2 and step == 1 else None
            rows.append(bench.row(slot + 4, given, uniform=draw))
        for slot, result in zip(slots, bench.step(*rows), strict=True):
            assert result.token_id is not None
            together[slot].append(result.token_id)
    assert together == {slot: tokens[: len(together[slot])] for slot, tokens in alone.items()}


def test_penalties_follow_the_output(model: tuple[Path, Any]) -> None:
    """Greedy with penalties, recomputed from the reference's logits step by step."""
    folder, reference = model
    sampling = SamplingParams(
        temperature=0.0, repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=0.8
    )
    tokens = generate(Bench(folder), 0, sampling, 20)
    for i, token in enumerate(tokens):
        with torch.no_grad():
            logits: Tensor = reference(torch.tensor([PROMPT + tokens[:i]])).logits[0, -1].double()
        for seen in set(PROMPT + tokens[:i]):
            logits[seen] = logits[seen] / 1.5 if logits[seen] > 0 else logits[seen] * 1.5
        for seen in set(tokens[:i]):
            logits[seen] -= 0.5 + 0.8 * tokens[:i].count(seen)
        assert logits[token].item() == pytest.approx(logits.max().item(), abs=1e-4)
    assert tokens != generate(Bench(folder), 0, SamplingParams(temperature=0.0), 20)


def test_logprobs_are_raw(model: tuple[Path, Any]) -> None:
    """Of the distribution before penalties and temperature, per row as each asked."""
    folder, reference = model
    bench = Bench(folder)
    exact = reference_logprobs(reference, PROMPT)[-1]
    for slot, logprobs in enumerate((None, 0, 4)):
        sampling = SamplingParams(
            temperature=0.3, repetition_penalty=2.0, top_k=3, seed=5, logprobs=logprobs
        )
        bench.begin(slot, PROMPT, sampling)
    rows = bench.step(*(bench.row(slot, PROMPT, uniform=0.6) for slot in range(3)))
    assert rows[0].logprobs is None
    assert len({row.token_id for row in rows}) == 1
    for row, count in zip(rows[1:], (0, 4), strict=True):
        assert row.logprobs is not None
        token = row.logprobs.token_id
        assert token == row.token_id
        assert row.logprobs.logprob == pytest.approx(exact[token].item(), abs=1e-4)
        assert row.logprobs.rank == int((exact > exact[token]).sum()) + 1
        assert [top for top, _ in row.logprobs.top] == exact.topk(count).indices.tolist()


def test_prompt_logprobs_stop_at_the_prompt(model: tuple[Path, Any]) -> None:
    """A replay computes outputs as well; they are not prompt tokens."""
    folder, reference = model
    output = (4, 8, 15)
    exact = reference_logprobs(reference, [*PROMPT, *output])
    bench = Bench(folder)
    sampling = SamplingParams(temperature=0.0, prompt_logprobs=2)
    bench.begin(0, PROMPT, sampling, output)
    found: list[TokenLogprobs] = []
    for chunk in (PROMPT[:5], [*PROMPT[5:], *output]):
        (row,) = bench.step(bench.row(0, chunk, prompt_logprobs=True))
        found += row.prompt_logprobs
        assert row.logprobs is None
    assert [entry.token_id for entry in found] == PROMPT[1:]
    for i, entry in enumerate(found):
        assert entry.logprob == pytest.approx(exact[i, PROMPT[i + 1]].item(), abs=1e-4)
        assert [token for token, _ in entry.top] == exact[i].topk(2).indices.tolist()


def test_prompt_logprobs_in_slices(
    model: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def logprobs() -> Any:
        bench = Bench(model[0])
        bench.begin(0, PROMPT, SamplingParams(prompt_logprobs=1))
        return bench.step(bench.row(0, PROMPT, prompt_logprobs=True))[0].prompt_logprobs

    whole = logprobs()
    monkeypatch.setattr("baton.engine.runner._LOGITS_BUDGET", 3 * 97)
    assert [entry.token_id for entry in logprobs()] == [entry.token_id for entry in whole]
    assert [entry.logprob for entry in logprobs()] == pytest.approx(
        [entry.logprob for entry in whole], abs=1e-5
    )


def test_shared_buffer(model: tuple[Path, Any]) -> None:
    """Two runners over the same bytes see each other's blocks; closing lets go of them."""
    folder, _ = model
    checkpoint = open_checkpoint(folder)
    config = EngineConfig(block_size=4, num_blocks=8)
    layout = kv_layout(checkpoint.config, config)
    arena = mmap.mmap(-1, 100 + 8 * layout.block_bytes)
    buffer = memoryview(arena)[100:]
    runners: list[Runner[StepPlan, StepResult]] = []
    for _ in range(2):
        runner = InlineRunner(checkpoint, config, kv_buffer=buffer)
        assert runner.layout == layout
        runners.append(runner)
    begin = SlotBegin(0, SamplingParams(temperature=0.0), tuple(PROMPT), ())
    table = (6, 1, 3, 0)
    whole = SequenceStep(0, 0, tuple(PROMPT), table, sample=True)
    token = runners[0].execute(StepPlan(0, (begin,), (whole,))).rows[0].token_id
    last = SequenceStep(0, len(PROMPT) - 1, (PROMPT[-1],), table, sample=True)
    assert runners[1].execute(StepPlan(0, (begin,), (last,))).rows[0].token_id == token
    written = torch.frombuffer(arena, dtype=torch.float32, offset=100).view(8, -1).abs().sum(1) > 0
    assert written.nonzero().flatten().tolist() == [0, 1, 3, 6]
    del written
    for each in runners:
        each.close()
        each.close()
        with pytest.raises((IndexError, RuntimeError)):
            each.execute(StepPlan(1, (), (last,)))
    buffer.release()
    arena.close()


def test_buffers_that_do_not_fit(model: tuple[Path, Any]) -> None:
    checkpoint = open_checkpoint(model[0])
    config = EngineConfig(block_size=4, num_blocks=8)
    needed = 8 * kv_layout(checkpoint.config, config).block_bytes
    with pytest.raises(ValueError, match=f"hold {needed} bytes"):
        InlineRunner(checkpoint, config, kv_buffer=memoryview(bytearray(needed - 1)))
    with pytest.raises(ValueError, match="writable"):
        InlineRunner(checkpoint, config, kv_buffer=memoryview(bytes(needed)))
    with pytest.raises(ValueError, match="cannot serve device"):
        KVCache(
            kv_layout(checkpoint.config, config),
            8,
            torch.device("meta"),
            memoryview(bytearray(needed)),
        )


def test_stale_tails_of_blocks_do_not_matter(model: tuple[Path, Any]) -> None:
    """What an earlier sequence left behind in a block is masked, whatever it was."""
    bench = Bench(model[0])
    expected = generate(bench, 0, SamplingParams(temperature=0.0), 9)
    bench.runner._cache.tensor.fill_(1e4)
    assert generate(bench, 0, SamplingParams(temperature=0.0), 9) == expected


def test_warm_up_touches_nothing(model: tuple[Path, Any]) -> None:
    bench = Bench(model[0])
    bench.begin(0, PROMPT)
    token = bench.token(bench.row(0, PROMPT))
    before = bench.runner._cache.tensor.clone()
    bench.runner.warm_up()
    assert torch.equal(bench.runner._cache.tensor, before)
    fresh = Bench(model[0])
    fresh.begin(0, PROMPT)
    assert fresh.token(fresh.row(0, PROMPT)) == token
    assert fresh.token(fresh.row(0, None)) == bench.token(bench.row(0, None))


@pytest.mark.parametrize("max_model_len", [1, 2, 3, 40])
def test_warm_up_of_short_models(model: tuple[Path, Any], max_model_len: int) -> None:
    Bench(model[0], max_model_len=max_model_len).runner.warm_up()


def test_length_above_the_model(tmp_path: Path) -> None:
    save(tmp_path, DENSE)
    with pytest.raises(ConfigError, match="max_model_len 600"):
        InlineRunner(open_checkpoint(tmp_path), EngineConfig(max_model_len=600))


def test_sharded_half_precision_checkpoint(tmp_path: Path) -> None:
    """Weights in bfloat16 over several files, computed in float32."""
    reference = save(tmp_path / "whole", MOE).bfloat16()
    reference.save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    checkpoint = open_checkpoint(tmp_path / "shards")
    assert len(checkpoint.files) > 2
    assert {info.dtype for info in checkpoint.tensors.values()} == {"BF16"}
    exact = reference_logprobs(
        type(reference).from_pretrained(
            tmp_path / "shards", dtype=torch.float32, attn_implementation="eager"
        ),
        PROMPT,
    )
    bench = Bench(tmp_path / "shards")
    bench.begin(0, PROMPT, SamplingParams(temperature=0.0, logprobs=5))
    (row,) = bench.step(bench.row(0, PROMPT))
    assert row.logprobs is not None
    for token, logprob in row.logprobs.top:
        assert logprob == pytest.approx(exact[-1, token].item(), abs=1e-4)
