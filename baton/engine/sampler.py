"""From logits to tokens, for a batch of rows that all want something else.

Per row: penalties, temperature, top-k, top-p, min-p, renormalise, then inverse CDF in token-id
order at the row's uniform. Each filter keeps all tokens at or above some value, so the three of
them together are one threshold per row, tokens tied with the last one kept are kept too, and the
result does not depend on how a sort orders equals. Filters are float32; the draw is float64 where
the device has it. Any torch device.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from baton.core.request import TokenLogprobs
from baton.engine.slot_state import SamplingColumns, SlotState

Float64s = npt.NDArray[np.float64]
Int64s = npt.NDArray[np.int64]

_CANDIDATES = 256
"""How many best tokens are sorted before a top-p row is found to need all of them."""
_LARGE = 1e30
"""Beyond any logit, and far from where float32 ends."""
_MIN_TEMPERATURE = 1e-6


def sample(logits_BV: Tensor, slots_B: Int64s, uniforms_B: Float64s, state: SlotState) -> Tensor:
    """Token ids [B], int64, on the logits' device. ``logits_BV`` is float32 and not changed."""
    columns = state.columns(slots_B)
    penalised = np.flatnonzero(columns.has_penalties())
    if penalised.size:
        rows = torch.from_numpy(penalised).to(logits_BV.device)
        slots = torch.from_numpy(slots_B[penalised]).to(logits_BV.device)
        counts, prompt_seen = state.history(slots)
        changed = apply_penalties(
            logits_BV.index_select(0, rows), counts, prompt_seen, columns.take(penalised)
        )
        logits_BV = logits_BV.index_copy(0, rows, changed)
    return choose(logits_BV, columns, uniforms_B)


def apply_penalties(
    logits_BV: Tensor, counts_BV: Tensor, prompt_seen_BV: Tensor, columns: SamplingColumns
) -> Tensor:
    """Repetition over prompt and output, then frequency and presence over output.

    ``counts_BV``: occurrences among output tokens; ``prompt_seen_BV``: in the prompt or not.
    """
    repetition, frequency, presence = _upload(
        logits_BV.device, columns.repetition, columns.frequency, columns.presence
    )
    in_output = counts_BV > 0
    repeated = torch.where(logits_BV > 0, logits_BV / repetition, logits_BV * repetition)
    logits_BV = torch.where(in_output | prompt_seen_BV, repeated, logits_BV)
    penalized = logits_BV - frequency * counts_BV - presence * in_output
    # A penalty next to 0 overflows. One request's odd parameter must not make NaN of its row: the
    # step, and with it everybody's token, would fail.
    return penalized.nan_to_num_(nan=0.0, posinf=_LARGE, neginf=-_LARGE)


def choose(logits_BV: Tensor, columns: SamplingColumns, uniforms_B: Float64s) -> Tensor:
    """Best token of greedy rows (the lowest id of exact ties), a draw for the others."""
    drawn = np.flatnonzero(columns.temperature > 0)
    if not drawn.size:
        return logits_BV.argmax(-1)
    if drawn.size == len(logits_BV):
        return _draw(logits_BV, columns, uniforms_B)
    rows = torch.from_numpy(drawn).to(logits_BV.device)
    tokens = _draw(logits_BV.index_select(0, rows), columns.take(drawn), uniforms_B[drawn])
    return logits_BV.argmax(-1).index_copy_(0, rows, tokens)


def _draw(logits_BV: Tensor, columns: SamplingColumns, uniforms_B: Float64s) -> Tensor:
    dtype = _draw_dtype(logits_BV.device)
    (temperature,) = _upload(
        logits_BV.device, np.maximum(columns.temperature, np.float32(_MIN_TEMPERATURE))
    )
    uniforms = torch.from_numpy(uniforms_B).to(logits_BV.device, dtype).unsqueeze(1)
    # Best token at 0: no temperature, however low, can overflow.
    scaled = (logits_BV - logits_BV.amax(-1, keepdim=True)) / temperature
    threshold = _threshold(scaled, columns)
    if threshold is not None:
        scaled = scaled.masked_fill(scaled < threshold, float("-inf"))
    probs = torch.softmax(scaled, -1, dtype=dtype)
    cdf = probs.cumsum(-1)
    total = cdf[:, -1:].contiguous()
    tokens = torch.searchsorted(cdf, uniforms * total, right=True)
    # u may round up to 1 (float32), and u * total to total. The first token to reach the total
    # is the last that has any mass.
    tokens = torch.minimum(tokens, torch.searchsorted(cdf, total))
    tokens = tokens.clamp_(max=cdf.shape[1] - 1)  # of a row of NaN the search finds nothing
    # A device's parallel scan need not be monotone: the last word is the probability itself.
    possible = probs.gather(1, tokens) > 0
    return torch.where(possible, tokens, probs.argmax(-1, keepdim=True)).squeeze(1)


