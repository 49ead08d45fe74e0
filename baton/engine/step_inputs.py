"""From a plan's rows to the tensors that the model's layers share: built once per step.

Tokens are reordered: rows of one token first, longest context first, then the longer rows. So
decode rows are neighbours that attend in a few padded batches, and each chunk is a slice.

A token's numbers must not depend on its batch or its chunk (see ``linear``): tokens are padded to
the model's row quantum, keys and queries of attention to their own.
Dim letters here and in the layers: T tokens of the step, L layers, B rows of a batch, S context,
D head dim, N a flat count.
"""

from __future__ import annotations

import dataclasses
import itertools
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from baton.engine.plan import SequenceStep
from kvpool.layout import KVLayout

Int64s = npt.NDArray[np.int64]

SPLIT_TOKENS = 1024
"""A batch of decode rows is split where that saves so many tokens of padding."""
GATHER_TOKENS = 65536
"""Most tokens whose keys and values a batch of decode rows gathers at once, if it is not one row:
what a step needs for it must not grow with rows times context."""
QUERY_TILE = 128
"""Chunk queries attend in tiles, so that early ones skip the keys that come after them."""
QUERY_QUANTUM = 4
"""Attention of fewer queries than this takes another kernel, with another order of summation."""
KEY_QUANTUM = 16
"""Keys beyond a multiple of the vector width are summed apart; masked ones in it add zero."""
WHOLE_KEYS, KEY_BLOCK = 192, 512
"""Up to so many keys are summed in one go. More are cut into parts that depend on their number,
so there the number is always the same: that of the blocks in which attention takes them anyway."""


@dataclasses.dataclass(frozen=True, slots=True)
class Tile:
    """Queries of one chunk and the keys they may see."""

    begin: int
    end: int
    context: int
    """Keys, padding included."""
    mask_TS: Tensor
    """0 or -inf, [queries, context]: the queries of begin to end and padding."""


@dataclasses.dataclass(frozen=True, slots=True)
class Segment:
    """Neighbouring tokens that attend together: decode rows, or one row's chunk."""

    begin: int
    end: int
    pages_LN: Tensor
    """Pages of the rows' blocks per layer, plane by plane."""
    context: int
    """Keys per row, padding included."""
    mask_B11S: Tensor | None = None
    """Decode only."""
    tiles: tuple[Tile, ...] = ()
    """Chunks only."""


@dataclasses.dataclass(frozen=True, slots=True)
class StepInputs:
    """What the model needs to know about one step."""

    num_tokens: int
    """Without padding, which fills T up to a multiple of the row quantum."""
    token_ids_T: Tensor
    positions_T: Tensor
    rows_LTP: Tensor
    """Where each layer writes each token's planes; padding has none."""
    segments: tuple[Segment, ...]
    first_tokens: tuple[int, ...]
    """Per plan row: index of its first token in T; its tokens are neighbours."""
    group_tokens: tuple[int, ...]
    """Tokens of every dp group in this step, without padding."""


