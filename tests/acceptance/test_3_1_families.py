"""Issue 3, line 1, in full: every family, prompts of 1 to 600 tokens, 64 tokens each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.engine.same_tokens import MAX_TIES, Request, Server, check, random_prompt
from tests.engine.tiny_models import VARIANTS, save

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(3000)]

TOKENS = 64
LENGTHS = (1, 2, 3, 15, 16, 17, 33, 64, 130, 257, 431, 600)
LONGEST = max(LENGTHS) + TOKENS
TIES: list[str] = []


def alone() -> Iterator[list[Request]]:
    """One after the other, prompts whole."""
    for length in LENGTHS:
        yield [Request(random_prompt(length), TOKENS, chunk=length)]


def small_chunks() -> Iterator[list[Request]]:
    """All together, in chunks of 1 to 12 tokens: the short ones decode while others prefill."""
    yield [
        Request(random_prompt(length), TOKENS, chunk=1 + index, delay=5 * index % 13)
        for index, length in enumerate(LENGTHS)
    ]


def prefix_hits() -> Iterator[list[Request]]:
    """All but the first use its blocks, up to near the end of their prompts."""
    first = random_prompt(600)
    requests = [Request(first, TOKENS, chunk=200)]
    for index, length in enumerate(LENGTHS[2:]):
        start = (length - 1) // 4 * 4
        prompt = first[:start] + random_prompt(length - start, seed=1)
        requests.append(
            Request(prompt, TOKENS, 1 + index * 3, delay=3 + index, prefix_of=0, start=start)
        )
    yield requests


WAYS = {"alone": alone, "small chunks": small_chunks, "prefix hits": prefix_hits}


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_same_tokens_and_logits(variant: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    reference = save(tmp_path, VARIANTS[variant])
    for way, batches in WAYS.items():
        server = Server(tmp_path, max_len=LONGEST, slots=len(LENGTHS))
        apart, count = 0.0, 0
        for number, requests in enumerate(batches()):
            server.serve(requests, seed=number)
            for request in requests:
                largest, ties = check(reference, request)
                apart, count = max(apart, largest), count + 1
                TIES.extend(f"{variant}, {way}, {tie}" for tie in ties)
        print(f"{variant}, {way}: {count} prompts x {TOKENS} tokens; logits {apart:.1e} apart")


def test_few_ties() -> None:
    """Of all the variants above together."""
    print(f"ties: {TIES}")
    assert len(TIES) <= MAX_TIES, TIES
