"""What is chosen for a model: the same in a dry run and in a real load; and references alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from baton.core.config import EngineConfig
from baton.core.errors import ConfigError
from baton.engine.checkpoint import open_checkpoint
from baton.engine.ops.catalog import CATALOG
from baton.engine.ops.devices import available_devices, find_device
from baton.engine.ops.dry import dry_choices, outline_mesh, unused_ops
from baton.engine.ops.registry import REFERENCE, Implementation
from baton.engine.parallel.mesh import Axes
from baton.engine.runner import InlineRunner
from tests.engine.tiny_models import (
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    DENSE,
    LLAMA,
    MOE,
    VARIANTS,
    Bench,
    reference_greedy,
    save,
)

# Wide enough that some products are packed in float32 and others are not.
MODELS: dict[str, dict[str, Any]] = {
    "dense": DENSE | {"hidden_size": 384, "head_dim": 64},
    "moe": MOE | {"hidden_size": 320, "moe_intermediate_size": 256},
    "v2": VARIANTS["v2-groups-yarn-biases"],
    "v3": DEEPSEEK_V3,
    "tied": VARIANTS["llama-all-biases-one-kv-head-tied"],
}
LAYOUTS = (
    Axes(),
    Axes(tp=2),
    Axes(tp=2, ep=2),
    Axes(ep=3),
    Axes(dp=2, ep=2),
    Axes(tp=2, dp=2, ep=4),
)
SMALL: dict[str, Any] = {"num_blocks": 4, "max_num_seqs": 2, "num_threads": 1}


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp(request.param)
    save(path, MODELS[request.param])
    return path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("axes", LAYOUTS, ids=str)
def test_a_dry_run_chooses_as_a_load_does(folder: Path, axes: Axes, dtype: Any) -> None:
    checkpoint = open_checkpoint(folder)
    config = EngineConfig(tp=axes.tp, ep=axes.ep, dp=axes.dp, dtype=dtype, **SMALL)
    if axes.ep > 1 and checkpoint.config.moe is None:
        # Ranks that share experts share nothing of a dense model.
        config = EngineConfig(tp=axes.tp, dp=axes.dp, dtype=dtype, **SMALL)
        axes = Axes(axes.tp, 1, axes.dp)
    first = dry_choices(checkpoint, config)
    for rank in range(axes.world_size):
        runner = InlineRunner(checkpoint, config, mesh=outline_mesh(axes, rank))
        real = runner.ops.choices
        runner.close()
        assert dry_choices(checkpoint, config, rank=rank) == real
        assert first == real, "all ranks choose alike"


def test_a_dry_run_refuses_as_a_load_does(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    config = EngineConfig(tp=4, **SMALL)
    with pytest.raises(ConfigError) as dry:
        dry_choices(checkpoint, config)
    with pytest.raises(ConfigError) as real:
        InlineRunner(checkpoint, config, mesh=outline_mesh(Axes(tp=4), 0))
    assert dry.value.message == real.value.message
    assert "cannot be split over tp=4" in dry.value.message


def test_a_dry_run_reads_no_weights(folder: Path, tmp_path: Path) -> None:
    """It works on a checkpoint whose weights are gone since it was looked at."""
    checkpoint = open_checkpoint(folder)
    config = EngineConfig(**SMALL)
    expected = dry_choices(checkpoint, config)
    hidden = [file.rename(tmp_path / file.name) for file in checkpoint.files]
    try:
        assert dry_choices(checkpoint, config) == expected
    finally:
        for file, place in zip(hidden, checkpoint.files, strict=True):
            file.rename(place)


def test_unused_operations(tmp_path: Path) -> None:
    save(tmp_path, DEEPSEEK_V2)
    choices = dry_choices(open_checkpoint(tmp_path), EngineConfig(**SMALL))
    assert unused_ops(choices) == ("paged_attention", "quantize", "dequantize")


@pytest.mark.parametrize("name", ["dense", "llama", "moe", "v2", "v3"])
def test_references_alone_are_the_model(name: str, tmp_path: Path) -> None:
    """They are the yardstick of all overrides: here they are measured themselves."""
    options = {"dense": DENSE, "llama": LLAMA, "moe": MOE, "v2": DEEPSEEK_V2, "v3": DEEPSEEK_V3}
    oracle = save(tmp_path, options[name])
    bench = Bench(tmp_path, num_threads=1)
    references = [item for item in CATALOG if item.name == REFERENCE]
    runner = InlineRunner(open_checkpoint(tmp_path), bench.config, implementations=references)
    assert {choice.implementation.name for choice in runner.ops.choices} == {REFERENCE}
    bench.runner = runner
    prompts = {0: [5, 9, 2, 7, 7, 1, 30], 1: [11, 3], 2: [8] * 19}
    found: dict[int, list[int]] = {slot: [] for slot in prompts}
    # A chunked prompt beside whole ones, then decode in a batch.
    for slot, prompt in prompts.items():
        bench.begin(slot, prompt)
    bench.step(bench.row(2, prompts[2][:10], sample=False))
    rows = [bench.row(0, prompts[0]), bench.row(1, prompts[1]), bench.row(2, prompts[2][10:])]
    for _ in range(12):
        for slot, result in enumerate(bench.step(*rows)):
            assert result.token_id is not None
            found[slot].append(result.token_id)
        rows = [bench.row(slot, None) for slot in prompts]
    for slot, prompt in prompts.items():
        assert found[slot] == reference_greedy(oracle, prompt, 12), slot


def test_an_operation_that_nothing_can_do(tmp_path: Path) -> None:
    save(tmp_path, DENSE)
    never = Implementation(
        "rotary", "never", lambda site: None, can_handle=lambda site: "no wheels"
    )
    catalog = [item for item in CATALOG if item.op != "rotary"] + [never]
    with pytest.raises(ConfigError, match=r"rotary.*layers\.\*\.attention.*never: no wheels"):
        dry_choices(open_checkpoint(tmp_path), EngineConfig(**SMALL), implementations=catalog)


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert available_devices()[0] == find_device("cpu") == torch.device("cpu")
    with monkeypatch.context() as patch:
        patch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)
        with pytest.raises(ConfigError, match=r"device cuda is not there.*use device cpu"):
            find_device("cuda")
        assert available_devices() == (torch.device("cpu"),)
        patch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
        assert [device.type for device in available_devices()] == ["cpu", "cuda"]
