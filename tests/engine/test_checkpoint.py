"""Looking at checkpoints: what is read, and how every kind of damage is told."""

from __future__ import annotations

import json
import pickle
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from baton.core.config import EngineConfig
from baton.core.errors import Code, ConfigError
from baton.engine.checkpoint import open_checkpoint
from baton.engine.models.config import kv_layout, resolve_max_model_len
from baton.engine.models.tensors import expected_tensors
from baton.engine.runner import InlineRunner
from tests.engine.tiny_models import DEEPSEEK_V3, DENSE, MOE, VARIANTS, save

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
Q_NORM = "model.layers.1.self_attn.q_norm.weight"


@pytest.fixture(params=["dense", "moe"])
def whole(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    save(tmp_path / "m", DENSE if request.param == "dense" else MOE)
    return tmp_path / "m"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save(tmp_path / "m", MOE, max_shard_size="60KB")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 2
    return tmp_path / "m"


def edit_json(file: Path, **changes: Any) -> None:
    """Set keys; ``None`` removes one."""
    value = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: item for key, item in value.items() if item is not None}))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def shorten(file: Path, by: int) -> None:
    file.write_bytes(file.read_bytes()[:-by])


def test_reads_configuration(whole: Path) -> None:
    edit_json(whole / "generation_config.json", eos_token_id=[3, 7])
    checkpoint = open_checkpoint(whole)
    config = checkpoint.config
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (
        (3, 6, 2, 10)
    )
    assert checkpoint.eos_token_ids == (3, 7)
    assert checkpoint.max_position_embeddings == config.max_position_embeddings == 512
    assert checkpoint.files == (whole / WEIGHTS,)
    assert (config.moe is not None) == (config.architecture == "Qwen3MoeForCausalLM")
    tensors = load_file(whole / WEIGHTS)
    assert set(checkpoint.tensors) == set(tensors)
    info = checkpoint.tensors[Q_NORM]
    assert (info.dtype, info.shape) == ("F32", (10,))
    data = (whole / WEIGHTS).read_bytes()[info.begin : info.end]
    assert struct.unpack("<10f", data) == tuple(tensors[Q_NORM].tolist())
    assert pickle.loads(pickle.dumps(checkpoint)) == checkpoint


def test_reads_shards(sharded: Path) -> None:
    checkpoint = open_checkpoint(sharded)
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    assert {name: info.file.name for name, info in checkpoint.tensors.items()} == weight_map
    assert checkpoint.files == tuple(sorted(sharded.glob("*.safetensors")))


def test_older_spellings(whole: Path) -> None:
    """Configurations written before ``rope_parameters`` and ``num_local_experts`` existed."""
    new = open_checkpoint(whole)
    changes: dict[str, Any] = {"rope_parameters": None, "rope_theta": 10000.0}
    if new.config.moe is not None:
        changes |= {"num_local_experts": None, "num_experts": 5}
    edit_json(whole / "config.json", **changes, use_sliding_window=False, sliding_window=4096)
    old = open_checkpoint(whole)
    assert old.config == new.config
    assert old.fingerprint == new.fingerprint


def test_ignored_tensors_may_stay(whole: Path) -> None:
    edit_tensors(whole, lambda t: t.update({"model.rotary_emb.inv_freq": torch.zeros(5)}))
    edit_json(whole / "config.json", tie_word_embeddings=True)
    assert open_checkpoint(whole).config.tie_word_embeddings


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_every_variant_is_complete(variant: str, tmp_path: Path) -> None:
    """What ``transformers`` writes is all there, nothing too much, and each tensor is missed."""
    save(tmp_path / "m", VARIANTS[variant])
    checkpoint = open_checkpoint(tmp_path / "m")
    expected = expected_tensors(checkpoint.config)
    unused = set(checkpoint.tensors) - set(expected)
    assert all(0 in checkpoint.tensors[name].shape for name in unused)
    tensors = load_file(tmp_path / "m" / WEIGHTS)
    for name in [name for name in expected if ".layers." not in name or ".layers.1." in name]:
        save_file({k: t for k, t in tensors.items() if k != name}, tmp_path / "m" / WEIGHTS)
        assert name in message_of(tmp_path / "m")


def test_layers_behind_the_last_may_stay(tmp_path: Path) -> None:
    """DeepSeek-V3 predicts several tokens with layers that are not used."""
    save(tmp_path / "m", DEEPSEEK_V3)
    name = "model.layers.3.eh_proj.weight"
    edit_tensors(tmp_path / "m", lambda t: t.update({name: torch.zeros(48, 96)}))
    config = open_checkpoint(tmp_path / "m").config
    assert (config.num_layers, config.num_mtp_layers) == (3, 1)
    edit_json(tmp_path / "m" / "config.json", num_nextn_predict_layers=0)
    assert name in message_of(tmp_path / "m")


