"""The runner that computes in its caller's thread: one rank, one device, no processes."""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import Tensor

from baton.core.config import EngineConfig
from baton.core.request import SamplingParams, TokenLogprobs
from baton.engine.checkpoint import Checkpoint
from baton.engine.kv_cache import TORCH_DTYPES, KVCache
from baton.engine.loader import load_model
from baton.engine.models.config import kv_layout, resolve_max_model_len
from baton.engine.plan import RowResult, SequenceStep, SlotBegin, StepPlan, StepResult
from baton.engine.sampler import sample, token_logprobs
from baton.engine.slot_state import SlotState
from baton.engine.step_inputs import build_inputs
from kvpool.layout import KVLayout

_LOGITS_BUDGET = 2**24
"""Prompt logprobs are computed in slices of at most this many logits (64 MiB)."""
_WARM_UP_TOKENS = 32


class InlineRunner:
    """Implements ``baton.engine.plan.Runner``.

    ``kv_buffer`` is the instance's arena (see ``KVCache`` for what it must hold); without it the
    runner allocates ``config.num_blocks`` blocks itself. ``ConfigError`` for a ``max_model_len``
    that the model cannot do, ``ValueError`` for a buffer that does not fit.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: EngineConfig,
        *,
        kv_buffer: memoryview | None = None,
    ) -> None:
        torch.set_num_threads(config.num_threads)
        self._device = torch.device(config.device)
        self._dtype = TORCH_DTYPES[config.dtype]
        self._layout = kv_layout(checkpoint.config, config)
        self._num_slots = config.max_num_seqs
        self._max_len = resolve_max_model_len(checkpoint.config, config)
        self._cache = KVCache(self._layout, config.num_blocks, self._device, kv_buffer)
        self._model = load_model(
            checkpoint, dtype=self._dtype, device=self._device, max_len=self._max_len
        )
        self._row_quantum = self._model.row_quantum
        self._state = self._new_state()

    @property
    def layout(self) -> KVLayout:
        """Shape of the KV blocks."""
        return self._layout

    def execute(self, plan: StepPlan) -> StepResult:
        """Run the model on all rows, write their KV, sample where asked."""
        return self._execute(plan, self._cache, self._state)

    def warm_up(self) -> None:
        """A prefill and a few decode steps on scratch memory; slots and KV blocks are untouched."""
        num_tokens = min(_WARM_UP_TOKENS, self._max_len - 2)
        if num_tokens < 1:
            return
        num_blocks = -(-(num_tokens + 2) // self._layout.block_size)
        cache = KVCache(self._layout, num_blocks, self._device)
        state = self._new_state()
        table = tuple(range(num_blocks))
        prompt = (0,) * num_tokens
        for sampling in (SamplingParams(temperature=0.0), SamplingParams(top_p=0.9)):
            begin = SlotBegin(0, sampling, prompt, ())
            whole = SequenceStep(0, 0, prompt, table, sample=True, uniform=0.5)
            self._execute(StepPlan(0, (begin,), (whole,)), cache, state)
            for start in (num_tokens, num_tokens + 1):
                row = SequenceStep(0, start, None, table, sample=True, uniform=0.5)
                self._execute(StepPlan(0, (), (row,)), cache, state)

    def close(self) -> None:
        """Let go of the KV buffer. Idempotent; ``execute`` must not be called afterwards."""
        self._cache.close()

    def _new_state(self) -> SlotState:
        return SlotState(self._num_slots, self._model.config.vocab_size, self._device)

    @torch.inference_mode()
    def _execute(self, plan: StepPlan, cache: KVCache, state: SlotState) -> StepResult:
        started = time.perf_counter()
        for begin in plan.begins:
            state.begin(begin)
        inputs = build_inputs(
            plan.rows,
            self._layout,
            state.last_token,
            device=self._device,
            dtype=self._dtype,
            row_quantum=self._row_quantum,
        )
        hidden_TH = self._model.forward(inputs, cache)
        sampled = [i for i, row in enumerate(plan.rows) if row.sample]
        tokens: dict[int, int] = {}
        logprobs: dict[int, TokenLogprobs] = {}
        if sampled:
            lasts = [inputs.first_tokens[i] + plan.rows[i].num_tokens - 1 for i in sampled]
            logits_BV = self._model.logits(_rows(hidden_TH, lasts))
            slots_B = np.array([plan.rows[i].slot for i in sampled], dtype=np.int64)
            uniforms_B = np.array([plan.rows[i].uniform for i in sampled])
            tokens_B = sample(logits_BV, slots_B, uniforms_B, state)
            state.record(slots_B, tokens_B)
            tokens = dict(zip(sampled, tokens_B.tolist(), strict=True))
            logprobs = _output_logprobs(plan, sampled, logits_BV, tokens_B, state)
        results = tuple(
            RowResult(
                token_id=tokens.get(i),
                logprobs=logprobs.get(i),
                prompt_logprobs=self._prompt_logprobs(row, inputs.first_tokens[i], hidden_TH, state)
                if row.prompt_logprobs
                else (),
            )
            for i, row in enumerate(plan.rows)
        )
        return StepResult(plan.step, results, time.perf_counter() - started)

    def _prompt_logprobs(
        self, row: SequenceStep, first: int, hidden_TH: Tensor, state: SlotState
    ) -> tuple[TokenLogprobs, ...]:
        """Logprobs of the prompt tokens that follow this row's positions."""
        prompt = state.prompt_ids(row.slot)
        targets = prompt[row.start + 1 : row.start + row.num_tokens + 1]
        num_top = state.sampling(row.slot).prompt_logprobs or 0
        width = max(1, _LOGITS_BUDGET // self._model.config.vocab_size)
        results: list[TokenLogprobs] = []
        for begin in range(0, len(targets), width):
            part = targets[begin : begin + width]
            hidden = hidden_TH[first + begin : first + begin + len(part)]
            tokens = torch.tensor(part, dtype=torch.int64, device=self._device)
            results += token_logprobs(self._model.logits(hidden), tokens, [num_top] * len(part))
        return tuple(results)


def _output_logprobs(
    plan: StepPlan, sampled: list[int], logits_BV: Tensor, tokens_B: Tensor, state: SlotState
) -> dict[int, TokenLogprobs]:
    """By plan row, for the rows whose sequences ask for logprobs."""
    asked = [
        (place, i, num_top)
        for place, i in enumerate(sampled)
        if (num_top := state.sampling(plan.rows[i].slot).logprobs) is not None
    ]
    if not asked:
        return {}
    places = [place for place, _, _ in asked]
    found = token_logprobs(
        _rows(logits_BV, places), _rows(tokens_B, places), [num_top for _, _, num_top in asked]
    )
    return {i: entry for (_, i, _), entry in zip(asked, found, strict=True)}


def _rows(tensor: Tensor, rows: list[int]) -> Tensor:
    """A choice of rows; the tensor itself where that is all of them in order."""
    if rows == list(range(len(tensor))):
        return tensor
    return tensor.index_select(0, torch.tensor(rows, device=tensor.device))
