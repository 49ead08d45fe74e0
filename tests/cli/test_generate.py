"""``baton generate`` as a user runs it: real processes, the demo model, transformers as oracle."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from baton.core.config import EngineConfig
from baton.core.request import FinishReason, SamplingParams
from baton.engine.checkpoint import open_checkpoint
from baton.engine.offline import OfflineEngine, OfflineRequest, fit_to_batch
from tests.cli.generate_kit import (
    COMMAND,
    DEMO_MODEL,
    EOS,
    LONG,
    ROOT,
    TIMEOUT_S,
    answer,
    copy_model,
    run,
    token_file,
)
from tests.cluster import oracle

# One prompt.


def test_greedy_tokens_of_a_text_are_those_of_transformers() -> None:
    prompt = "import os\n\n\ndef read_config(path):\n"
    found = answer("--prompt", prompt, "--max-tokens", "24", "--temperature", "0")
    ids = oracle.tokenizer()(prompt)["input_ids"]
    assert found["num_prompt_tokens"] == len(ids)
    oracle.check_greedy(ids, found["token_ids"])
    assert found["text"] == oracle.tokenizer().decode(found["token_ids"], skip_special_tokens=True)
    if len(found["token_ids"]) == 24:
        assert found["finish_reason"] == "length"
    else:
        assert found["finish_reason"] == "stop"
    assert found["dtype"] == "float32"
    assert "logprobs" not in found
    timings = found["timings"]
    assert min(timings[name] for name in ("load_s", "prefill_s", "decode_tokens_per_s")) > 0
    assert timings["prefill_s"] <= timings["total_s"]
    # One step for the prompt, one for each further token, and perhaps one that was in vain.
    assert len(found["token_ids"]) <= timings["num_steps"] <= len(found["token_ids"]) + 1


def test_without_json_the_text_streams_alone_and_timings_go_to_standard_error() -> None:
    args = ("--prompt", "class Queue:", "--max-tokens", "16", "--temperature", "0")
    result = run(*args)
    assert result.returncode == 0, result.stderr
    assert result.stdout == answer(*args)["text"] + "\n"
    assert "tokens/s" in result.stderr
    assert "loading demo-model" in result.stderr


def test_chat_is_what_the_template_makes_of_the_prompt() -> None:
    found = answer("--prompt", "Write a function.", "--chat", "--max-tokens", "8", "--seed", "1")
    ids = oracle.tokenizer().apply_chat_template(
        [{"role": "user", "content": "Write a function."}],
        add_generation_prompt=True,
        return_dict=True,
    )["input_ids"]
    file = ("--prompt-token-ids", "-", "--max-tokens", "8", "--seed", "1")
    again = answer(*file, stdin=json.dumps(ids))
    assert found["num_prompt_tokens"] == len(ids)
    assert found["token_ids"] == again["token_ids"]


def test_seeds_reproduce_and_are_told() -> None:
    args = ("--prompt", "def f(", "--max-tokens", "16", "--temperature", "1.2", "--top-k", "50")
    first = answer(*args)
    again = answer(*args, "--seed", str(first["seed"]))
    other = answer(*args, "--seed", str(first["seed"] ^ 1))
    assert again["token_ids"] == first["token_ids"]
    assert other["token_ids"] != first["token_ids"]
    ids = oracle.tokenizer()("def f(")["input_ids"]
    output = [token for token in first["token_ids"] if token not in EOS]
    oracle.check_sampled(ids, output, seed=first["seed"], temperature=1.2, top_k=50)


def test_stop_token_ids_and_the_models_own_end() -> None:
    ids = oracle.prompts(8)[5]
    plain = answer(
        *("--prompt-token-ids", "-", "--max-tokens", "12", "--temperature", "0", "--ignore-eos"),
        stdin=json.dumps(ids),
    )
    tokens = plain["token_ids"]
    assert len(tokens) == 12
    stop = tokens[6]
    found = answer(
        *("--prompt-token-ids", "-", "--max-tokens", "12", "--temperature", "0"),
        *("--stop-token-id", str(stop), "--stop-token-id", "11", "--ignore-eos"),
        stdin=json.dumps(ids),
    )
    end = min(tokens.index(token) for token in (stop, 11) if token in tokens)
    assert found["token_ids"] == tokens[: end + 1]
    assert found["finish_reason"] == "stop"
    assert found["text"] == oracle.tokenizer().decode(tokens[:end], skip_special_tokens=True)


def test_the_models_own_end_tokens_end_it_unless_ignored(tmp_path: Path) -> None:
    """With an end token that the model is sure to draw: the one that greedy decoding draws."""
    args = ("--prompt-token-ids", "-", "--max-tokens", "6", "--temperature", "0")
    ids = json.dumps(oracle.prompts(8)[4])
    tokens = answer(*args, "--ignore-eos", stdin=ids)["token_ids"]
    model = copy_model(tmp_path)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [tokens[2]]}))
    end = tokens.index(tokens[2])
    ended = answer(*args, model=model, stdin=ids)
    assert (ended["token_ids"], ended["finish_reason"]) == (tokens[: end + 1], "stop")
    ignored = answer(*args, "--ignore-eos", model=model, stdin=ids)
    assert (ignored["token_ids"], ignored["finish_reason"]) == (tokens, "length")


def test_logprobs_are_those_of_transformers() -> None:
    ids = oracle.prompts(8)[3]
    found = answer(
        *("--prompt-token-ids", "-", "--max-tokens", "5", "--temperature", "0"),
        *("--logprobs", "3", "--ignore-eos"),
        stdin=json.dumps(ids),
    )
    logits = oracle.forced(ids, found["token_ids"]).logits
    expected = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    assert [item["token_id"] for item in found["logprobs"]] == found["token_ids"]
    for row, item in zip(expected, found["logprobs"], strict=True):
        assert item["logprob"] == pytest.approx(row[item["token_id"]], abs=1e-3)
        assert len(item["top"]) == 3
        for token, logprob in item["top"]:
            assert logprob == pytest.approx(row[token], abs=1e-3)


# Batches.


def test_a_batch_from_a_file_without_a_tokenizer(tmp_path: Path) -> None:
    """Ragged prompts in a cache too small for all, in small chunks: each as if it were alone."""
    model = copy_model(tmp_path, "tokenizer*")
    prompts = oracle.prompts(6, longest=90)
    found = answer(
        *("--prompt-token-ids", token_file(tmp_path, prompts), "--max-tokens", "12"),
        *("--temperature", "0", "--num-blocks", "20", "--block-size", "8"),
        *("--max-num-batched-tokens", "32", "--ignore-eos"),
        model=model,
    )
    assert found["text"] is None
    assert found["num_prompt_tokens"] == [len(prompt) for prompt in prompts]
    assert found["finish_reason"] == ["length"] * 6
    for prompt, tokens in zip(prompts, found["token_ids"], strict=True):
        assert len(tokens) == 12
        oracle.check_greedy(prompt, tokens)


def test_a_batch_of_texts_draws_what_each_alone_draws() -> None:
    args = ("--max-tokens", "8", "--seed", "-5", "--temperature", "0.9", "--top-p", "0.95")
    texts = ["import os", "class A:\n    def"]
    both = answer("--prompt", texts[0], "--prompt", texts[1], *args)
    for place, text in enumerate(texts):
        alone = answer("--prompt", text, *args)
        assert both["token_ids"][place] == alone["token_ids"]
        assert both["text"][place] == alone["text"]
        assert both["finish_reason"][place] == alone["finish_reason"]


def test_an_engine_takes_batch_after_batch_in_a_cache_made_for_them() -> None:
    torch.set_num_threads(1)
    prompts = [tuple(prompt) for prompt in oracle.prompts(5, longest=40)]
    greedy = SamplingParams(temperature=0.0, max_tokens=6)
    batch = [OfflineRequest(prompt, greedy) for prompt in prompts]
    config = fit_to_batch(EngineConfig(max_num_batched_tokens=64, block_size=4), batch)
    assert config.max_num_seqs == 5
    seen: list[tuple[int, int]] = []
    with OfflineEngine(open_checkpoint(DEMO_MODEL), config) as engine:
        first = engine.generate(
            batch, on_tokens=lambda place, event: seen.extend((place, t) for t in event.token_ids)
        )
        again = engine.generate(batch[::-1])
        assert engine.num_preemptions == 0
    for place, (prompt, output) in enumerate(zip(prompts, first.outputs, strict=True)):
        oracle.check_greedy(prompt, output.token_ids)
        assert output.finish_reason is FinishReason.LENGTH
        assert [token for at, token in seen if at == place] == output.token_ids
    assert [output.token_ids for output in again.outputs[::-1]] == [
        output.token_ids for output in first.outputs
    ]
    # All prompts fit into two steps; then one step for each further token of all.
    assert first.timings.num_steps <= 2 + 6
    assert 0 < first.timings.prefill_s < first.timings.total_s
    assert engine.load_s > 0


# Purity and ends.


def test_nothing_else_is_ever_on_standard_output(tmp_path: Path) -> None:
    """A library that prints, through Python and through the descriptor, does not spoil the JSON."""
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, os, threading\n"
        "real = threading.Thread.start\n"
        "def start(self):\n"
        "    print('chatter from python'); os.write(1, b'chatter from below\\n')\n"
        "    real(self)\n"
        "threading.Thread.start = start\n"
    )
    result = subprocess.run(
        [*COMMAND, "--model", str(DEMO_MODEL), "--prompt", "x", "--max-tokens", "2", "--json"],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert set(json.loads(result.stdout)) >= {"model", "token_ids", "text", "timings"}
    assert "chatter from python" in result.stderr
    assert "chatter from below" in result.stderr


def test_a_bar_on_a_terminal() -> None:
    """Standard error is a terminal: the bar is drawn there, and standard output stays clean."""
    reader, writer = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, "--model", str(DEMO_MODEL), "--prompt", "x", "--max-tokens", "2", "--json"],
        stdout=subprocess.PIPE,
        stderr=writer,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
        cwd=ROOT,
    )
    os.close(writer)
    shown = b""
    try:
        while chunk := os.read(reader, 4096):
            shown += chunk
    except OSError:  # the terminal's other end is closed
        pass
    finally:
        os.close(reader)
    stdout, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, shown
    assert b"loading demo-model" in shown
    assert b"\x1b[" in shown
    assert json.loads(stdout)["text"] is not None


@pytest.mark.parametrize(
    ("number", "ranks"),
    [(signal.SIGINT, ()), (signal.SIGTERM, ()), (signal.SIGINT, ("--tp", "2"))],
    ids=["ctrl-c", "sigterm", "ctrl-c-with-ranks"],
)
def test_a_signal_ends_it_and_leaves_no_process(
    number: signal.Signals, ranks: tuple[str, ...]
) -> None:
    """In the middle of the answer, sent to all processes of the terminal as Ctrl-C is."""
    process = subprocess.Popen(
        [*COMMAND, *LONG, *ranks],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.read(8), process.stderr.read().decode()
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) == (2 if ranks else 0)
    os.killpg(process.pid, number)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 128 + number, stderr.decode()
    assert b"Traceback" not in stderr
    assert not psutil.wait_procs(children, timeout=10)[1]


def test_a_reader_that_goes_away_is_no_bug() -> None:
    process = subprocess.Popen(
        [*COMMAND, *LONG],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.read(4), process.stderr.read().decode()
    process.stdout.close()
    stderr = process.stderr.read()
    assert process.wait(timeout=30) == 1
    assert b"Traceback" not in stderr, stderr.decode()


# Ranks.


@pytest.mark.parametrize(
    "ranks",
    [("--tp", "2"), ("--ep", "2"), ("--dp", "2"), ("--tp", "2", "--ep", "2")],
    ids=lambda ranks: "".join(ranks).replace("--", ""),
)
def test_ranks_give_the_tokens_of_transformers(ranks: tuple[str, ...]) -> None:
    prompts = oracle.prompts(4, longest=60)
    found = answer(
        *("--prompt-token-ids", "-", "--max-tokens", "8", "--temperature", "0", "--ignore-eos"),
        *ranks,
        stdin=json.dumps(prompts),
    )
    for prompt, tokens in zip(prompts, found["token_ids"], strict=True):
        assert len(tokens) == 8
        oracle.check_greedy(prompt, tokens)
