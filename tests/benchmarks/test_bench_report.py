"""The arithmetic of the report."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from baton.core.slo import Slo
from benchmarks.load import LoadResult
from benchmarks.outcome import Outcome
from benchmarks.report import distribution, lines, parse_slo, per_request, summarize, table


def finished(arrival_s: float, *token_times_s: float) -> Outcome:
    outcome = Outcome(arrival_s, arrival_s, arrival_s, 10, len(token_times_s))
    outcome.token_times_s = list(token_times_s)
    outcome.end_s = token_times_s[-1]
    return outcome


def failed(arrival_s: float, kind: str) -> Outcome:
    outcome = Outcome(arrival_s, arrival_s + 0.5, arrival_s, 10, 3, end_s=arrival_s + 1)
    outcome.token_times_s = [arrival_s + 0.6]
    outcome.fail(kind, "because")
    outcome.fail("later", "a consequence")
    return outcome


RESULT = LoadResult(
    [
        finished(0.0, 1.0, 1.5, 2.0),  # TTFT 1.0, TPOT 0.5
        finished(0.0, 0.2),  # no TPOT: meets any
        finished(1.0, 4.0, 4.1),  # TTFT 3.0: too late
        failed(2.0, "shed"),
    ],
    start_s=0.0,
    end_s=10.0,
    client_cpu_s=1.0,
)


def test_summary() -> None:
    summary = summarize(RESULT, Slo(ttft_s=1.0, tpot_s=0.5))
    requests = summary["requests"]
    assert (requests["total"], requests["finished"], requests["failed"]) == (4, 3, 1)
    assert requests["failures"] == {"shed": 1}
    assert requests["examples"] == {"shed": "because"}
    assert summary["attainment"] == pytest.approx(2 / 4)  # the shed one is a miss
    assert summary["goodput"] == pytest.approx(0.2)
    assert summary["output_tokens"] == 6  # the failed request's token does not count
    assert summary["output_tokens_per_s"] == pytest.approx(0.6)
    assert summary["total_tokens_per_s"] == pytest.approx(3.6)
    assert summary["request_rate"] == pytest.approx(0.3)
    assert summary["ttft_s"]["p50"] == pytest.approx(1.0)
    assert summary["ttft_s"]["max"] == pytest.approx(3.0)
    assert summary["tpot_s"]["count"] == 2
    assert summary["tpot_s"]["mean"] == pytest.approx(0.3)
    assert summary["itl_s"]["count"] == 3
    assert summary["e2e_s"]["max"] == pytest.approx(3.1)
    assert summary["client"]["cpu_share"] == pytest.approx(0.1)
    assert summary["client"]["lateness_s"]["max"] == pytest.approx(0.5)
    json.dumps(summary, allow_nan=False)


def test_a_run_in_which_all_failed_has_no_latencies() -> None:
    summary = summarize(LoadResult([failed(0.0, "timeout")], 0.0, 5.0, 0.0), Slo())
    assert summary["attainment"] == 0
    assert summary["goodput"] == 0
    assert summary["ttft_s"] == distribution([])
    assert summary["ttft_s"]["p99"] is None
    assert any("timeout" in line for line in lines(summary))


def test_per_request_times_count_from_the_start() -> None:
    shifted = LoadResult([finished(101.0, 102.0)], 100.0, 103.0, 0.0)
    (row,) = per_request(shifted)
    assert (row["due_s"], row["token_times_s"]) == (1.0, [2.0])


def test_table_and_lines_can_be_read() -> None:
    summary = summarize(RESULT, Slo(ttft_s=1.0))
    out = io.StringIO()
    Console(file=out, width=120).print(table(summary, "model"))
    assert "TTFT (ms)" in out.getvalue()
    assert "1,000.0" in out.getvalue()
    text = "\n".join(lines(summary))
    assert "3 of 4 finished" in text
    assert "TTFT <= 1.0 s" in text
    assert "1 x shed" in text


def test_slo() -> None:
    assert parse_slo("ttft=1.0,tpot=0.05") == Slo(ttft_s=1.0, tpot_s=0.05)
    assert parse_slo("tpot=2") == Slo(tpot_s=2.0)
    for wrong in ("", "ttft", "itl=1", "ttft=1,ttft=2", "ttft=0", "ttft=x"):
        with pytest.raises(ValueError):
            parse_slo(wrong)
