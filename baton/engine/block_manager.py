"""Who owns which KV block: free list, reference counts, prefix cache. No device, no I/O.

Every block is in exactly one of three places:

* *free*: holds nothing of value;
* *referenced*: in the block table of at least one sequence (cached or not);
* *idle*: cached, referenced by nobody, reused on a hit or evicted for new content.

A block enters the cache when its content is committed, under the key of its whole prefix, and
only below a parent that is cached too. Who references a cached block therefore references the
cached blocks of its whole prefix: a child becomes idle no later than its parent. As tables are
released last block first, the least recently used idle block is always a leaf, and eviction in
that order keeps what is cached closed under prefixes, at O(1) a block.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from baton.core.blocks import BlockKey, extend_block_keys, tenant_salt

_ONE = np.uint64(1)


@dataclasses.dataclass(frozen=True, slots=True)
class BlockStatistics:
    """``num_free + num_idle + num_referenced == num_blocks``; the rest are counts since start."""

    num_blocks: int
    num_free: int
    num_idle: int
    """Cached and referenced by nobody."""
    num_referenced: int
    num_cached: int
    """Idle or referenced blocks that a lookup can find."""
    num_evictions: int
    num_hits: int
    """Blocks taken from the cache."""

    @property
    def num_available(self) -> int:
        """Blocks that can be handed out now."""
        return self.num_free + self.num_idle


class BlockManager:
    """Accounts for the blocks ``0 .. num_blocks - 1`` of one cache.

    ``generations`` ([num_blocks], uint64) may live in shared memory; an entry is raised by one
    whenever its block is handed out for new content, and never otherwise.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        salt: bytes,
        enable_prefix_cache: bool = True,
        generations: npt.NDArray[np.uint64] | None = None,
        track_changes: bool = False,
    ) -> None:
        """``track_changes``: keep what :meth:`take_changes` returns; somebody must take it."""
        if generations is None:
            generations = np.zeros(num_blocks, dtype=np.uint64)
        if generations.shape != (num_blocks,) or generations.dtype != np.uint64:
            raise ValueError(
                f"generations must be uint64 of shape ({num_blocks},), "
                f"got {generations.dtype} of shape {generations.shape}"
            )
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_cache = enable_prefix_cache
        self.generations = generations
        self._salt = salt
        self._free = list(range(num_blocks - 1, -1, -1))
        self._references = [0] * num_blocks
        self._cached: dict[BlockKey, int] = {}
        self._key_of: list[BlockKey | None] = [None] * num_blocks
        self._parent_of: list[BlockKey | None] = [None] * num_blocks
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._changes: list[tuple[bool, BlockKey]] | None = [] if track_changes else None
        self._num_evictions = 0
        self._num_hits = 0

    # Keys.

    def salt_for(self, *, tenant: str, adapter: str) -> bytes:
        """Root of the keys of one tenant and adapter; the plain salt where both are empty."""
        return tenant_salt(self._salt, tenant=tenant, adapter=adapter)

    def extend_keys(self, keys: list[BlockKey], token_ids: Sequence[int], *, salt: bytes) -> None:
        """Append to ``keys`` those of the full blocks of ``token_ids`` that it lacks."""
        extend_block_keys(keys, token_ids, block_size=self.block_size, salt=salt)

    # Queries.

    @property
    def num_available(self) -> int:
        """Blocks that :meth:`allocate` can hand out: free and idle ones."""
        return len(self._free) + len(self._idle)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold ``num_tokens`` tokens."""
        return -(-num_tokens // self.block_size)

    def match(self, keys: Sequence[BlockKey]) -> list[int]:
        """Blocks of the longest cached prefix of ``keys``. Changes nothing."""
        found: list[int] = []
        for key in keys:
            block = self._cached.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def num_idle_among(self, blocks: Sequence[int]) -> int:
        """How many of ``blocks`` are idle: acquiring those lowers :attr:`num_available`."""
        return sum(1 for block in blocks if block in self._idle)

    def num_references(self, block: int) -> int:
        """Block tables that contain ``block``."""
        return self._references[block]

    def is_cached(self, block: int) -> bool:
        """Whether a lookup can find ``block``."""
        return self._key_of[block] is not None

    def generations_of(self, blocks: Sequence[int]) -> tuple[int, ...]:
        """Generations of ``blocks``, in their order."""
        return tuple(self.generations[list(blocks)].tolist())

    # Changes.

    def allocate(self, count: int) -> list[int]:
        """``count`` blocks for new content, one reference each; evicts idle ones if need be.

        Raises ValueError, and changes nothing, where fewer are available.
        """
        if count > self.num_available:
            raise ValueError(f"{count} blocks wanted, {self.num_available} available")
        if not count:
            return []
        blocks = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
        if count == 1:  # a decode's: the shorter way
            self.generations[blocks[0]] += _ONE
        else:
            self.generations[blocks] += _ONE
        return blocks

    def acquire(self, blocks: Sequence[int]) -> None:
        """Add a reference to each of these cached blocks (a hit of :meth:`match`)."""
        for block in blocks:
            assert self._key_of[block] is not None, f"block {block} is not cached"
            if not self._references[block]:
                del self._idle[block]
            self._references[block] += 1
        self._num_hits += len(blocks)

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference to each block of a table, given first to last."""
        for block in reversed(blocks):
            assert self._references[block] > 0, f"block {block} is released once too often"
            self._references[block] -= 1
            if self._references[block]:
                continue
            if self._key_of[block] is None:
                self._free.append(block)
            else:
                self._idle[block] = None

    def register(self, block: int, key: BlockKey, *, parent: BlockKey | None) -> bool:
        """Enter a referenced block, full and committed, in the cache.

        ``parent`` is the key of the block before it (``None`` for the first), which must be
        cached in the same table. Returns False, and changes nothing, if ``key`` is taken: then no
        later block of that table may be registered either, for its parent would be a stranger.
        """
        if not self.enable_prefix_cache or key in self._cached:
            return False
        assert self._references[block] > 0, f"block {block} is not referenced"
        assert self._key_of[block] is None, f"block {block} is already cached"
        assert parent is None or parent in self._cached, f"the parent of block {block} is missing"
        self._cached[key] = block
        self._key_of[block] = key
        self._parent_of[block] = parent
        if self._changes is not None:
            self._changes.append((True, key))
        return True

    def _evict(self) -> int:
        block, _ = self._idle.popitem(last=False)
        key = self._key_of[block]
        assert key is not None
        del self._cached[key]
        self._key_of[block] = None
        self._parent_of[block] = None
        self._num_evictions += 1
        if self._changes is not None:
            self._changes.append((False, key))
        return block

    def take_changes(self) -> list[tuple[bool, BlockKey]]:
        """(entered, key) of all cache changes since the last call, in order."""
        changes = self._changes
        if not changes:
            return []
        self._changes = []
        return changes

    # Accounts.

    def cached_keys(self) -> list[BlockKey]:
        """Keys of all cached blocks, a parent before its children."""
        return list(self._cached)

    def statistics(self) -> BlockStatistics:
        """A frozen account of every block."""
        return BlockStatistics(
            num_blocks=self.num_blocks,
            num_free=len(self._free),
            num_idle=len(self._idle),
            num_referenced=self.num_blocks - self.num_available,
            num_cached=len(self._cached),
            num_evictions=self._num_evictions,
            num_hits=self._num_hits,
        )

    def check_integrity(self, references: Mapping[int, int] | None = None) -> None:
        """Account for every block; raises AssertionError with details.

        ``references``: how many tables contain each block, counted by the owner of the tables.
        """
        free, idle = set(self._free), set(self._idle)
        held = {block for block, count in enumerate(self._references) if count}
        assert len(free) == len(self._free), "a block is twice in the free list"
        places = Counter([*free, *idle, *held])
        everywhere = Counter(range(self.num_blocks))
        assert places == everywhere, f"blocks not in exactly one place: {places - everywhere}"
        for key, block in self._cached.items():
            assert self._key_of[block] == key, f"block {block} is cached under a foreign key"
        cached = {block for block, key in enumerate(self._key_of) if key is not None}
        assert cached == set(self._cached.values()), "keys and blocks of the cache differ"
        assert not cached & free, f"cached blocks in the free list: {sorted(cached & free)}"
        assert idle <= cached, f"idle blocks that are not cached: {sorted(idle - cached)}"
        order = {block: position for position, block in enumerate(self._idle)}
        for block in cached:
            parent_key = self._parent_of[block]
            if parent_key is None:
                continue
            assert parent_key in self._cached, f"block {block} is cached without its parent"
            parent = self._cached[parent_key]
            assert self._references[parent] >= self._references[block], (
                f"parent {parent} has fewer references than its child {block}"
            )
            if parent in order:
                assert order[block] < order[parent], f"{parent} would be evicted before {block}"
        if references is not None:
            actual = {block: count for block, count in enumerate(self._references) if count}
            expected = {block: count for block, count in references.items() if count}
            assert actual == expected, (
                f"reference counts differ: {actual} but tables say {expected}"
            )
