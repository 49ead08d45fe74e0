"""Families besides the demo model's, through a cluster (acceptance 3.1 has all of them)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.families import check_served

PAIR = ("--prefill", "1", "--decode", "1")


@pytest.mark.parametrize("variant", ["v3-yarn-groups-one-shared", "llama-llama3"])
def test_disaggregated(variant: str, tmp_path: Path) -> None:
    assert check_served(variant, tmp_path, *PAIR, num_tokens=24) == []
