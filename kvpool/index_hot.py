"""Which prefixes prompts share: a bounded count of where lookups end. Pure."""

from __future__ import annotations

from baton.core.blocks import BlockKey


class HotPrefixes:
    """Counts ends of lookups; once there are ``capacity`` different ones, all counts are halved.

    So what is asked for again and again stays, what was asked for once goes, and old fame fades.
    """

    def __init__(self, capacity: int = 2048) -> None:
        if capacity < 2:
            raise ValueError(f"room for two prefixes at least, got {capacity}")
        self._capacity = capacity
        self._entries: dict[BlockKey, list[int]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def count(self, key: BlockKey, num_blocks: int) -> None:
        """A lookup found ``num_blocks`` blocks, the last of them ``key``."""
        entry = self._entries.get(key)
        if entry is not None:
            entry[0] += 1
            return
        if len(self._entries) >= self._capacity:
            self._fade()
        self._entries[key] = [1, num_blocks]

    def _fade(self) -> None:
        kept = {key: [n // 2, depth] for key, (n, depth) in self._entries.items() if n > 1}
        if len(kept) > self._capacity // 2:  # all are hot: the hotter half has to do
            order = sorted(kept, key=lambda key: kept[key][0], reverse=True)
            kept = {key: kept[key] for key in order[: self._capacity // 2]}
        self._entries = kept

    def top(self) -> list[tuple[BlockKey, int, int]]:
        """(key, blocks up to it, count), highest count first."""
        entries = [(key, depth, count) for key, (count, depth) in self._entries.items()]
        return sorted(entries, key=lambda entry: (-entry[2], -entry[1], entry[0]))