def _draw_dtype(device: torch.device) -> torch.dtype:
    """In what the distribution is summed: an inverse CDF over thousands of tokens in float32 is off
    by up to 1e-6, and two batches that differ in rounding would part there. Not every device has
    float64; there the bound is what float32 gives.
    """
    return torch.float64 if device.type in ("cpu", "cuda") else torch.float32


def _threshold(scaled_BV: Tensor, columns: SamplingColumns) -> Tensor | None:
    """[B, 1]: the lowest value that each row keeps; ``None`` where no row filters."""
    device, vocab_size = scaled_BV.device, scaled_BV.shape[1]
    limited, nucleus = columns.top_k < vocab_size, columns.top_p < 1
    threshold = None
    if np.any(columns.min_p > 0):
        with np.errstate(divide="ignore"):
            (threshold,) = _upload(device, np.log(columns.min_p))
    if not np.any(limited | nucleus):
        return threshold
    wanted = int(columns.top_k[limited].max(initial=0))
    if np.any(nucleus & ~limited):
        wanted = max(wanted, _CANDIDATES)
    best_BN = scaled_BV.topk(min(wanted, vocab_size), -1).values
    floor = _top_k_floor(best_BN, columns, vocab_size)
    if np.any(nucleus):
        kept = scaled_BV.masked_fill(scaled_BV < floor, float("-inf")).exp_()
        (share,) = _upload(device, columns.top_p)
        target = share * kept.sum(-1, keepdim=True)
        reached = _nucleus_floor(best_BN, target, floor)
        if best_BN.shape[1] < vocab_size:
            open_ended = torch.from_numpy(nucleus & ~limited).to(device)
            short = (best_BN.exp().sum(-1) < target.squeeze(1)) & open_ended
            rows = short.nonzero().squeeze(1)
            if len(rows):
                sorted_RV = scaled_BV.index_select(0, rows).sort(-1, descending=True).values
                exact = _nucleus_floor(sorted_RV, target[rows], floor[rows])
                reached = reached.index_copy(0, rows, exact)
        floor = torch.where(share < 1, reached, floor)
    return floor if threshold is None else torch.maximum(floor, threshold)


def _nucleus_floor(best_BN: Tensor, target_B1: Tensor, floor_B1: Tensor) -> Tensor:
    """[B, 1]: the value at which the best tokens together reach ``target_B1`` of mass.

    ``best_BN`` sorted, best first. The lowest of them at or above ``floor_B1`` where they do not
    reach it; the best one always stays.
    """
    gain_BN = best_BN.exp()
    outside = (gain_BN.cumsum(-1) - gain_BN >= target_B1) | (best_BN < floor_B1)
    outside[:, 0] = False
    return best_BN.masked_fill(outside, float("inf")).amin(-1, keepdim=True)


def _top_k_floor(best_BN: Tensor, columns: SamplingColumns, vocab_size: int) -> Tensor:
    """[B, 1]: the k-th best value, -inf for rows that keep all."""
    limited = columns.top_k < vocab_size
    places = np.where(limited, columns.top_k - 1, 0)
    kth = best_BN.gather(1, torch.from_numpy(places).to(best_BN.device).unsqueeze(1))
    keep_all = torch.from_numpy(~limited).to(best_BN.device).unsqueeze(1)
    return kth.masked_fill(keep_all, float("-inf"))


def _upload(device: torch.device, *columns: npt.NDArray[np.float32]) -> tuple[Tensor, ...]:
    """Columns [B] of numbers → tensors [B, 1], in one copy."""
    together = torch.from_numpy(np.stack(columns)).to(device)
    return together.unsqueeze(2).unbind(0)


def token_logprobs(
    logits_NV: Tensor, tokens_N: Tensor, num_top: Sequence[int]
) -> list[TokenLogprobs]:
    """Logprob, rank and best alternatives of one token per row, from raw logits.

    ``num_top`` [N]: how many alternatives each row reports. Tokens of equal probability share a
    rank, and are listed by id.
    """
    logprobs_NV = torch.log_softmax(logits_NV, -1)
    own_N1 = logprobs_NV.gather(1, tokens_N.unsqueeze(1))
    ranks = ((logprobs_NV > own_N1).sum(-1) + 1).tolist()
    most = min(max(num_top, default=0), logits_NV.shape[1])
    top_values, top_ids = logprobs_NV.topk(most, -1)
    rows = zip(
        tokens_N.tolist(),
        own_N1.squeeze(1).tolist(),
        ranks,
        top_ids.tolist(),
        top_values.tolist(),
        num_top,
        strict=True,
    )
    results = []
    for token, logprob, rank, ids, values, count in rows:
        listed = zip(ids[:count], values[:count], strict=True)
        top = sorted(listed, key=lambda pair: (-pair[1], pair[0]))
        results.append(TokenLogprobs(token, logprob, rank, tuple(top)))
    return results
