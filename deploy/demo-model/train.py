# SPDX-License-Identifier: Apache-2.0
"""Train Baton's demo model: a small Qwen3-MoE that has read the Python standard library.

The demo model exists so that a fresh checkout can serve something real without a download: real
routing decisions, a real tokenizer and chat template, and text that looks like Python. Everything
it learns from ships with the interpreter that runs this script.

    python deploy/demo-model/train.py --out deploy/demo-model
"""

import argparse
import ast
import hashlib
import json
import math
import os
import platform
import random
import sysconfig
import time
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The BPE trainer counts words in parallel; one thread keeps a shared machine responsive.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

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

SAMPLE_PROMPTS = ["def read_", "class Queue:\n", "import os\n\n\ndef "]
SAMPLE_CHAT = "Write a Python function named `is_empty`."


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
    """Format messages exactly as CHAT_TEMPLATE does (`write_folder` checks that they agree)."""
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


def model_config(args: argparse.Namespace) -> Qwen3MoeConfig:
    """The architecture; config.json is written from here.

    No two of the matrix widths (hidden 256, queries 192, keys 64, experts 128) are equal, so that a
    loader that mixes up two of them fails instead of computing nonsense.
    """
    return Qwen3MoeConfig(
        vocab_size=args.vocab,
        hidden_size=256,
        intermediate_size=512,  # of dense layers, of which there are none
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        tie_word_embeddings=True,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        router_aux_loss_coef=args.aux,
        bos_token_id=None,
        eos_token_id=[0, 2],
        pad_token_id=0,
    )


def balance_loss(router_logits: tuple[torch.Tensor, ...], top_k: int) -> torch.Tensor:
    """Switch-style load balancing, layer by layer: 1 when a layer uses its experts evenly.

    The loss that comes with the model averages over the layers first, so that two badly balanced
    layers may cancel; the sum over layers may not.
    """
    losses = []
    for logits in router_logits:
        probabilities = logits.float().softmax(-1)
        chosen = probabilities.topk(top_k, dim=-1).indices
        share = F.one_hot(chosen, logits.shape[-1]).float().sum(1).mean(0) / top_k
        losses.append(logits.shape[-1] * (share * probabilities.mean(0)).sum())
    return torch.stack(losses).mean()


