from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.core.errors import ConfigError, InvalidRequest
from baton.gateway.model_info import load_model_info
from baton.gateway.tokenizer import Detokenizer, GatewayTokenizer
from tests.gateway.gateway_support import EOS, VOCAB

TEXTS = st.text(max_size=60) | st.text("aé世🙂 \n", max_size=60)


@given(text=TEXTS)
def test_pieces_join_to_the_text(tokenizer: GatewayTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=False)
    pieces = [detokenizer.push([token]) for token in ids]
    assert "".join(pieces) + detokenizer.flush() == text
    if "�" not in text:
        assert not any("�" in piece for piece in pieces)


@given(ids=st.lists(st.integers(0, VOCAB - 1), max_size=120), skip=st.booleans())
def test_any_tokens_give_the_decoded_text(
    tokenizer: GatewayTokenizer, ids: list[int], skip: bool
) -> None:
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
    text = "".join(detokenizer.push([token]) for token in ids) + detokenizer.flush()
    assert text == tokenizer.decode(ids, skip_special_tokens=skip)


@given(count=st.integers(1, 200))
def test_long_runs_of_broken_bytes_stay_bounded(tokenizer: GatewayTokenizer, count: int) -> None:
    broken = tokenizer.encode("世")[:1] * count
    detokenizer = Detokenizer(tokenizer)
    text = "".join(detokenizer.push([token]) for token in broken) + detokenizer.flush()
    assert text == tokenizer.decode(broken)


@given(ids=st.lists(st.integers(0, VOCAB - 1), max_size=40), cut=st.integers(0, 40))
def test_grouping_of_tokens_does_not_matter(
    tokenizer: GatewayTokenizer, ids: list[int], cut: int
) -> None:
    one, two = Detokenizer(tokenizer), Detokenizer(tokenizer)
    assert one.push(ids) == two.push(ids[:cut]) + two.push(ids[cut:])
    assert one.flush() == two.flush()


def test_incomplete_character_waits_and_is_flushed(tokenizer: GatewayTokenizer) -> None:
    ids = [token for char in "🙂" for token in tokenizer.encode(char)]
    assert len(ids) > 1
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push([token]) for token in ids[:-1]] == [""] * (len(ids) - 1)
    assert "�" in detokenizer.flush()


async def test_chat_template(tokenizer: GatewayTokenizer) -> None:
    messages = [{"role": "user", "content": "hé"}]
    text = tokenizer.render_chat(messages)
    assert text == "<|im_start|>user\nhé<|im_end|>\n<|im_start|>assistant\n"
    ids = await tokenizer.encode_chat(messages)
    assert ids[0] == 0
    assert EOS in ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_template_that_refuses_names_the_field(tokenizer: GatewayTokenizer) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]
    with pytest.raises(InvalidRequest, match="system must come first") as caught:
        tokenizer.render_chat(messages)
    assert caught.value.param == "messages"


async def test_long_text_is_encoded_the_same(tokenizer: GatewayTokenizer) -> None:
    text = "def hello 世界 " * 1000
    assert await tokenizer.encode_async(text) == tokenizer.encode(text)


def test_model_facts(model_dir: Path) -> None:
    info = load_model_info(model_dir)
    assert info.eos_token_ids == (1, 2)
    assert (info.vocab_size, info.max_model_len) == (VOCAB, 256)
    assert load_model_info(model_dir, max_model_len=64).max_model_len == 64


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, "config.json is missing"),
        ("{", "cannot be read"),
        ("[]", "JSON object"),
        ('{"vocab_size": 5}', "max_position_embeddings"),
        ('{"max_position_embeddings": 5, "vocab_size": "x"}', "vocab_size"),
    ],
)
def test_broken_folders(tmp_path: Path, config: str | None, expected: str) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(ConfigError, match=expected):
        load_model_info(tmp_path)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_model_info(tmp_path / "nowhere")


def test_tokenizer_may_be_missing_but_not_broken(tmp_path: Path) -> None:
    assert GatewayTokenizer.load(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text(json.dumps({"no": "tokenizer"}))
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        GatewayTokenizer.load(tmp_path)


def test_gateway_process_never_imports_torch(model_dir: Path) -> None:
    program = f"""
import sys
from pathlib import Path
import baton.gateway.server
from baton.gateway.tokenizer import GatewayTokenizer
tokenizer = GatewayTokenizer.load(Path({str(model_dir)!r}))
tokenizer.render_chat([{{"role": "user", "content": "x"}}])
tokenizer.decode(tokenizer.encode("x"))
assert "ray" not in sys.modules
assert "torch" not in sys.modules
"""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
