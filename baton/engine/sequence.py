"""A sequence: one submission on its way through this engine, and queues of them by rank."""

from __future__ import annotations

import bisect
import dataclasses
from collections import abc
from collections.abc import Iterator
from typing import overload

from baton.core.blocks import BlockKey
from baton.core.request import FinishReason, Part, Submission, TokenLogprobs
from baton.engine.states import SequenceState


class DummyTokens(abc.Sequence[int]):
    """Tokens that nobody looks at, for simulations: how many there are is what counts.

    They are like those of no other sequence whose ``token`` is another one.
    """

    __slots__ = ("_num", "_token")

    def __init__(self, num: int, token: int) -> None:
        self._num = num
        self._token = token

    def __len__(self) -> int:
        return self._num

    @overload
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[int, ...]: ...

    def __getitem__(self, index: int | slice) -> int | tuple[int, ...]:
        places = range(self._num)[index]
        return self._token if isinstance(places, int) else (self._token,) * len(places)

    def append(self, token: int) -> None:
        """One more."""
        self._num += 1

    def grow(self, num: int) -> None:
        """So many more."""
        self._num += num


Rank = tuple[int, int]
"""(negated priority, order of arrival): smaller goes first, larger is preempted first."""


@dataclasses.dataclass(slots=True, eq=False)
class Sequence:
    """Mutable; only the scheduler and the engine change it. Compared by identity.

    What a step asks of each sequence, and never changes, is a field and not looked up each time.

    ``0 <= num_committed <= num_computed <= len(token_ids) + num_in_flight`` holds, and
    ``num_in_flight`` tokens that uncommitted plans will draw follow ``token_ids``.
    """

    submission: Submission
    part: Part
    rank: Rank
    salt: bytes
    """Root of its block keys."""
    max_num_tokens: int
    """Prompt and outputs end here, whatever is drawn."""
    state: SequenceState
    token_ids: list[int] | DummyTokens
    """Prompt, then the output tokens known so far."""
    stop_token_ids: frozenset[int]
    owes_prompt_logprobs: bool
    """Logprobs of the prompt are asked for and not reported yet."""
    blocks: list[int] = dataclasses.field(default_factory=list)
    keys: list[BlockKey] = dataclasses.field(default_factory=list)
    """Keys of full blocks, computed as they are needed."""
    num_registered: int = 0
    """Leading blocks of the table that the cache knows."""
    may_register: bool = True
    """False once another sequence has entered the same content first."""
    num_computed: int = 0
    """Leading tokens whose KV is computed or planned."""
    num_committed: int = 0
    """Leading tokens whose KV is there."""
    num_in_flight: int = 0
    """Tokens that uncommitted plans draw."""
    num_plans: int = 0
    """Uncommitted plans that contain it."""
    lineage: int = 0
    """Raised to void the rows of uncommitted plans that build on a token that did not come."""
    slot: int | None = None
    num_cached_tokens: int | None = None
    """Prompt tokens found in the cache at first; ``None`` before, and again once reported."""
    has_looked_up: bool = False
    rises_at_s: float | None = None
    """When offline work ranks as if it had priority 0."""
    num_offered: int = 0
    """Leading blocks that were offered to other tiers."""
    prompt_logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)
    request_id: str = dataclasses.field(init=False)
    """Of the submission."""
    num_prompt_tokens: int = dataclasses.field(init=False)
    """Without outputs."""
    is_greedy: bool = dataclasses.field(init=False)
    """It draws no numbers."""
    _table: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.request_id = self.submission.request_id
        self.num_prompt_tokens = len(self.submission.prompt_ids)
        self.is_greedy = self.submission.sampling.greedy

    @property
    def num_uncomputed(self) -> int:
        """Tokens, in-flight ones included, that no plan computes yet; 1 for a decoding one."""
        return len(self.token_ids) + self.num_in_flight - self.num_computed

    @property
    def is_offline(self) -> bool:
        """Whether it yields to online work: by its rank, which may rise."""
        return self.rank[0] > 0

    @property
    def next_output_index(self) -> int:
        """Index among the request's outputs of the token that is drawn next."""
        return len(self.token_ids) + self.num_in_flight - self.num_prompt_tokens

    @property
    def draws_last_token(self) -> bool:
        """Whether an uncommitted plan draws the last token it can have here."""
        limit = self.max_num_tokens
        if self.part is Part.PREFILL:
            limit = self.submission.num_tokens + 1
        return len(self.token_ids) + self.num_in_flight >= limit

    def block_table(self, num_blocks: int) -> tuple[int, ...]:
        """The first ``num_blocks`` blocks; the whole table is copied only when it has changed."""
        if num_blocks == len(self._table) == len(self.blocks):
            return self._table
        if num_blocks < len(self.blocks):
            return tuple(self.blocks[:num_blocks])
        self._table = tuple(self.blocks)
        return self._table

    def append(self, token: int) -> tuple[FinishReason | None, int | None]:
        """One more output token: why it ends the request, if it does, and the stop token."""
        self.token_ids.append(token)
        if token in self.stop_token_ids:
            return FinishReason.STOP, token
        if len(self.token_ids) >= self.max_num_tokens:
            return FinishReason.LENGTH, None
        return None, None

    def step_back(self) -> None:
        """The runner drew nothing: the last token is computed again, later rows do not count."""
        self.lineage += 1
        self.num_in_flight = 0
        self.num_computed = self.num_committed = len(self.token_ids) - 1

    def take_blocks(self) -> list[int]:
        """Hand over the block table and forget what was computed in it."""
        blocks, self.blocks, self._table = self.blocks, [], ()
        self.num_registered = self.num_computed = self.num_committed = self.num_offered = 0
        self.may_register = True
        self.prompt_logprobs.clear()
        return blocks


def _rank(sequence: Sequence) -> Rank:
    return sequence.rank


class RankedQueue:
    """Sequences in the order of their rank."""

    def __init__(self) -> None:
        self._items: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._items)

    def __contains__(self, sequence: Sequence) -> bool:
        index = bisect.bisect_left(self._items, sequence.rank, key=_rank)
        return index < len(self._items) and self._items[index] is sequence

    @property
    def first(self) -> Sequence | None:
        """The one whose turn it is."""
        return self._items[0] if self._items else None

    def offline(self) -> list[Sequence]:
        """Those that yield: the last of all."""
        return self._items[bisect.bisect_left(self._items, (1, 0), key=_rank) :]

    def add(self, sequence: Sequence) -> None:
        """Insert by rank."""
        bisect.insort(self._items, sequence, key=_rank)

    def remove(self, sequence: Sequence) -> None:
        """Take out one that is in the queue."""
        index = bisect.bisect_left(self._items, sequence.rank, key=_rank)
        assert self._items[index] is sequence, f"{sequence.request_id} is not in its queue"
        del self._items[index]
