"""The gateway's keys of a prompt are those that the engine gives its blocks."""

from __future__ import annotations

import random

import pytest

from baton.core.blocks import block_salt
from baton.core.request import SamplingParams, Submission
from baton.engine.block_manager import BlockManager
from baton.engine.prefixes import prefix_keys
from baton.gateway.prompt_keys import MAX_KEYS, PromptKeys
from kvpool.layout import KVLayout
from protos.baton.internal.v1 import controller_pb2 as pb

LAYOUT = KVLayout("float32", 4, num_layers=2, num_kv_heads=2, head_dim=8, num_shards=2)


def view(**changes: object) -> pb.ClusterView:
    record = pb.InstanceRecord(
        instance_id="p", model_fingerprint="print", kv_layout=LAYOUT.text, block_size=4
    )
    for name, value in changes.items():
        setattr(record, name, value)
    return pb.ClusterView(instances=[pb.InstanceView(record=record, state="ready")])


def engine_keys(prompt: list[int], tenant: str) -> tuple[bytes, ...]:
    # As an instance makes it: the layout's canonical form, whatever its ranks.
    salt = block_salt(model_fingerprint="print", layout=LAYOUT.canonical.text)
    blocks = BlockManager(num_blocks=8, block_size=4, salt=salt)
    wanted = Submission("r", 0, tuple(prompt), SamplingParams(), tenant=tenant)
    return tuple(prefix_keys(wanted, blocks))


@pytest.mark.parametrize("tenant", ["", "salt", "größe"])
@pytest.mark.parametrize("num_tokens", [1, 4, 5, 8, 9, 203])
def test_keys_are_the_engines(num_tokens: int, tenant: str) -> None:
    prompt = random.Random(num_tokens).choices(range(1 << 17), k=num_tokens)
    keys = PromptKeys()
    assert keys.of(prompt, tenant) == (), "nobody is there yet"
    keys.on_view(view())
    assert keys.of(prompt, tenant) == engine_keys(prompt, tenant)
    assert len(keys.of(prompt, tenant)) == (num_tokens - 1) // 4


def test_views_change_the_keys_and_empty_ones_do_not() -> None:
    keys = PromptKeys()
    keys.on_view(view())
    before = keys.of(range(9), "")
    keys.on_view(pb.ClusterView())
    assert keys.of(range(9), "") == before
    one_rank = KVLayout("float32", 4, num_layers=2, num_kv_heads=4, head_dim=8)
    keys.on_view(view(kv_layout=one_rank.text))
    assert keys.of(range(9), "") == before, "keys do not depend on the number of ranks"
    keys.on_view(view(model_fingerprint="other"))
    assert not set(keys.of(range(9), "")) & set(before)


def test_long_prompts_are_looked_up_so_far_and_no_further() -> None:
    keys = PromptKeys()
    keys.on_view(view())
    assert len(keys.of(range(8 * MAX_KEYS), "")) == MAX_KEYS
