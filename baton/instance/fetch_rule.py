"""Fetch a prefix from the pool, or compute it: whichever is predicted to be sooner done. Pure.

Both sides are learnt from what this instance measures. Computing: the cost model of its own steps,
so that the later part of a long prompt counts as what it costs, and whole steps that are saved.
Fetching: to ask the pool node, to bring blocks up from each lower tier, to copy them. What waits
before the prompt is computed meanwhile, so a fetch costs only what it takes longer than that.

Who never fetches measures nothing, and one slow moment would count for ever. So each time that
something is found too slow, a little more is hoped of it, until it is tried once; this much less
often, the more it would cost: tries make requests slower by a twentieth at most, on average.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from baton.core.cluster import StepSample
from baton.core.config import FetchPolicy
from baton.core.cost_model import StepCosts, chunk_context
from baton.core.predictor import InstancePredictor, OnlineCosts
from kvpool.tiers import Tier

_ASK_S = 0.002
_COPY_S_PER_BYTE = 2e-10
_BRING_UP: Mapping[Tier, tuple[float, float]] = {
    Tier.DISK: (0.001, 3e-10),
    Tier.REMOTE: (0.002, 5e-10),
    Tier.EXTERNAL: (0.005, 1e-9),
}
"""Seconds for the first, and for each byte, before anything was measured: what is good, so that it
is measured."""
ALL_TIERS = (Tier.HOST, *_BRING_UP)
_HOPE = 0.05
_HIT_WEIGHT = 0.05
_LEAST_HIT_SHARE = 0.1


@dataclasses.dataclass(frozen=True, slots=True)
class Missing:
    """What of a prompt's beginning is not cached here, and may be in the pool."""

    num_cached_tokens: int
    """Before it; cached here."""
    num_blocks: int
    """At most so much of it."""
    num_prompt_tokens: int
    """Of the whole prompt."""
    queue_s: float = 0.0
    """Until what waits before it is computed."""
    tiers: tuple[Tier, ...] = ()
    """To bring blocks up from; empty: all."""


class _Estimate:
    """Seconds of something with so many blocks."""

    __slots__ = ("_num_refused", "_online")

    def __init__(self, first_s: float, block_s: float) -> None:
        self._online = OnlineCosts(StepCosts(first_s, block_s, 0.0))
        self._num_refused = 0.0

    def seconds(self, num_blocks: int) -> float:
        """Predicted; less and less while it is not measured."""
        return self._online.predict(_line(num_blocks)) / (1.0 + _HOPE * self._num_refused)

    def refused(self) -> None:
        """It was found too slow."""
        self._num_refused += 1.0

    def observe(self, num_blocks: int, seconds: float, beside_s: float = 0.0) -> None:
        """It was measured, together with something that took ``beside_s``."""
        own_s = max(1e-9, seconds - beside_s)
        predicted_s = self._online.predict(_line(num_blocks))
        self._online.observe(_line(num_blocks), own_s, beside_s=beside_s)
        # What is much faster than believed is to be tried again soon, until it is believed.
        self._num_refused = max(0.0, predicted_s / own_s - 1.0) / _HOPE


