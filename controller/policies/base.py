"""Where a submission goes: filter, score and pick over pairs of instances. Pure.

A policy only *scores*: per row, what one more prefill and one more decode would cost there. Filters
and the pick are the same for all of them, in :func:`choose`. A pair's cost is the prefill side's
plus the decode side's, less what is saved where both are one instance, so the cheapest pair of a
group (instances that can hand blocks to each other) is found in time linear in the number of
instances, though the decision ranges over all pairs.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import numpy as np
import numpy.typing as npt

from controller.columns import Bools, PlacementView
from controller.events import PlaceQuery

Costs = npt.NDArray[np.float64]

# What a request asked to avoid (or the fallback should avoid) is used only if nothing else is
# left: dearer than any load.
_AVOID_COST = 1e6
_TIE = 1e-9


@dataclasses.dataclass(frozen=True, slots=True)
class Choice:
    """Rows of a pair. ``prefill == decode``: everything on one instance."""

    prefill: int
    decode: int
    fallback: tuple[int, int] | None
    num_candidates: int
    """Pairs that passed the filters."""
    reason: str
    tentative: bool = False
    """The decode side is to be asked for again once prefill is done."""
    predicted_ttft_s: float | None = None
    predicted_tpot_s: float | None = None
    prefill_s: float = 0.0
    """Of the prefill instance's time that it will take, predicted; 0 where the policy does not
    predict."""


@dataclasses.dataclass(frozen=True, slots=True)
class NoChoice:
    """Why nothing can take it."""

    reason: str
    hopeless: bool = False
    """No instance of this cluster could ever take it, whatever its state or role."""


@dataclasses.dataclass(frozen=True, slots=True)
class Scores:
    """What a policy thinks of every row; arrays have shape [rows]. Smaller is better."""

    prefill: Costs
    decode: Costs
    same: Costs | float = 0.0
    """Saved where prefill and decode are this one row; also the answer to who wins a tie."""
    text: str = ""
    """Begins the reason that ``baton explain`` shows."""
    ttft_s: Costs | None = None
    tpot_s: Costs | None = None
    prefill_s: Costs | None = None
    """Predictions, where the policy makes them: for the first token of this request, for each
    token after it, and of the prefill instance's time."""
    tentative: bool = False


class PlacementPolicy(Protocol):
    """A policy. One object serves one controller, which calls it for one decision at a time."""

    name: str
    colocates: bool
    """Both sides must be one instance."""

    def score(self, query: PlaceQuery, view: PlacementView, now: float, draw: int) -> Scores:
        """Costs of every row; rows that cannot take the request are filtered out afterwards.

        Changes nothing that is not the policy's own. ``draw`` numbers the decision (for rotation);
        ``query.bind_to``: only the decode side will be used.
        """


def choose(
    policy: PlacementPolicy, query: PlaceQuery, view: PlacementView, now: float, draw: int
) -> Choice | NoChoice:
    """The pair that ``policy`` likes best. ``draw`` numbers the decision: it breaks ties."""
    fits = view.live & (view.max_tokens >= query.num_total_tokens)
    if not fits.any() and view.live.any():
        longest = int(view.max_tokens[view.live].max())
        return NoChoice(
            f"the longest sequence any instance can hold is {longest} tokens, "
            f"this one may become {query.num_total_tokens}",
            hopeless=True,
        )
    usable = fits & view.placeable
    prefill_ok = usable & view.takes_prefill
    bound = view.row_of.get(query.bind_to) if query.bind_to is not None else None
    if query.bind_to is not None:
        if bound is None:
            return NoChoice(f"{query.bind_to}, which has the prompt's KV, is gone")
        prefill_ok = np.zeros_like(fits)
        prefill_ok[bound] = True
    # A request that ends at its first token makes no handoff: any prefill instance does it all.
    single = query.max_new_tokens <= 1 and bound is None
    decode_ok = prefill_ok if single else usable & view.takes_decode
    if not prefill_ok.any():
        return NoChoice("no ready instance takes prefill")
    if not decode_ok.any():
        return NoChoice("no ready instance takes decode")
    if policy.colocates and bound is None:
        prefill_ok = decode_ok = prefill_ok & decode_ok
        if not prefill_ok.any():
            return NoChoice("no ready instance takes both prefill and decode")

    scores = policy.score(query, view, now, draw)
    pick = _Pick(view, scores, prefill_ok, decode_ok, one=single or policy.colocates, draw=draw)
    avoided = [row for name in query.exclude if (row := view.row_of.get(name)) is not None]
    pick.avoid(avoided)
    pair = pick.cheapest()
    if pair is None:
        return NoChoice("no ready prefill and decode instance can exchange KV blocks")
    prefill, decode = pair
    reason = (
        f"{scores.text}prefill {view.names[prefill]} at {scores.prefill[prefill]:.3f}, "
        f"decode {view.names[decode]} at {scores.decode[decode]:.3f}"
    )
    if prefill in avoided or decode in avoided:
        reason = (
            f"nothing but instances it should avoid is left: prefill {view.names[prefill]}, "
            f"decode {view.names[decode]}"
        )
    num_candidates = pick.num_pairs()
    fallback = None
    if num_candidates > 1 and bound is None:
        pick.avoid([prefill, decode])
        fallback = pick.cheapest()
        if fallback == pair:
            fallback = None
    return Choice(
        prefill,
        decode,
        fallback,
        num_candidates,
        reason,
        tentative=scores.tentative and prefill != decode and bound is None,
        predicted_ttft_s=None if scores.ttft_s is None else float(scores.ttft_s[prefill]),
        predicted_tpot_s=None if scores.tpot_s is None else float(scores.tpot_s[decode]),
        prefill_s=0.0 if scores.prefill_s is None else float(scores.prefill_s[prefill]),
    )


