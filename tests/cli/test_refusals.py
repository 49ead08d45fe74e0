"""``baton serve`` on broken models and settings: one sentence, exit code 2, nothing started."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DEMO_MODEL = ROOT / "deploy" / "demo-model"


def _edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4096])


def _garbage(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"not a checkpoint at all")


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _bad_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


BROKEN: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "no-config": (_no_config, ["config.json"]),
    "bad-json": (_bad_json, ["config.json"]),
    "no-weights": (_no_weights, ["safetensors"]),
    "truncated": (_truncate, ["model.safetensors"]),
    "garbage": (_garbage, ["model.safetensors"]),
    "architecture": (
        lambda folder: _edit_config(folder, architectures=["GPT2LMHeadModel"]),
        ["GPT2LMHeadModel", "config.json"],
    ),
    "shapes": (lambda folder: _edit_config(folder, num_experts=6), ["model.safetensors"]),
    "layers": (lambda folder: _edit_config(folder, num_hidden_layers=9), ["model.safetensors"]),
}


def _serve(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "baton.cli.main", "serve", *args, "--cluster", "refused"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        check=False,
    )


def _assert_one_sentence(result: subprocess.CompletedProcess[str], words: list[str]) -> None:
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("baton: ")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in lines[0]


@pytest.mark.parametrize("case", list(BROKEN))
def test_broken_model_folders(case: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(DEMO_MODEL, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    damage, words = BROKEN[case]
    damage(folder)
    _assert_one_sentence(_serve("--model", str(folder)), words)


def test_missing_folder() -> None:
    _assert_one_sentence(_serve("--model", "/nowhere/at/all"), ["/nowhere/at/all"])


def test_missing_model_setting() -> None:
    _assert_one_sentence(_serve(), ["model"])


def test_wrong_flag_value() -> None:
    _assert_one_sentence(
        _serve("--model", str(DEMO_MODEL), "--dtype", "int3"), ["engine.dtype", "int3"]
    )


def test_context_longer_than_the_model(tmp_path: Path) -> None:
    path = tmp_path / "baton.yaml"
    path.write_text(f"model: {DEMO_MODEL}\nengine:\n  max_model_len: 10000000\n")
    _assert_one_sentence(_serve("--config", str(path)), ["max_model_len", "10000000"])


def test_ranks_of_a_role_that_the_model_cannot_have(tmp_path: Path) -> None:
    path = tmp_path / "baton.yaml"
    path.write_text(f"model: {DEMO_MODEL}\ndecode_engine:\n  tp: 4\n")
    _assert_one_sentence(_serve("--config", str(path)), ["decode_engine: ", "tp=4"])


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("policy: fastest", ["controller.policy", "fastest", "least-loaded"]),
        ("policy: nowhere.at_all:Mine", ["controller.policy", "nowhere"]),
        ("policy: json:JSONDecoder", ["controller.policy", "has no 'name'"]),
        ("profile: /nowhere/at/all.yaml", ["profile", "/nowhere/at/all.yaml"]),
        ("admission: {max_ttft_factor: -1}", ["controller.admission", "max_ttft_factor"]),
    ],
)
def test_what_the_controller_cannot_do(setting: str, words: list[str], tmp_path: Path) -> None:
    path = tmp_path / "baton.yaml"
    path.write_text(f"model: {DEMO_MODEL}\ncontroller:\n  {setting}\n")
    _assert_one_sentence(_serve("--config", str(path)), words)
