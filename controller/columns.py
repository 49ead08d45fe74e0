"""Hot numbers of the instances as columns, one row per live incarnation.

Only the core writes them (through :class:`Columns`); policies get a :class:`PlacementView`, whose
arrays are read-only windows on the same memory, so that a decision copies nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import cast

import numpy as np
import numpy.typing as npt

from baton.core.cluster import InstanceInfo, InstanceLoad, Role
from baton.core.cost_model import CostModel
from kvpool.layout import canonical_text

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

TIERS = ("host", "disk", "remote")
"""Of the pool, fastest first: the rows of the ``tier_`` columns."""

_MIN_ROWS = 8


Rows = npt.NDArray[np.intp]


@dataclasses.dataclass(frozen=True, slots=True)
class Sides:
    """Who may take what: changes with members, states and roles, not with load."""

    prefill: Rows
    decode: Rows
    both: Rows
    shortest: int
    """The longest sequence that fits everywhere, and the longest that fits anywhere."""
    longest: int
    one_group: bool
    """Whether all live instances can exchange blocks."""
    any_costs: bool
    """Whether anything is predicted of any of them."""
    step_tokens: Floats | float
    """Prompt tokens of a full step, at least 1: shape [rows], or one number where all are equal."""
    of_node: Mapping[int, Rows]
    """Live rows by machine."""


class Memo:
    """What was worked out from a view's slow columns; ``Columns`` forgets it when they change."""

    __slots__ = ("sides",)

    def __init__(self) -> None:
        self.sides: Sides | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class PlacementView:
    """All columns, shape [rows]; a row that is not ``live`` means nothing."""

    live: Bools
    placeable: Bools
    takes_prefill: Bools
    takes_decode: Bools
    group: Ints
    """Equal numbers: same model fingerprint, and KV layouts that differ in the number of shards at
    most, so blocks can be handed over."""
    max_tokens: Ints
    """The longest sequence that fits, by model length and by blocks."""
    max_num_seqs: Ints
    max_num_batched_tokens: Ints
    num_blocks: Ints
    num_available_blocks: Ints
    """Reported: free, or cached and idle, which is free at once when needed."""
    num_waiting_tokens: Ints
    """Reported: prompt tokens that wait for their computation."""
    num_sequences: Ints
    """Reported: waiting, running and waiting for KV."""
    fresh_tokens: Ints
    """Prompt tokens placed here that no heartbeat can have counted yet."""
    open_prefill: Ints
    open_decode: Ints
    """Placements whose end no gateway has reported."""
    open_context: Ints
    """Tokens of the sequences in ``open_decode``: prompts, and half of what may come."""
    node: Ints
    """Equal numbers: one machine, one host tier."""
    has_costs: Bools
    """Whether the predictions below mean anything."""
    prefill_free_at_s: Floats
    """When the prompts that wait there are computed, predicted (the controller's clock)."""
    prefill_overhead_s: Floats
    prefill_item_s: Floats
    prefill_context_s: Floats
    decode_overhead_s: Floats
    decode_item_s: Floats
    decode_context_s: Floats
    handoff_latency_s: Floats
    handoff_token_s: Floats
    tier_latency_s: Floats
    """Shape [tiers, rows]; as ``TIERS``."""
    tier_token_s: Floats
    row_of: Mapping[str, int]
    """Live rows by instance id."""
    names: Mapping[int, str]
    """Instance ids by row."""
    node_of: Mapping[str, int]
    """Machines by the id of their pool node."""
    memo: Memo
    """One of its own for a view with other roles than its columns'."""

    @property
    def sides(self) -> Sides:
        """Who may take what now, as of the last change."""
        sides = self.memo.sides
        if sides is None:
            usable = self.live & self.placeable
            prefill, decode = usable & self.takes_prefill, usable & self.takes_decode
            lengths = self.max_tokens[self.live]
            of_node: dict[int, list[int]] = {}
            for row in self.names:
                of_node.setdefault(int(self.node[row]), []).append(row)
            sides = self.memo.sides = Sides(
                np.flatnonzero(prefill),
                np.flatnonzero(decode),
                np.flatnonzero(prefill & decode),
                int(lengths.min(initial=2**62)),
                int(lengths.max(initial=0)),
                self.one_group,
                bool(self.has_costs.any()),
                self._step_tokens(),
                {node: np.array(rows, dtype=np.intp) for node, rows in of_node.items()},
            )
        return sides

    def _step_tokens(self) -> Floats | float:
        live = self.max_num_batched_tokens[self.live]
        if len(live) and live.min() == live.max():
            return float(live[0])
        return np.maximum(self.max_num_batched_tokens, 1).astype(np.float64)

    @property
    def one_group(self) -> bool:
        """Whether all live instances can exchange blocks."""
        groups = self.group[self.live]
        return not len(groups) or bool(groups.min() == groups.max())