def test_fingerprint(tmp_path: Path) -> None:
    save(tmp_path / "a", DENSE)
    save(tmp_path / "b", DENSE)
    first = open_checkpoint(tmp_path / "a").fingerprint
    assert re.fullmatch("[0-9a-f]{32}", first)
    assert open_checkpoint(tmp_path / "b").fingerprint == first

    def finetune(tensors: dict[str, torch.Tensor]) -> None:
        for tensor in tensors.values():
            tensor += 1e-3

    edit_tensors(tmp_path / "b", finetune)
    assert open_checkpoint(tmp_path / "b").fingerprint != first
    edit_json(tmp_path / "a" / "config.json", rms_norm_eps=1e-5)
    assert open_checkpoint(tmp_path / "a").fingerprint != first


def write(name: str, text: str | bytes) -> Callable[[Path], object]:
    data = text.encode() if isinstance(text, str) else text
    return lambda folder: (folder / name).write_bytes(data)


def config(**changes: Any) -> Callable[[Path], object]:
    return lambda folder: edit_json(folder / "config.json", **changes)


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    return lambda folder: edit_tensors(folder, change)


def header(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


OFFSETS = '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}'
GATE = "mlp.gate_proj.weight"

# What is broken, and which words the message must have besides the folder.
BROKEN: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no config": (lambda p: (p / "config.json").unlink(), ("config.json", "no such file")),
    "bad json": (write("config.json", "{,"), ("config.json", "not valid JSON")),
    "binary config": (write("config.json", b"\xff\xfe\x00"), ("config.json", "JSON")),
    "not an object": (write("config.json", "[]"), ("config.json", "object")),
    "bad generation": (write("generation_config.json", "?"), ("generation_config.json", "JSON")),
    "bad eos": (config(eos_token_id=97), ("config.json", "eos_token_id 97")),
    "no architecture": (config(architectures=None), ("config.json", "architectures")),
    "other architecture": (
        config(architectures=["GPT2LMHeadModel"]),
        ("config.json", "GPT2LMHeadModel", "Qwen3ForCausalLM"),
    ),
    "longrope": (
        config(rope_parameters={"rope_type": "longrope", "factor": 4.0}),
        ("config.json", "rope_parameters", "longrope"),
    ),
    "old longrope": (
        config(rope_scaling={"type": "su", "factor": 4.0}),
        ("config.json", "rope_scaling", "su"),
    ),
    "partial rotary": (
        config(rope_parameters={"partial_rotary_factor": 0.5}),
        ("config.json", "partial_rotary_factor"),
    ),
    "rope shape": (config(rope_parameters=[1]), ("config.json", "rope_parameters")),
    "sliding window": (
        config(use_sliding_window=True, sliding_window=64),
        ("config.json", "use_sliding_window"),
    ),
    "layer types": (
        config(layer_types=["full_attention", "sliding_attention"]),
        ("config.json", "sliding_attention"),
    ),
    "quantized": (
        config(quantization_config={"quant_method": "fp8"}),
        ("config.json", "quantization_config"),
    ),
    "activation": (config(hidden_act="gelu"), ("config.json", "gelu")),
    "no hidden": (config(hidden_size=None), ("config.json", "hidden_size is missing")),
    "text number": (config(hidden_size="48"), ("config.json", "hidden_size", "'48'")),
    "zero layers": (config(num_hidden_layers=0), ("config.json", "num_hidden_layers")),
    "bad flag": (config(tie_word_embeddings="no"), ("config.json", "tie_word_embeddings")),
    "bad eps": (config(rms_norm_eps=0), ("config.json", "rms_norm_eps")),
    "heads": (config(num_key_value_heads=4), ("config.json", "num_key_value_heads 4")),
    "odd head": (config(head_dim=9), ("config.json", "head_dim 9")),
    "no weights": (lambda p: (p / WEIGHTS).unlink(), (WEIGHTS, INDEX, "neither")),
    "empty file": (write(WEIGHTS, b""), (WEIGHTS, "not a safetensors file")),
    "text file": (write(WEIGHTS, "version https://lfs " * 9), (WEIGHTS, "not a safetensors file")),
    "cut header": (
        lambda p: write(WEIGHTS, (p / WEIGHTS).read_bytes()[:99])(p),
        (WEIGHTS, "header"),
    ),
    "cut data": (lambda p: shorten(p / WEIGHTS, 1), (WEIGHTS, "truncated")),
    "header json": (write(WEIGHTS, header("{nope}")), (WEIGHTS, "broken safetensors header")),
    "header list": (write(WEIGHTS, header("[1,2]")), (WEIGHTS, "broken safetensors header")),
    "header entry": (write(WEIGHTS, header('{"a": {}}')), (WEIGHTS, "broken safetensors header")),
    "offsets": (write(WEIGHTS, header(OFFSETS) + bytes(8)), (WEIGHTS, "tensor a", "offsets")),
    "missing tensor": (tensors(lambda t: t.pop(Q_NORM)), (WEIGHTS, Q_NORM, "missing")),
    "missing head": (tensors(lambda t: t.pop("lm_head.weight")), (WEIGHTS, "lm_head.weight")),
    "wrong shape": (
        tensors(lambda t: t.update({Q_NORM: torch.zeros(11)})),
        (WEIGHTS, Q_NORM, "[11]", "[10]"),
    ),
    "config of another model": (config(hidden_size=64), (WEIGHTS, "config.json", "[97, 48]")),
    "unknown tensor": (
        tensors(lambda t: t.update({"model.extra": torch.zeros(1)})),
        (WEIGHTS, "model.extra"),
    ),
    "dtype": (
        tensors(lambda t: t.update({Q_NORM: torch.zeros(10, dtype=torch.int8)})),
        (WEIGHTS, Q_NORM, "I8"),
    ),
}


