"""``baton generate`` on what it cannot do: one sentence, exit code 2, an empty standard output."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.generate_kit import COMMAND, ROOT, TIMEOUT_S, copy_model, run

ONE = ("--prompt", "x")
FEW = ("--prompt-token-ids", "-")
BAD: dict[str, tuple[tuple[str, ...], str | None, list[str]]] = {
    "no-prompt": ((), None, ["--prompt", "--prompt-token-ids"]),
    "both-prompts": ((*ONE, *FEW), "[1]", ["--prompt", "not both"]),
    "chat-without-text": ((*FEW, "--chat"), "[1]", ["--chat"]),
    "empty-text": (("--prompt", ""), None, ["empty"]),
    "no-such-file": (("--prompt-token-ids", "/no/where.json"), None, ["/no/where.json"]),
    "bad-json": (FEW, "[1, 2", ["JSON"]),
    "deep-json": (FEW, "[" * 100_000, ["JSON"]),
    "not-a-list": (FEW, '{"a": 1}', ["list of token ids"]),
    "strings": (FEW, '["a"]', ["list of token ids"]),
    "booleans": (FEW, "[true]", ["list of token ids"]),
    "mixed": (FEW, "[[1], 2]", ["list of token ids"]),
    "empty-list": (FEW, "[]", ["empty"]),
    "an-empty-list": (FEW, "[[1], []]", ["empty"]),
    "token-out-of-range": (FEW, "[1, 99999999]", ["99999999", "vocabulary"]),
    "token-in-a-batch": (FEW, "[[1], [-1]]", ["prompt 1", "-1", "vocabulary"]),
    "too-long": (FEW, json.dumps([5] * 100_000), ["100000 tokens", "context"]),
    "too-long-for-the-cache": (
        (*FEW, "--num-blocks", "2", "--block-size", "4", "--max-tokens", "8"),
        "[1, 2, 3, 4]",
        ["max_tokens is 8", "context of 8"],
    ),
    "no-tokens": ((*ONE, "--max-tokens", "0"), None, ["max_tokens", "0"]),
    "temperature": ((*ONE, "--temperature", "2.5"), None, ["temperature", "2.5"]),
    "nan": ((*ONE, "--top-p", "nan"), None, ["top_p", "nan"]),
    "logprobs": ((*ONE, "--logprobs", "99"), None, ["logprobs", "99"]),
    "seed": ((*ONE, "--seed", str(2**64)), None, ["seed", str(2**64)]),
    "stop-token": ((*ONE, "--stop-token-id", "99999999"), None, ["99999999", "vocabulary"]),
    "dtype": ((*ONE, "--dtype", "int3"), None, ["dtype", "int3"]),
    "device": ((*ONE, "--device", "abacus"), None, ["device", "abacus"]),
    "threads": ((*ONE, "--num-threads", "0"), None, ["num_threads", "0"]),
    "no-ranks": ((*ONE, "--tp", "0"), None, ["tp", "0"]),
    "heads-do-not-divide": ((*ONE, "--tp", "4"), None, ["num_attention_heads 6", "tp=4"]),
    "more-ranks-than-experts": ((*ONE, "--ep", "16"), None, ["8 experts", "ep=16"]),
    "ep-of-some-ranks": ((*ONE, "--tp", "2", "--dp", "2", "--ep", "2"), None, ["ep"]),
}


def assert_refused(result: subprocess.CompletedProcess[str], words: list[str]) -> None:
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("baton: ")]
    lines = [line for line in lines if not line.startswith("baton: loading")]
    assert len(lines) == 1, result.stderr
    for word in words:
        assert word in lines[0]


@pytest.mark.parametrize("case", list(BAD))
def test_bad_input(case: str) -> None:
    args, stdin, words = BAD[case]
    assert_refused(run(*args, "--json", stdin=stdin), words)


FOLDERS: dict[str, tuple[Callable[[Path], Path], list[str]]] = {
    "nothing": (lambda folder: folder / "nowhere", ["nowhere"]),
    "no-tokenizer": (
        lambda folder: copy_model(folder, "tokenizer*"),
        ["tokenizer.json", "--prompt-token-ids"],
    ),
    "no-weights": (lambda folder: copy_model(folder, "*.safetensors"), ["safetensors"]),
}


@pytest.mark.parametrize("case", list(FOLDERS))
def test_bad_folder(case: str, tmp_path: Path) -> None:
    make, words = FOLDERS[case]
    assert_refused(run(*ONE, model=make(tmp_path)), words)


def test_no_folder() -> None:
    result = subprocess.run(
        [*COMMAND, *ONE], capture_output=True, text=True, timeout=TIMEOUT_S, cwd=ROOT, check=False
    )
    assert_refused(result, ["--model"])


def test_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert_refused(run(*ONE, "--device", "cuda"), ["device cuda"])
