"""The models, against the reference implementation of the architecture."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from baton.core.request import SamplingParams, TokenLogprobs
from tests.engine.tiny_models import VARIANTS, Bench, reference_greedy, reference_logprobs, save

WITH_LOGPROBS = SamplingParams(temperature=0.0, logprobs=20, prompt_logprobs=20)
TOLERANCE = 5e-5


@pytest.fixture(scope="module", params=list(VARIANTS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("model")
    return folder, save(folder, VARIANTS[request.param])


def tokens(count: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(97), k=count)


def assert_matches(
    entry: TokenLogprobs | None, expected: torch.Tensor, tol: float = TOLERANCE
) -> None:
    assert entry is not None
    assert entry.logprob == pytest.approx(expected[entry.token_id].item(), abs=tol)
    assert len(entry.top) == 20
    for token, logprob in entry.top:
        assert logprob == pytest.approx(expected[token].item(), abs=tol)
    best = expected.topk(20).values
    for (_, logprob), value in zip(entry.top, best.tolist(), strict=True):
        assert logprob == pytest.approx(value, abs=tol)


def prefill(
    bench: Bench, slot: int, prompt: Sequence[int], chunks: Sequence[int]
) -> list[TokenLogprobs]:
    """Prefill in chunks of these sizes; logprobs of prompt tokens 1.. and of the first output."""
    assert sum(chunks) == len(prompt)
    entries: list[TokenLogprobs] = []
    begin = 0
    for size in chunks:
        last = begin + size == len(prompt)
        chunk = prompt[begin : begin + size]
        (result,) = bench.step(bench.row(slot, chunk, sample=last, prompt_logprobs=True))
        entries += result.prompt_logprobs
        if last:
            assert result.logprobs is not None
            entries.append(result.logprobs)
        else:
            assert result.token_id is None
        begin += size
    return entries


@pytest.mark.parametrize("chunks", [[37], [1] * 37, [4] * 9 + [1], [5, 1, 17, 3, 11], [36, 1]])
def test_prefill_logits(model: Any, chunks: list[int]) -> None:
    folder, reference = model
    bench, prompt = Bench(folder), tokens(37)
    bench.begin(2, prompt, WITH_LOGPROBS)
    expected = reference_logprobs(reference, prompt)
    entries = prefill(bench, 2, prompt, chunks)
    assert len(entries) == len(prompt)
    for position, entry in enumerate(entries):
        assert_matches(entry, expected[position])
    assert [entry.token_id for entry in entries[:-1]] == prompt[1:]


def test_long_chunk_crosses_query_tiles(model: Any) -> None:
    folder, reference = model
    bench, prompt = Bench(folder, blocks_each=90), tokens(331)
    bench.begin(0, prompt, WITH_LOGPROBS)
    expected = reference_logprobs(reference, prompt)
    for position, entry in enumerate(prefill(bench, 0, prompt, [30, 300, 1])):
        assert_matches(entry, expected[position])


def test_greedy_tokens_equal(model: Any) -> None:
    folder, reference = model
    bench, prompt = Bench(folder, blocks_each=24), tokens(21, seed=4)
    bench.begin(1, prompt)
    output = [bench.token(bench.row(1, prompt))]
    output += [bench.token(bench.row(1, None)) for _ in range(63)]
    assert output == reference_greedy(reference, prompt, 64)


def test_prefix_in_cache(model: Any) -> None:
    """A second sequence uses the first one's blocks and computes only what follows."""
    folder, reference = model
    bench, prefix = Bench(folder), tokens(16, seed=1)
    bench.begin(0, prefix)
    bench.step(bench.row(0, prefix, sample=False))
    prompt = prefix + tokens(9, seed=2)
    bench.begin(1, prompt, WITH_LOGPROBS)
    second = bench.sequences[1]
    second.blocks = bench.sequences[0].blocks[:4] + second.blocks
    second.num_computed = 16
    (result,) = bench.step(bench.row(1, prompt[16:]))
    assert_matches(result.logprobs, reference_logprobs(reference, prompt)[-1])


def test_mixed_batches(model: Any) -> None:
    """Decode rows of different lengths, whole prompts and chunks, in shuffled rows of one step."""
    folder, reference = model
    bench = Bench(folder)
    shuffle = random.Random(6).shuffle
    lengths = {0: 3, 1: 30, 2: 11, 3: 17, 4: 26, 5: 1}
    prompts = {slot: tokens(length, seed=10 + slot) for slot, length in lengths.items()}
    whole = {slot: list(prompt) for slot, prompt in prompts.items()}
    chunk_of = {0: 3, 1: 7, 2: 11, 3: 5, 4: 1, 5: 1}
    for slot, prompt in prompts.items():
        bench.begin(slot, prompt, WITH_LOGPROBS)
    for _ in range(34):
        rows = []
        for slot, prompt in prompts.items():
            done = bench.sequences[slot].num_computed
            if done >= 44:
                continue
            chunk = prompt[done : done + chunk_of[slot]] or None
            last = done + len(chunk or [0]) >= len(prompt)
            rows.append(bench.row(slot, chunk, sample=last))
        shuffle(rows)
        for row, result in zip(rows, bench.step(*rows), strict=True):
            assert (result.token_id is not None) == row.sample
            if row.sample:
                expected = reference_logprobs(reference, whole[row.slot])[-1]
                assert_matches(result.logprobs, expected)
                assert result.token_id == int(expected.argmax())
                assert result.token_id is not None
                whole[row.slot].append(result.token_id)
    assert min(len(sequence) for sequence in whole.values()) > 34


def test_decode_rows_of_very_different_lengths(model: Any) -> None:
    """Far apart enough that the padded batch is split."""
    folder, reference = model
    bench = Bench(folder, blocks_each=125, num_blocks=1000)
    prompts = {slot: tokens(length, slot) for slot, length in enumerate([5, 460, 9, 450, 5, 7])}
    for slot, prompt in prompts.items():
        bench.begin(slot, prompt, WITH_LOGPROBS)
        bench.step(bench.row(slot, prompt[:-1], sample=False))
    results = bench.step(*(bench.row(slot, prompt[-1:]) for slot, prompt in prompts.items()))
    for prompt, result in zip(prompts.values(), results, strict=True):
        assert_matches(result.logprobs, reference_logprobs(reference, prompt)[-1])


@pytest.mark.parametrize("variant", ["dense", "moe"])
def test_bfloat16(variant: str, tmp_path: Path) -> None:
    """Close to the reference in the same dtype, and no further from float32 than that is."""
    reference = save(tmp_path, VARIANTS[variant])
    bench, prompt = Bench(tmp_path, dtype="bfloat16"), tokens(40, seed=3)
    exact = reference_logprobs(reference, prompt)
    rounded = reference_logprobs(reference.bfloat16(), prompt)
    bench.begin(0, prompt, WITH_LOGPROBS)
    entries = prefill(bench, 0, prompt, [30, 9, 1])
    ours, theirs, apart = [], [], []
    for position, entry in enumerate(entries):
        for token, logprob in entry.top:
            ours.append(abs(logprob - exact[position, token].item()))
            theirs.append(abs(rounded[position, token].item() - exact[position, token].item()))
            apart.append(abs(logprob - rounded[position, token].item()))
    assert max(apart) < 0.5
    assert sum(ours) / len(ours) < 1.5 * sum(theirs) / len(theirs)