class FetchRule:
    """Decides for one instance.

    Args:
        policy: ``auto``, or the answer.
        block_size: in tokens.
        block_bytes: of a block.
        chunk: prompt tokens that a step computes, at most.
    """

    def __init__(
        self, policy: FetchPolicy, *, block_size: int, block_bytes: int, chunk: int = 8192
    ) -> None:
        self.policy = policy
        self._block_size = block_size
        self._chunk = chunk
        self._steps = InstancePredictor()
        self._ask = _Estimate(_ASK_S, 0.0)
        copy_s = block_bytes * _COPY_S_PER_BYTE
        self._copy = {tier: _Estimate(0.0, copy_s) for tier in ALL_TIERS}
        self._bring_up = {
            tier: _Estimate(first_s, block_bytes * byte_s)
            for tier, (first_s, byte_s) in _BRING_UP.items()
        }
        self._hit_share = 1.0
        """Of the questions, those that found something."""

    # What was measured.

    def stepped(self, sample: StepSample) -> None:
        """A step took so long."""
        self._steps.observe(sample)

    def answered(self, num_asked: int, found: Mapping[Tier, int], seconds: float) -> None:
        """The pool took so long to answer a question for so many blocks; ``found``: where those
        were that it has, all in the host tier now."""
        self._hit_share += _HIT_WEIGHT * (bool(found) - self._hit_share)
        lower = {tier: found[tier] for tier in self._bring_up if found.get(tier)}
        if lower:
            _measured(self._bring_up, lower, seconds, self._ask.seconds(num_asked))
        else:
            self._ask.observe(num_asked, seconds)

    def fetched(self, found: Mapping[Tier, int], seconds: float) -> None:
        """Copying so many blocks, by where they were before they were asked for, took so long."""
        _measured(self._copy, found, seconds, 0.0)

    # What follows.

    def queue_s(self, num_waiting_tokens: int) -> float:
        """Seconds until so many prompt tokens are computed."""
        costs = self._steps.prefill.costs
        num_steps = -(-num_waiting_tokens // self._chunk)
        return num_waiting_tokens * costs.item_s + num_steps * costs.overhead_s

    def tiers_to_ask(self, missing: Missing) -> tuple[Tier, ...]:
        """From which tiers blocks are worth bringing up; empty: the pool need not be asked."""
        every = ALL_TIERS
        if missing.num_blocks <= 0 or self.policy == "never":
            return ()
        if self.policy == "always" or not self._steps.prefill.learnt:
            return every  # nothing was computed yet: a hit is the likelier gain
        compute_s = self._compute_s(missing)
        ask_s = self._ask.seconds(missing.num_blocks)
        answer = []
        for tier in every:
            rest_s = self._fetch_s({tier: missing.num_blocks}, bring_up=True)
            late_s = max(0.0, ask_s + rest_s - missing.queue_s)
            # A question that finds nothing has cost its time all the same.
            wait_s = max(0.0, ask_s - missing.queue_s)
            share = max(_LEAST_HIT_SHARE, self._hit_share)
            if share * (compute_s - late_s) > (1.0 - share) * wait_s:
                answer.append(tier)
            else:
                self._refused(tier)
        if Tier.HOST not in answer:
            # Whatever is asked for passes through it.
            self._ask.refused()
            return ()
        return tuple(answer)

    def worth_fetching(self, missing: Missing, found: Mapping[Tier, int]) -> bool:
        """Whether blocks that the pool holds for us shall be copied; ``found`` by where they were.
        ``missing`` as when it was asked, its ``queue_s`` as it is now."""
        num_blocks = sum(found.values())
        if num_blocks <= 0 or self.policy == "never":
            return False
        if self.policy == "always" or not self._steps.prefill.learnt:
            return True
        compute_s = self._compute_s(dataclasses.replace(missing, num_blocks=num_blocks))
        if max(0.0, self._fetch_s(found, bring_up=False) - missing.queue_s) < compute_s:
            return True
        for tier in found:
            self._refused(tier)
        return False

    def _compute_s(self, missing: Missing) -> float:
        """What computing these blocks adds to computing the rest of the prompt."""
        costs = self._steps.prefill.costs
        num_tokens = missing.num_blocks * self._block_size
        left = missing.num_prompt_tokens - missing.num_cached_tokens
        num_steps = self._num_steps(left) - self._num_steps(left - num_tokens)
        context = chunk_context(missing.num_cached_tokens, num_tokens)
        return num_steps * costs.overhead_s + num_tokens * costs.item_s + context * costs.context_s

    def _num_steps(self, num_tokens: int) -> int:
        return -(-max(1, num_tokens) // self._chunk)

    def _fetch_s(self, found: Mapping[Tier, int], *, bring_up: bool) -> float:
        """Seconds of copies, and of bringing up what has to be, without the question."""
        seconds = sum(self._copy[tier].seconds(n) for tier, n in found.items() if n)
        if bring_up:
            lower = ((tier, n) for tier, n in found.items() if n and tier in self._bring_up)
            seconds += sum(self._bring_up[tier].seconds(n) for tier, n in lower)
        return seconds

    def _refused(self, tier: Tier) -> None:
        self._copy[tier].refused()
        if tier in self._bring_up:
            self._bring_up[tier].refused()


def _measured(
    estimates: Mapping[Tier, _Estimate], found: Mapping[Tier, int], seconds: float, beside_s: float
) -> None:
    """Blocks of several tiers took so long together: what cannot be told apart is laid to the tier
    that took most of it."""
    predicted = {tier: estimates[tier].seconds(count) for tier, count in found.items() if count}
    if predicted:
        most = max(predicted, key=lambda tier: predicted[tier])
        others_s = sum(predicted.values()) - predicted[most]
        estimates[most].observe(found[most], seconds, beside_s + others_s)


def _line(num_blocks: int) -> tuple[float, float, float]:
    return (1.0, float(num_blocks), 0.0)
