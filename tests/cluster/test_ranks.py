"""Instances of several ranks in a cluster: same tokens, and a rank's death is its instance's."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import oracle
from tests.cluster.families import check_served
from tests.cluster.harness import Cluster, assert_nothing_held, serving
from tests.cluster.kills import MAX_SILENCE_S, kill_under_load

PAIR = ("--prefill", "1", "--decode", "1")


@pytest.mark.parametrize(
    ("variant", "axes"),
    [
        ("moe", {"tp": 2}),
        ("v3-yarn-groups-one-shared", {"dp": 2, "ep": 2}),
    ],
)
def test_disaggregated(variant: str, axes: dict[str, int], tmp_path: Path) -> None:
    assert check_served(variant, tmp_path, *PAIR, num_tokens=16, engine=axes) == []


def test_a_rank_dies_under_load() -> None:
    """Acceptance 3.7: its instance alone ends, quickly, with the rank named; the others go on."""
    prompts = oracle.prompts(12, longest=300)
    settings = {"engine": {"tp": 2, "num_blocks": 512}}
    flags = ("--prefill", "0", "--decode", "0", "--mixed", "2")
    with serving(*flags, settings=settings) as cluster:
        killed: list[int] = []

        def second_rank(instance_id: str) -> int:
            ranks = rank_pids(cluster, instance_id)
            assert len(ranks) == 2
            killed.append(ranks[1])
            return ranks[1]

        other = {item.instance_id: item for item in cluster.live_instances()}["mixed-1"]
        load, lives = asyncio.run(
            kill_under_load(
                cluster, prompts, ["mixed-0"], num_tokens=96, concurrency=8, pid_of=second_rank
            )
        )
        assert_nothing_held(cluster, within_s=10.0)
        now = {item.instance_id: item for item in cluster.live_instances()}
        assert (now["mixed-1"].incarnation, now["mixed-1"].pid) == (other.incarnation, other.pid)
        assert now["mixed-0"].incarnation == lives["mixed-0"][1] > lives["mixed-0"][0]
        assert not set(killed) & set(rank_pids(cluster, "mixed-0"))
        named = re.compile(rf"rank \d \(tp \d, dp 0\) of mixed-0, pid {killed[0]}")
        assert any(named.search(text) for text in session_logs()), "the log names the rank"
    assert not load.failed, [reply.error for reply in load.failed]
    assert max(reply.longest_gap_s for _, reply in load.replies) < MAX_SILENCE_S
    assert len(load.check_tokens(prompts, num_tokens=96)) <= oracle.MAX_TIES


def rank_pids(cluster: Cluster, instance_id: str) -> list[int]:
    """Processes of an instance's ranks: those that map its arena, without its driver."""
    arena = f"baton-{cluster.name}-{instance_id}-"
    return [
        process.pid
        for process in cluster.processes()
        if "RankActor" in process.name()
        and arena in Path(f"/proc/{process.pid}/maps").read_text(errors="replace")
    ]


def session_logs() -> Iterator[str]:
    """Logs of the newest Ray session on this machine, which is the test's."""
    for file in Path("/tmp/ray/session_latest/logs").glob("*"):
        if file.is_file():
            yield file.read_text(errors="replace")
