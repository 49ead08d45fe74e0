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

from controller.columns import PlacementView, Rows
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
    sides, num_total = view.sides, query.num_total_tokens
    if num_total > sides.longest and view.row_of:
        return NoChoice(
            f"the longest sequence any instance can hold is {sides.longest} tokens, "
            f"this one may become {num_total}",
            hopeless=True,
        )
    prefill_rows, decode_rows, both_rows = sides.prefill, sides.decode, sides.both
    if num_total > sides.shortest:
        prefill_rows, decode_rows, both_rows = (
            rows[view.max_tokens[rows] >= num_total]
            for rows in (prefill_rows, decode_rows, both_rows)
        )
    bound = view.row_of.get(query.bind_to) if query.bind_to is not None else None
    if query.bind_to is not None:
        if bound is None:
            return NoChoice(f"{query.bind_to}, which has the prompt's KV, is gone")
        prefill_rows = np.array([bound], dtype=np.intp)
        both_rows = decode_rows[decode_rows == bound]
    # A request that ends at its first token makes no handoff: any prefill instance does it all.
    single = query.max_new_tokens <= 1 and bound is None
    if single:
        decode_rows = both_rows = prefill_rows
    if not len(prefill_rows):
        return NoChoice("no ready instance takes prefill")
    if not len(decode_rows):
        return NoChoice("no ready instance takes decode")
    if policy.colocates and bound is None:
        prefill_rows = decode_rows = both_rows
        if not len(both_rows):
            return NoChoice("no ready instance takes both prefill and decode")

    scores = policy.score(query, view, now, draw)
    one = single or policy.colocates
    pick = _Pick(view, scores, prefill_rows, decode_rows, both_rows, one=one, draw=draw)
    avoided = [row for name in query.exclude if (row := view.row_of.get(name)) is not None]
    pick.avoid(avoided)
    pair = pick.cheapest()
    if pair is None:
        return NoChoice("no ready prefill and decode instance can exchange KV blocks")
    prefill, decode = pair
    reason = (
        f"{scores.text}prefill {view.names[prefill]} at {float(scores.prefill[prefill]):.3f}, "
        f"decode {view.names[decode]} at {float(scores.decode[decode]):.3f}"
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
        prefill_rows: Rows,
        decode_rows: Rows,
        both_rows: Rows,
        *,
        one: bool,
        draw: int,
    ) -> None:
        self._view = view
        self._rows = (prefill_rows, decode_rows, both_rows)
        self._prefill, self._decode, self._same = scores.prefill, scores.decode, scores.same
        self._one = one
        self._draw = draw

    def avoid(self, rows: list[int]) -> None:
        """Take these only where nothing else is left."""
        if rows:
            self._prefill, self._decode = self._prefill.copy(), self._decode.copy()
            for row in set(rows):
                self._prefill[row] += _AVOID_COST
                self._decode[row] += _AVOID_COST

    def cheapest(self) -> tuple[int, int] | None:
        """The best pair, ties broken by power of two choices; ``None`` if no two fit together."""
        if self._one:
            return self._pick_one(self._rows[2], self._totals(self._rows[2]))
        best: tuple[float, tuple[Rows, Rows, Rows], Costs, Costs] | None = None
        for rows in self._groups():
            prefill, decode = self._prefill[rows[0]], self._decode[rows[1]]
            cost = float(np.minimum.reduce(prefill)) + float(np.minimum.reduce(decode))
            if best is None or cost < best[0] - _TIE:
                best = (cost, rows, prefill, decode)
        if best is None:
            return None
        cost, (prefill_rows, decode_rows, both_rows), prefill, decode = best
        # At equal cost, an instance that does both saves the handoff.
        if len(both_rows):
            total = self._totals(both_rows)
            if total.min() <= cost + _TIE:
                return self._pick_one(both_rows, total)
        view, draw = self._view, self._draw
        return (
            _pick(_tied(prefill_rows, prefill), view.open_prefill, 2 * draw),
            _pick(_tied(decode_rows, decode), view.open_decode, 2 * draw + 1),
        )

    def _totals(self, rows: Rows) -> Costs:
        same = self._same if isinstance(self._same, float) else self._same[rows]
        total: Costs = self._prefill[rows] + self._decode[rows] - same
        return total

    def _pick_one(self, rows: Rows, total: Costs) -> tuple[int, int]:
        num_open = self._view.open_prefill + self._view.open_decode
        row = _pick(_tied(rows, total), num_open, self._draw)
        return row, row

    def _groups(self) -> list[tuple[Rows, Rows, Rows]]:
        """Rows of each group that has both sides: of prefill, of decode, of both."""
        if self._view.sides.one_group:
            return [self._rows]
        group = self._view.group
        both = np.intersect1d(group[self._rows[0]], group[self._rows[1]])
        first, second, third = self._rows
        return [
            (
                first[group[first] == number],
                second[group[second] == number],
                third[group[third] == number],
            )
            for number in both
        ]

    def num_pairs(self) -> int:
        """Pairs that passed the filters."""
        if self._one:
            return len(self._rows[2])
        return sum(len(prefill) * len(decode) for prefill, decode, _ in self._groups())


def _tied(rows: Rows, costs: Costs) -> Rows:
    """Those of ``rows`` (not empty), which cost ``costs``, that cost as little as the cheapest."""
    tied: Rows = rows[costs <= np.minimum.reduce(costs) + _TIE]
    return tied


def _pick(rows: Rows, num_open: npt.NDArray[np.int64], draw: int) -> int:
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
