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
from controller.policies.prefixes import CachedTokens, cached_tokens

# A target that will be missed costs as much as so many seconds: more than any wait, less than
# what the request asked to avoid.
_MISS_S = 1e3
_EPSILON_S = 1e-9
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
        if not view.has_costs.any():
            prefill, decode = load_costs(view)
            return Scores(prefill, decode, text="least loaded (nothing is measured yet): ")
        cached = cached_tokens(query, view)
        ttft_s, own_s = predicted_ttft(query, view, now, cached)
        tpot_s = predicted_tpot(query, view)
        prefill, decode = ttft_s.copy(), tpot_s.copy()
        slo = query.slo
        if slo.ttft_s is not None:
            prefill += _MISS_S * (ttft_s > slo.ttft_s)
        handoff_s = view.handoff_latency_s + query.num_prompt_tokens * view.handoff_token_s
        same = handoff_s / max(1.0, query.num_expected_tokens - 1.0)
        if slo.tpot_s is not None:
            decode += _MISS_S * (tpot_s + same > slo.tpot_s)
        wait_s = np.maximum(0.0, view.prefill_free_at_s - now)
        tentative = bool(
            query.bind_to is None
            and float(wait_s[view.live & view.placeable & view.takes_prefill].min(initial=0.0))
            > self._late_binding_s
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


def predicted_ttft(
    query: PlaceQuery, view: PlacementView, now: float, cached: CachedTokens | None
) -> tuple[Costs, Costs]:
    """Per row: TTFT (what has passed included), and the instance's time that prefill takes."""
    num_tokens = float(query.num_prompt_tokens)
    stretch = _stretch(query, view)
    device: Costs | float = 0.0 if cached is None else cached.device
    own_s = _prefill_s(view, num_tokens - device, device) * stretch
    fetch_s: Costs | float = 0.0
    if cached is not None and cached.pool.any():
        tier, rows = cached.pool_tier.astype(np.intp), np.arange(len(view.live))
        wait_s = view.tier_latency_s[tier, rows]
        wait_s = wait_s + (cached.pool - device) * view.tier_token_s[tier, rows]
        rest_s = _prefill_s(view, num_tokens - cached.pool, cached.pool) * stretch
        # As the instance will decide: the pool where that is faster.
        fetches = (cached.pool > 0) & (wait_s + rest_s < own_s)
        own_s = np.where(fetches, rest_s, own_s)
        fetch_s = np.where(fetches, wait_s, 0.0)
    queue_s = np.maximum(0.0, view.prefill_free_at_s - now)
    # A fetch goes on while others are computed.
    return query.waited_s + np.maximum(queue_s, fetch_s) + own_s, own_s


def predicted_tpot(query: PlaceQuery, view: PlacementView) -> Costs:
    """Per row: seconds per token with this request in the batch."""
    num_decodes = view.open_decode + 1.0
    context = view.open_context + query.num_prompt_tokens + query.num_expected_tokens / 2
    step_s = view.decode_overhead_s + num_decodes * view.decode_item_s
    return np.asarray(step_s + context * view.decode_context_s, dtype=np.float64)


def _prefill_s(view: PlacementView, num_new: Costs | float, start: Costs | float) -> Costs:
    """Seconds to compute ``num_new`` tokens after ``start`` others, with nothing beside them."""
    num_steps = np.ceil(num_new / np.maximum(view.max_num_batched_tokens, 1))
    seconds = num_steps * view.prefill_overhead_s + num_new * view.prefill_item_s
    return np.asarray(
        seconds + num_new * (start + num_new / 2) * view.prefill_context_s, dtype=np.float64
    )


def _stretch(query: PlaceQuery, view: PlacementView) -> Costs:
    """Per row: how much longer prompts take beside the decodes there.

    A step's prompt chunk is as large as the decodes' target lets it be.
    """
    limit_s = query.slo.tpot_s
    busy = view.open_decode > 0
    if limit_s is None or not busy.any():
        return np.ones(len(view.live))
    largest = np.maximum(view.max_num_batched_tokens, 1)
    item_s = np.maximum(view.prefill_item_s, _EPSILON_S)
    overhead_s = np.maximum(view.prefill_overhead_s, view.decode_overhead_s)
    beside_s = view.open_decode * view.decode_item_s + view.open_context * view.decode_context_s
    chunk = np.clip((limit_s - overhead_s - beside_s) / item_s, _SMALLEST_CHUNK, largest)
    alone_s = view.prefill_overhead_s / largest + item_s
    return np.where(busy, ((overhead_s + beside_s) / chunk + item_s) / alone_s, 1.0)