_BOOL_COLUMNS = ("live", "placeable", "takes_prefill", "takes_decode", "has_costs")
_NOT_COLUMNS = ("row_of", "names", "node_of", "memo")


class Columns:
    """The writable side. A row is given out by :meth:`add` and free again after :meth:`remove`."""

    def __init__(self) -> None:
        self._groups: dict[tuple[str, str], int] = {}
        self._row_of: dict[str, int] = {}
        self._names: dict[int, str] = {}
        self._nodes: dict[str, int] = {}
        self._node_of: dict[str, int] = {}
        self._data: dict[str, npt.NDArray[np.generic]] = {}
        self._memo = Memo()
        self._grow(_MIN_ROWS)

    @property
    def view(self) -> PlacementView:
        """Read-only windows on the columns; follows them until a row is added."""
        return self._view

    def add(self, info: InstanceInfo) -> int:
        """Give a live incarnation a row. The instance must not have one."""
        assert info.instance_id not in self._row_of
        free = np.flatnonzero(~self._bools("live"))
        if not len(free):
            num_rows = len(self._bools("live"))
            self._grow(num_rows + max(_MIN_ROWS, num_rows // 4))
            free = np.flatnonzero(~self._bools("live"))
        row = int(free[0])
        for name, column in self._data.items():
            column[..., row] = name == "live"
        self._row_of[info.instance_id] = row
        self._names[row] = info.instance_id
        self.set_info(row, info)
        return row

    def remove(self, row: int) -> None:
        """Free a row, and all that was counted on it."""
        del self._row_of[self._names.pop(row)]
        self._memo.sides = None
        for column in self._data.values():
            column[..., row] = 0

    def set_info(self, row: int, info: InstanceInfo) -> None:
        """Take over what an instance says it is."""
        key = (info.model_fingerprint, canonical_text(info.kv_layout))
        ints = self._ints
        ints("group")[row] = self._groups.setdefault(key, len(self._groups))
        ints("max_tokens")[row] = min(info.max_model_len, info.num_blocks * info.block_size)
        ints("max_num_seqs")[row] = max(1, info.max_num_seqs)
        ints("max_num_batched_tokens")[row] = max(1, info.max_num_batched_tokens)
        ints("num_blocks")[row] = max(1, info.num_blocks)
        ints("node")[row] = self._nodes.setdefault(info.node_id, len(self._nodes))
        self.set_role(row, info.role)

    def set_role(self, row: int, role: Role) -> None:
        """Which work may be placed here."""
        self._memo.sides = None
        self._bools("takes_prefill")[row] = role.takes_prefill
        self._bools("takes_decode")[row] = role.takes_decode

    def set_placeable(self, row: int, placeable: bool) -> None:
        """Whether new work may be placed here at all."""
        self._memo.sides = None
        self._bools("placeable")[row] = placeable

    def set_load(self, row: int, load: InstanceLoad) -> None:
        """Take over a heartbeat's numbers."""
        ints = self._ints
        ints("num_available_blocks")[row] = load.num_free_blocks + load.num_cached_blocks
        ints("num_waiting_tokens")[row] = load.num_waiting_tokens
        ints("num_sequences")[row] = load.num_waiting + load.num_running + load.num_pending_kv

    def set_costs(self, row: int, costs: CostModel) -> None:
        """Take over what is predicted of an instance."""
        values = {
            "prefill_overhead_s": costs.prefill.overhead_s,
            "prefill_item_s": costs.prefill.item_s,
            "prefill_context_s": costs.prefill.context_s,
            "decode_overhead_s": costs.decode.overhead_s,
            "decode_item_s": costs.decode.item_s,
            "decode_context_s": costs.decode.context_s,
            "handoff_latency_s": costs.handoff.latency_s,
            "handoff_token_s": costs.kv_bytes_per_token / costs.handoff.bytes_per_s,
        }
        for name, value in values.items():
            self._floats(name)[row] = value
        for index, tier in enumerate(TIERS):
            link = costs.tiers.get(tier, costs.handoff)
            self._floats("tier_latency_s")[index, row] = link.latency_s
            self._floats("tier_token_s")[index, row] = costs.kv_bytes_per_token / link.bytes_per_s
        has_costs = self._bools("has_costs")
        if not has_costs[row]:
            has_costs[row] = True
            self._memo.sides = None

    def set_pool_nodes(self, nodes: Mapping[str, str]) -> None:
        """Pool nodes that are here, by id: the machine of each."""
        self._node_of.clear()
        for member_id, node_id in nodes.items():
            self._node_of[member_id] = self._nodes.setdefault(node_id, len(self._nodes))

    def extend_prefill(self, row: int, now: float, seconds: float) -> None:
        """Work was placed: the row is free so much later."""
        free_at = self._floats("prefill_free_at_s")
        free_at[row] = max(float(free_at[row]), now) + seconds

    def correct_prefill(self, row: int, load: InstanceLoad, fresh_s: float, now: float) -> None:
        """Bring the prediction in line with a report; ``fresh_s`` it cannot have counted yet.

        A report does not count what a step under way computes, so it is only a lower bound, and
        one full step above it the upper one.
        """
        view = self._view
        if not view.has_costs[row]:
            return
        num_tokens = load.num_waiting_tokens - load.num_offline_waiting_tokens
        step_tokens = int(view.max_num_batched_tokens[row])
        overhead_s = float(view.prefill_overhead_s[row])
        item_s = float(view.prefill_item_s[row])
        lowest = now + fresh_s + num_tokens * (item_s + overhead_s / step_tokens)
        highest = lowest + overhead_s + step_tokens * item_s
        free_at = self._floats("prefill_free_at_s")
        free_at[row] = min(max(float(free_at[row]), lowest), highest)

    def count(
        self, row: int, *, prefill: int = 0, decode: int = 0, tokens: int = 0, context: int = 0
    ) -> None:
        """Add to (or take from) the in-flight corrections."""
        ints = self._ints
        for name, delta in (
            ("open_prefill", prefill),
            ("open_decode", decode),
            ("fresh_tokens", tokens),
            ("open_context", context),
        ):
            if delta:
                ints(name)[row] += delta
                assert ints(name)[row] >= 0, f"{name} of {self._names[row]} fell below zero"

    def _bools(self, name: str) -> Bools:
        return cast(Bools, self._data[name])

    def _ints(self, name: str) -> Ints:
        return cast(Ints, self._data[name])

    def _floats(self, name: str) -> Floats:
        return cast(Floats, self._data[name])

    def _grow(self, num_rows: int) -> None:
        for field in dataclasses.fields(PlacementView):
            if field.name in _NOT_COLUMNS:
                continue
            dtype: type[np.generic] = np.bool_ if field.name in _BOOL_COLUMNS else np.int64
            if field.name.endswith("_s"):
                dtype = np.float64
            shape = (len(TIERS), num_rows) if field.name.startswith("tier_") else (num_rows,)
            column: npt.NDArray[np.generic] = np.zeros(shape, dtype=dtype)
            old = self._data.get(field.name)
            if old is not None:
                column[..., : old.shape[-1]] = old
            self._data[field.name] = column
        windows: dict[str, npt.NDArray[np.generic]] = {}
        for name, column in self._data.items():
            windows[name] = column.view()
            windows[name].flags.writeable = False
        maps = {"row_of": self._row_of, "names": self._names, "node_of": self._node_of}
        self._memo.sides = None
        self._view = PlacementView(**windows, **maps, memo=self._memo)  # type: ignore[arg-type]