def build_inputs(
    rows: Sequence[SequenceStep],
    layout: KVLayout,
    last_token_by_slot: Tensor,
    *,
    device: torch.device,
    dtype: torch.dtype,
    row_quantum: int = 1,
    shard: int = 0,
    group_tokens: tuple[int, ...] | None = None,
) -> StepInputs:
    """Lay out a step. ``dtype`` is the model's, which attention masks share.

    Without rows it is the step of an idle group: padding only.
    """
    counts = np.fromiter((row.num_tokens for row in rows), np.int64, len(rows))
    starts = np.fromiter((row.start for row in rows), np.int64, len(rows))
    order, num_single = _order(starts, counts)
    ordered = [rows[i] for i in order.tolist()]
    counts, starts = counts[order], starts[order]
    ends = np.cumsum(counts)
    begins = ends - counts
    first_tokens = np.empty_like(begins)
    first_tokens[order] = begins

    upload = _Upload()
    num_tokens = int(counts.sum())
    num_padded = max(num_tokens, 1) + -max(num_tokens, 1) % row_quantum
    upload.add(_padded(_token_ids(ordered, num_tokens), num_padded))
    positions = np.repeat(starts - begins, counts) + np.arange(num_tokens)
    upload.add(_padded(positions, num_padded))
    tables = _Tables.of(ordered)
    upload.add(_written_rows(tables, counts, positions, layout))
    late = [i for i, row in enumerate(ordered) if row.token_ids is None]
    upload.add(begins[late])
    upload.add(np.fromiter((ordered[i].slot for i in late), np.int64, len(late)))
    batches = _batches(starts[:num_single], layout.block_size)
    batches += [(i, i + 1) for i in range(num_single, len(ordered))]
    for begin, end in batches:
        lengths = starts[begin:end] + counts[begin:end]
        upload.add(_pages(tables, slice(begin, end), lengths, layout))
    token_ids, device_positions, written, late_at, late_slots, *pages = upload.send(device)

    if late:
        token_ids.index_copy_(0, late_at, last_token_by_slot.index_select(0, late_slots))
    planes = layout.num_planes
    layers_L1 = torch.arange(layout.num_layers, device=device).unsqueeze(1) * planes
    layers_L1 += shard * layout.num_layers * planes
    rows_LTP = written.view(1, -1, planes) + (layers_L1 * layout.block_size).unsqueeze(2)
    segments = []
    for (begin, end), pages_N in zip(batches, pages, strict=True):
        pages_LN = pages_N.unsqueeze(0) + layers_L1
        if end <= num_single:
            context = _padded_keys(ordered[begin].start + 1)
            own = device_positions[int(begins[begin]) : int(ends[end - 1])]
            mask = _mask(own, context, dtype).view(end - begin, 1, 1, context)
            segment = Segment(int(begins[begin]), int(ends[end - 1]), pages_LN, context, mask)
        else:
            row, first = ordered[begin], int(begins[begin])
            tiles = _tiles(row, first, device_positions, dtype)
            context = tiles[-1].context
            segment = Segment(first, first + row.num_tokens, pages_LN, context, tiles=tiles)
        segments.append(segment)
    return StepInputs(
        num_tokens,
        token_ids,
        device_positions,
        rows_LTP,
        tuple(segments),
        tuple(first_tokens.tolist()),
        (num_tokens,) if group_tokens is None else group_tokens,
    )


class _Upload:
    """Collects integer arrays and brings them to the device in one copy."""

    def __init__(self) -> None:
        self._arrays: list[Int64s] = []

    def add(self, array: Int64s) -> None:
        self._arrays.append(array.reshape(-1))

    def send(self, device: torch.device) -> Sequence[Tensor]:
        together: npt.NDArray[Any] = np.concatenate(self._arrays)
        sizes = [array.size for array in self._arrays]
        return torch.split_with_sizes(torch.from_numpy(together).to(device), sizes)


def _order(starts: Int64s, counts: Int64s) -> tuple[Int64s, int]:
    """Rows of one token first, longest context first, then the others; how many are of the first.

    Equals stay in their order.
    """
    single = counts == 1
    by_context = np.where(single, -starts, 0)
    return np.lexsort((by_context, ~single)), int(np.count_nonzero(single))


def _padded(values: Int64s, size: int) -> Int64s:
    """With zeros up to ``size``; ``np.pad`` takes longer than all the rest of a small step."""
    result = np.zeros(size, np.int64)
    result[: len(values)] = values
    return result


def _token_ids(rows: Sequence[SequenceStep], num_tokens: int) -> Int64s:
    tokens = ((0,) if row.token_ids is None else row.token_ids for row in rows)
    return np.fromiter(itertools.chain.from_iterable(tokens), np.int64, num_tokens)


