"""Where a submission goes: filter, score and pick over pairs of instances. Pure.

A pair's cost is the prefill side's cost plus the decode side's, so the cheapest pair of a group
(instances that can hand blocks to each other) is its cheapest prefill with its cheapest decode
side, and a decision is linear in the number of instances though it ranges over all pairs.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from controller.columns import Bools, PlacementView
from controller.events import PlaceQuery

Costs = npt.NDArray[np.float64]

# What a request asked to avoid (or the fallback should avoid) is used only if nothing else is
# left: dearer than any load.
_AVOID_COST = 1e6
_TIE = 1e-9
# A step's worth of queued prompt weighs as much as a full batch of sequences; memory pressure
# matters less, because blocks that only cache can be evicted.
_PRESSURE_WEIGHT = 0.5


@dataclasses.dataclass(frozen=True, slots=True)
class Choice:
    """Rows of a pair. ``prefill == decode``: everything on one instance."""

    prefill: int
    decode: int
    fallback: tuple[int, int] | None
    num_candidates: int
    """Pairs that passed the filters."""
    reason: str


@dataclasses.dataclass(frozen=True, slots=True)
class NoChoice:
    """Why nothing can take it."""

    reason: str
    hopeless: bool = False
    """No instance of this cluster could ever take it, whatever its state or role."""


def choose(query: PlaceQuery, view: PlacementView, draw: int) -> Choice | NoChoice:
    """The least loaded pair. ``draw`` numbers the decision: it only breaks ties."""
    fits = view.live & (view.max_tokens >= query.num_total_tokens)
    if view.live.any() and not fits.any():
        longest = int(view.max_tokens[view.live].max())
        return NoChoice(
            f"the longest sequence any instance can hold is {longest} tokens, "
            f"this one may become {query.num_total_tokens}",
            hopeless=True,
        )
    usable = fits & view.placeable
    prefill_ok = usable & view.takes_prefill
    # A request that ends at its first token makes no handoff: any prefill instance does it all.
    single = query.max_new_tokens <= 1
    decode_ok = prefill_ok if single else usable & view.takes_decode
    if not prefill_ok.any():
        return NoChoice("no ready instance takes prefill")
    if not decode_ok.any():
        return NoChoice("no ready instance takes decode")

    prefill_cost, decode_cost = _costs(view)
    avoided = [row for name in query.exclude if (row := view.row_of.get(name)) is not None]
    prefill_cost[avoided] += _AVOID_COST
    decode_cost[avoided] += _AVOID_COST

    pair = _cheapest(view, prefill_ok, decode_ok, prefill_cost, decode_cost, single, draw)
    if pair is None:
        return NoChoice("no ready prefill and decode instance can exchange KV blocks")
    prefill, decode = pair
    reason = (
        f"least loaded: prefill {view.names[prefill]} at {prefill_cost[prefill]:.3f}, "
        f"decode {view.names[decode]} at {decode_cost[decode]:.3f}"
    )
    if prefill in avoided or decode in avoided:
        reason = (
            f"nothing but instances it should avoid is left: prefill {view.names[prefill]}, "
            f"decode {view.names[decode]}"
        )
    num_candidates = _num_pairs(view, prefill_ok, decode_ok, single)
    fallback = None
    if num_candidates > 1:
        for cost in (prefill_cost, decode_cost):
            cost[[prefill, decode]] += _AVOID_COST
        fallback = _cheapest(view, prefill_ok, decode_ok, prefill_cost, decode_cost, single, draw)
        if fallback == pair:
            fallback = None
    return Choice(prefill, decode, fallback, num_candidates, reason)


def paths(view: PlacementView) -> tuple[bool, bool, bool]:
    """Whether anything ready takes prefill, decode, and both in one group (a usable path)."""
    prefill_ok = view.live & view.placeable & view.takes_prefill
    decode_ok = view.live & view.placeable & view.takes_decode
    both = np.intersect1d(view.group[prefill_ok], view.group[decode_ok])
    return bool(prefill_ok.any()), bool(decode_ok.any()), bool(len(both))


def _costs(view: PlacementView) -> tuple[Costs, Costs]:
    """Per row: what one more prefill, and one more decode, would meet there."""
    # Rows without an instance divide by one; no filter lets them through.
    max_seqs = np.maximum(view.max_num_seqs, 1)
    free = view.num_available_blocks / np.maximum(view.num_blocks, 1)
    pressure = _PRESSURE_WEIGHT * (1.0 - free)
    queued_steps = (view.num_waiting_tokens + view.fresh_tokens) / np.maximum(
        view.max_num_batched_tokens, 1
    )
    prefill = queued_steps + view.num_sequences / max_seqs + pressure
    decode = np.maximum(view.num_sequences, view.open_decode) / max_seqs + pressure
    return prefill, decode


def _cheapest(
    view: PlacementView,
    prefill_ok: Bools,
    decode_ok: Bools,
    prefill_cost: Costs,
    decode_cost: Costs,
    single: bool,
    draw: int,
) -> tuple[int, int] | None:
    if single:
        row = _pick(_tied(prefill_ok, prefill_cost), view.open_prefill, draw)
        return row, row
    best: tuple[float, Bools] | None = None
    for group in np.intersect1d(view.group[prefill_ok], view.group[decode_ok]):
        members = view.group == group
        cost = prefill_cost[prefill_ok & members].min() + decode_cost[decode_ok & members].min()
        if best is None or cost < best[0] - _TIE:
            best = (float(cost), members)
    if best is None:
        return None
    tied_prefill = _tied(prefill_ok & best[1], prefill_cost)
    tied_decode = _tied(decode_ok & best[1], decode_cost)
    # At equal cost, an instance that does both saves the handoff.
    same = np.intersect1d(tied_prefill, tied_decode)
    if len(same):
        row = _pick(same, view.open_prefill + view.open_decode, draw)
        return row, row
    return (
        _pick(tied_prefill, view.open_prefill, 2 * draw),
        _pick(tied_decode, view.open_decode, 2 * draw + 1),
    )


def _tied(ok: Bools, cost: Costs) -> npt.NDArray[np.intp]:
    """Rows among ``ok`` (not empty) that cost as little as the cheapest."""
    return np.flatnonzero(ok & (cost <= cost[ok].min() + _TIE))


def _pick(rows: npt.NDArray[np.intp], num_open: npt.NDArray[np.int64], draw: int) -> int:
    """Power of two choices among equals: draw two, take the one with less open."""
    bits = mix64(draw)
    first = int(rows[(bits & 0xFFFFFFFF) % len(rows)])
    second = int(rows[(bits >> 32) % len(rows)])
    return second if num_open[second] < num_open[first] else first


def mix64(value: int) -> int:
    """A fixed mixing of 64 bits (the finalizer of splitmix64): draws without a generator."""
    mask = 0xFFFFFFFFFFFFFFFF
    bits = (value + 1) * 0x9E3779B97F4A7C15 & mask
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9 & mask
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB & mask
    return bits ^ (bits >> 31)


def _num_pairs(view: PlacementView, prefill_ok: Bools, decode_ok: Bools, single: bool) -> int:
    if single:
        return int(prefill_ok.sum())
    num_groups = int(view.group.max()) + 1
    prefill = np.bincount(view.group[prefill_ok], minlength=num_groups)
    decode = np.bincount(view.group[decode_ok], minlength=num_groups)
    return int(prefill @ decode)
