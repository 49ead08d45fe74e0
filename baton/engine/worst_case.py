"""Measures what the largest steps of an engine's settings need, by running them on scratch memory.

Memory decides the shapes, not what the results are worth, so the runs are kept short:

* layers of one kind need the same, one after the other: one of each kind runs;
* all rows stand at the longest context, but their tables repeat one block, so that the scratch
  cache is as small as a step;
* attention takes segments and tiles one after the other: only the largest of each kind runs,
  while the inputs of all of them are held.

Everything else is the runner's own step, with all that sampling can be asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor

from baton.core.request import MAX_LOGPROBS, SamplingParams
from baton.engine.devices import DeviceMemory
from baton.engine.kv_cache import KVCache
from baton.engine.models.decoder import Decoder
from baton.engine.plan import SequenceStep, SlotBegin, StepPlan, StepResult
from baton.engine.step_inputs import QUERY_QUANTUM, Segment, StepInputs

REQUEST_TOKEN_BYTES = 40
"""Host memory per token of a running sequence: an int object and its place in a tuple."""
_EVERYTHING = SamplingParams(
    temperature=2.0,
    top_p=0.999999,
    min_p=1e-9,
    repetition_penalty=1.1,
    presence_penalty=0.1,
    frequency_penalty=0.1,
    logprobs=MAX_LOGPROBS,
    prompt_logprobs=MAX_LOGPROBS,
)

Execute = Callable[[Any, StepPlan, KVCache], StepResult]
"""(model, plan, cache): a runner's step with another model and cache than its own."""


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """How large steps can be."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_len: int
    """Tokens of the longest sequence."""
    block_size: int


@dataclasses.dataclass(frozen=True, slots=True)
class Peaks:
    """Bytes that the largest steps took for a moment, beside what was held before and after."""

    prefill: int
    decode: int
    mixed: int


def measure(
    memory: DeviceMemory, model: Decoder, shape: Shape, execute: Execute, cache: KVCache
) -> Peaks:
    """Run the largest steps and see what they take; the runner has been warmed up.

    ``cache``: scratch memory, one block. Raises what a step raises.
    """
    short = _Shortened(model)

    def peak_of(plan: StepPlan) -> int:
        memory.settle()
        before = memory.in_use()
        memory.reset_peak()
        execute(short, plan, cache)
        return max(0, memory.peak() - before)

    # What is made at the first use of it is not a step's. Slots begin here once for all plans.
    near = dataclasses.replace(shape, max_len=min(shape.max_len, shape.block_size))
    execute(short, dataclasses.replace(_mixed_plan(near), begins=_begins(shape)), cache)
    return Peaks(
        decode=peak_of(_plan(shape, [1] * shape.max_num_seqs)),
        prefill=max(peak_of(plan) for plan in _prefill_plans(shape)),
        mixed=peak_of(_mixed_plan(shape)),
    )


class _Shortened:
    """A decoder that runs one layer of each kind, and the largest segments of attention."""

    def __init__(self, model: Decoder) -> None:
        kinds = {(type(layer.attention), type(layer.mlp)): layer for layer in model.layers}
        self._model = dataclasses.replace(model, layers=tuple(kinds.values()))
        self.config = model.config
        self.row_quantum = model.row_quantum
        self.logits = model.logits

    def forward(self, inputs: StepInputs, cache: KVCache) -> Tensor:
        """See ``Decoder``. Most of attention's output is zero."""
        decode = [segment for segment in inputs.segments if not segment.tiles]
        chunks = [segment for segment in inputs.segments if segment.tiles]
        largest = [max(part, key=_num_keys) for part in (decode, chunks) if part]
        segments = tuple(
            dataclasses.replace(segment, tiles=segment.tiles[-1:]) for segment in largest
        )
        return self._model.forward(dataclasses.replace(inputs, segments=segments), cache)


def _num_keys(segment: Segment) -> int:
    return int(segment.pages_LN.shape[1])


def _mixed_plan(shape: Shape) -> StepPlan:
    """One long prompt beside all the sequences that decode."""
    singles = shape.max_num_seqs - 1
    return _plan(shape, [1] * singles + [max(1, shape.max_num_batched_tokens - singles)])


def _prefill_plans(shape: Shape) -> list[StepPlan]:
    """The whole budget for one prompt, and for as many as make masks the largest by padding."""
    budget, seqs = shape.max_num_batched_tokens, shape.max_num_seqs

    def masked(each: int) -> int:
        return min(seqs, budget // each) * (each + -each % QUERY_QUANTUM)

    each = max(range(2, budget + 1), key=masked, default=1)
    many = [each] * min(seqs, budget // each)
    return [_plan(shape, [budget]), _plan(shape, many, prompt_logprobs=False)]


def _begins(shape: Shape) -> tuple[SlotBegin, ...]:
    prompt = (1,) * shape.max_len
    return tuple(SlotBegin(slot, _EVERYTHING, prompt, ()) for slot in range(shape.max_num_seqs))


def _plan(shape: Shape, counts: list[int], *, prompt_logprobs: bool = True) -> StepPlan:
    """Rows of so many tokens each, all of which end at the longest context."""
    table = (0,) * -(-shape.max_len // shape.block_size)
    rows = []
    for slot, wanted in enumerate(counts):
        count = min(wanted, shape.max_len)
        rows.append(
            SequenceStep(
                slot,
                shape.max_len - count,
                None if count == 1 else (1,) * count,
                table,
                sample=True,
                uniform=0.5,
                prompt_logprobs=prompt_logprobs and count > 1,
            )
        )
    return StepPlan(0, (), tuple(rows))
