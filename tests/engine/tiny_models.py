"""Tiny random checkpoints, their reference implementation, and a small hand-driven scheduler."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from baton.core.config import EngineConfig
from baton.core.request import SamplingParams
from baton.engine.checkpoint import open_checkpoint
from baton.engine.plan import RowResult, SequenceStep, SlotBegin, StepPlan
from baton.engine.runner import InlineRunner

GREEDY = SamplingParams(temperature=0.0)

VOCAB = 97
DENSE: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": VOCAB,
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
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 24,
    "num_experts": 5,
    "num_experts_per_tok": 3,
    "norm_topk_prob": True,
}
LLAMA = DENSE | {"model_type": "llama", "head_dim": None}
QWEN2 = DENSE | {"model_type": "qwen2", "head_dim": 8}
_LATENT = {key: value for key, value in DENSE.items() if key != "head_dim"} | {
    "num_key_value_heads": 6,
    "kv_lora_rank": 20,
    "q_lora_rank": 14,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "n_routed_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
}
DEEPSEEK_V2 = _LATENT | {"model_type": "deepseek_v2", "topk_method": "greedy"}
DEEPSEEK_V3 = _LATENT | {"model_type": "deepseek_v3", "n_group": 2, "topk_group": 1}


def _rope(kind: str, theta: float = 10000.0, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **parameters}}


_YARN: dict[str, Any] = {"factor": 4.0, "original_max_position_embeddings": 176}
_LLAMA3: dict[str, Any] = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
_VARIANTS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama-all-biases-one-kv-head-tied": LLAMA
    | {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}
    | {"tie_word_embeddings": True, "head_dim": 10},
    "llama-llama3": LLAMA
    | {"head_dim": 16, "num_key_value_heads": 3}
    | _rope("llama3", 5e5, **_LLAMA3),
    "llama-linear": LLAMA | _rope("linear", factor=2.5),
    "llama-dynamic": LLAMA | _rope("dynamic", factor=2.0),
    "llama-yarn-stated-factor": LLAMA
    | {"head_dim": 16}
    | _rope("yarn", **_YARN, attention_factor=1.3, beta_fast=4),
    "qwen2": QWEN2,
    "qwen2-yarn-tied-one-kv-head": QWEN2
    | {"tie_word_embeddings": True, "num_key_value_heads": 1, "head_dim": 16}
    | _rope("yarn", **_YARN, truncate=False),
    "dense": DENSE,
    "dense-tied-one-kv-head": DENSE
    | {"num_key_value_heads": 1, "tie_word_embeddings": True, "head_dim": 16},
    "dense-bias": DENSE | {"attention_bias": True, "num_key_value_heads": 6},
    "dense-yarn": DENSE | _rope("yarn", 5e5, **_YARN),
    "moe": MOE,
    "moe-tied-raw-weights": MOE
    | {"norm_topk_prob": False, "tie_word_embeddings": True, "num_key_value_heads": 1},
    "moe-sparse-step-bias": MOE
    | {"num_hidden_layers": 4, "decoder_sparse_step": 2, "attention_bias": True},
    "moe-some-dense": MOE | {"mlp_only_layers": [1]} | _rope("default", 500.0),
    "v2-lite": DEEPSEEK_V2 | {"q_lora_rank": None, "routed_scaling_factor": 1.0},
    "v2-groups-yarn-biases": DEEPSEEK_V2
    | {"topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 2}
    | {"n_routed_experts": 9, "routed_scaling_factor": 1.7, "norm_topk_prob": True}
    | {"attention_bias": True, "mlp_bias": True}
    | _rope("yarn", **_YARN, mscale=0.707, mscale_all_dim=0.707),
    "v2-no-shared-tied-coarse-eps": DEEPSEEK_V2
    | {"n_shared_experts": 0, "first_k_dense_replace": 0, "tie_word_embeddings": True}
    | {"rms_norm_eps": 1e-3, "n_routed_experts": 7, "num_experts_per_tok": 1},
    "v3": DEEPSEEK_V3,
    "v3-yarn-groups-one-shared": DEEPSEEK_V3
    | {"n_routed_experts": 10, "n_group": 5, "topk_group": 3, "n_shared_experts": 1}
    | {"first_k_dense_replace": 2}
    | _rope("yarn", **_YARN, mscale=1.0, mscale_all_dim=0.8),
    "v3-plain-halves-biases-tied": DEEPSEEK_V3
    | {"q_lora_rank": None, "rope_interleave": False, "attention_bias": True}
    | {"n_group": 1, "norm_topk_prob": False, "n_shared_experts": 0}
    | {"tie_word_embeddings": True, "rms_norm_eps": 1e-3},
    "v3-one-head": DEEPSEEK_V3
    | {"num_attention_heads": 1, "num_key_value_heads": 1, "num_hidden_layers": 2}
    | _rope("linear", factor=3.0, mscale_all_dim=1.0),
}
VARIANTS = {name: options | {"max_position_embeddings": 704} for name, options in _VARIANTS.items()}
"""Several configurations of every family; long enough for prompts of 600 tokens."""


def save(folder: Path, options: dict[str, Any], **how: Any) -> Any:
    """Save a random model with norms and biases that are not neutral; returns the reference."""
    torch.manual_seed(20)
    config = AutoConfig.for_model(**options)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            if name.endswith("bias"):
                parameter.normal_()
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.3)
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
