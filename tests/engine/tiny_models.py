"""Tiny random checkpoints, their reference implementation, and a small hand-driven scheduler."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from baton.core.config import EngineConfig
from baton.core.request import SamplingParams
from baton.engine.checkpoint import open_checkpoint
from baton.engine.plan import RowResult, SequenceStep, SlotBegin, StepPlan
from baton.engine.runner import InlineRunner

GREEDY = SamplingParams(temperature=0.0)

DENSE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "eos_token_id": 3,
}
MOE: dict[str, Any] = DENSE | {
    "moe_intermediate_size": 24,
    "num_experts": 5,
    "num_experts_per_tok": 3,
    "norm_topk_prob": True,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "dense": DENSE,
    "dense-tied-one-kv-head": DENSE
    | {"num_key_value_heads": 1, "tie_word_embeddings": True, "head_dim": 16},
    "dense-bias": DENSE | {"attention_bias": True, "num_key_value_heads": 6},
    "moe": MOE,
    "moe-tied-raw-weights": MOE
    | {"norm_topk_prob": False, "tie_word_embeddings": True, "num_key_value_heads": 1},
    "moe-sparse-step": MOE | {"num_hidden_layers": 4, "decoder_sparse_step": 2},
    "moe-some-dense": MOE
    | {"mlp_only_layers": [1], "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
}


def save(folder: Path, options: dict[str, Any], **how: Any) -> Any:
    """Save a random model with norms and biases that are not neutral; returns the reference."""
    torch.manual_seed(20)
    if "num_experts" in options:
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**options, attn_implementation="eager"))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**options, attn_implementation="eager"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            if name.endswith("bias"):
                parameter.normal_()
    model.eval()
    model.save_pretrained(folder, **how)
    return model


@torch.no_grad()
def reference_logprobs(model: Any, token_ids: Sequence[int]) -> Tensor:
    """[tokens, vocab], of the whole sequence at once."""
    logits = model(torch.tensor([list(token_ids)])).logits[0]
    return torch.log_softmax(logits.float(), -1)


@torch.no_grad()
def reference_greedy(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@dataclasses.dataclass
class Placed:
    """A sequence with blocks that are deliberately out of order."""

    slot: int
    blocks: tuple[int, ...]
    num_computed: int = 0


class Bench:
    """Drives a runner by hand."""

    def __init__(self, folder: Path, *, blocks_each: int = 12, **engine: Any) -> None:
        defaults: dict[str, Any] = {
            "block_size": 4,
            "num_blocks": 96,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 512,
        }
        self.config = EngineConfig(**(defaults | engine))
        self.runner = InlineRunner(open_checkpoint(folder), self.config)
        self.blocks_each = blocks_each
        self.sequences: dict[int, Placed] = {}
        self._begins: list[SlotBegin] = []
        self._step = 0

    def begin(
        self,
        slot: int,
        prompt: Sequence[int],
        sampling: SamplingParams = GREEDY,
        output: Sequence[int] = (),
    ) -> None:
        first = slot * self.blocks_each
        blocks = tuple(reversed(range(first, first + self.blocks_each)))
        self.sequences[slot] = Placed(slot, blocks)
        self._begins.append(SlotBegin(slot, sampling, tuple(prompt), tuple(output)))

    def row(
        self,
        slot: int,
        token_ids: Sequence[int] | None,
        *,
        sample: bool = True,
        uniform: float = 0.0,
        prompt_logprobs: bool = False,
    ) -> SequenceStep:
        sequence = self.sequences[slot]
        start = sequence.num_computed
        sequence.num_computed += 1 if token_ids is None else len(token_ids)
        used = -(-sequence.num_computed // self.config.block_size)
        return SequenceStep(
            slot=slot,
            start=start,
            token_ids=None if token_ids is None else tuple(token_ids),
            block_table=sequence.blocks[:used],
            sample=sample,
            uniform=uniform,
            prompt_logprobs=prompt_logprobs,
        )

    def step(self, *rows: SequenceStep) -> tuple[RowResult, ...]:
        self._step += 1
        plan = StepPlan(self._step, tuple(self._begins), rows)
        self._begins = []
        result = self.runner.execute(plan)
        assert result.step == self._step
        assert len(result.rows) == len(rows)
        assert result.seconds > 0
        return result.rows

    def token(self, *rows: SequenceStep) -> int:
        token = self.step(*rows)[0].token_id
        assert token is not None
        return token