def paths(view: PlacementView) -> tuple[bool, bool, bool]:
    """Whether anything ready takes prefill, decode, and both in one group (a usable path)."""
    prefill_ok = view.live & view.placeable & view.takes_prefill
    decode_ok = view.live & view.placeable & view.takes_decode
    both = np.intersect1d(view.group[prefill_ok], view.group[decode_ok])
    return bool(prefill_ok.any()), bool(decode_ok.any()), bool(len(both))


class _Pick:
    """One decision's rows and costs."""

    def __init__(
        self,
        view: PlacementView,
        scores: Scores,
        prefill_ok: Bools,
        decode_ok: Bools,
        *,
        one: bool,
        draw: int,
    ) -> None:
        self._view = view
        self._prefill_ok, self._decode_ok = prefill_ok, decode_ok
        # Ours to change: a fallback avoids the first choice.
        self._prefill, self._decode = scores.prefill.copy(), scores.decode.copy()
        self._same = np.broadcast_to(np.asarray(scores.same, dtype=np.float64), view.live.shape)
        self._one = one
        self._draw = draw

    def avoid(self, rows: list[int]) -> None:
        """Take these only where nothing else is left."""
        if rows:
            self._prefill[rows] += _AVOID_COST
            self._decode[rows] += _AVOID_COST

    def cheapest(self) -> tuple[int, int] | None:
        """The best pair, ties broken by power of two choices; ``None`` if no two fit together."""
        view = self._view
        both = self._prefill_ok & self._decode_ok
        if self._one:
            total = self._prefill + self._decode - self._same
            row = _pick(_tied(both, total), view.open_prefill + view.open_decode, self._draw)
            return row, row
        best: tuple[float, Bools] | None = None
        for members in self._groups():
            prefill_ok, decode_ok = self._prefill_ok & members, self._decode_ok & members
            cost = self._prefill[prefill_ok].min() + self._decode[decode_ok].min()
            if best is None or cost < best[0] - _TIE:
                best = (float(cost), members)
        if best is None:
            return None
        cost, members = best
        # At equal cost, an instance that does both saves the handoff.
        same_ok = both & members
        if same_ok.any():
            total = self._prefill + self._decode - self._same
            if total[same_ok].min() <= cost + _TIE:
                rows = _tied(same_ok, total)
                row = _pick(rows, view.open_prefill + view.open_decode, self._draw)
                return row, row
        return (
            _pick(
                _tied(self._prefill_ok & members, self._prefill), view.open_prefill, 2 * self._draw
            ),
            _pick(
                _tied(self._decode_ok & members, self._decode),
                view.open_decode,
                2 * self._draw + 1,
            ),
        )

    def _groups(self) -> list[Bools]:
        """Members of each group that has both sides."""
        group = self._view.group
        if self._view.one_group:
            return [self._view.live]
        both = np.intersect1d(group[self._prefill_ok], group[self._decode_ok])
        return [group == number for number in both]

    def num_pairs(self) -> int:
        """Pairs that passed the filters."""
        if self._one:
            return int((self._prefill_ok & self._decode_ok).sum())
        group = self._view.group
        num_groups = int(group.max()) + 1
        prefill = np.bincount(group[self._prefill_ok], minlength=num_groups)
        decode = np.bincount(group[self._decode_ok], minlength=num_groups)
        return int(prefill @ decode)


def _tied(ok: Bools, cost: Costs) -> npt.NDArray[np.intp]:
    """Rows among ``ok`` (not empty) that cost as little as the cheapest."""
    rows = np.flatnonzero(ok)
    costs = cost[rows]
    tied: npt.NDArray[np.intp] = rows[costs <= costs.min() + _TIE]
    return tied


def _pick(rows: npt.NDArray[np.intp], num_open: npt.NDArray[np.int64], draw: int) -> int:
    """Power of two choices among equals: draw two, take the one with less open."""
    if len(rows) == 1:
        return int(rows[0])
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
