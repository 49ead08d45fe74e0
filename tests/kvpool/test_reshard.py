from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpool.layout import KVLayout, canonical_text
from kvpool.reshard import HeadMove, plan_reshard

Content = npt.NDArray[np.unsignedinteger]
Dtype = Literal["float32", "bfloat16"]

SHARDS = range(1, 7)
BASE = KVLayout("bfloat16", block_size=4, num_layers=2, num_kv_heads=2, head_dim=6, num_shards=3)
NUM_BLOCKS = 3


def cut(total: int, num_shards: int, dtype: Dtype = "float32", **other: Any) -> KVLayout:
    sizes = {"block_size": 4, "num_layers": 2, "head_dim": 6, **other}
    return KVLayout(dtype, num_kv_heads=total // num_shards, num_shards=num_shards, **sizes)


def contents(layout: KVLayout, num_blocks: int, seed: int = 1) -> Content:
    """[blocks, layers, planes, tokens, all heads, head_dim] of any bits, NaN of all kinds too."""
    dtype: Any = np.uint32 if layout.dtype == "float32" else np.uint16
    shape = (num_blocks, layout.num_layers, layout.num_planes, layout.block_size)
    full = (*shape, layout.total_kv_heads, layout.head_dim)
    made = np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, full, dtype, endpoint=True)
    signalling = 0x7F800001 if layout.dtype == "float32" else 0x7F81
    made[..., 0] = signalling
    made[..., 1] |= 0xFF80 << (16 if layout.dtype == "float32" else 0)
    return made


