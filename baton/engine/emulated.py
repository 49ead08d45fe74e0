"""Emulated instances: all that an instance is, but that its steps compute nothing.

A step takes the time that a profile says. Its tokens are drawn from fingerprints (see
``fingerprints.py``) that lie in the KV blocks where keys and values would be, and are read back
from there: a block that is lost, stale, corrupt or somebody else's gives wrong tokens. No torch
and no weights.

Time may be dilated: every step and transfer takes so many times as long as the profile says, so
that the host's own work, which is real, weighs less. Whoever measures divides by the same number.
"""

from __future__ import annotations

import array
import dataclasses
import itertools
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from baton.core.clock import Clock, SystemClock
from baton.core.config import EngineConfig
from baton.core.cost_model import CostModel
from baton.core.request import TokenLogprobs
from baton.engine.checkpoint import Checkpoint
from baton.engine.fingerprints import Words, draw, fingerprints, mix
from baton.engine.memory import MemoryMap
from baton.engine.plan import (
    RowResult,
    SequenceStep,
    SlotBegin,
    StepPlan,
    StepResult,
    shape_of,
)
from baton.engine.profile_file import load_profile

_MIN_SLACK_S = 0.002
_SLACK = 0.25
"""Of the last step's time. A step that begins so soon after its end waited behind it: what is
between them is this host's delay, which a device with a queue of its own would not have had."""


@dataclasses.dataclass(frozen=True, slots=True)
class Emulation:
    """How long everything is to take."""

    cost: CostModel
    """Dilated."""

    @classmethod
    def from_config(cls, config: EngineConfig) -> Emulation:
        """Of ``device: emulated``. Raises ConfigError for a profile that cannot be read."""
        assert config.profile is not None, "device emulated has a profile"
        return cls(load_profile(Path(config.profile)).cost.dilated(config.time_dilation))

    def runner(
        self, checkpoint: Checkpoint, config: EngineConfig, buffer: memoryview
    ) -> EmulatedRunner:
        """For an instance whose ``config.num_blocks`` KV blocks lie in ``buffer``."""
        return EmulatedRunner(
            self.cost,
            buffer,
            num_blocks=config.kv_blocks,
            block_size=config.block_size,
            vocab_size=checkpoint.config.vocab_size,
            avoid=checkpoint.eos_token_ids,
            queued=config.async_scheduling,
        )

    def handoff_s(self, num_tokens: int) -> float:
        """How long so many tokens take from a prefill to a decode instance."""
        return self.cost.handoff_s(num_tokens)

    def fetch_s(self, num_tokens: Mapping[str, int]) -> float:
        """How long a prefix takes out of the pool: tokens by tier."""
        return sum(self.cost.fetch_s(tier, count) for tier, count in num_tokens.items())


class _Slot:
    """What the runner remembers of a sequence; its KV is in the blocks alone."""

    __slots__ = ("begin", "firsts", "last_token", "num_verified")

    def __init__(self, begin: SlotBegin) -> None:
        self.begin = begin
        self.last_token: int | None = None
        self.firsts = array.array("I")
        """The fingerprint at the begin of each of its blocks, as it was written or verified: who
        else writes to a block begins there."""
        self.num_verified = 0
        """Leading tokens in the cache that were written by this slot, or read and verified."""


