"""How often keys were asked for lately, estimated in little memory. Pure.

A count-min sketch: each key has one counter in each of four rows, found by four words of the key
itself, which is a cryptographic hash already. The least of the four is the estimate: other keys
can only make it too high. All counters are halved from time to time, so old fame fades.
"""

from __future__ import annotations

import struct

from baton.core.blocks import BlockKey

MAX_COUNT = 15
_ROWS = 4
_WORDS = struct.Struct("<4I")
_HALVED = bytes(count // 2 for count in range(256))
_ADDITIONS_PER_KEY = 10


class FrequencySketch:
    """Estimates for about ``capacity`` keys of interest at a time; 4 to 8 bytes for each."""

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"a sketch needs room for a key, got {capacity}")
        width = 1 << max(6, (capacity - 1).bit_length())
        self._mask = width - 1
        self._rows = [bytearray(width) for _ in range(_ROWS)]
        self._additions = 0
        self._ageing_after = _ADDITIONS_PER_KEY * width

    def add(self, key: BlockKey) -> None:
        """Count one use of ``key`` (16 bytes); at most ``MAX_COUNT`` are remembered."""
        mask = self._mask
        cells = [word & mask for word in _WORDS.unpack(key)]
        least = min(row[cell] for row, cell in zip(self._rows, cells, strict=True))
        if least < MAX_COUNT:
            # Only the lowest are raised: the others are too high already, because of other keys.
            for row, cell in zip(self._rows, cells, strict=True):
                if row[cell] == least:
                    row[cell] = least + 1
        self._additions += 1
        if self._additions >= self._ageing_after:
            self._additions = 0
            self._rows = [row.translate(_HALVED) for row in self._rows]

    def estimate(self, key: BlockKey) -> int:
        """Uses of ``key``, 0 to ``MAX_COUNT``; never too low but for ageing."""
        mask = self._mask
        words: tuple[int, ...] = _WORDS.unpack(key)
        return min(row[word & mask] for row, word in zip(self._rows, words, strict=True))
