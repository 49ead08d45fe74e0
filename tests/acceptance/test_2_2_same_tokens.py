"""Issue 2, line 2, in full: 64 prompts, 128 tokens, concurrency 16, four ways to serve."""

from __future__ import annotations

import pytest
import torch

from tests.cluster import oracle, tokens
from tests.cluster.harness import serving

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(3000)]

PROMPTS = 64
TOKENS = 128
WAYS = {
    "1P1D": ("--prefill", "1", "--decode", "1"),
    "2P2D": ("--prefill", "2", "--decode", "2"),
    "mixed": ("--prefill", "0", "--decode", "0", "--mixed", "1"),
}


@pytest.mark.parametrize("way", list(WAYS))
def test_same_tokens(way: str) -> None:
    prompts = oracle.prompts(PROMPTS)
    assert {1, 1500} <= {len(prompt) for prompt in prompts}
    with serving(*WAYS[way]) as cluster:
        greedy = tokens.run_greedy(cluster, prompts, num_tokens=TOKENS, concurrency=16)
        sampled = tokens.run_sampled(cluster, prompts, num_tokens=TOKENS, concurrency=16)
        again = tokens.run_sampled(cluster, prompts, num_tokens=TOKENS, concurrency=16)
    ties = tokens.check_greedy(prompts, greedy)
    draws = tokens.check_sampled(prompts, sampled) + tokens.check_sampled(prompts, again)
    print(f"{way}: {PROMPTS} prompts x {TOKENS} tokens, greedy ties {ties}, draw ties {draws}")


def test_the_oracle_generates_what_it_was_forced_to() -> None:
    """``generate`` itself, on some prompts: teacher forcing is a fair stand-in."""
    for prompt in oracle.prompts(PROMPTS)[::8]:
        ids = torch.tensor([prompt])
        made = oracle.model().generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=TOKENS,
            min_new_tokens=TOKENS,
            eos_token_id=None,
        )[0, len(prompt) :]
        assert len(oracle.check_greedy(prompt, made.tolist())) <= 1
