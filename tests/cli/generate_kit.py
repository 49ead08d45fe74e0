"""Runs ``baton generate`` as a user does: a process of its own, by default with the demo model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DEMO_MODEL = ROOT / "deploy" / "demo-model"
COMMAND = (sys.executable, "-m", "baton.cli.main", "generate")
LONG = (
    *("--model", str(DEMO_MODEL), "--prompt", "x", "--max-tokens", "4000", "--ignore-eos"),
    *("--temperature", "0"),
)
TIMEOUT_S = 120.0
EOS = (0, 2)  # of the demo model


def run(
    *args: str, model: Path = DEMO_MODEL, stdin: str | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, "--model", str(model), *args],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        cwd=ROOT,
        check=False,
    )


def answer(*args: str, model: Path = DEMO_MODEL, stdin: str | None = None) -> dict[str, Any]:
    """The object of ``--json``: all that is on standard output."""
    result = run(*args, "--json", model=model, stdin=stdin)
    assert result.returncode == 0, result.stderr
    value = json.loads(result.stdout)
    assert isinstance(value, dict)
    return value


def token_file(folder: Path, value: object) -> str:
    path = folder / "tokens.json"
    path.write_text(json.dumps(value))
    return str(path)


def copy_model(folder: Path, *leave_out: str) -> Path:
    model = folder / "model"
    shutil.copytree(DEMO_MODEL, model, ignore=shutil.ignore_patterns("*.py", *leave_out))
    return model
