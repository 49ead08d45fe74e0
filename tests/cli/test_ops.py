"""``baton ops`` as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from baton.core.config import EngineConfig
from baton.engine.checkpoint import open_checkpoint
from baton.engine.runner import InlineRunner

ROOT = Path(__file__).resolve().parents[2]
DEMO_MODEL = ROOT / "deploy" / "demo-model"


def ops(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "baton.cli.main", "ops", *args],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        check=False,
    )


def test_table() -> None:
    """Each choice of a real load has its line, with its reason."""
    done = ops("--model", str(DEMO_MODEL))
    assert done.returncode == 0, done.stderr
    config = EngineConfig(num_blocks=4, max_num_seqs=2)
    runner = InlineRunner(open_checkpoint(DEMO_MODEL), config)
    words = done.stdout.split()
    for choice in runner.ops.choices:
        assert choice.site.where in words
        assert choice.site.op in words
        assert choice.implementation.name in words
    runner.close()
    assert "best that can run here" in " ".join(words)
    assert "there is no override" in done.stdout
    assert "not used by this model: mla_attention, quantize, dequantize" in done.stdout


def test_json() -> None:
    done = ops("--model", str(DEMO_MODEL), "--dtype", "bfloat16", "--tp", "2", "--json")
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    assert (told["device"], told["dtype"], told["tp"], told["ep"]) == ("cpu", "bfloat16", 2, 1)
    by_place = {(row["where"], row["op"]): row for row in told["ops"]}
    assert len(by_place) == len(told["ops"])
    model = open_checkpoint(DEMO_MODEL).config
    attention = by_place["layers.*.attention", "paged_attention"]
    assert attention["shape"]["heads"] == model.num_heads // 2
    assert attention["implementation"] == "sdpa"
    assert attention["weights"] is None
    assert attention["passed_over"] == [{"implementation": "reference", "reason": "priority 0"}]
    head = by_place["lm_head", "linear"]
    assert head["shape"]["out_features"] == model.vocab_size // 2
    assert head["weights"] in ("oneDNN blocks", "[out, in]")
    assert all(row["reason"] for row in told["ops"])
    assert told["unused"] == ["mla_attention", "quantize", "dequantize"]


NO_GPU = ("--device", "cuda"), ["cuda", "not there"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--tp", "3"), ["tp=3", "another number of ranks"]),
        (("--device", "abacus"), ["engine.device", "abacus"]),
        (("--dtype", "int3"), ["engine.dtype", "int3"]),
        (("--tp", "2", "--ep", "3"), ["ep must be 1 or tp * dp"]),
        *([] if torch.accelerator.is_available() else [NO_GPU]),
    ],
)
def test_refusals(args: tuple[str, ...], words: list[str]) -> None:
    refused(ops("--model", str(DEMO_MODEL), *args), words)


def test_no_model(tmp_path: Path) -> None:
    refused(ops(), ["model is missing", "--model DIR"])
    refused(ops("--model", str(tmp_path / "none")), ["none", "no such folder"])


def refused(done: subprocess.CompletedProcess[str], words: list[str]) -> None:
    """One sentence, exit code 2."""
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("baton: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    for word in words:
        assert word in lines[0]