def message_of(folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        open_checkpoint(folder)
    assert caught.value.code is Code.CONFIG
    message = caught.value.message
    assert str(folder) in message
    assert "\n" not in message
    assert "; " in message, "says what to do"
    return message


@pytest.mark.parametrize("damage", list(BROKEN))
def test_broken(damage: str, tmp_path: Path) -> None:
    save(tmp_path / "m", DENSE)
    do, words = BROKEN[damage]
    do(tmp_path / "m")
    message = message_of(tmp_path / "m")
    for word in words:
        assert word in message


def test_missing_folder(tmp_path: Path) -> None:
    assert "no such folder" in message_of(tmp_path / "nowhere")


def test_broken_moe(tmp_path: Path) -> None:
    save(tmp_path / "m", MOE)
    edit_json(tmp_path / "m" / "config.json", num_experts_per_tok=6)
    assert "num_experts_per_tok 6" in message_of(tmp_path / "m")
    edit_json(tmp_path / "m" / "config.json", num_experts_per_tok=2, mlp_only_layers="1")
    assert "mlp_only_layers" in message_of(tmp_path / "m")


def test_broken_shards(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    first, *_, last = sorted(sharded.glob("*.safetensors"))
    name = next(key for key, file in index["weight_map"].items() if file == last.name)

    def with_map(weight_map: object) -> str:
        (sharded / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        return message_of(sharded)

    assert INDEX in with_map(None)
    assert "no-such" in with_map(index["weight_map"] | {name: "no-such.safetensors"})
    assert "../x" in with_map(index["weight_map"] | {name: "../x"})
    message = with_map(index["weight_map"] | {name: first.name})
    assert first.name in message
    assert name in message
    (sharded / INDEX).write_text(json.dumps(index))
    original = last.read_bytes()
    last.write_bytes(original[:-3])
    assert last.name in (message := message_of(sharded))
    assert "truncated" in message
    described = json.loads(original[8 : 8 + int.from_bytes(original[:8], "little")])
    described.pop("__metadata__", None)
    at_the_end = max(described, key=lambda key: int(described[key]["data_offsets"][1]))
    assert f"tensor {at_the_end} is not whole" in message
    last.unlink()
    assert last.name in (message := message_of(sharded))
    assert "missing" in message


def test_a_file_that_is_cut_short_after_the_check(whole: Path) -> None:
    checkpoint = open_checkpoint(whole)
    shorten(whole / WEIGHTS, 1)
    with pytest.raises(ConfigError, match=f"{WEIGHTS}: tensor .* cannot be read") as caught:
        InlineRunner(checkpoint, EngineConfig(num_blocks=4))
    last = max(checkpoint.tensors, key=lambda name: checkpoint.tensors[name].end)
    assert last in caught.value.message


def test_unreadable_file(tmp_path: Path) -> None:
    save(tmp_path / "m", DENSE)
    (tmp_path / "m" / "config.json").unlink()
    (tmp_path / "m" / "config.json").mkdir()
    assert "cannot be read" in message_of(tmp_path / "m")


def test_no_torch_needed() -> None:
    code = "import sys, baton.engine.checkpoint; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_max_model_len(tmp_path: Path) -> None:
    save(tmp_path, DENSE)
    model = open_checkpoint(tmp_path).config
    assert resolve_max_model_len(model, EngineConfig()) == 512
    assert resolve_max_model_len(model, EngineConfig(max_model_len=100)) == 100
    assert resolve_max_model_len(model, EngineConfig(num_blocks=3, block_size=8)) == 24
    with pytest.raises(ConfigError, match="max_position_embeddings 512"):
        resolve_max_model_len(model, EngineConfig(max_model_len=513))


def test_kv_layout(tmp_path: Path) -> None:
    save(tmp_path, DENSE)
    layout = kv_layout(open_checkpoint(tmp_path).config, EngineConfig(block_size=8))
    assert layout.block_bytes == 3 * 2 * 8 * 2 * 10 * 4