def forward_loss(
    model: Qwen3MoeForCausalLM, window: torch.Tensor
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Mean next-token loss of the windows, and the router logits of every layer."""
    out = model.model(input_ids=window[:, :-1], use_cache=False, output_router_logits=True)
    logits = model.lm_head(out.last_hidden_state).float()
    loss = F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
    return loss, out.router_logits


@torch.no_grad()
def evaluate(model: Qwen3MoeForCausalLM, ids: torch.Tensor, seq_len: int) -> dict[str, Any]:
    """Loss over consecutive windows of `ids`, and how clearly and evenly the routers choose."""
    top_k = model.config.num_experts_per_tok
    total, count = 0.0, 0
    margins: list[torch.Tensor] = []
    loads = torch.zeros(model.config.num_hidden_layers, model.config.num_experts)
    for first in range(0, len(ids) - 1, seq_len * 8):
        piece = ids[first : first + seq_len * 8 + 1]
        rows = (len(piece) - 1) // seq_len
        if rows == 0:
            break
        window = torch.stack([piece[i * seq_len : (i + 1) * seq_len + 1] for i in range(rows)])
        loss, routers = forward_loss(model, window)
        total, count = total + loss.item() * rows * seq_len, count + rows * seq_len
        for layer, logits in enumerate(routers):
            ranked = logits.float().softmax(-1).topk(top_k + 1, dim=-1)
            margins.append(ranked.values[:, top_k - 1] - ranked.values[:, top_k])
            loads[layer] += F.one_hot(ranked.indices[:, :top_k], loads.shape[1]).sum((0, 1))
    loads /= loads.sum(-1, keepdim=True)
    quantiles = torch.cat(margins).quantile(torch.tensor([0.01, 0.1, 0.5])).tolist()
    return {
        "loss": round(total / count, 4),
        "tokens": count,
        "router_margin_p1_p10_p50": [round(value, 5) for value in quantiles],
        "expert_share_min_max": [round(loads.min().item(), 4), round(loads.max().item(), 4)],
    }


@torch.no_grad()
def samples(
    model: Qwen3MoeForCausalLM, tokenizer: Tokenizer, seed: int, tokens: int
) -> Iterator[str]:
    """Yield sampled continuations of the fixed prompts and one answer to a chat message."""
    chat = render_chat([("user", SAMPLE_CHAT)]) + f"{IM_START}assistant\n"
    for prompt in [*SAMPLE_PROMPTS, chat]:
        torch.manual_seed(seed)
        ids = torch.tensor([tokenizer.encode(prompt).ids])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=True,
            temperature=0.6,
            top_p=0.95,
        )
        yield tokenizer.decode(out[0].tolist(), skip_special_tokens=False)


def write_folder(model: Qwen3MoeForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Write the Hugging Face folder; the weights are bfloat16, expert by expert as published."""
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    # Readers of the older format, and of the published Qwen3-MoE files, look for these names.
    config["num_experts"] = config["num_local_experts"]
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    config["torch_dtype"] = "bfloat16"
    (out / "model.safetensors").chmod(0o644)
    generation = {"eos_token_id": [0, 2], "pad_token_id": 0}
    tokenizer.save(str(out / "tokenizer.json"))
    tokens = {
        str(index): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for index, token in enumerate(SPECIAL_TOKENS)
    }
    tokenizer_config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": tokens,
        "additional_special_tokens": [IM_START, IM_END],
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": IM_END,
        "model_max_length": model.config.max_position_embeddings,
        "pad_token": END_OF_TEXT,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
    }
    for name, content in [
        ("config.json", config),
        ("generation_config.json", generation),
        ("tokenizer_config.json", tokenizer_config),
    ]:
        (out / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def train(args: argparse.Namespace, corpus: Corpus, tokenizer: Tokenizer) -> tuple[int, float]:
    """Train, writing the folder now and then and at the end; return tokens seen and seconds."""
    torch.manual_seed(args.seed)
    # The working copy is bfloat16 and AdamW updates an fp32 master copy: the loss that training
    # lowers is then the loss of the weights that are saved.
    model = Qwen3MoeForCausalLM(model_config(args)).bfloat16()
    model.set_attn_implementation("sdpa")
    model.set_experts_implementation("grouped_mm")
    model.train()
    working = list(model.parameters())
    master = [p.detach().float().clone() for p in working]
    decay = [p for p in master if p.ndim > 1]
    plain = [p for p in master if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
        fused=True,
    )
    count = sum(p.numel() for p in working)
    print(f"{count:,} parameters, {sum(map(len, corpus.train)):,} training tokens", flush=True)
    short = batches(corpus.train, args.seq_len, args.batch_tokens, args.seed)
    long = batches(corpus.train, args.long_seq_len, args.batch_tokens, args.seed + 1)
    started = reported = saved = time.monotonic()
    step, seen, average = 0, 0, math.log(args.vocab)
    while True:
        elapsed = time.monotonic() - started
        # With both limits set, the one that ends first also shapes the schedule.
        done = max(step / args.steps, elapsed / (args.minutes * 60) if args.minutes else 0.0)
        if done >= 1:
            break
        cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))
        rate = args.lr * min(1.0, (step + 1) / args.warmup) * cosine
        window = next(long if done >= 1 - args.long_fraction else short)
        loss, routers = forward_loss(model, window)
        (loss + args.aux * balance_loss(routers, model.config.num_experts_per_tok)).backward()
        for fp32, bf16 in zip(master, working, strict=True):
            assert bf16.grad is not None
            fp32.grad, bf16.grad = bf16.grad.float(), None
        torch.nn.utils.clip_grad_norm_(master, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(working, master)
        step, seen = step + 1, seen + window[:, 1:].numel()
        average += (loss.item() - average) * max(0.02, 1 / step)
        now = time.monotonic()
        if now - reported > 15:
            reported = now
            print(
                f"{done:6.1%} step {step} tokens {seen:,} loss {average:.3f} lr {rate:.2e}"
                f" {seen / (now - started):,.0f} tok/s {(now - started) / 60:.1f} min",
                flush=True,
            )
        if now - saved > args.save_minutes * 60:
            saved = now
            write_folder(model, tokenizer, args.out)
    write_folder(model, tokenizer, args.out)
    return seen, time.monotonic() - started


def report(args: argparse.Namespace, corpus: Corpus, tokenizer: Tokenizer) -> None:
    """Measure the written folder, not the model in memory, and print samples of it."""
    model = Qwen3MoeForCausalLM.from_pretrained(args.out, dtype=torch.float32)
    model.eval()
    train_part = torch.cat(corpus.train)[: len(corpus.held_out)]
    parts = {"train": train_part, "held-out": corpus.held_out, "chat": corpus.held_out_chat}
    for name, ids in parts.items():
        print(name, json.dumps(evaluate(model, ids, args.long_seq_len)), flush=True)
    for sample in samples(model, tokenizer, args.seed, 120):
        print("-" * 80 + f"\n{sample}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write")
    parser.add_argument("--stdlib", type=Path, default=Path(sysconfig.get_paths()["stdlib"]))
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--minutes", type=float, default=0.0, help="stop by then (0: no limit)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--warmup", type=int, default=150, help="steps")
    parser.add_argument("--aux", type=float, default=0.01, help="weight of the balance loss")
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--long-seq-len", type=int, default=512, help="of the last part")
    parser.add_argument("--long-fraction", type=float, default=0.25)
    parser.add_argument("--chats", type=int, default=8000, help="conversations to make, at most")
    parser.add_argument("--save-minutes", type=float, default=5.0)
    parser.add_argument("--report-only", action="store_true", help="measure the existing folder")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"Python {platform.python_version()}, torch {torch.__version__}", flush=True)
    if args.report_only:
        tokenizer = Tokenizer.from_file(str(args.out / "tokenizer.json"))
    else:
        texts = [document.text for document in collect(args.stdlib)[0]]
        tokenizer = train_tokenizer(texts, args.vocab)
    corpus = build_corpus(tokenizer, args.stdlib, args.seed, args.chats)
    if not args.report_only:
        seen, seconds = train(args, corpus, tokenizer)
        print(f"trained on {seen:,} tokens in {seconds / 60:.1f} minutes", flush=True)
    report(args, corpus, tokenizer)


if __name__ == "__main__":
    main()
