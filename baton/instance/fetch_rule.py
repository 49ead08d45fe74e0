"""Fetch a prefix from the pool, or compute it: whichever was measured to be faster. Pure.

One number for each side, both smoothed: seconds per token of steps that compute many, and seconds
per block of fetches, with what a fetch costs before its first block. The scheduler's cost model
will know more (queues, tiers, other machines); this rule only keeps a slow pool from making
requests slower than no pool.
"""

from __future__ import annotations

from baton.core.config import FetchPolicy

_WEIGHT = 0.2
"""Of the newest measurement."""
_MIN_STEP_TOKENS = 32
"""Steps with fewer say how long decoding takes, not prefill."""
_FIRST_SECONDS_PER_BYTE = 1e-9
_FIRST_OVERHEAD_S = 0.002
_FORGOTTEN = 0.02
"""Of what is known against fetching, each time that it prevails: who never fetches measures
nothing, and one slow moment would count for ever."""


class FetchRule:
    """Decides for one instance. ``block_size`` in tokens, ``block_bytes`` of a block."""

    def __init__(self, policy: FetchPolicy, *, block_size: int, block_bytes: int) -> None:
        self._policy = policy
        self._block_size = block_size
        self._token_s: float | None = None
        self._first_block_s = self._block_s = block_bytes * _FIRST_SECONDS_PER_BYTE
        self._overhead_s = _FIRST_OVERHEAD_S

    def computed(self, num_tokens: int, seconds: float) -> None:
        """A step took so long."""
        if num_tokens >= _MIN_STEP_TOKENS:
            per_token = seconds / num_tokens
            known = per_token if self._token_s is None else self._token_s
            self._token_s = known + _WEIGHT * (per_token - known)

    def answered(self, seconds: float) -> None:
        """The pool took so long to say what it has."""
        self._overhead_s += _WEIGHT * (seconds - self._overhead_s)

    def fetched(self, num_blocks: int, seconds: float) -> None:
        """Copying so many blocks took so long."""
        self._block_s += _WEIGHT * (seconds / num_blocks - self._block_s)

    def worth_asking(self, num_blocks: int) -> bool:
        """Whether the pool shall be asked for a prefix that it may have at most so much of."""
        return num_blocks > 0 and self._worth(num_blocks, self._overhead_s)

    def worth_fetching(self, num_blocks: int) -> bool:
        """Whether blocks that the pool holds for us shall be copied."""
        return num_blocks > 0 and self._worth(num_blocks, 0.0)

    def _worth(self, num_blocks: int, overhead_s: float) -> bool:
        if self._policy != "auto":
            return self._policy == "always"
        if self._token_s is None:
            return True  # nothing was computed yet: a hit is the likelier gain
        compute_s = num_blocks * self._block_size * self._token_s
        if overhead_s + num_blocks * self._block_s < compute_s:
            return True
        self._overhead_s -= _FORGOTTEN * max(0.0, self._overhead_s - _FIRST_OVERHEAD_S)
        self._block_s -= _FORGOTTEN * max(0.0, self._block_s - self._first_block_s)
        return False
