"""Issue 4, line 1: the same tokens from every tier and after every restart, for GQA and MLA, with
equal and with different numbers of ranks on the two sides."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

import pytest

from baton.core.config import EngineConfig
from baton.engine.checkpoint import open_checkpoint
from baton.engine.models.config import kv_layout
from tests.cluster.families import check_greedy
from tests.cluster.harness import DEMO_MODEL, assert_nothing_held, serving
from tests.cluster.pool_kit import ask, kill_instance, kill_pool_node, pool_numbers, settle
from tests.engine.same_tokens import random_prompt
from tests.engine.tiny_models import VARIANTS, save

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(1200)]

PAIR = ("--prefill", "1", "--decode", "1", "--served-model-name", DEMO_MODEL.name)
SIX_KV_HEADS = {"num_key_value_heads": 6, "intermediate_size": 96}
CASES: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "gqa": ("moe", {}, 1, 1),
    "gqa 1 to 2": ("moe", {}, 1, 2),
    "gqa 2 to 1": ("dense", {}, 2, 1),
    "gqa 2 to 3": ("dense", SIX_KV_HEADS, 2, 3),
    "mla": ("v3", {}, 1, 1),
    "mla 1 to 2": ("v3", {}, 1, 2),
    "mla 2 to 1": ("v3", {}, 2, 1),
}
NUM_DEVICE_BLOCKS = 64
NUM_HOST_BLOCKS = 80
LENGTHS = (448, 464, 480, 496)
"""28 to 31 blocks each: two fit into the device tier, the last three not quite into the host's."""


@pytest.mark.parametrize(("variant", "options", "prefill", "decode"), CASES.values(), ids=CASES)
def test_every_hit(
    variant: str, options: dict[str, Any], prefill: int, decode: int, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    reference = save(model, VARIANTS[variant] | options)
    for file in DEMO_MODEL.glob("tokenizer*"):
        shutil.copy(file, model)
    layout = kv_layout(open_checkpoint(str(model)).config, EngineConfig()).canonical
    settings = {
        "engine": {"num_blocks": NUM_DEVICE_BLOCKS},
        "prefill_engine": {"tp": prefill},
        "decode_engine": {"tp": decode},
        "pool": {
            "host_bytes": NUM_HOST_BLOCKS * layout.block_bytes,
            "disk_path": str(tmp_path / "disk"),
            "write_back": "all",
            "fetch": "always",
        },
    }
    prompts = [random_prompt(length) for length in LENGTHS]
    asking = functools.partial(ask, num_tokens=16, check=functools.partial(check_greedy, reference))
    seen: set[str] = set()
    with serving(*PAIR, model=model, settings=settings) as cluster:
        assert asking(cluster, prompts) == [{}] * len(prompts)
        settle(cluster)
        (device,) = asking(cluster, prompts[-1:])
        assert set(device) == {"device"}, "nobody was asked for what is here"
        # Evicted from the device, and the first one from the host tier too.
        for found in asking(cluster, [prompts[2], prompts[0], prompts[1]]):
            assert found, "it was written back"
            seen |= set(found)
        settle(cluster)
        mixed = [*prompts[1][:200], *random_prompt(250)]
        assert 0 < sum(asking(cluster, [mixed])[0].values()) <= 200

        kill_instance(cluster, "prefill-0")
        (found,) = asking(cluster, prompts[1:2])
        assert found.get("host", 0) > 0, "the host tier was kept"
        seen |= set(found)
        kill_instance(cluster, "decode-0")
        assert asking(cluster, prompts[1:2]) != [{}]

        settle(cluster)
        used = pool_numbers(cluster)["baton_pool_host_used"]
        kill_pool_node(cluster)
        assert pool_numbers(cluster)["baton_pool_host_used"] == used, "the arena was adopted"
        kill_instance(cluster, "prefill-0")
        (found,) = asking(cluster, prompts[1:2])
        assert found.get("host", 0) > 0, "what was adopted is found"
        settle(cluster)
        assert_nothing_held(cluster, within_s=10.0)
    # Shared memory went with the cluster, as with a machine that restarts.
    with serving(*PAIR, model=model, settings=settings) as cluster:
        for found in asking(cluster, prompts):
            seen |= set(found)
        assert pool_numbers(cluster)["baton_pool_failed_disk"] == 0
        assert_nothing_held(cluster, within_s=10.0)
    assert seen >= {"host", "disk"}, seen
