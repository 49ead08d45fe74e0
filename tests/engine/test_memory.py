"""Memory: the arithmetic of its budget, and what processes of their own really take."""

from __future__ import annotations

import dataclasses
import functools
import json
import mmap
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from baton.core.config import EngineConfig
from baton.core.errors import ConfigError
from baton.engine import devices
from baton.engine.checkpoint import open_checkpoint
from baton.engine.devices import CpuMemory
from baton.engine.memory import (
    BLOCK_RECORD_BYTES,
    MIB,
    MemoryEntry,
    MemoryMap,
    MemoryNeeds,
    check_weights,
    fit_blocks,
)
from baton.engine.resident import Mapping, mappings, process_memory, resident_bytes
from baton.engine.runner import InlineRunner
from baton.engine.step_inputs import GATHER_TOKENS, _batches
from tests.engine.big_checkpoints import MEDIUM, save_big
from tests.engine.tiny_models import DENSE, save
from tests.house.files import ROOT

DEMO = ROOT / "deploy" / "demo-model"
NEEDS = MemoryNeeds(
    held=300 * MIB,
    prefill=100 * MIB,
    decode=40 * MIB,
    mixed=80 * MIB,
    reserve=10 * MIB,
    limit=552 * MIB + 100 * (MIB + BLOCK_RECORD_BYTES),
    block_bytes=MIB,
)
CATCH_ALL = ("unaccounted", "runtime.heap", "shared")
MEASURED = EngineConfig(num_blocks=None, memory_limit_gib=1.0)