class EmulatedRunner:
    """Implements ``baton.engine.plan.Runner``.

    ``buffer``: the instance's arena, in the layout that ``kv_layout`` gives emulated devices: per
    token a word for its id and one for its fingerprint. ``avoid``: token ids that are never drawn.
    ``queued``: whether a plan may wait behind the one that runs.

    When a slot begins, all that it finds in its blocks is read and must be a chain of
    fingerprints; after that, each step reads one word of every block. What is wrong spoils the
    fingerprints from there on, and so the tokens.
    """

    def __init__(
        self,
        cost: CostModel,
        buffer: memoryview,
        *,
        num_blocks: int,
        block_size: int,
        vocab_size: int,
        avoid: Sequence[int] = (),
        queued: bool = True,
        clock: Clock | None = None,
    ) -> None:
        num_words = num_blocks * 2 * block_size
        words = np.frombuffer(buffer, np.uint32, num_words)
        self._words: npt.NDArray[np.uint32] = words.reshape(num_blocks, 2, block_size)
        self._flat = buffer[: num_words * 4].cast("B").cast("I")
        self._block_size = block_size
        self._vocab_size = vocab_size
        self._avoid = sorted(set(avoid))
        self._cost = cost
        self._queued = queued
        self._slack_s = 0.0
        self._clock = clock or SystemClock()
        self._closed = threading.Event()
        self._slots: dict[int, _Slot] = {}
        self._free_at = 0.0
        self.num_faults = 0
        """Times that a sequence's blocks did not hold what they should."""
        self.host_s = 0.0
        """Spent on the work itself: as long as it is shorter than the steps, it costs no time."""
        self.late_s = 0.0
        """How much longer than the profile says steps were, so late that the next could not make up
        for it."""

    def execute(self, plan: StepPlan) -> StepResult:
        """Fill in the fingerprints, and draw tokens from them; returns when the time is over."""
        entered = self._clock.now()
        since_last = entered - self._free_at
        begun = self._free_at if 0 <= since_last < self._slack_s else entered
        rows = self._compute(plan)
        step_s = self._cost.step_s(shape_of(plan))
        ends = begun + step_s
        self._slack_s = max(_MIN_SLACK_S, _SLACK * step_s) if self._queued else 0.0
        now = self._clock.now()
        self.host_s += now - entered
        if ends > now:
            self._closed.wait(ends - now)
        late = max(0.0, self._clock.now() - ends)
        if late < self._slack_s:
            late = 0.0
        self.late_s += late
        self._free_at = ends + late
        return StepResult(plan.step, rows, self._free_at - begun)

    def memory(self) -> list[MemoryMap]:
        """Nothing is measured: the tensors of a model are not here."""
        return []

    def close(self) -> None:
        """End a wait and let go of the blocks. Idempotent."""
        self._closed.set()
        self._words = np.empty((0, 2, self._block_size), np.uint32)
        self._flat.release()

    def _compute(self, plan: StepPlan) -> tuple[RowResult, ...]:
        for begin in plan.begins:
            self._slots[begin.slot] = _Slot(begin)
        faults = self._check(plan.rows)
        return tuple(
            self._row(row, self._slots[row.slot], fault)
            for row, fault in zip(plan.rows, faults, strict=True)
        )

    def _row(self, row: SequenceStep, slot: _Slot, fault: int) -> RowResult:
        before = fault
        if row.start:
            before += self._flat[self._place(row, row.start - 1)]
        token_ids = row.token_ids
        if token_ids is None:
            assert slot.last_token is not None, "nothing was sampled for this slot"
            token_ids = (slot.last_token,)
        if len(token_ids) == 1:
            place = self._place(row, row.start)
            fingerprint = (before + mix(token_ids[0], row.start)) & 0xFFFFFFFF
            self._flat[place - self._block_size] = token_ids[0]
            self._flat[place] = fingerprint
            if row.start % self._block_size == 0:
                slot.firsts.append(fingerprint)
        else:
            self._write(row, slot, token_ids, before)
        end = slot.num_verified = row.start + len(token_ids)
        token_id = None
        if row.sample:
            fingerprint = self._flat[self._place(row, end - 1)]
            token_id = slot.last_token = draw(fingerprint, self._vocab_size, self._avoid)
        return _result(row, slot.begin, end, token_id)

    def _place(self, row: SequenceStep, position: int) -> int:
        """Where in the arena the word of a position's fingerprint is; its token's is one page
        before."""
        size = self._block_size
        return (row.block_table[position // size] * 2 + 1) * size + position % size

    def _write(
        self, row: SequenceStep, slot: _Slot, token_ids: tuple[int, ...], before: int
    ) -> None:
        tokens = np.array(token_ids, np.uint32)
        found = fingerprints(tokens, row.start, before & 0xFFFFFFFF)
        positions = np.arange(row.start, row.start + len(tokens))
        indexes, offsets = np.divmod(positions, self._block_size)
        blocks = np.array(row.block_table)[indexes]
        self._words[blocks, 0, offsets] = tokens
        self._words[blocks, 1, offsets] = found
        slot.firsts.extend(found[offsets == 0].tolist())

    def _check(self, rows: Sequence[SequenceStep]) -> list[int]:
        """Read what the rows build on: for each row 0, or a number that spoils it."""
        faults = [0] * len(rows)
        known: list[int] = []
        for i, row in enumerate(rows):
            slot = self._slots[row.slot]
            if slot.num_verified != row.start:
                faults[i] = self._verify(row, slot)
            elif row.start:
                known.append(i)
        if known:
            for i, fault in zip(known, self._check_known([rows[i] for i in known]), strict=True):
                faults[i] = fault
        self.num_faults += sum(fault != 0 for fault in faults)
        return faults

    def _verify(self, row: SequenceStep, slot: _Slot) -> int:
        """All words of tokens [0, start), which others wrote."""
        size, start = self._block_size, row.start
        count = -(-start // size)
        words = self._words[np.array(row.block_table[:count], np.intp)]
        tokens, found = (words[:, plane].reshape(-1)[:start] for plane in (0, 1))
        slot.firsts = array.array("I", found[::size].tolist())
        wrong = found ^ fingerprints(tokens, 0, 0)
        return _spoiler(wrong) if wrong.any() else 0

    def _check_known(self, rows: Sequence[SequenceStep]) -> list[int]:
        """One word of each block that these rows have written or verified before."""
        firsts = [self._slots[row.slot].firsts for row in rows]
        counts = [len(words) for words in firsts]
        tables = (row.block_table[:count] for row, count in zip(rows, counts, strict=True))
        blocks = np.fromiter(itertools.chain.from_iterable(tables), np.intp, sum(counts))
        wrong = self._words[blocks, 1, 0] ^ np.frombuffer(b"".join(firsts), np.uint32)
        if not wrong.any():
            return [0] * len(rows)
        parts = np.split(wrong, np.cumsum(counts)[:-1])
        return [_spoiler(part) if part.any() else 0 for part in parts]


def _spoiler(wrong: Words) -> int:
    """Any number that depends on what is wrong, but for 0."""
    return mix(int(wrong.sum(dtype=np.uint32)), len(wrong)) or 1


def _result(row: SequenceStep, begin: SlotBegin, end: int, token_id: int | None) -> RowResult:
    """The only token that is likely, and where somebody asks, how likely."""
    logprobs = None
    if token_id is not None and begin.sampling.logprobs is not None:
        logprobs = _certain(token_id, begin.sampling.logprobs)
    prompt: tuple[TokenLogprobs, ...] = ()
    if row.prompt_logprobs:
        num_top = begin.sampling.prompt_logprobs or 0
        prompt = tuple(_certain(i, num_top) for i in begin.prompt_ids[row.start + 1 : end + 1])
    return RowResult(token_id, logprobs, prompt)


def _certain(token_id: int, num_top: int) -> TokenLogprobs:
    return TokenLogprobs(token_id, 0.0, rank=1, top=((token_id, 0.0),) if num_top else ())
