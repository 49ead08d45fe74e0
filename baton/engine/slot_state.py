"""What sampling must remember of each sequence, by slot.

Parameters live on the host in columns, so that a step picks its rows with one index operation.
The last sampled token and the counts for the penalties live on the device, so that the next step
can start before this step's tokens are on the host.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from baton.core.request import SamplingParams
from baton.engine.plan import SlotBegin

Float32s = npt.NDArray[np.float32]
Int64s = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True, slots=True)
class SamplingColumns:
    """Sampling parameters of B rows as columns [B]."""

    temperature: Float32s
    """0 for greedy rows."""
    top_k: Int64s
    """The vocabulary's size where there is no limit."""
    top_p: Float32s
    min_p: Float32s
    repetition: Float32s
    presence: Float32s
    frequency: Float32s

    def take(self, rows: npt.NDArray[np.int64]) -> SamplingColumns:
        """The same columns for a choice of rows."""
        columns = (getattr(self, field.name)[rows] for field in dataclasses.fields(self))
        return SamplingColumns(*columns)

    def has_penalties(self) -> npt.NDArray[np.bool_]:
        """[B]: which rows need token counts."""
        additive = (self.presence != 0) | (self.frequency != 0)
        needed: npt.NDArray[np.bool_] = additive | (self.repetition != 1)
        return needed

    @staticmethod
    def of(params: list[SamplingParams], vocab_size: int) -> SamplingColumns:
        """Columns for a list of rows."""
        columns = SamplingColumns.blank(len(params), vocab_size)
        for row, sampling in enumerate(params):
            columns.put(row, sampling, vocab_size)
        return columns

    @staticmethod
    def blank(count: int, vocab_size: int) -> SamplingColumns:
        """``count`` greedy rows."""
        zeros, ones = np.zeros(count, np.float32), np.ones(count, np.float32)
        return SamplingColumns(
            temperature=zeros,
            top_k=np.full(count, vocab_size, np.int64),
            top_p=ones,
            min_p=zeros.copy(),
            repetition=ones.copy(),
            presence=zeros.copy(),
            frequency=zeros.copy(),
        )

    def put(self, row: int, sampling: SamplingParams, vocab_size: int) -> None:
        """Overwrite one row."""
        top_k = vocab_size if sampling.top_k is None else min(sampling.top_k, vocab_size)
        self.temperature[row] = sampling.temperature
        self.top_k[row] = top_k
        self.top_p[row] = sampling.top_p
        self.min_p[row] = sampling.min_p
        self.repetition[row] = sampling.repetition_penalty
        self.presence[row] = sampling.presence_penalty
        self.frequency[row] = sampling.frequency_penalty


@dataclasses.dataclass(slots=True)
class _Slot:
    sampling: SamplingParams
    prompt_ids: tuple[int, ...]


class SlotState:
    """State of up to ``num_slots`` slots; grows where a higher slot begins."""

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._slots: dict[int, _Slot] = {}
        self._columns = SamplingColumns.blank(num_slots, vocab_size)
        self.last_token = torch.zeros(num_slots, dtype=torch.int64, device=device)
        """[slots]: the token sampled last."""
        self._counts: Tensor | None = None
        self._prompt_seen: Tensor | None = None

    @property
    def num_slots(self) -> int:
        """Slots that there is room for."""
        return len(self.last_token)

    def begin(self, begin: SlotBegin) -> None:
        """A sequence takes a slot."""
        if begin.slot >= self.num_slots:
            self._grow(max(begin.slot + 1, 2 * self.num_slots))
        self._slots[begin.slot] = _Slot(begin.sampling, begin.prompt_ids)
        self._columns.put(begin.slot, begin.sampling, self._vocab_size)
        if begin.sampling.has_penalties:
            counts, prompt_seen = self._history()
            counts[begin.slot] = self._count(begin.output_ids)
            prompt_seen[begin.slot] = self._count(begin.prompt_ids) > 0

    def sampling(self, slot: int) -> SamplingParams:
        """The parameters that a slot began with."""
        return self._slots[slot].sampling

    def prompt_ids(self, slot: int) -> tuple[int, ...]:
        """The prompt that a slot began with."""
        return self._slots[slot].prompt_ids

    def columns(self, slots_B: Int64s) -> SamplingColumns:
        """Parameters of these slots' rows."""
        return self._columns.take(slots_B)

    def history(self, slots_B: Tensor) -> tuple[Tensor, Tensor]:
        """Output counts [B, vocab] and which tokens are in the prompt [B, vocab].

        Only for slots that began with penalties.
        """
        counts, prompt_seen = self._history()
        return counts.index_select(0, slots_B), prompt_seen.index_select(0, slots_B)

    def record(self, slots_B: Int64s, tokens_B: Tensor) -> None:
        """Remember what was sampled. Runs on the device, without waiting for it."""
        device_slots = torch.from_numpy(slots_B).to(self._device)
        self.last_token.index_copy_(0, device_slots, tokens_B)
        counted = np.flatnonzero(self._columns.take(slots_B).has_penalties())
        if counted.size:
            counts, _ = self._history()
            rows = torch.from_numpy(counted).to(self._device)
            at = (device_slots[rows], tokens_B[rows])
            counts.index_put_(at, counts.new_ones(()), accumulate=True)

    def _count(self, token_ids: tuple[int, ...]) -> Tensor:
        tokens = torch.tensor(token_ids, dtype=torch.int64, device=self._device)
        return tokens.bincount(minlength=self._vocab_size).to(torch.int32)

    def _history(self) -> tuple[Tensor, Tensor]:
        """The [slots, vocab] buffers, made when the first sequence with penalties begins."""
        if self._counts is None or self._prompt_seen is None:
            shape = (self.num_slots, self._vocab_size)
            self._counts = torch.zeros(shape, dtype=torch.int32, device=self._device)
            self._prompt_seen = torch.zeros(shape, dtype=torch.bool, device=self._device)
        return self._counts, self._prompt_seen

    def _grow(self, num_slots: int) -> None:
        more = num_slots - self.num_slots
        blank = SamplingColumns.blank(more, self._vocab_size)
        self._columns = SamplingColumns(
            *(
                np.concatenate((getattr(self._columns, field.name), getattr(blank, field.name)))
                for field in dataclasses.fields(SamplingColumns)
            )
        )
        self.last_token = _padded(self.last_token, more)
        if self._counts is not None and self._prompt_seen is not None:
            self._counts = _padded(self._counts, more)
            self._prompt_seen = _padded(self._prompt_seen, more)


def _padded(tensor: Tensor, more: int) -> Tensor:
    return torch.cat((tensor, tensor.new_zeros(more, *tensor.shape[1:])))
