"""The runner that computes in its caller's thread: one rank, one device, no processes."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from baton.core.config import EngineConfig
from baton.core.errors import ConfigError
from baton.core.request import SamplingParams, TokenLogprobs
from baton.engine.checkpoint import Checkpoint
from baton.engine.devices import OutOfMemory, device_memory, is_out_of_memory
from baton.engine.holdings import tensors_of, weight_tag
from baton.engine.kv_cache import TORCH_DTYPES, KVCache
from baton.engine.loader import load_model
from baton.engine.memory import GIB, MemoryMap, MemoryNeeds, check_weights, fit_blocks, mib
from baton.engine.models.config import kv_layout, kv_shard, resolve_max_model_len
from baton.engine.ops.devices import find_device
from baton.engine.ops.registry import Implementation, Ops
from baton.engine.parallel.mesh import Mesh, single_mesh
from baton.engine.plan import RowResult, SequenceStep, SlotBegin, StepPlan, StepResult
from baton.engine.resident import keep_large_pieces_apart
from baton.engine.sampler import token_logprobs
from baton.engine.slot_state import SlotState
from baton.engine.step_inputs import StepInputs, build_inputs
from baton.engine.weights import Progress
from baton.engine.worst_case import REQUEST_TOKEN_BYTES, Shape, measure
from kvpool.layout import KVLayout

_LOGITS_BUDGET = 2**24
"""Prompt logprobs are computed in slices of at most this many logits (64 MiB)."""
_WARM_UP_TOKENS = 32


class InlineRunner:
    """Implements ``baton.engine.plan.Runner`` for one rank; of several, each rank has one.

    ``kv_buffer`` is the instance's arena (its group's blocks; see ``KVCache`` for what it must
    hold); without it the runner allocates ``config.num_blocks`` blocks of its own shard itself.
    Where ``config.num_blocks`` is ``None``, it has no cache until ``attach``.
    ``implementations``: what operations are chosen from; default, the catalog's.
    ``ConfigError`` for a ``max_model_len`` that the model cannot do or ranks that it cannot be cut
    for, ``ValueError`` for a buffer that does not fit.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: EngineConfig,
        *,
        mesh: Mesh | None = None,
        kv_buffer: memoryview | None = None,
        progress: Progress | None = None,
        implementations: Sequence[Implementation] | None = None,
    ) -> None:
        torch.set_num_threads(config.num_threads)
        mesh = mesh or single_mesh()
        self._device = find_device(config.device)
        self._memory = device_memory(self._device)
        self._needs: MemoryNeeds | None = None
        self._config = config
        self._dtype = TORCH_DTYPES[config.dtype]
        self._layout = kv_layout(checkpoint.config, config)
        self._shard = kv_shard(self._layout, mesh.tp.rank, mesh.tp.size)
        self._name = mesh.axes.name(mesh.rank)
        self._num_slots = config.max_num_seqs
        self._max_len = resolve_max_model_len(checkpoint.config, config)
        self.attach(config.num_blocks or 0, kv_buffer)
        num_weights = sum(math.prod(info.shape) for info in checkpoint.tensors.values())
        check_weights(num_weights * self._dtype.itemsize, config, self._memory_limit())
        self.ops = Ops(self._device, self._dtype, implementations)
        self._model = load_model(
            checkpoint,
            ops=self.ops,
            max_len=self._max_len,
            mesh=mesh,
            exchange=config.exchange,
            progress=progress,
        )
        if config.memory_limit_gib is not None and self._device.type == "cpu":
            # Holes in the heap were seen to grow to twice the largest step.
            keep_large_pieces_apart()
        self._row_quantum = self._model.row_quantum
        self._sample = self.ops.bind("sample", "*")
        self._state = self._new_state()
        self._num_groups = mesh.axes.dp

    @property
    def layout(self) -> KVLayout:
        """Shape of the instance's KV blocks."""
        return self._layout

    def attach(self, num_blocks: int, kv_buffer: memoryview | None = None) -> None:
        """Take a KV cache of so many blocks, in place of the one before it.

        ``kv_buffer``: see the class. Not while a step runs.
        """
        own, shard = self._layout, self._shard
        if kv_buffer is None:
            own, shard = dataclasses.replace(own, num_shards=1), 0
        self._cache = KVCache(own, num_blocks, self._device, kv_buffer, shard=shard)

    def execute(self, plan: StepPlan) -> StepResult:
        """Run the model on all rows, write their KV, sample where asked.

        Raises OutOfMemory, with the memory map, where there was too little of it.
        """
        with self._out_of_memory_explained():
            return self._execute(plan, self._cache, self._state, (plan.num_tokens,))

    def step(self, plan: StepPlan | None, group_tokens: tuple[int, ...]) -> StepResult | None:
        """One rank's part in a step of several groups; ``None``: this rank's group is idle.

        ``group_tokens``: tokens of every dp group in this step. Idle ranks take part in what the
        groups do together.
        """
        if plan is None:
            self._idle(group_tokens)
            return None
        with self._out_of_memory_explained():
            return self._execute(plan, self._cache, self._state, group_tokens)

    def warm_up(self) -> None:
        """A prefill and a few decode steps on scratch memory; slots and KV blocks are untouched.

        All ranks of an instance call it together.
        """
        num_tokens = min(_WARM_UP_TOKENS, self._max_len - 2)
        if num_tokens < 1:
            return
        layout = self._cache.layout
        num_blocks = -(-(num_tokens + 2) // layout.block_size)
        cache = KVCache(layout, num_blocks, self._device, shard=self._cache.shard)
        state = self._new_state()
        table = tuple(range(num_blocks))
        prompt = (0,) * num_tokens
        for sampling in (SamplingParams(temperature=0.0), SamplingParams(top_p=0.9)):
            begin = SlotBegin(0, sampling, prompt, ())
            whole = SequenceStep(0, 0, prompt, table, sample=True, uniform=0.5)
            plan = StepPlan(0, (begin,), (whole,))
            self._execute(plan, cache, state, (num_tokens,) * self._num_groups)
            for start in (num_tokens, num_tokens + 1):
                row = SequenceStep(0, start, None, table, sample=True, uniform=0.5)
                self._execute(StepPlan(0, (), (row,)), cache, state, (1,) * self._num_groups)

    def profile(self) -> MemoryNeeds:
        """Warm up, and measure what the largest steps need beside the KV cache.

        Scratch memory is used and given back. All ranks of an instance call it together. Raises
        OutOfMemory where such a step does not fit into the memory that there is.
        """
        started = time.perf_counter()
        config, vocab_size = self._config, self._model.config.vocab_size
        shape = Shape(
            config.max_num_seqs, config.max_num_batched_tokens, self._max_len, config.block_size
        )
        with self._out_of_memory_explained():
            self.warm_up()
            peaks = measure(self._memory, self._model, shape, *self._scratch())
        self._memory.settle()
        # Made when the first sequence with penalties begins; see SlotState.
        reserve = config.max_num_seqs * vocab_size * (torch.int32.itemsize + torch.bool.itemsize)
        weights = [tensor for _, tensor in tensors_of(self._model)]
        reserve += self._memory.kernel_reserve(weights, config.max_num_batched_tokens)
        if self._device.type == "cpu":
            reserve += config.max_num_seqs * self._max_len * REQUEST_TOKEN_BYTES
        self._needs = MemoryNeeds(
            held=self._memory.in_use() - self._memory.resident(self._cache.tensor),
            prefill=peaks.prefill,
            decode=peaks.decode,
            mixed=peaks.mixed,
            reserve=reserve,
            limit=self._memory_limit(),
            block_bytes=self._layout.block_bytes // self._layout.num_shards,
            seconds=time.perf_counter() - started,
        )
        self._memory.ready(self._held())
        return self._needs

    def fit(self) -> EngineConfig:
        """Profile; the settings with the ``num_blocks`` that there is memory for.

        Where ``config.num_blocks`` is a number, it is only checked. Raises ConfigError, with the
        numbers, where the memory is not enough.
        """
        try:
            needs = self.profile()
        except OutOfMemory as error:
            raise ConfigError(
                f"the largest steps do not fit into memory: {error.message}",
                param="engine.memory_limit_gib",
            ) from error
        num_blocks = fit_blocks([needs], self._config, self._max_len)
        return dataclasses.replace(self._config, num_blocks=num_blocks)

    def memory(self) -> list[MemoryMap]:
        """What memory is used for now: one map, this rank's. From any thread."""
        entries, in_use = self._memory.account(self._held())
        return [
            MemoryMap(
                rank=self._name,
                device=str(self._device),
                entries=tuple(entries),
                in_use=in_use,
                imports=self._memory.imports,
                peak=self._memory.peak(),
                needs=self._needs,
            )
        ]

    def close(self) -> None:
        """Let go of the KV buffer. Idempotent; ``execute`` must not be called afterwards."""
        self._cache.close()

    def _held(self) -> dict[str, list[Tensor]]:
        """What is there for good, by tag."""
        held: dict[str, list[Tensor]] = {}
        for path, tensor in tensors_of(self._model):
            held.setdefault(weight_tag(path), []).append(tensor)
        held["kv_cache"] = [self._cache.tensor]
        held["sampling"] = [tensor for _, tensor in tensors_of(self._state)]
        return held

    def _memory_limit(self) -> int:
        limit, wanted = self._memory.limit(), self._config.memory_limit_gib
        return limit if wanted is None else min(limit, int(wanted * GIB))

    def _scratch(self) -> tuple[Any, KVCache]:
        """How to run a step with any model, on slots and one KV block of its own."""
        layout = dataclasses.replace(self._layout, num_shards=1)
        cache, state = KVCache(layout, 1, self._device), self._new_state()
        other = copy.copy(self)

        def execute(model: Any, plan: StepPlan, cache: KVCache) -> StepResult:
            other._model = model
            return other._execute(plan, cache, state, (plan.num_tokens,) * self._num_groups)

        return execute, cache

    @contextlib.contextmanager
    def _out_of_memory_explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            found = self.memory()[0]
            reason = str(error).strip().partition("\n")[0]
            raise OutOfMemory(
                f"{self._name} has no memory for this step ({reason}), with "
                f"{mib(found.in_use + found.imports)} in use: lower memory_limit_gib, num_blocks "
                f"or max_num_batched_tokens\n{found.text}"
            ) from error

    def _new_state(self) -> SlotState:
        return SlotState(self._num_slots, self._model.config.vocab_size, self._device)

    @torch.inference_mode()
    def _idle(self, group_tokens: tuple[int, ...]) -> None:
        inputs = self._inputs((), self._cache, self._state, group_tokens)
        self._model.forward(inputs, self._cache)

    def _inputs(
        self,
        rows: tuple[SequenceStep, ...],
        cache: KVCache,
        state: SlotState,
        group_tokens: tuple[int, ...],
    ) -> StepInputs:
        return build_inputs(
            rows,
            cache.layout,
            state.last_token,
            device=self._device,
            dtype=self._dtype,
            row_quantum=self._row_quantum,
            shard=cache.shard,
            group_tokens=group_tokens,
        )

    @torch.inference_mode()
    def _execute(
        self, plan: StepPlan, cache: KVCache, state: SlotState, group_tokens: tuple[int, ...]
    ) -> StepResult:
        started = time.perf_counter()
        for begin in plan.begins:
            state.begin(begin)
        inputs = self._inputs(plan.rows, cache, state, group_tokens)
        hidden_TH = self._model.forward(inputs, cache)
        sampled = [i for i, row in enumerate(plan.rows) if row.sample]
        tokens: dict[int, int] = {}
        logprobs: dict[int, TokenLogprobs] = {}
        if sampled:
            lasts = [inputs.first_tokens[i] + plan.rows[i].num_tokens - 1 for i in sampled]
            logits_BV = self._model.logits(_rows(hidden_TH, lasts))
            slots_B = np.array([plan.rows[i].slot for i in sampled], dtype=np.int64)
            uniforms_B = np.array([plan.rows[i].uniform for i in sampled])
            tokens_B = self._sample(logits_BV, slots_B, uniforms_B, state)
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