def in_process(
    what: str, folder: Path, *, timeout_s: float = 200.0, env: Any = None, **settings: Any
) -> Any:
    """The answer of ``memory_process``."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.memory_process", what, folder, json.dumps(settings)],
        cwd=ROOT,
        env=os.environ | (env or {}),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def medium(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("medium")
    assert save_big(folder, MEDIUM) > 200e6
    return folder


# The budget.


def test_what_is_left_becomes_blocks() -> None:
    assert (NEEDS.transient, NEEDS.margin) == (100 * MIB, 42 * MIB)
    assert NEEDS.beside_blocks == 452 * MIB
    assert NEEDS.rest == 100 * MIB + 100 * (MIB + BLOCK_RECORD_BYTES)
    fits = functools.partial(fit_blocks, config=MEASURED, max_model_len=100)
    assert fits([NEEDS]) == 199
    exact = dataclasses.replace(NEEDS, limit=NEEDS.beside_blocks + 100 * (MIB + BLOCK_RECORD_BYTES))
    assert fits([exact]) == 100
    assert fits([dataclasses.replace(exact, limit=exact.limit - 1)]) == 99


def test_the_tightest_rank_decides() -> None:
    small = dataclasses.replace(NEEDS, held=350 * MIB)
    large_blocks = dataclasses.replace(NEEDS, block_bytes=4 * MIB)
    assert fit_blocks([NEEDS, small], MEASURED, 100) == 149
    assert fit_blocks([small, large_blocks], MEASURED, 100) == 50
    assert fit_blocks([large_blocks, small], MEASURED, 100) == 50


def test_given_blocks_are_checked() -> None:
    fitting = dataclasses.replace(MEASURED, num_blocks=199)
    assert fit_blocks([NEEDS], fitting, 100) == 199
    with pytest.raises(ConfigError, match="200 KV blocks") as caught:
        fit_blocks([NEEDS], dataclasses.replace(fitting, num_blocks=200), 100)
    assert caught.value.param == "engine.num_blocks"
    for number in ("300.0 MiB", "100.0 MiB", "40.0 MiB", "80.0 MiB", "10.0 MiB", "42.0 MiB"):
        assert number in caught.value.message
    assert "at most 199 blocks" in caught.value.message


@pytest.mark.parametrize(
    ("max_model_len", "model_len", "num_blocks"),
    [(160, 9999, 10), (None, 9999, 32), (None, 100, 7), (161, 9999, 11)],
)
def test_the_least_is_one_sequence(
    max_model_len: int | None, model_len: int, num_blocks: int
) -> None:
    """Of the length that was asked for; else of one step's tokens, or the model's own length."""
    config = dataclasses.replace(MEASURED, max_model_len=max_model_len)
    limit = NEEDS.beside_blocks + num_blocks * (MIB + BLOCK_RECORD_BYTES)
    enough = dataclasses.replace(NEEDS, limit=limit)
    assert fit_blocks([enough], config, model_len) == num_blocks
    with pytest.raises(ConfigError, match=f"needs {num_blocks} KV blocks") as caught:
        fit_blocks([dataclasses.replace(enough, limit=limit - 1)], config, model_len)
    assert caught.value.param == "engine.memory_limit_gib"


def test_a_limit_below_everything_leaves_nothing() -> None:
    with pytest.raises(ConfigError, match=r"0\.0 MiB are left"):
        fit_blocks([dataclasses.replace(NEEDS, limit=MIB)], MEASURED, 100)


def test_weights_are_compared_before_they_are_loaded() -> None:
    config = EngineConfig(tp=2)
    check_weights(200, config, 100)
    with pytest.raises(ConfigError, match="2 ranks"):
        check_weights(202, config, 100)


def test_what_the_settings_must_say() -> None:
    with pytest.raises(ValueError, match="memory_limit_gib"):
        EngineConfig(num_blocks=None)
    with pytest.raises(ValueError, match="memory_limit_gib"):
        EngineConfig(memory_limit_gib=0.0)
    with pytest.raises(ValueError, match="tp = ep = dp = 1"):
        EngineConfig(num_blocks=None, memory_limit_gib=1.0, tp=2)


def test_the_map_says_what_it_does_not_know() -> None:
    entries = (MemoryEntry("a", 100, 60), MemoryEntry("b", 30, 30))
    found = MemoryMap("rank 0", "cpu", entries, in_use=100, imports=7, peak=120, needs=NEEDS)
    assert found.unaccounted == 10
    assert [line.split()[0] for line in found.text.splitlines()[1:4]] == ["a", "b", "unaccounted"]
    assert NEEDS.text in found.text


def test_a_map_that_memory_changed_under_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that ends between two looks gives memory back that the first one has seen."""
    memory, looks = CpuMemory(), 0
    piece = mmap.mmap(-1, 64 << 20)
    piece.write(b"x" * len(piece))

    def look() -> list[Mapping]:
        nonlocal looks
        looks += 1
        found = mappings()
        if not piece.closed:
            piece.close()
        return found

    monkeypatch.setattr(devices, "mappings", look)
    _, in_use = memory.account({})
    assert looks >= 2
    assert in_use < 32 << 20


def test_decode_batches_are_bounded_by_what_they_gather() -> None:
    import numpy as np

    starts = np.full(64, 8000, np.int64)
    batches = _batches(starts, 16)
    assert [begin for begin, _ in batches[1:]] == [end for _, end in batches[:-1]]
    assert (batches[0][0], batches[-1][1]) == (0, 64)
    assert all((end - begin) * 8192 <= GATHER_TOKENS for begin, end in batches)
    assert _batches(np.full(3, 10**6, np.int64), 16) == [(0, 1), (1, 2), (2, 3)]
    assert _batches(np.full(64, 1000, np.int64), 16) == [(0, 64)]


# Pages.