@dataclasses.dataclass(frozen=True, slots=True)
class _Tables:
    """The block tables of all rows, one after the other: converted once, then only indexed."""

    blocks_N: Int64s
    offsets_B: Int64s
    """Where each row's table begins."""

    @staticmethod
    def of(rows: Sequence[SequenceStep]) -> _Tables:
        tables = [row.block_table for row in rows]
        lengths = np.fromiter(map(len, tables), np.int64, len(tables))
        blocks = list(itertools.chain.from_iterable(tables))
        # Three times as fast as any of numpy's own ways, for what is longest of all a plan holds.
        packed = struct.pack(f"={len(blocks)}q", *blocks)
        return _Tables(np.frombuffer(packed, np.int64), np.cumsum(lengths) - lengths)


def _written_rows(tables: _Tables, counts: Int64s, positions: Int64s, layout: KVLayout) -> Int64s:
    """[T, planes]: the cache rows of layer 0 of shard 0 that take each token's planes."""
    size = layout.block_size
    blocks = tables.blocks_N[np.repeat(tables.offsets_B, counts) + positions // size]
    first: Int64s = blocks * (layout.num_pages * size) + positions % size
    return first[:, np.newaxis] + np.arange(layout.num_planes) * size


def _batches(starts: Int64s, block_size: int) -> list[tuple[int, int]]:
    """Split rows of one token, longest first, into batches that waste little on padding."""
    if not len(starts):
        return []
    quantum = np.where(starts < WHOLE_KEYS, KEY_QUANTUM, KEY_BLOCK)
    widths = (starts // quantum + 1) * quantum  # _padded_keys of each start + 1
    batches: list[tuple[int, int]] = []
    begin, count = 0, len(starts)
    # Between two changes of width, splitting at the first row saves most.
    for i in (np.flatnonzero(np.diff(widths)) + 1).tolist():
        if int(widths[begin] - widths[i]) * (count - i) > max(SPLIT_TOKENS, block_size):
            batches.append((begin, i))
            begin = i
    batches.append((begin, count))
    if count * int(widths[0]) <= GATHER_TOKENS:
        return batches
    parts: list[tuple[int, int]] = []
    for begin, end in batches:
        most = max(1, GATHER_TOKENS // int(widths[begin]))
        parts += [(first, min(first + most, end)) for first in range(begin, end, most)]
    return parts


def _pages(tables: _Tables, rows: slice, lengths: Int64s, layout: KVLayout) -> Int64s:
    """[planes, B, blocks]: layer 0's pages of the rows' contexts, in shard 0.

    ``lengths`` [B]: tokens of each row, this step's included. Short tables repeat the row's own
    first block: another may just be written by a transfer.
    """
    used = -(-lengths // layout.block_size)
    column = np.arange(-(-_padded_keys(int(lengths.max())) // layout.block_size))
    within = column * (column < used[:, np.newaxis])
    blocks: Int64s = tables.blocks_N[tables.offsets_B[rows, np.newaxis] + within]
    planes = np.arange(layout.num_planes)[:, np.newaxis, np.newaxis]
    return blocks * layout.num_pages + planes


def _tiles(
    row: SequenceStep, first: int, positions_T: Tensor, dtype: torch.dtype
) -> tuple[Tile, ...]:
    tiles = []
    for begin in range(0, row.num_tokens, QUERY_TILE):
        end = min(begin + QUERY_TILE, row.num_tokens)
        context = _padded_keys(row.start + end)
        mask = _mask(positions_T[first + begin : first + end], context, dtype)
        mask = F.pad(mask, (0, 0, 0, -(end - begin) % QUERY_QUANTUM))
        tiles.append(Tile(first + begin, first + end, context, mask))
    return tuple(tiles)


def _padded_keys(count: int) -> int:
    quantum = KEY_QUANTUM if count <= WHOLE_KEYS else KEY_BLOCK
    return -(-count // quantum) * quantum


def _mask(positions_T: Tensor, context: int, dtype: torch.dtype) -> Tensor:
    """[T, context]: -inf where a key comes after the query's position."""
    step = torch.zeros(2 * context, dtype=dtype, device=positions_T.device)
    step[context:] = float("-inf")
    # Each row is the same step, moved: to copy it is many times faster than to compare positions.
    return step.unfold(0, context, 1).index_select(0, context - 1 - positions_T)
