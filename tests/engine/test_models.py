"""The models, against the reference implementation of each architecture.

Quick forms; ``tests/acceptance/test_3_1_families.py`` has prompts of up to 600 tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from baton.core.request import SamplingParams, TokenLogprobs
from tests.engine.same_tokens import Request, Server, check, random_prompt
from tests.engine.tiny_models import VARIANTS, Bench, reference_greedy, reference_logprobs, save


@pytest.fixture(scope="module", params=list(VARIANTS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("model")
    return folder, save(folder, VARIANTS[request.param])


def assert_matches(reference: Any, *requests: Request) -> None:
    for request in requests:
        _, ties = check(reference, request)
        assert not ties


@pytest.mark.parametrize("chunk", [1, 4, 7, 36, 37])
def test_logits_in_chunks(model: Any, chunk: int) -> None:
    folder, reference = model
    server = Server(folder, max_len=40, slots=2)
    request = Request(random_prompt(37), count=1, chunk=chunk)
    server.serve([request])
    assert_matches(reference, request)


def test_greedy_tokens_in_mixed_batches(model: Any) -> None:
    """Prompts of 1, 7, 33 and 130 tokens; decode rows and chunks of others share steps."""
    folder, reference = model
    server = Server(folder, max_len=160, slots=6)
    requests = [
        Request(random_prompt(1), count=24, chunk=1),
        Request(random_prompt(7), count=24, chunk=2, delay=3),
        Request(random_prompt(33), count=24, chunk=5, delay=1),
        Request(random_prompt(130), count=24, chunk=9),
        Request(random_prompt(130, seed=1), count=24, chunk=130, delay=8),
        Request(random_prompt(2), count=24, chunk=2, delay=12),
    ]
    server.serve(requests)
    assert_matches(reference, *requests)


def test_prefix_in_cache(model: Any) -> None:
    """Others use the first one's blocks and compute only what follows, while it still decodes."""
    folder, reference = model
    server = Server(folder, max_len=60, slots=4)
    prompt = random_prompt(33)
    requests = [Request(prompt, count=12, chunk=33)]
    for start, tail, chunk in ((32, 1, 1), (16, 9, 4), (4, 20, 20)):
        other = prompt[:start] + random_prompt(tail, seed=5)
        requests.append(Request(other, 6, chunk, delay=2, prefix_of=0, start=start))
    server.serve(requests)
    assert_matches(reference, *requests)


def test_long_chunks_and_contexts_of_very_different_lengths(model: Any) -> None:
    """Chunks cross tiles of queries; decode rows are so far apart that their batch is split."""
    folder, reference = model
    server = Server(folder, max_len=470, slots=6)
    lengths = {5: 5, 460: 300, 9: 9, 331: 331, 7: 7}
    requests = [Request(random_prompt(n), count=4, chunk=chunk) for n, chunk in lengths.items()]
    server.serve(requests)
    assert_matches(reference, *requests)


@pytest.mark.parametrize("variant", ["dense", "v3"])
def test_generated_alone(variant: str, tmp_path: Path) -> None:
    """The reference's own decoding, token by token: one pass over its output is a fair stand-in."""
    reference = save(tmp_path, VARIANTS[variant])
    bench, prompt = Bench(tmp_path, blocks_each=24), random_prompt(21)
    bench.begin(1, prompt)
    output = [bench.token(bench.row(1, prompt))]
    output += [bench.token(bench.row(1, None)) for _ in range(63)]
    assert output == reference_greedy(reference, prompt, 64)


@pytest.mark.parametrize("variant", ["dense", "moe", "v2-groups-yarn-biases", "v3"])
def test_bfloat16(variant: str, tmp_path: Path) -> None:
    """Close to the reference in the same dtype, and no further from float32 than that is."""
    reference = save(tmp_path, VARIANTS[variant])
    bench, prompt = Bench(tmp_path, dtype="bfloat16"), random_prompt(40)
    exact = reference_logprobs(reference, prompt)
    rounded = reference_logprobs(reference.bfloat16(), prompt)
    bench.begin(0, prompt, SamplingParams(temperature=0.0, logprobs=20, prompt_logprobs=20))
    entries: list[TokenLogprobs] = []
    for begin, end in ((0, 30), (30, 39), (39, 40)):
        row = bench.row(0, prompt[begin:end], sample=end == 40, prompt_logprobs=True)
        (result,) = bench.step(row)
        entries += result.prompt_logprobs
    assert result.logprobs is not None
    ours, theirs, apart = [], [], []
    for position, entry in enumerate([*entries, result.logprobs]):
        assert len(entry.top) == 20
        for token, logprob in entry.top:
            ours.append(abs(logprob - exact[position, token].item()))
            theirs.append(abs(rounded[position, token].item() - exact[position, token].item()))
            apart.append(abs(logprob - rounded[position, token].item()))
    assert sum(apart) / len(apart) < 2 * sum(theirs) / len(theirs)
    assert sum(ours) / len(ours) < 1.5 * sum(theirs) / len(theirs)
