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
    """Pages of the rows' blocks per layer, keys of all rows before their values."""
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
    rows_LT2: Tensor
    """Where each layer writes each token's key and value; padding has none."""
    segments: tuple[Segment, ...]
    first_tokens: tuple[int, ...]
    """Per plan row: index of its first token in T; its tokens are neighbours."""


def build_inputs(
    rows: Sequence[SequenceStep],
    layout: KVLayout,
    last_token_by_slot: Tensor,
    *,
    device: torch.device,
    dtype: torch.dtype,
    row_quantum: int = 1,
) -> StepInputs:
    """Lay out a step. ``dtype`` is the model's, which attention masks share."""
    order = sorted(
        range(len(rows)),
        key=lambda i: (0, -rows[i].start) if rows[i].num_tokens == 1 else (1, i),
    )
    ordered = [rows[i] for i in order]
    num_single = sum(row.num_tokens == 1 for row in ordered)
    counts = np.fromiter((row.num_tokens for row in ordered), np.int64, len(ordered))
    ends = np.cumsum(counts)
    begins = ends - counts
    first_tokens = [0] * len(rows)
    for place, i in enumerate(order):
        first_tokens[i] = int(begins[place])

    upload = _Upload()
    num_tokens = int(ends[-1])
    padding = (0, -num_tokens % row_quantum)
    upload.add(np.pad(_token_ids(ordered), padding))
    starts = np.fromiter((row.start for row in ordered), np.int64, len(ordered))
    positions = np.repeat(starts - begins, counts) + np.arange(num_tokens)
    upload.add(np.pad(positions, padding))
    upload.add(_written_rows(ordered, counts, positions, layout))
    late = [i for i, row in enumerate(ordered) if row.token_ids is None]
    upload.add(begins[late])
    upload.add(np.fromiter((ordered[i].slot for i in late), np.int64, len(late)))
    batches = _batches(ordered[:num_single], layout.block_size)
    batches += [(i, i + 1) for i in range(num_single, len(ordered))]
    for begin, end in batches:
        upload.add(_pages(ordered[begin:end], layout))
    token_ids, device_positions, written, late_at, late_slots, *pages = upload.send(device)

    if late:
        token_ids.index_copy_(0, late_at, last_token_by_slot.index_select(0, late_slots))
    layers_L1 = torch.arange(layout.num_layers, device=device).unsqueeze(1) * 2
    rows_LT2 = written.view(1, -1, 2) + (layers_L1 * layout.block_size).unsqueeze(2)
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
        rows_LT2,
        tuple(segments),
        tuple(first_tokens),
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


def _token_ids(rows: Sequence[SequenceStep]) -> Int64s:
    tokens: list[int] = []
    for row in rows:
        tokens.extend((0,) if row.token_ids is None else row.token_ids)
    return np.array(tokens, dtype=np.int64)


def _written_rows(
    rows: Sequence[SequenceStep], counts: Int64s, positions: Int64s, layout: KVLayout
) -> Int64s:
    """[T, 2]: the cache rows of layer 0 that take each token's key and value."""
    size = layout.block_size
    firsts = [row.start // size for row in rows]
    touched = [
        np.array(row.block_table[first : (row.start + row.num_tokens - 1) // size + 1], np.int64)
        for row, first in zip(rows, firsts, strict=True)
    ]
    lengths = np.fromiter(map(len, touched), np.int64, len(touched))
    shift = np.repeat(np.cumsum(lengths) - lengths - np.array(firsts), counts)
    blocks = np.concatenate(touched)[positions // size + shift]
    keys = blocks * (layout.num_layers * 2 * size) + positions % size
    return np.stack((keys, keys + size), axis=1)


def _batches(rows: Sequence[SequenceStep], block_size: int) -> list[tuple[int, int]]:
    """Split rows, longest first, into batches that waste little on padding."""
    batches: list[tuple[int, int]] = []
    begin = 0
    for i, row in enumerate(rows):
        saved = (rows[begin].start - row.start) * (len(rows) - i)
        if saved > max(SPLIT_TOKENS, block_size):
            batches.append((begin, i))
            begin = i
    if rows:
        batches.append((begin, len(rows)))
    return batches


def _pages(rows: Sequence[SequenceStep], layout: KVLayout) -> Int64s:
    """[2, B, blocks]: layer 0's pages of the rows' contexts.

    Short tables repeat the row's own first block: another may just be written by a transfer.
    """
    longest = max(row.start + row.num_tokens for row in rows)
    width = -(-_padded_keys(longest) // layout.block_size)
    tables = np.empty((len(rows), width), dtype=np.int64)
    for i, row in enumerate(rows):
        used = -(-(row.start + row.num_tokens) // layout.block_size)
        tables[i, :used] = row.block_table[:used]
        tables[i, used:] = row.block_table[0]
    keys = tables * (layout.num_layers * 2)
    return np.stack((keys, keys + 1))


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
    keys = torch.arange(context, device=positions_T.device)
    mask = torch.zeros(len(positions_T), context, dtype=dtype, device=positions_T.device)
    return mask.masked_fill_(keys.unsqueeze(0) > positions_T.unsqueeze(1), float("-inf"))
