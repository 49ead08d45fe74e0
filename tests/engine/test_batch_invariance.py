"""A token's logits are the same bits whatever else is in its step and however it got there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from baton.core.request import SamplingParams
from baton.engine.ops.linear import PackedLinear, PlainLinear
from tests.engine.tiny_models import DENSE, MOE, Bench, save

# Head dims of real models are multiples of 4; with others decode rows and chunks part.
MODELS: dict[str, dict[str, Any]] = {
    "dense": DENSE | {"head_dim": 12},
    # Wide enough that some of its products are packed.
    "moe": MOE | {"hidden_size": 320, "head_dim": 32, "moe_intermediate_size": 256},
    "group-of-five": DENSE | {"head_dim": 20, "num_attention_heads": 5, "num_key_value_heads": 1},
}
LENGTH = 300
TOP = SamplingParams(temperature=0.0, logprobs=20)


@pytest.fixture(scope="module", params=MODELS)
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder: Path = tmp_path_factory.mktemp(request.param)
    save(folder, MODELS[request.param])
    return Bench(folder, blocks_each=90, num_blocks=900, max_num_seqs=10, num_threads=1)


def prompt(seed: int, length: int) -> list[int]:
    ids: list[int] = torch.randint(
        97, (length,), generator=torch.Generator().manual_seed(seed)
    ).tolist()
    return ids


def logprobs(bench: Bench, tokens: list[int], chunks: list[int], others: list[int]) -> list[Any]:
    """Of the last token of every chunk, computed beside ``others`` (lengths of other prompts)."""
    bench.begin(0, tokens, TOP)
    for slot in range(1, len(others) + 1):
        bench.begin(slot, prompt(slot, 80), TOP)
    found = []
    begin = 0
    for size in chunks:
        rows = [bench.row(0, tokens[begin : begin + size])]
        for slot, length in enumerate(others, start=1):
            rows.append(bench.row(slot, prompt(begin + slot, length)))
        entry = bench.step(*rows)[0].logprobs
        assert entry is not None
        found.append((begin + size, entry.top))
        begin += size
    return found


def test_any_batch_and_any_chunks(bench: Bench) -> None:
    tokens = prompt(99, LENGTH)
    ones = dict(logprobs(bench, tokens, [1] * LENGTH, []))
    ways = {
        "whole": ([LENGTH], []),
        "whole in a batch": ([LENGTH], [1, 7, 1, 80]),
        "chunks": ([3, 1, 16, 33, 2, 145, 100], []),
        "chunks in a batch": ([5, 1, 1, 60, 203, 30], [1, 1, 9]),
        "decode in a batch": ([250] + [1] * 50, [1] * 2),
        "decode in a wide batch": ([150] + [1] * 150, [1] * 9),
    }
    for way, (chunks, others) in ways.items():
        for position, top in logprobs(bench, tokens, chunks, others):
            assert top == ones[position], f"{way}: other bits after {position} tokens"


@pytest.mark.parametrize("kind", [PlainLinear, PackedLinear])
@pytest.mark.parametrize("shape", [(96, 256), (320, 1024), (8, 64), (2000, 130)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_a_product(kind: Any, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """In multiples of the quantum that was found for this machine, up to long chunks."""
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        kind = PlainLinear
    torch.manual_seed(7)
    weight, rows = torch.randn(shape).to(dtype), torch.randn(700, shape[1]).to(dtype)
    bias = torch.randn(shape[0]).to(dtype)
    linear = kind(weight, bias)
    quantum = linear.row_quantum
    whole: Tensor = linear(rows)
    exact = rows.double() @ weight.double().t() + bias.double()
    atol, rtol = (1e-3, 1e-4) if dtype == torch.float32 else (0.05, 2**-7)
    torch.testing.assert_close(whole.double(), exact, atol=atol, rtol=rtol)
    for multiple in (1, 2, 3, 5, 8, 21, 64):
        count = multiple * quantum
        assert torch.equal(linear(rows[:count]), whole[:count]), count
        assert torch.equal(linear(rows[-count:]), whole[-count:]), count
