"""What counts as met, missed, failed, shed and aborted; and the share of the last minute. Pure."""

from __future__ import annotations

import pytest

from baton.core.errors import Code
from baton.core.slo import ServiceLevel, Slo, Timing
from baton.gateway.attainment import WINDOW_S, AttainmentWindow, SloOutcome, Verdict, judge

LEVEL = ServiceLevel("chat", Slo(1.0, 0.1))
QUICK = Timing(0.0, 0.5, 1.0, 11)
LATE = Timing(0.0, 1.5, 2.0, 11)
SLOW = Timing(0.0, 0.5, 2.5, 11)
ONE_TOKEN = Timing(0.0, 0.9, 0.9, 1)

MET, MISSED = SloOutcome.MET, SloOutcome.MISSED


@pytest.mark.parametrize(
    ("timings", "expected"),
    [
        ([QUICK], Verdict(MET, (), True)),
        ([ONE_TOKEN], Verdict(MET, (), True)),
        ([LATE], Verdict(MISSED, ("ttft",), False)),
        ([SLOW], Verdict(MISSED, ("tpot",), False)),
        ([QUICK, SLOW], Verdict(MISSED, ("tpot",), False)),
        ([LATE, SLOW], Verdict(MISSED, ("ttft", "tpot"), False)),
    ],
)
def test_all_choices_have_to_meet_all_targets(timings: list[Timing], expected: Verdict) -> None:
    assert judge("length", LEVEL, timings, len(timings), 3.0) == expected


def test_deadlines() -> None:
    level = ServiceLevel("night", priority=-1, deadline_s=10.0)
    assert judge("stop", level, [LATE], 1, 9.0) == Verdict(MET, (), True)
    assert judge("stop", level, [LATE], 1, 11.0) == Verdict(MISSED, ("deadline",), False)


def test_failed_and_shed_are_misses_and_aborted_is_neither() -> None:
    for code in Code:
        verdict = judge(code, LEVEL, [QUICK], 1, 1.0)
        if code is Code.ABORTED:
            assert verdict == Verdict(SloOutcome.ABORTED, (), None)
        elif code is Code.OVERLOADED:
            assert verdict == Verdict(SloOutcome.SHED, (), False)
        else:
            assert verdict == Verdict(SloOutcome.FAILED, (), False)


def test_without_targets_nothing_is_said_of_them() -> None:
    assert judge("stop", ServiceLevel(), [SLOW], 1, 99.0) == Verdict(MET, (), None)
    assert judge("unavailable", ServiceLevel(), [], 1, 9.0) == Verdict(SloOutcome.FAILED, (), None)


def test_the_window_forgets() -> None:
    window = AttainmentWindow()
    assert window.counts(0.0) == (0, 0)
    for second in range(100):
        window.add(second % 2 == 0, second + 0.5)
    assert window.counts(99.5) == (WINDOW_S // 2, WINDOW_S)
    window.add(True, 99.9)
    assert window.counts(99.9) == (WINDOW_S // 2 + 1, WINDOW_S + 1)
    assert window.counts(99.9 + WINDOW_S) == (0, 0)
