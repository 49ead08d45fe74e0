"""What counts as a loss of the rule."""

from __future__ import annotations

from benchmarks.kv_fetch_rule import Rows, verdicts


def test_the_rule_is_held_against_the_better_of_both() -> None:
    rows: Rows = {
        ("host", 64, "auto"): [1.0, 1.05, 9.0],
        ("host", 64, "always"): [1.0, 1.0, 1.0],
        ("host", 64, "never"): [3.0, 3.0, 3.0],
        ("disk", 64, "auto"): [1.2, 1.2, 1.2],
        ("disk", 64, "always"): [2.0, 2.0, 2.0],
        ("disk", 64, "never"): [1.0, 1.0, 1.0],
    }
    host, disk = verdicts(rows)
    assert (host["tier"], host["prompt_tokens"], host["passes"]) == ("host", 64, True)
    assert host["median_ttft_s"] == {"auto": 1.05, "always": 1.0, "never": 3.0}
    assert (disk["tier"], disk["passes"]) == ("disk", False)
    assert round(disk["auto_over_best"], 6) == 0.2