def laid_out(layout: KVLayout, content: Content) -> npt.NDArray[np.uint8]:
    """The blocks' bytes, from the definition: shard after shard, each with its own heads."""
    heads = layout.num_kv_heads
    parts = [
        block[..., shard * heads : (shard + 1) * heads, :].tobytes()
        for block in content
        for shard in range(layout.num_shards)
    ]
    made = np.frombuffer(bytearray(b"".join(parts)), np.uint8)
    return made.reshape(len(content), layout.block_bytes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("ranks", list(itertools.product(SHARDS, SHARDS)), ids=str)
def test_every_ratio(ranks: tuple[int, int], dtype: Dtype) -> None:
    for factor in (1, 2):
        total = factor * math.lcm(*ranks)
        source, target = (cut(total, num_shards, dtype) for num_shards in ranks)
        content = contents(source, NUM_BLOCKS)
        there, wanted = laid_out(source, content), laid_out(target, content)
        kept = there.copy()
        here, back = np.zeros_like(wanted), np.zeros_like(there)
        plan = plan_reshard(source, target)
        plan.apply(there, here)
        assert np.array_equal(here, wanted)
        assert np.array_equal(there, kept)
        plan_reshard(target, source).apply(here, back)
        assert np.array_equal(back, there)
        assert plan.is_identity == (ranks[0] == ranks[1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_latent_stays_as_it_is(dtype: Dtype) -> None:
    """With MLA there is one latent in one shard, whatever the number of ranks."""
    layout = cut(1, 1, dtype, kind="mla", head_dim=9)
    plan = plan_reshard(layout, layout)
    assert plan.is_identity
    assert plan.moves == (HeadMove(0, 0, 0, 0, 1),)
    there = laid_out(layout, contents(layout, NUM_BLOCKS))
    here = np.zeros_like(there)
    plan.apply(there, here)
    assert np.array_equal(here, there)


def test_two_to_three() -> None:
    plan = plan_reshard(cut(6, 2), cut(6, 3))
    assert plan.moves == (
        HeadMove(source_shard=0, source_head=0, target_shard=0, target_head=0, num_heads=2),
        HeadMove(source_shard=0, source_head=2, target_shard=1, target_head=0, num_heads=1),
        HeadMove(source_shard=1, source_head=0, target_shard=1, target_head=1, num_heads=1),
        HeadMove(source_shard=1, source_head=1, target_shard=2, target_head=0, num_heads=2),
    )


sizes = st.integers(1, 4)


@given(
    shards=st.tuples(*[st.integers(1, 8)] * 3),
    sizes=st.fixed_dictionaries({"block_size": sizes, "num_layers": sizes, "head_dim": sizes}),
    num_blocks=st.integers(0, 4),
    dtype=st.sampled_from(("float32", "bfloat16")),
    seed=st.integers(0, 1000),
)
def test_a_way_around_ends_at_the_same_bytes(
    shards: tuple[int, int, int],
    sizes: dict[str, int],
    num_blocks: int,
    dtype: Dtype,
    seed: int,
) -> None:
    sizes = {**sizes, "head_dim": sizes["head_dim"] + 1}
    first, middle, last = (cut(math.lcm(*shards), one, dtype, **sizes) for one in shards)
    there = laid_out(first, contents(first, num_blocks, seed))
    between, around, straight = (np.zeros_like(there) for _ in range(3))
    plan_reshard(first, middle).apply(there, between)
    plan_reshard(middle, last).apply(between, around)
    plan_reshard(first, last).apply(there, straight)
    assert np.array_equal(around, straight)


def test_memory_of_either_kind() -> None:
    source, target = cut(4, 1), cut(4, 2)
    content = contents(source, 2)
    into = bytearray(2 * target.block_bytes)
    plan_reshard(source, target).apply(
        memoryview(laid_out(source, content).tobytes()), memoryview(into)
    )
    assert bytes(into) == laid_out(target, content).tobytes()


def test_sizes_that_do_not_fit() -> None:
    source, target = cut(4, 1), cut(4, 2)
    plan = plan_reshard(source, target)
    good = np.zeros(2 * source.block_bytes, np.uint8)
    for there, here in ((good[:-1], good), (good, good[: source.block_bytes]), (good[:4], good)):
        with pytest.raises(ValueError, match="blocks of v2"):
            plan.apply(there, here)
    with pytest.raises(ValueError, match="read-only"):
        plan.apply(good, memoryview(bytes(len(good))))


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "dtype": ({"dtype": "float32"}, "dtype bfloat16 is not float32"),
    "block size": ({"block_size": 8}, "block size 4 is not 8"),
    "layers": ({"num_layers": 3}, "number of layers 2 is not 3"),
    "kind": ({"kind": "mla"}, "kind gqa is not mla"),
    "head dim": ({"head_dim": 8}, "head dim 6 is not 8"),
    "heads": ({"num_shards": 2}, "number of KV heads 6 is not 4"),
    "version": ({"version": 3}, "version 2 is not 3"),
    "two": ({"num_layers": 1, "head_dim": 5}, "number of layers 2 is not 1, head dim 6 is not 5"),
}


@pytest.mark.parametrize(("change", "reason"), OTHERS.values(), ids=OTHERS)
def test_what_cannot_be_converted(change: dict[str, Any], reason: str) -> None:
    other = dataclasses.replace(BASE, **change)
    assert BASE.convertible_to(other) == reason
    with pytest.raises(ValueError, match=reason):
        plan_reshard(BASE, other)
    assert canonical_text(BASE.text) != canonical_text(other.text)


def test_canonical() -> None:
    assert BASE.total_kv_heads == 6
    assert BASE.canonical == dataclasses.replace(BASE, num_shards=1, num_kv_heads=6)
    assert BASE.canonical.block_bytes == BASE.block_bytes
    assert BASE.convertible_to(BASE.canonical) is None
    assert canonical_text(BASE.text) == canonical_text(BASE.canonical.text) == BASE.canonical.text
    assert canonical_text("not a layout") == "not a layout"


positive = st.integers(1, 10**9 - 1)


@given(
    st.builds(
        KVLayout,
        dtype=st.sampled_from(("float32", "bfloat16")),
        block_size=positive,
        num_layers=positive,
        num_kv_heads=positive,
        head_dim=positive,
        kind=st.sampled_from(("gqa", "mla")),
        num_shards=positive,
    )
)
def test_texts_are_parsed(layout: KVLayout) -> None:
    assert KVLayout.parse(layout.text) == layout


NO_LAYOUTS = [
    "",
    "layout",
    BASE.text + " ",
    BASE.text + ":scale=1",
    BASE.text.replace("gqa", "mha"),
    BASE.text.replace("bfloat16", "float16"),
    BASE.text.replace("heads=2", "heads=0"),
    BASE.text.replace("heads=2", "heads=02"),
    BASE.text.replace("heads=2", "heads=-2"),
    BASE.text.replace("heads=2", "heads=٢"),
    BASE.text.replace("heads=2", "heads=" + "9" * 5000),
    BASE.text.replace(":shards=3", ""),
]


@pytest.mark.parametrize("text", NO_LAYOUTS)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="describes no KV layout"):
        KVLayout.parse(text)


def test_other_versions_are_refused() -> None:
    with pytest.raises(ValueError, match="of version 1, this code knows 2: run the same release"):
        KVLayout.parse(BASE.text.replace("v2", "v1"))
