"""Predicted latency against the request's own targets.

Per row, from its cost model, its queue and what is cached:

* prefill: the predicted TTFT. What is left of the target decides: a row that misses it costs more
  than any that meets it;
* decode: the predicted TPOT with this request in the batch, the same way; among rows that meet the
  target, the fuller one with the larger reserve is not preferred: load is spread.

A request without targets gets the fastest pair.
"""

from __future__ import annotations

import numpy as np

from controller.columns import PlacementView
from controller.events import PlaceQuery
from controller.policies.base import Costs, Scores
from controller.policies.least_loaded import load_costs
from controller.policies.prefixes import REMOTE, CachedTokens, cached_tokens

# A target that will be missed costs as much as so many seconds: more than any wait, less than
# what the request asked to avoid.
_MISS_S = 1e3
_EPSILON_S = 1e-9
_PATIENCE = 30.0
"""A request that is late anyway goes behind the longest queue, unless that is so many TTFT targets
long."""
_SMALLEST_CHUNK = 16.0


class SloAware:
    """The default."""

    name = "slo"
    colocates = False

    def __init__(self, *, late_binding_s: float = 0.25) -> None:
        """``late_binding_s``: with a longer queue before prefill, decode is bound after it."""
        self._late_binding_s = late_binding_s

    def score(self, query: PlaceQuery, view: PlacementView, now: float, draw: int) -> Scores:
        """See ``PlacementPolicy``."""
        if not view.sides.any_costs:
            prefill, decode = load_costs(view)
            return Scores(prefill, decode, text="least loaded (nothing is measured yet): ")
        cached = cached_tokens(query, view)
        queue_s = np.maximum(view.prefill_free_at_s - now, 0.0)
        ttft_s, own_s = _ttft(query, view, queue_s, cached)
        tpot_s = predicted_tpot(query, view)
        prefill, decode = ttft_s, tpot_s
        slo, rows = query.slo, view.sides.prefill
        if slo.ttft_s is not None:
            missed = ttft_s > slo.ttft_s
            num_missed = np.count_nonzero(missed[rows])
            if num_missed == len(rows) and query.waited_s + _least(own_s[rows]) <= slo.ttft_s:
                # Queues make it miss wherever it goes: behind the longest it costs others least.
                # Not so what is too long for its target with no queue at all: such requests come
                # at any load, and what piles up of them looks like demand for prefill.
                patience_s = _PATIENCE * slo.ttft_s
                behind = np.where(queue_s < patience_s, -queue_s, queue_s)
                prefill = behind + (_MISS_S + patience_s)
            elif num_missed:
                prefill = ttft_s + _MISS_S * missed
        handoff_s = query.num_prompt_tokens * view.handoff_token_s
        handoff_s += view.handoff_latency_s
        same = handoff_s
        same /= max(1.0, query.num_expected_tokens - 1.0)
        if slo.tpot_s is not None:
            missed = tpot_s + same > slo.tpot_s
            if np.count_nonzero(missed):
                decode = tpot_s + _MISS_S * missed
        tentative = bool(
            query.bind_to is None
            and len(rows)
            and np.minimum.reduce(queue_s[rows]) > self._late_binding_s
        )
        return Scores(
            prefill,
            decode,
            same,
            text="predicted: ",
            ttft_s=ttft_s,
            tpot_s=tpot_s,
            prefill_s=own_s,
            tentative=tentative,
        )


def _least(values: Costs) -> float:
    return float(np.minimum.reduce(values, initial=np.inf))


def predicted_ttft(
    query: PlaceQuery, view: PlacementView, now: float, cached: CachedTokens | None
) -> tuple[Costs, Costs]:
    """Per row: TTFT (what has passed included), and the instance's time that prefill takes."""
    return _ttft(query, view, np.maximum(view.prefill_free_at_s - now, 0.0), cached)


def _ttft(
    query: PlaceQuery, view: PlacementView, queue_s: Costs, cached: CachedTokens | None
) -> tuple[Costs, Costs]:
    num_tokens = float(query.num_prompt_tokens)
    stretch = _stretch(query, view)
    device: Costs | float = 0.0 if cached is None else cached.device
    own_s = _prefill_s(view, num_tokens - device, device)
    if stretch is not None:
        own_s *= stretch
    wait_s = queue_s
    if cached is not None and cached.pool:
        missing = cached.pool - cached.device
        fetch_s = missing * view.tier_token_s[REMOTE]
        fetch_s += view.tier_latency_s[REMOTE]
        for rows, tier in cached.nearby:
            fetch_s[rows] = view.tier_latency_s[tier, rows]
            fetch_s[rows] += missing[rows] * view.tier_token_s[tier, rows]
        rest_s = _prefill_s(view, num_tokens - cached.pool, float(cached.pool))
        if stretch is not None:
            rest_s *= stretch
        # As the instance will decide: the pool where that is faster.
        fetches = fetch_s + rest_s < own_s
        fetches &= missing > 0
        own_s = np.where(fetches, rest_s, own_s)
        # A fetch goes on while others are computed.
        wait_s = np.maximum(queue_s, np.where(fetches, fetch_s, 0.0))
    ttft_s = query.waited_s + wait_s
    ttft_s += own_s
    return ttft_s, own_s


def predicted_tpot(query: PlaceQuery, view: PlacementView) -> Costs:
    """Per row: seconds per token with this request in the batch."""
    step_s = view.open_decode + 1.0
    step_s *= view.decode_item_s
    step_s += view.decode_overhead_s
    context = view.open_context + (query.num_prompt_tokens + query.num_expected_tokens / 2)
    context *= view.decode_context_s
    step_s += context
    return np.asarray(step_s, dtype=np.float64)


def _prefill_s(view: PlacementView, num_new: Costs | float, start: Costs | float) -> Costs:
    """Seconds to compute ``num_new`` tokens after ``start`` others, with nothing beside them."""
    seconds: Costs = np.ceil(num_new / view.sides.step_tokens) * view.prefill_overhead_s
    seconds += num_new * view.prefill_item_s
    seconds += num_new * (start + num_new / 2) * view.prefill_context_s
    return seconds


def _stretch(query: PlaceQuery, view: PlacementView) -> Costs | None:
    """Per row: how much longer prompts take beside the decodes there; ``None``: no longer at all.

    A step's prompt chunk is as large as the decodes' target lets it be.
    """
    limit_s, rows = query.slo.tpot_s, view.sides.prefill
    if limit_s is None or not np.count_nonzero(view.open_decode[rows]):
        return None
    busy = view.open_decode > 0
    largest = view.sides.step_tokens
    item_s = np.maximum(view.prefill_item_s, _EPSILON_S)
    overhead_s = np.maximum(view.prefill_overhead_s, view.decode_overhead_s)
    beside_s = view.open_decode * view.decode_item_s + view.open_context * view.decode_context_s
    chunk = np.clip((limit_s - overhead_s - beside_s) / item_s, _SMALLEST_CHUNK, largest)
    alone_s = view.prefill_overhead_s / largest + item_s
    return np.where(busy, ((overhead_s + beside_s) / chunk + item_s) / alone_s, 1.0)
