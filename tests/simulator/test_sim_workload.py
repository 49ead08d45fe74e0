from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from baton.core.errors import ConfigError
from baton.simulator.workload import (
    Trace,
    TraceRequest,
    exchanged,
    follow,
    mean_rate,
    read_trace,
    rescale,
    rotate,
    split,
)

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:04.0319600,3180,8
2023-11-16 18:17:06.9799600,110,27
"""
MOONCAKE = [
    {"timestamp": 0, "input_length": 1000, "output_length": 50, "hash_ids": [0, 1]},
    {"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [0, 2]},
    {"timestamp": 3000, "input_length": 20, "output_length": 7, "hash_ids": [3]},
    {"timestamp": 6000, "input_length": 30, "output_length": 9, "hash_ids": [4]},
]


def written(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lengths(trace: Trace) -> list[tuple[int, int]]:
    return [(r.num_prompt_tokens, r.num_output_tokens) for r in trace]


def example() -> Trace:
    arrivals = [0.0, 0.1, 0.2, 3.0, 3.1, 9.0]
    return tuple(TraceRequest(at, 100 + i, 10 + i) for i, at in enumerate(arrivals))


def test_azure_traces(tmp_path: Path) -> None:
    path = tmp_path / "azure_code.csv"
    path.write_text(AZURE)
    trace = read_trace(path)
    assert lengths(trace) == [(4808, 10), (3180, 8), (110, 27)]
    assert [r.arrival_s for r in trace] == pytest.approx([0.0, 0.052, 3.0], abs=1e-6)


def test_mooncake_traces_are_spread_within_their_bins_by_the_seed(tmp_path: Path) -> None:
    path = written(tmp_path / "mooncake_conversation.jsonl", MOONCAKE)
    trace = read_trace(path, seed=3)
    assert read_trace(path, seed=3) == trace
    assert read_trace(path, seed=4) != trace
    assert trace[0].arrival_s == 0.0
    assert sorted(lengths(trace)) == sorted([(1000, 50), (600, 5), (20, 7), (30, 9)])
    by_prompt = {r.num_prompt_tokens: r for r in trace}
    assert by_prompt[1000].hash_ids == (0, 1)
    first = min(by_prompt[1000].arrival_s, by_prompt[600].arrival_s)
    # Whatever was drawn, two bins lie between the first and the last.
    assert 3.0 < by_prompt[30].arrival_s - first < 9.0
    assert [r.arrival_s for r in trace] == sorted(r.arrival_s for r in trace)


def test_own_traces(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"arrival_s": 5.0, "prompt_tokens": 7, "output_tokens": 3},
        {
            "arrival_s": 5.5,
            "prompt_tokens": 9,
            "output_tokens": 1,
            "service_class": "batch",
            "tenant": "a",
            "hash_ids": [1, 2],
        },
    ]
    trace = read_trace(written(tmp_path / "mine.jsonl", rows))
    assert trace == (
        TraceRequest(0.0, 7, 3),
        TraceRequest(0.5, 9, 1, (1, 2), "batch", "a"),
    )


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("empty.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n", "no requests"),
        ("other.csv", "a,b\n1,2\n", "azure"),
        ("broken.jsonl", "{", "baton"),
        ("text.jsonl", '{"arrival_s": "x", "prompt_tokens": 1, "output_tokens": 1}', "arrival_s"),
        ("mooncake.jsonl", '{"timestamp": 0}', "mooncake"),
    ],
)
def test_what_is_no_trace_is_said_so(tmp_path: Path, name: str, text: str, says: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=says) as caught:
        read_trace(tmp_path / name)
    assert name in caught.value.message


def test_a_missing_file_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_trace(tmp_path / "none.csv")


def test_compressed_arrivals_keep_the_bursts() -> None:
    trace = example()
    faster = rescale(trace, 10 * mean_rate(trace), "compressed")
    assert [r.arrival_s for r in faster] == pytest.approx([r.arrival_s / 10 for r in trace])
    assert lengths(faster) == lengths(trace)
    assert mean_rate(faster) == pytest.approx(10 * mean_rate(trace))


def test_poisson_arrivals_keep_order_and_lengths_and_follow_the_seed() -> None:
    trace = tuple(TraceRequest(float(i), i + 1, 2 * i + 1) for i in range(2000))
    drawn = rescale(trace, 7.0, "poisson", seed=1)
    assert drawn == rescale(trace, 7.0, "poisson", seed=1)
    assert drawn != rescale(trace, 7.0, "poisson", seed=2)
    assert lengths(drawn) == lengths(trace)
    assert drawn[0].arrival_s == 0.0
    assert mean_rate(drawn) == pytest.approx(7.0, rel=0.1)
    gaps = [b.arrival_s - a.arrival_s for a, b in itertools.pairwise(drawn)]
    assert min(gaps) >= 0.0
    # Of a Poisson process: as large a deviation as mean.
    mean = sum(gaps) / len(gaps)
    deviation = (sum((g - mean) ** 2 for g in gaps) / len(gaps)) ** 0.5
    assert deviation == pytest.approx(mean, rel=0.1)


def test_twice_the_rate_is_the_same_poisson_draw_in_half_the_time() -> None:
    slow = rescale(example(), 1.0, "poisson", seed=5)
    fast = rescale(example(), 2.0, "poisson", seed=5)
    assert [2 * r.arrival_s for r in fast] == pytest.approx([r.arrival_s for r in slow])


def test_exchanged_lengths() -> None:
    trace = (TraceRequest(0.0, 500, 20, (1,)), TraceRequest(1.0, 30, 1))
    assert exchanged(trace) == (TraceRequest(0.0, 20, 500), TraceRequest(1.0, 1, 30))


def test_traces_follow_one_another_a_mean_gap_later() -> None:
    trace = example()
    joined = follow(trace, trace)
    assert lengths(joined) == lengths(trace) * 2
    assert joined[len(trace)].arrival_s == pytest.approx(9.0 + 1.0 / mean_rate(trace))
    later = [r.arrival_s - joined[len(trace)].arrival_s for r in joined[len(trace) :]]
    assert later == pytest.approx([r.arrival_s for r in trace])


def test_halves_and_rotations_begin_at_zero() -> None:
    trace = example()
    first, second = split(trace)
    assert lengths(first + second) == lengths(trace)
    assert first[0].arrival_s == second[0].arrival_s == 0.0
    turned = rotate(trace, 0.5)
    assert lengths(turned) == lengths(second) + lengths(first)
    assert [r.arrival_s for r in turned] == sorted(r.arrival_s for r in turned)
    assert rotate(trace, 1.0) == trace
