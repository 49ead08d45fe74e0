"""The comparison's arithmetic and its reference, on a model small enough for a test."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from benchmarks.compare_transformers import arguments, markdown, medians
from benchmarks.load import LoadResult
from benchmarks.outcome import Outcome
from benchmarks.reference import Reference


def run(token_s: float) -> LoadResult:
    outcome = Outcome(0.0, 0.0, 0.0, 4, 3)
    outcome.token_times_s = [token_s, 2 * token_s, 3 * token_s]
    outcome.end_s = 3 * token_s
    return LoadResult([outcome], 0.0, 3 * token_s, 0.0)


def test_what_follows_two_dashes_is_for_the_cluster() -> None:
    args = arguments(["--model", "m", "--concurrency", "1", "2", "--", "--prefill", "2"])
    assert args.concurrency == [1, 2]
    assert args.serve_options == ["--prefill", "2"]
    assert arguments(["--model", "m"]).serve_options == []


def test_medians_of_repetitions() -> None:
    row = medians([run(0.1), run(0.5), run(0.2)])
    assert row["output_tokens_per_s"] == pytest.approx(5.0)
    assert row["output_tokens_per_s_range"] == pytest.approx([2.0, 10.0])
    assert row["ttft_s_p50"] == pytest.approx(0.2)
    assert row["tpot_s_p50"] == pytest.approx(0.2)


def test_markdown_has_a_row_per_system_and_the_command() -> None:
    document = {
        "command": "python benchmarks/serve.py compare --model m",
        "started_at": "2026-01-02T03:04:05+00:00",
        "model": "m",
        "workload": {"input_len": 4, "output_len": 3, "repetitions": 3},
        "transformers": {"threads": 2, "experts": "eager"},
        "equal_outputs": 1.0,
        "machine": {
            "cores": 2,
            "cpu": "some",
            "memory_bytes": 2**34,
            "versions": {"python": "3", "torch": "2", "ray": "2"},
        },
        "rows": [
            {"system": system, "concurrency": 4, **medians([run(0.1)])}
            for system in ("baton", "transformers")
        ],
    }
    text = markdown(document)
    assert "| 4 | baton | 10.0 | 100.0 | 100.0 | 100.0 |" in text
    assert "| 4 | transformers | 10.0 |" in text
    assert "`python benchmarks/serve.py compare --model m`, 2026-01-02." in text


def test_reference_makes_every_token_and_times_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        eos_token_id=1,
    )
    transformers.Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    before = torch.get_num_threads()
    try:
        reference = Reference(tmp_path, max_threads=1)
        prompts = [[5, 6, 7, 8], [9, 10, 11, 12]]
        reference.choose(prompts, 2)
        assert (reference.experts, reference.threads) == (None, 1)
        outcomes = reference.generate(prompts, 6)
    finally:
        torch.set_num_threads(before)
    assert [len(outcome.token_ids) for outcome in outcomes] == [6, 6]
    for outcome in outcomes:
        assert outcome.timing is not None
        assert outcome.timing.num_output_tokens == 6
        assert outcome.token_times_s == sorted(outcome.token_times_s)
