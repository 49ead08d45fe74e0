# SPDX-License-Identifier: Apache-2.0
"""What the demo model learns from: the standard library's sources, and conversations about them."""

import ast
import hashlib
import os
import random
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# The BPE trainer counts words in parallel; one thread keeps a shared machine responsive.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = [END_OF_TEXT, IM_START, IM_END]  # they take the ids 0, 1 and 2

# Qwen's pre-tokenizer: a loader that rebuilds it from the model type then splits text as we did.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Content may be a string or OpenAI's list of parts, of which a text model can use the text.
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['content'] is string %}{{- message['content'] }}"
    "{%- elif message['content'] %}{%- for part in message['content'] %}"
    "{%- if part['type'] == 'text' %}{{- part['text'] }}{%- endif %}{%- endfor %}{%- endif %}"
    "{{- '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)

# Tests are repetitive; the others are tables or generated text that teach no Python.
SKIPPED_DIRS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
SKIPPED_DIRS |= {"encodings", "pydoc_data", "lib-dynload"}
SKIPPED_FILES = {"entities.py", "stringprep.py"}
HELD_OUT_EVERY = 40  # one file in so many, chosen by the hash of its path


@dataclass(frozen=True)
class Document:
    """One source file: its path below the library folder and its text."""

    name: str
    text: str


@dataclass
class Corpus:
    """Token ids of whole documents, each ended by its end-of-text token."""

    train: list[torch.Tensor]
    held_out: torch.Tensor
    held_out_chat: torch.Tensor


def collect(root: Path) -> tuple[list[Document], list[Document]]:
    """Return the library's own sources as (training, held-out) documents, in path order."""
    train: list[Document] = []
    held_out: list[Document] = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        # `_sysconfigdata*` and `config-*` describe the machine that built the interpreter.
        if SKIPPED_DIRS & set(relative.parts) or relative.parts[0].startswith("config-"):
            continue
        if path.name in SKIPPED_FILES or path.name.startswith("_sysconfigdata"):
            continue
        try:
            with tokenize.open(path) as file:  # honours the file's own coding line
                text = file.read()
        except (SyntaxError, UnicodeDecodeError):
            continue
        if len(text) < 200:
            continue
        name = relative.as_posix()
        digest = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
        (held_out if digest % HELD_OUT_EVERY == 0 else train).append(Document(name, text))
    return train, held_out


def render_chat(messages: list[tuple[str, str]]) -> str:
    """Format messages exactly as CHAT_TEMPLATE does (`train.py` checks that they agree)."""
    return "".join(f"{IM_START}{role}\n{content}{IM_END}\n" for role, content in messages)


def chat_samples(documents: list[Document], rng: random.Random, limit: int) -> list[str]:
    """Turn functions of the library into short conversations about completing or writing them."""
    samples: list[str] = []
    for document in documents:
        try:
            tree = ast.parse(document.text)
        except SyntaxError:
            continue
        lines = document.text.splitlines()
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef) or node.end_lineno is None:
                continue
            body = [line[node.col_offset :] for line in lines[node.lineno - 1 : node.end_lineno]]
            if not 4 <= len(body) <= 30:
                continue
            source = "\n".join(body)
            doc = (ast.get_docstring(node) or "").split("\n")[0].strip().rstrip(".")
            if rng.random() < 0.5:
                cut = rng.randrange(1, len(body) - 1)
                ask = rng.choice(["Complete this function:", "Continue this Python code:"])
                user, answer = f"{ask}\n\n" + "\n".join(body[:cut]), "\n".join(body[cut:])
            elif doc and rng.random() < 0.7:
                user, answer = f"Write a Python function named `{node.name}`: {doc}.", source
            else:
                user, answer = f"Write a Python function named `{node.name}`.", source
            messages = [("user", user), ("assistant", answer)]
            if rng.random() < 0.25:
                messages.insert(0, ("system", "You are a helpful assistant."))
            samples.append(render_chat(messages))
    rng.shuffle(samples)
    return samples[:limit]


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE: the 256 bytes are all in the vocabulary, so that no text is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def build_corpus(tokenizer: Tokenizer, stdlib: Path, seed: int, chats: int) -> Corpus:
    """Encode the library and the conversations made from it."""
    train, held_out = collect(stdlib)

    def encode(texts: list[str]) -> list[torch.Tensor]:
        encodings = tokenizer.encode_batch([text + END_OF_TEXT for text in texts])
        return [torch.tensor(encoding.ids) for encoding in encodings]

    chat_train = chat_samples(train, random.Random(seed), chats)
    chat_held = chat_samples(held_out, random.Random(seed), chats)
    return Corpus(
        train=encode([document.text for document in train] + chat_train),
        held_out=torch.cat(encode([document.text for document in held_out])),
        held_out_chat=torch.cat(encode(chat_held)),
    )


def batches(
    documents: list[torch.Tensor], seq_len: int, batch_tokens: int, seed: int
) -> Iterator[torch.Tensor]:
    """Yield shuffled [rows, seq_len + 1] windows over freshly shuffled documents, without end."""
    generator = torch.Generator().manual_seed(seed)
    rows = max(1, batch_tokens // seq_len)
    while True:
        order = torch.randperm(len(documents), generator=generator).tolist()
        stream = torch.cat([documents[index] for index in order])
        count = (len(stream) - 1) // seq_len
        starts = torch.randperm(count, generator=generator) * seq_len
        for first in range(0, count - rows + 1, rows):
            picked = starts[first : first + rows]
            yield torch.stack([stream[at : at + seq_len + 1] for at in picked.tolist()])
