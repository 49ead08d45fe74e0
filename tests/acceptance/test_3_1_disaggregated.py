"""Issue 3, line 1, through the cluster: every variant's KV is handed from prefill to decode."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.families import check_served
from tests.engine.same_tokens import MAX_TIES
from tests.engine.tiny_models import VARIANTS

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(300)]

TIES: list[str] = []


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_disaggregated(variant: str, tmp_path: Path) -> None:
    flags = ("--prefill", "1", "--decode", "1")
    TIES.extend(check_served(variant, tmp_path, *flags, num_tokens=64))
    print(f"{variant}: the reference's tokens; ties so far {TIES}")
    assert len(TIES) <= MAX_TIES
