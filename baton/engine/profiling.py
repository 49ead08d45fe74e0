"""Measures the steps of a real runner: what ``baton profile`` fits a cost model to.

Plans are made by hand. The KV that a step reads is whatever the runner's blocks hold: time does not
depend on it, so a long context need not be computed first.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from baton.core.cluster import StepSample
from baton.core.config import EngineConfig
from baton.core.request import SamplingParams
from baton.engine.plan import Runner, SequenceStep, SlotBegin, StepPlan, StepResult, shape_of

_CONTEXT_SHARES = (0.0, 0.25, 0.6)
"""Of the longest sequence, before a prompt's chunk."""
_DECODE_SHARES = (0.02, 0.25, 0.9)
"""Of the longest sequence, in the cache of each decode."""
_FIRST_TOKENS = 16
_FACTOR = 4

Rows = tuple[SequenceStep, ...]


class StepGrid:
    """Steps of every kind and size that fit: ``prefill``, ``decode`` and ``mixed``."""

    def __init__(self, config: EngineConfig, max_len: int) -> None:
        self._block_size = config.block_size
        self._num_blocks = config.kv_blocks
        self._max_len = min(max_len, self._num_blocks * self._block_size)
        self.num_slots = min(config.max_num_seqs, self._num_blocks)
        budget = min(config.max_num_batched_tokens, self._max_len - 1)
        self.prefill = [
            rows
            for num_tokens in _sizes(_FIRST_TOKENS, budget)
            for start in self._starts(_CONTEXT_SHARES)
            if (rows := self._rows([(start, num_tokens)])) is not None
        ]
        self.decode = [
            rows
            for count in _sizes(1, self.num_slots)
            for start in self._starts(_DECODE_SHARES)
            if (rows := self._rows([(max(1, start), 1)] * count)) is not None
        ]
        self.mixed = [
            rows
            for count in _sizes(1, min(self.num_slots, budget) - 1)
            for num_tokens in (budget // 4, budget - count)
            if num_tokens > 1
            and (rows := self._rows([(0, num_tokens), *[(self._max_len // 8 + 1, 1)] * count]))
        ]

    @property
    def steps(self) -> list[Rows]:
        """All of them."""
        return [*self.prefill, *self.decode, *self.mixed]

    def first(self) -> StepPlan:
        """Begins all slots, so that each has a token to go on from."""
        sampling = SamplingParams()
        begins = tuple(SlotBegin(slot, sampling, (1,), ()) for slot in range(self.num_slots))
        rows = tuple(
            SequenceStep(slot, 0, (1,), (slot,), sample=True, uniform=0.5)
            for slot in range(self.num_slots)
        )
        return StepPlan(0, begins, rows)

    def _starts(self, shares: Sequence[float]) -> list[int]:
        return list(dict.fromkeys(int(self._max_len * share) for share in shares))

    def _rows(self, parts: Sequence[tuple[int, int]]) -> Rows | None:
        """A row for each (start, tokens); ``None`` where they do not fit into the cache."""
        rows, used = [], 0
        for slot, (start, num_tokens) in enumerate(parts):
            if start + num_tokens > self._max_len:
                return None
            count = -(-(start + num_tokens) // self._block_size)
            table = tuple(range(used, used + count))
            used += count
            tokens = None if num_tokens == 1 else (1,) * num_tokens
            rows.append(SequenceStep(slot, start, tokens, table, sample=True, uniform=0.5))
        return None if used > self._num_blocks else tuple(rows)


def measure_steps(
    runner: Runner[StepPlan, StepResult],
    grid: StepGrid,
    *,
    num_rounds: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[StepSample]:
    """The median time of each of the grid's steps; one round more is not counted.

    Rounds go over all steps, so that a slow moment of the machine hits each step once at most.
    ``progress``: told how many steps are done, of how many.
    """
    runner.execute(grid.first())
    steps = grid.steps
    seconds: list[list[float]] = [[] for _ in steps]
    total, number = (num_rounds + 1) * len(steps), 0
    for round_number in range(num_rounds + 1):
        for rows, found in zip(steps, seconds, strict=True):
            number += 1
            result = runner.execute(StepPlan(number, (), rows))
            if round_number:
                found.append(result.seconds)
            progress(number, total)
    return [
        StepSample(shape_of(StepPlan(0, (), rows)), statistics.median(found))
        for rows, found in zip(steps, seconds, strict=True)
    ]


def _sizes(first: int, last: int) -> list[int]:
    """From ``first`` up by a factor, and ``last``; none where ``last`` is smaller than 1."""
    sizes = []
    while first < last:
        sizes.append(first)
        first *= _FACTOR
    return [*sizes, last] if last >= 1 else []
