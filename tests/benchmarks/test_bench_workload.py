"""Arrivals, lengths, prompts and traces."""

from __future__ import annotations

import itertools
import math
import statistics
from pathlib import Path

import numpy as np
import pytest

from benchmarks.traces import read_trace
from benchmarks.workload import (
    Arrivals,
    Item,
    PromptMaker,
    arrival_times,
    length_sampler,
    read_prompts,
    reshape,
    synthetic,
    with_texts,
)


@pytest.mark.parametrize("process", ["poisson", "constant", "burst"])
def test_arrivals_keep_the_rate_and_the_seed(process: Arrivals) -> None:
    times = arrival_times(20_000, 5.0, process, seed=3)
    assert times[0] == 0.0
    assert times == sorted(times)
    assert times == arrival_times(20_000, 5.0, process, seed=3)
    assert len(times) / times[-1] == pytest.approx(5.0, rel=0.1)
    if process != "constant":
        assert times != arrival_times(20_000, 5.0, process, seed=4)


def test_bursts_vary_more_than_poisson_and_poisson_more_than_constant() -> None:
    def variation(process: Arrivals) -> float:
        times = arrival_times(5000, 2.0, process, seed=0)
        gaps = [b - a for a, b in itertools.pairwise(times)]
        return statistics.pstdev(gaps) / statistics.fmean(gaps)

    assert variation("constant") == pytest.approx(0, abs=1e-6)
    assert variation("poisson") == pytest.approx(1, rel=0.1)
    assert variation("burst") == pytest.approx(2, rel=0.15)  # 1 / sqrt(0.25)


def test_odd_arrivals() -> None:
    assert arrival_times(3, math.inf, "poisson", seed=0) == [0.0, 0.0, 0.0]
    assert arrival_times(0, 1.0, "poisson", seed=0) == []
    assert arrival_times(1, 1.0, "burst", seed=0) == [0.0]
    with pytest.raises(ValueError, match="positive"):
        arrival_times(1, 0.0, "poisson", seed=0)


def test_lengths() -> None:
    generator = np.random.default_rng(0)
    assert length_sampler("7")(generator) == 7
    uniform = length_sampler("uniform:3:5")
    assert {uniform(generator) for _ in range(100)} == {3, 4, 5}
    lognormal = length_sampler("lognormal:100:0.5")
    assert statistics.median(lognormal(generator) for _ in range(2000)) == pytest.approx(100, 0.1)


@pytest.mark.parametrize(
    "text", ["", "0", "-1", "x", "uniform:5:3", "uniform:1", "normal:1:2", "lognormal:0:1"]
)
def test_wrong_lengths_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a length"):
        length_sampler(text)


def test_synthetic_is_reproducible() -> None:
    def make(seed: int) -> list[Item]:
        return synthetic(
            50,
            rate=10,
            arrivals="poisson",
            input_len="uniform:1:500",
            output_len="8",
            seed=seed,
        )

    assert make(1) == make(1)
    assert make(1) != make(2)
    assert {item.output_len for item in make(1)} == {8}


def test_prompts_are_within_the_vocabulary_and_reproducible() -> None:
    maker = PromptMaker(100, seed=1, first_id=10)
    prompt = maker.prompt(0, Item(0.0, 300, 1))
    assert isinstance(prompt, list)
    assert len(prompt) == 300
    assert min(prompt) >= 10
    assert max(prompt) < 100
    assert prompt == PromptMaker(100, seed=1, first_id=10).prompt(0, Item(5.0, 300, 9))
    assert prompt != maker.prompt(1, Item(0.0, 300, 1))
    with pytest.raises(ValueError, match="vocabulary"):
        PromptMaker(10, seed=0)


def test_equal_prefix_ids_are_equal_tokens() -> None:
    maker = PromptMaker(1000, seed=0, block_tokens=8)
    one = maker.prompt(0, Item(0.0, 20, 1, prefix_ids=(1, 2, 3)))
    two = maker.prompt(1, Item(0.0, 27, 1, prefix_ids=(1, 2, 4)))  # 24 of blocks, 3 of its own
    assert len(one) == 20
    assert len(two) == 27
    assert one[:16] == two[:16]
    assert one[16:20] != two[16:20]


def test_text_prompts_go_round(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("def f():\\n\n\nimport os\n")
    texts = read_prompts(file)
    assert texts == ["def f():\n", "import os"]
    items = with_texts([Item(float(i), 5, 5) for i in range(3)], texts)
    assert [item.text for item in items] == ["def f():\n", "import os", "def f():\n"]
    assert PromptMaker(100, 0).prompt(0, items[0]) == "def f():\n"
    with pytest.raises(ValueError, match="no prompts"):
        with_texts(items, [])


def test_reshape() -> None:
    items = [Item(0.0, 1000, 100, (1, 2)), Item(10.0, 3, 3), Item(20.0, 1, 1)]
    made = reshape(items, rate_scale=2, length_scale=0.1, clip_input=50, limit=2)
    assert made == [Item(0.0, 50, 10, (1, 2)), Item(5.0, 1, 1)]
    with pytest.raises(ValueError, match="positive"):
        reshape(items, rate_scale=0)


AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,0
2023-11-16 18:16:46.6805900,879,55
"""
MOONCAKE = """{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [0, 1]}
{"timestamp": 0, "input_length": 1000, "output_length": 6, "hash_ids": [0, 2]}
{"timestamp": 3000, "input_length": 10, "output_length": 7, "hash_ids": [3]}
{"timestamp": 60000, "input_length": 10, "output_length": 8, "hash_ids": [3]}
"""


def test_azure(tmp_path: Path) -> None:
    file = tmp_path / "azure.csv"
    file.write_text(AZURE)
    items = read_trace(file, "azure", seed=0)
    assert [item.at_s for item in items] == pytest.approx([0.0, 4.314579, 60.0], abs=1e-6)
    assert [(item.input_len, item.output_len) for item in items] == [(374, 44), (396, 1), (879, 55)]


def test_mooncake_spreads_bins_and_keeps_prefixes(tmp_path: Path) -> None:
    file = tmp_path / "mooncake.jsonl"
    file.write_text(MOONCAKE)
    items = read_trace(file, "mooncake", seed=0)
    assert items == read_trace(file, "mooncake", seed=0)
    assert items != read_trace(file, "mooncake", seed=1)
    assert items[0].at_s == 0.0
    times = [item.at_s for item in items]
    assert times == sorted(times)
    assert len(set(times)) == 4
    by_output = {item.output_len: item for item in items}
    assert abs(by_output[5].at_s - by_output[6].at_s) < 3
    assert 54 <= by_output[8].at_s - by_output[7].at_s <= 63
    maker = PromptMaker(5000, seed=0)
    one, two = maker.prompt(0, by_output[5]), maker.prompt(1, by_output[6])
    assert (len(one), len(two)) == (600, 1000)
    assert one[:512] == two[:512]
    assert one[512:600] != two[512:600]
    assert maker.prompt(2, by_output[7]) == maker.prompt(3, by_output[8])


def test_broken_traces_name_the_line(tmp_path: Path) -> None:
    file = tmp_path / "trace"
    file.write_text(AZURE + "2023-11-16 18:16:46,x,1\n")
    with pytest.raises(ValueError, match="trace:5 "):
        read_trace(file, "azure", seed=0)
    file.write_text(MOONCAKE + '{"timestamp": 1}\n')
    with pytest.raises(ValueError, match="trace:5 "):
        read_trace(file, "mooncake", seed=0)
    file.write_text("")
    with pytest.raises(ValueError, match="no requests"):
        read_trace(file, "mooncake", seed=0)
