"""``baton profile`` as a user runs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from baton.cli.settings import load_settings
from baton.core.errors import ConfigError
from baton.engine.profile_file import load_profile

ROOT = Path(__file__).resolve().parents[2]
DEMO_MODEL = ROOT / "deploy" / "demo-model"
SMALL = (
    *("--max-num-seqs", "4", "--max-num-batched-tokens", "32", "--max-model-len", "64"),
    *("--num-blocks", "40", "--rounds", "1"),
)


def profile(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "baton.cli.main", "profile", *args],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        check=False,
    )


def test_what_is_measured_is_a_profile_that_an_emulated_cluster_takes(tmp_path: Path) -> None:
    out = tmp_path / "here.yaml"
    done = profile("--model", str(DEMO_MODEL), *SMALL, "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "mean error of prefill steps" in done.stdout
    found = load_profile(out)
    assert found.source.startswith("fitted")
    assert found.cost.decode_s(1, 10) > 0
    assert found.cost.prefill_s(30) > 0
    assert found.cost.kv_bytes_per_token == 4 * 2 * 2 * 32 * 4
    flags = {"model": str(DEMO_MODEL), "device": "emulated", "profile": str(out)}
    engine = load_settings(None, flags).engine
    assert (engine.num_blocks, engine.max_num_seqs, engine.max_model_len) == (40, 4, 64)


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ((), "--out FILE"),
        (("--out", "/nowhere/x.yaml"), "no such folder"),
        (("--out", "x.yaml", "--model", "/nowhere"), "/nowhere"),
        (("--out", "x.yaml", "--model", str(DEMO_MODEL), "--max-num-seqs", "9999"), "max_num"),
        (("--out", "x.yaml", "--model", str(DEMO_MODEL), "--dtype", "int8"), "int8"),
    ],
)
def test_what_cannot_be_measured_is_refused_first(args: tuple[str, ...], named: str) -> None:
    done = profile(*args)
    assert done.returncode == 2
    assert named in done.stderr
    assert not (ROOT / "x.yaml").exists()


def test_sizes_that_a_user_gives_win_over_the_profile() -> None:
    path = ROOT / "benchmarks/profiles/ascend-910b-qwen2.5-7b.yaml"
    flags: dict[str, Any] = {"model": "m", "profile": str(path), "device": "emulated"}
    plain = load_settings(None, flags).engine
    assert (plain.block_size, plain.num_blocks, plain.max_num_seqs) == (128, 5776, 512)
    flags["engine"] = {"block_size": 64, "max_num_seqs": 8}
    given = load_settings(None, flags).engine
    assert (given.block_size, given.num_blocks, given.max_num_seqs) == (64, 11553, 8)


def test_a_profile_that_cannot_be_read_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml cannot be read"):
        load_settings(None, {"model": "m", "device": "emulated", "profile": "nowhere.yaml"})
