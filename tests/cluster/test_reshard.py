"""Prefill and decode cut into different numbers of ranks: blocks are converted on the way.

1 to 2, 2 to 1 and MLA are in ``scripts/acceptance 4.1``, with all tiers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.cluster.families import check_served
from tests.cluster.harness import Cluster
from tests.cluster.test_ranks import PAIR, rank_pids

SIX_KV_HEADS = {"num_key_value_heads": 6, "intermediate_size": 96}

CASES: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "2 to 3": ("dense", SIX_KV_HEADS, 2, 3),
}


@pytest.mark.parametrize(("variant", "options", "prefill", "decode"), CASES.values(), ids=CASES)
def test_disaggregated(
    variant: str, options: dict[str, Any], prefill: int, decode: int, tmp_path: Path
) -> None:
    def count_ranks(cluster: Cluster) -> None:
        for instance_id, wanted in (("prefill-0", prefill), ("decode-0", decode)):
            # A single rank is a thread of its instance.
            assert len(rank_pids(cluster, instance_id)) == (wanted if wanted > 1 else 0)

    ties = check_served(
        variant,
        tmp_path,
        *PAIR,
        num_tokens=16,
        roles={"prefill": {"tp": prefill}, "decode": {"tp": decode}},
        options=options,
        look=count_ranks,
    )
    assert ties == []
