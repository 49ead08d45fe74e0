"""Issue 3, line 2: tokens and logprobs over several ranks, against ``transformers``.

One batch per model and cut: prompts of 1 to 600 tokens in small chunks, some with a common prefix,
so that groups of a dp engine have uneven loads and the ones with short prompts are idle at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from baton.core.config import EngineConfig
from baton.core.request import SamplingParams, TokenLogprobs
from baton.engine.checkpoint import open_checkpoint
from baton.engine.offline import OfflineEngine, OfflineRequest
from tests.engine.same_tokens import LOGIT_TIE, MAX_TIES, TOLERANCE, random_prompt
from tests.engine.tiny_models import VARIANTS, reference_logprobs, save

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(600)]

TOKENS = 64
LENGTHS = (600, 431, 257, 130, 33, 17, 16, 2, 1)
SAMPLING = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True, logprobs=20)
DENSE = ("dense", "llama", "qwen2-yarn-tied-one-kv-head")
EXPERTS = ("moe", "v2-lite", "v3-yarn-groups-one-shared")
CUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tp": 2},
    "dp2": {"dp": 2},
    "ep2": {"ep": 2},
    "dp2 ep2 all-to-all": {"dp": 2, "ep": 2, "exchange": "all_to_all"},
    "dp2 ep2 all-gather": {"dp": 2, "ep": 2, "exchange": "all_gather"},
    "tp2 ep2": {"tp": 2, "ep": 2},
    "tp2 dp2 ep4": {"tp": 2, "dp": 2, "ep": 4},
}
CASES = [(variant, cut) for variant in DENSE for cut in ("tp2", "dp2")]
CASES += [(variant, cut) for variant in EXPERTS for cut in CUTS]
TIES: list[str] = []


def prompts() -> list[list[int]]:
    """The last three begin like the first."""
    made = [random_prompt(length) for length in LENGTHS]
    return made + [made[0][: 48 * (i + 1)] + random_prompt(5, seed=9 + i) for i in range(3)]


@pytest.mark.parametrize(("variant", "cut"), CASES)
def test_same_tokens_over_ranks(variant: str, cut: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    reference = save(tmp_path, VARIANTS[variant])
    config = EngineConfig(
        num_blocks=256, max_num_seqs=8, max_num_batched_tokens=24, max_model_len=700, **CUTS[cut]
    )
    with OfflineEngine(open_checkpoint(tmp_path), config) as engine:
        # The first alone: what it caches is there for those that begin like it.
        requests = [OfflineRequest(tuple(prompt), SAMPLING) for prompt in prompts()]
        outputs = [*engine.generate(requests[:1]).outputs, *engine.generate(requests[1:]).outputs]
    apart = 0.0
    for prompt, output in zip(prompts(), outputs, strict=True):
        assert len(output.token_ids) == TOKENS
        sequence = prompt + output.token_ids
        expected = reference_logprobs(reference, sequence)[len(prompt) - 1 : -1]
        apart = max(apart, _difference(output.logprobs, expected))
        for index, (token, row) in enumerate(zip(output.token_ids, expected, strict=True)):
            gap = float(row.max() - row[token])
            assert gap < LOGIT_TIE, f"wrong token {index} after {len(prompt)}: gap {gap}"
            if gap:
                TIES.append(f"{variant} {cut}: prompt of {len(prompt)}, token {index}: {gap:.1e}")
    print(f"{variant} {cut}: the reference's tokens, logprobs {apart:.1e} apart; ties {TIES}")
    assert apart < TOLERANCE
    assert len(TIES) <= MAX_TIES


def _difference(found: Sequence[TokenLogprobs], expected: torch.Tensor) -> float:
    """The largest between logprobs of the twenty best tokens at every position."""
    assert len(found) == len(expected)
    return max(
        abs(value - float(row[token]))
        for entry, row in zip(found, expected, strict=True)
        for token, value in entry.top
    )
