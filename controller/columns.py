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
from kvpool.layout import canonical_text

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]

_MIN_ROWS = 8


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
    row_of: Mapping[str, int]
    """Live rows by instance id."""
    names: Mapping[int, str]
    """Instance ids by row."""


_BOOL_COLUMNS = ("live", "placeable", "takes_prefill", "takes_decode")


class Columns:
    """The writable side. A row is given out by :meth:`add` and free again after :meth:`remove`."""

    def __init__(self) -> None:
        self._groups: dict[tuple[str, str], int] = {}
        self._row_of: dict[str, int] = {}
        self._names: dict[int, str] = {}
        self._data: dict[str, npt.NDArray[np.generic]] = {}
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
            self._grow(2 * len(self._bools("live")))
            free = np.flatnonzero(~self._bools("live"))
        row = int(free[0])
        for name, column in self._data.items():
            column[row] = name == "live"
        self._row_of[info.instance_id] = row
        self._names[row] = info.instance_id
        self.set_info(row, info)
        return row

    def remove(self, row: int) -> None:
        """Free a row, and all that was counted on it."""
        del self._row_of[self._names.pop(row)]
        for column in self._data.values():
            column[row] = 0

    def set_info(self, row: int, info: InstanceInfo) -> None:
        """Take over what an instance says it is."""
        key = (info.model_fingerprint, canonical_text(info.kv_layout))
        ints = self._ints
        ints("group")[row] = self._groups.setdefault(key, len(self._groups))
        ints("max_tokens")[row] = min(info.max_model_len, info.num_blocks * info.block_size)
        ints("max_num_seqs")[row] = max(1, info.max_num_seqs)
        ints("max_num_batched_tokens")[row] = max(1, info.max_num_batched_tokens)
        ints("num_blocks")[row] = max(1, info.num_blocks)
        self.set_role(row, info.role)

    def set_role(self, row: int, role: Role) -> None:
        """Which work may be placed here."""
        self._bools("takes_prefill")[row] = role.takes_prefill
        self._bools("takes_decode")[row] = role.takes_decode

    def set_placeable(self, row: int, placeable: bool) -> None:
        """Whether new work may be placed here at all."""
        self._bools("placeable")[row] = placeable

    def set_load(self, row: int, load: InstanceLoad) -> None:
        """Take over a heartbeat's numbers."""
        ints = self._ints
        ints("num_available_blocks")[row] = load.num_free_blocks + load.num_cached_blocks
        ints("num_waiting_tokens")[row] = load.num_waiting_tokens
        ints("num_sequences")[row] = load.num_waiting + load.num_running + load.num_pending_kv

    def count(self, row: int, *, prefill: int = 0, decode: int = 0, tokens: int = 0) -> None:
        """Add to (or take from) the in-flight corrections."""
        ints = self._ints
        for name, delta in (
            ("open_prefill", prefill),
            ("open_decode", decode),
            ("fresh_tokens", tokens),
        ):
            if delta:
                ints(name)[row] += delta
                assert ints(name)[row] >= 0, f"{name} of {self._names[row]} fell below zero"

    def _bools(self, name: str) -> Bools:
        return cast(Bools, self._data[name])

    def _ints(self, name: str) -> Ints:
        return cast(Ints, self._data[name])

    def _grow(self, num_rows: int) -> None:
        for field in dataclasses.fields(PlacementView):
            if field.name in ("row_of", "names"):
                continue
            dtype = np.bool_ if field.name in _BOOL_COLUMNS else np.int64
            column: npt.NDArray[np.generic] = np.zeros(num_rows, dtype=dtype)
            old = self._data.get(field.name)
            if old is not None:
                column[: len(old)] = old
            self._data[field.name] = column
        windows: dict[str, npt.NDArray[np.generic]] = {}
        for name, column in self._data.items():
            windows[name] = column.view()
            windows[name].flags.writeable = False
        self._view = PlacementView(**windows, row_of=self._row_of, names=self._names)  # type: ignore[arg-type]
