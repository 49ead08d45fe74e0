"""Roles switch on a loaded cluster and nobody notices (short form of acceptance 2.3)."""

from __future__ import annotations

import asyncio

from tests.cluster import oracle
from tests.cluster.flips import flip_under_load
from tests.cluster.harness import Cluster, assert_nothing_held


def test_each_instance_flips_under_load(two_pairs: Cluster) -> None:
    prompts = oracle.prompts(16, longest=600)
    load, flips = asyncio.run(
        flip_under_load(two_pairs, prompts, num_tokens=32, rounds=2, concurrency=16)
    )
    assert flips == 2 * 2 * 4
    assert not load.failed, load.failed[0].error
    assert len(load.replies) >= 16
    load.check_tokens(prompts, num_tokens=32)
    assert_nothing_held(two_pairs, within_s=5.0)


def test_the_last_path_is_kept_unless_forced(pair: Cluster) -> None:
    refused = pair.command("role", "prefill-0", "decode")
    assert refused.returncode == 1
    assert "prefill" in refused.stderr
    assert {i.instance_id: i.role for i in pair.live_instances()} == {
        "prefill-0": "prefill",
        "decode-0": "decode",
    }
    forced = pair.command("role", "prefill-0", "decode", "--force")
    assert forced.returncode == 0, forced.stderr
    assert not pair.status()["ready"]
    back = pair.command("role", "prefill-0", "prefill")
    assert back.returncode == 0, back.stderr
    assert "decode -> prefill" in back.stdout
    assert pair.status()["ready"]


def test_wrong_role_and_unknown_instance_are_named(pair: Cluster) -> None:
    wrong = pair.command("role", "prefill-0", "cook")
    assert wrong.returncode == 1
    assert "cook" in wrong.stderr
    unknown = pair.command("role", "prefill-9", "mixed")
    assert unknown.returncode == 1
    assert "prefill-9" in unknown.stderr