def test_pages_that_were_never_touched_are_not_resident() -> None:
    size = 64 * MIB
    before = process_memory().anonymous
    untouched = torch.empty(size, dtype=torch.uint8)
    begin = untouched.data_ptr()
    assert resident_bytes([(begin, begin + size)])[0] < 4 * MIB
    untouched[: size // 2] = 1
    half = resident_bytes([(begin, begin + size)])[0]
    assert size // 2 <= half < size // 2 + 4 * MIB
    assert resident_bytes([(begin + 100, begin + 5100)]) == [5000]
    assert resident_bytes([]) == []
    assert process_memory().anonymous - before >= size // 2


# Whole processes.


@pytest.mark.parametrize("which", ["demo", "medium"])
def test_the_map_accounts_for_memory(which: str, request: pytest.FixtureRequest) -> None:
    folder = DEMO if which == "demo" else request.getfixturevalue("medium")
    answer = in_process("account", folder, max_num_seqs=16, max_model_len=512, num_blocks=512)
    for found in answer["maps"]:
        shares = {entry["tag"]: entry["in_use"] / found["in_use"] for entry in found["entries"]}
        shares["unaccounted"] = found["unaccounted"] / found["in_use"]
        assert abs(shares["unaccounted"]) <= 0.05, found["text"]
        assert all(shares[tag] <= 0.05 for tag in CATCH_ALL), found["text"]
        sizes = {entry["tag"]: entry["size"] for entry in found["entries"]}
        assert sizes["kv_cache"] == 512 * answer["needs"]["block_bytes"]
        weights = {tag: size for tag, size in sizes.items() if tag.startswith("weights")}
        expected = sum(
            (info.end - info.begin) * (2 if info.dtype == "BF16" else 1)
            for info in open_checkpoint(folder).tensors.values()
        )
        if which == "medium":
            assert sum(weights.values()) == pytest.approx(expected, rel=0.02)
        else:  # tied: the mapped file's half-precision table, and the copy that products use
            assert sum(weights.values()) == pytest.approx(expected + 2 * MIB, rel=0.02)


def test_the_worst_load_stays_within_a_tight_limit(medium: Path) -> None:
    settings: dict[str, Any] = {"max_num_seqs": 16, "max_model_len": 512, "num_blocks": None}
    refused = in_process("tight", medium, memory_limit_gib=0.45, **settings)
    assert refused["code"] == "config_error"
    assert refused["param"] == "engine.memory_limit_gib"
    assert "sequence of 512 tokens needs 32 KV blocks" in refused["refused"]
    assert "limit 460.8 MiB" in refused["refused"]
    answer = in_process("tight", medium, memory_limit_gib=0.72, **settings)
    assert answer["num_tokens"] == 2 * 20 * 24
    assert answer["peak"] <= answer["limit"], answer["needs"]
    # Not by being far away from it.
    assert answer["peak"] >= 0.8 * answer["limit"], answer["needs"]
    assert "has no memory for this step" in answer["error"]
    assert "weights.projections" in answer["error"]
    assert answer["again"] == 20 * 24


def test_weights_that_cannot_fit_are_refused_before_they_are_loaded(medium: Path) -> None:
    refused = in_process("account", medium, memory_limit_gib=0.1, num_blocks=None)
    assert "the weights take 237" in refused["refused"]


@pytest.mark.parametrize("tp", [1, 2])
def test_loading_takes_little_more_than_the_weights(medium: Path, tp: int) -> None:
    """The long form, on a checkpoint of 1.5 GB, is tests/acceptance/test_3_6_loading.py."""
    few_kernels = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "4", "LRU_CACHE_CAPACITY": "4"}
    answer = in_process("load", medium, env=few_kernels, dtype="float32", tp=tp, rank=tp - 1)
    embedding = 16000 * 768 * 4
    assert answer["own"] == pytest.approx((answer["whole"] - embedding) / tp, rel=0.01)
    assert answer["samples"] > 20
    # What kernels and the largest temporary copy take does not grow with the checkpoint.
    assert answer["peak"] <= answer["own"] + 24 * MIB


def test_a_cache_can_be_attached_later(tmp_path: Path) -> None:
    save(tmp_path, DENSE)
    config = EngineConfig(
        block_size=4, num_blocks=None, memory_limit_gib=8.0, max_num_seqs=4, max_model_len=64
    )
    runner = InlineRunner(open_checkpoint(tmp_path), config)
    fitted = runner.fit()
    assert fitted.kv_blocks > 64
    runner.attach(64)
    sizes = {entry.tag: entry.size for entry in runner.memory()[0].entries}
    assert sizes["kv_cache"] == 64 * runner.layout.block_bytes
    runner.close()
