"""Settings: accepted ones arrive, wrong ones are refused by name, value and expectation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from baton.cli.settings import load_settings, parse_settings
from baton.core.errors import ConfigError
from baton.core.policy_config import ServiceClassConfig

GOOD: dict[str, Any] = {
    "model": "deploy/demo-model",
    "prefill": 2,
    "decode": 3,
    "resources": {"prefill": {"node_a": 0.01}},
    "engine": {"dtype": "bfloat16", "block_size": 32},
    "gateway": {"max_n": 4},
}


def test_good_settings() -> None:
    config = parse_settings(GOOD, source="test")
    assert (config.prefill, config.decode, config.mixed) == (2, 3, 0)
    assert config.engine.dtype == "bfloat16"
    assert config.engine.block_size == 32
    assert config.engine.num_blocks == 2048
    assert config.resources == {"prefill": {"node_a": 0.01}}


def test_service_classes() -> None:
    classes = {"chat": {"ttft_s": 1.0, "tpot_s": 0.05, "priority": 2}, "night": {"priority": -1}}
    given = {"classes": classes, "default": "chat", "api_keys": {"k": "night"}}
    service = parse_settings({"model": "m", "service": given}, source="test").service
    assert service.classes["chat"] == ServiceClassConfig(ttft_s=1.0, tpot_s=0.05, priority=2)
    assert service.classes["night"] == ServiceClassConfig(priority=-1)
    assert (service.default, service.api_keys) == ("chat", {"k": "night"})


def test_engines_by_role() -> None:
    given = {
        "engine": {"tp": 2, "num_blocks": 64},
        "prefill_engine": {"tp": 1},
        "decode_engine": {"dp": 3, "ep": 6},
    }
    config = parse_settings({"model": "m", **given}, source="test")
    cuts = {role: config.engine_of(role) for role in ("prefill", "decode", "mixed")}
    assert {role: (one.tp, one.ep, one.dp) for role, one in cuts.items()} == {
        "prefill": (1, 1, 1),
        "decode": (2, 6, 3),
        "mixed": (2, 1, 1),
    }
    assert {one.num_blocks for one in cuts.values()} == {64}


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "baton.yaml"
    path.write_text("model: a\nprefill: 2\nengine:\n  num_blocks: 64\n")
    config = load_settings(path, {"prefill": 4, "dtype": "bfloat16", "decode": None})
    assert config.prefill == 4
    assert config.decode == 1
    assert config.engine.num_blocks == 64
    assert config.engine.dtype == "bfloat16"


def test_the_file_knows_the_flags_by_their_names(tmp_path: Path) -> None:
    path = tmp_path / "baton.yaml"
    path.write_text("model: a\ndtype: bfloat16\nengine:\n  block_size: 32\n")
    config = load_settings(path, {})
    assert config.engine.dtype == "bfloat16"
    assert config.engine.block_size == 32
    path.write_text("model: a\ndtype: int3\n")
    with pytest.raises(ConfigError, match=r"engine\.dtype is 'int3'"):
        load_settings(path, {})
    path.write_text("model: a\ndtype: bfloat16\nengine: 5\n")
    with pytest.raises(ConfigError, match="engine"):
        load_settings(path, {})


BAD = [
    ({"modle": "x"}, ["modle", "'x'", "expected one of", "model"]),
    ({"prefill": "two"}, ["prefill", "'two'", "integer"]),
    ({"prefill": True}, ["prefill", "True", "integer"]),
    ({"prefill": 1.5}, ["prefill", "1.5", "integer"]),
    ({"prefill": -1}, ["prefill"]),
    ({"prefill": 0, "mixed": 0}, ["prefill=0"]),
    ({"http_port": 99999}, ["http_port", "99999", "65535"]),
    ({"store": "etcd://x"}, ["store", "etcd://x", "redis"]),
    ({"engine": {"dtype": "int4"}}, ["engine.dtype", "'int4'", "float32"]),
    ({"engine": {"blocks": 1}}, ["engine.blocks", "1", "expected one of", "num_blocks"]),
    ({"engine": {"block_size": 0}}, ["engine", "block_size", "0"]),
    ({"engine": 7}, ["engine", "7"]),
    (
        {"engine": {"max_num_seqs": 600, "max_num_batched_tokens": 512}},
        ["max_num_batched_tokens", "512", "600"],
    ),
    ({"prefill_engine": {"tp": 0}}, ["prefill_engine", "tp must be positive", "0"]),
    ({"prefill_engine": {"tp": "2"}}, ["prefill_engine.tp", "'2'", "integer"]),
    ({"decode_engine": {"dtype": "bfloat16"}}, ["decode_engine.dtype", "one of tp, ep, dp"]),
    ({"decode_engine": {"tp": 2, "ep": 3}}, ["decode_engine: ep must be 1 or tp * dp = 2", "3"]),
    ({"engine": {"ep": 2, "dp": 2}, "prefill_engine": {"tp": 2}}, ["prefill_engine: ep must be"]),
    ({"controller": {"dead_after_s": 0.5}}, ["controller", "dead_after_s"]),
    ({"gateway": {"max_replays": "many"}}, ["gateway.max_replays", "'many'"]),
    ({"handoff": {"transport": "pigeon"}}, ["handoff.transport", "'pigeon'", "shm"]),
    ({"resources": {"cook": {"a": 1}}}, ["resources", "cook"]),
    ({"resources": {"prefill": {"x": -1}}}, ["resources.prefill.x", "-1"]),
    ({"handoff": {"pull_timeout_s": float("inf")}}, ["handoff", "pull_timeout_s", "inf"]),
    ({"handoff": {"lease_s": float("nan")}}, ["handoff", "lease_s", "nan"]),
    ({"cluster": "a/b c"}, ["cluster", "'a/b c'", "letters"]),
    ({"cluster": ""}, ["cluster", "''"]),
    ({"served_model_name": ""}, ["served_model_name", "empty"]),
    ({"host": ""}, ["host", "empty"]),
    (
        {"service": {"classes": {"chat": {"ttft": 1.0}}}},
        ["unknown setting service.classes.chat.ttft", "1.0", "one of ttft_s, tpot_s"],
    ),
    ({"service": {"classes": {"chat": {"ttft_s": "1"}}}}, ["service.classes.chat.ttft_s", "'1'"]),
    ({"service": {"classes": {"chat": {"tpot_s": 0}}}}, ["service.classes.chat", "tpot_s", "0"]),
    ({"service": {"classes": {"chat": 5}}}, ["service.classes.chat", "5"]),
    ({"service": {"classes": {"a b": {}}}}, ["service", "classes", "'a b'"]),
    ({"service": {"classes": {"none": {}}}}, ["service", "classes", "'none'"]),
    ({"service": {"class": {}}}, ["service.class", "one of classes, default, api_keys"]),
    (
        {"service": {"classes": {"chat": {}}, "default": "talk"}},
        ["service", "default", "'talk'", "chat"],
    ),
    ({"service": {"api_keys": {"k": "chat"}}}, ["service", "api_keys.k", "'chat'", "none"]),
]


@pytest.mark.parametrize(("change", "words"), BAD, ids=[str(change) for change, _ in BAD])
def test_bad_settings_are_named(change: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        parse_settings({"model": "deploy/demo-model", **change}, source="baton.yaml")
    for word in ("baton.yaml", *words):
        assert word in error.value.message


BAD_FILES = [
    ("model: [unclosed", "not valid YAML"),
    ("- a\n- b\n", "must hold settings"),
    ("just text", "must hold settings"),
    ("prefill: 1\n", "model is missing"),
]


@pytest.mark.parametrize(("text", "words"), BAD_FILES)
def test_bad_files_are_named(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "baton.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_settings(path, {})


def test_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_settings(tmp_path / "none.yaml", {})
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"binary\.yaml"):
        load_settings(path, {})
