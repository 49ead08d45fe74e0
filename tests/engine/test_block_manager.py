import dataclasses

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from baton.core.blocks import BlockKey, block_keys
from baton.engine.block_manager import BlockManager

SALT = b"salt"


def manager(num_blocks: int = 8, block_size: int = 2, *, cache: bool = True) -> BlockManager:
    return BlockManager(num_blocks, block_size, salt=SALT, enable_prefix_cache=cache)


def keys_of(*tokens: int, block_size: int = 2) -> list[BlockKey]:
    return block_keys(tokens, block_size=block_size, salt=SALT)


def enter(blocks: BlockManager, keys: list[BlockKey]) -> list[int]:
    """Allocate and register a chain; one reference stays."""
    table = blocks.allocate(len(keys))
    for index, (block, key) in enumerate(zip(table, keys, strict=True)):
        assert blocks.register(block, key, parent=keys[index - 1] if index else None)
    return table


def test_blocks_are_handed_out_once_and_come_back() -> None:
    blocks = manager(4)
    table = blocks.allocate(4)
    assert sorted(table) == [0, 1, 2, 3]
    assert blocks.num_available == 0
    blocks.release(table[:2])
    assert blocks.num_available == 2
    assert set(blocks.allocate(2)) == set(table[:2])
    blocks.check_integrity(dict.fromkeys(range(4), 1))


def test_too_many_blocks_are_refused_and_nothing_changes() -> None:
    blocks = manager(4)
    before = blocks.statistics()
    with pytest.raises(ValueError, match="5 blocks wanted, 4 available"):
        blocks.allocate(5)
    assert blocks.statistics() == before
    assert not blocks.generations.any()


def test_generation_rises_with_new_content_only() -> None:
    generations = np.full(4, 7, dtype=np.uint64)
    blocks = BlockManager(4, 2, salt=SALT, generations=generations)
    keys = keys_of(1, 2)
    table = enter(blocks, keys)
    assert blocks.generations_of(table) == (8,)
    blocks.release(table)
    blocks.acquire(blocks.match(keys))
    assert generations[table[0]] == 8
    blocks.release(table)
    assert generations.sum() == 7 * 4 + 1
    blocks.allocate(4)
    assert generations[table[0]] == 9
    assert generations.sum() == 7 * 4 + 1 + 4


@pytest.mark.parametrize("generations", [np.zeros(3, dtype=np.uint64), np.zeros(4, dtype=np.int64)])
def test_a_foreign_generation_table_is_refused(generations: np.ndarray) -> None:
    with pytest.raises(ValueError, match="generations must be uint64 of shape"):
        BlockManager(4, 2, salt=SALT, generations=generations)


def test_match_finds_the_longest_prefix_and_changes_nothing() -> None:
    blocks = manager()
    table = enter(blocks, keys_of(1, 2, 3, 4))
    before = blocks.statistics()
    assert blocks.match(keys_of(1, 2, 3, 4, 5, 6)) == table
    assert blocks.match(keys_of(1, 2, 9, 9)) == table[:1]
    assert blocks.match(keys_of(9, 9, 3, 4)) == []
    assert blocks.statistics() == before


def test_a_taken_key_is_not_registered_twice() -> None:
    blocks = manager()
    keys = keys_of(1, 2)
    first = enter(blocks, keys)
    second = blocks.allocate(1)
    assert not blocks.register(second[0], keys[0], parent=None)
    assert blocks.match(keys) == first
    blocks.release(second)
    assert blocks.statistics().num_free == 7
    blocks.check_integrity({first[0]: 1})


def test_an_orphan_is_not_registered() -> None:
    blocks = manager()
    keys = keys_of(1, 2, 3, 4)
    with pytest.raises(AssertionError, match="parent"):
        blocks.register(blocks.allocate(1)[0], keys[1], parent=keys[0])


def test_eviction_takes_the_oldest_leaf_first() -> None:
    blocks = manager(4)
    old, new = keys_of(1, 2, 3, 4), keys_of(5, 6, 7, 8)
    blocks.release(enter(blocks, old))
    blocks.release(enter(blocks, new))
    assert blocks.statistics().num_free == 0
    lengths = []
    for _ in range(4):
        blocks.allocate(1)
        lengths.append((len(blocks.match(old)), len(blocks.match(new))))
    assert lengths == [(1, 2), (0, 2), (0, 1), (0, 0)]
    assert blocks.statistics().num_evictions == 4


def test_a_hit_protects_from_eviction() -> None:
    blocks = manager(3)
    keys = keys_of(1, 2, 3, 4)
    blocks.release(enter(blocks, keys))
    hits = blocks.match(keys)
    assert blocks.num_idle_among(hits) == 2
    blocks.acquire(hits)
    assert blocks.num_available == 1
    assert blocks.allocate(1)[0] not in hits
    assert blocks.statistics().num_hits == 2


def test_releasing_once_too_often_is_noticed() -> None:
    blocks = manager()
    table = blocks.allocate(1)
    blocks.release(table)
    with pytest.raises(AssertionError, match="once too often"):
        blocks.release(table)


def test_without_a_cache_nothing_is_found() -> None:
    blocks = manager(cache=False)
    keys = keys_of(1, 2)
    assert not blocks.register(blocks.allocate(1)[0], keys[0], parent=None)
    assert blocks.match(keys) == []


def test_tenants_and_adapters_have_keys_of_their_own() -> None:
    blocks = manager()
    salts = {
        blocks.salt_for(tenant=tenant, adapter=adapter)
        for tenant, adapter in [("", ""), ("a", ""), ("", "a"), ("a", "b"), ("ab", ""), ("b", "a")]
    }
    assert len(salts) == 6
    assert blocks.salt_for(tenant="", adapter="") == SALT


def test_integrity_notices_a_lost_block() -> None:
    blocks = manager(4)
    table = blocks.allocate(2)
    blocks.check_integrity(dict.fromkeys(table, 1))
    with pytest.raises(AssertionError, match="reference counts differ"):
        blocks.check_integrity({table[0]: 1})


def test_statistics_are_frozen() -> None:
    statistics = manager().statistics()
    with pytest.raises(dataclasses.FrozenInstanceError):
        statistics.num_free = 3  # type: ignore[misc]


@dataclasses.dataclass(eq=False)
class Table:
    tokens: list[int]
    keys: list[BlockKey]
    blocks: list[int]
    num_registered: int
    may_register: bool = True


class BlockManagerMachine(RuleBasedStateMachine):
    """Against a model that knows which tokens each block holds, and never forgets to look."""

    tables = Bundle("tables")

    def __init__(self) -> None:
        super().__init__()
        self.size = 2
        self.blocks = manager(7, self.size)
        self.content: dict[int, tuple[int, ...]] = {}
        """block → all tokens of the prefix that ends with it, for cached blocks."""
        self.generations = [0] * 7
        self.open: list[Table] = []

    def _hand_out(self, count: int) -> list[int]:
        owned = {block for table in self.open for block in table.blocks}
        fresh = self.blocks.allocate(count)
        assert not owned & set(fresh)
        assert len(set(fresh)) == count
        for block in fresh:
            self.generations[block] += 1
            self.content.pop(block, None)
        return fresh

    @rule(target=tables, tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9))
    def begin(self, tokens: list[int]) -> Table:
        keys = block_keys(tokens, block_size=self.size, salt=SALT)
        hits = self.blocks.match(keys)
        for index, block in enumerate(hits):
            assert self.content[block] == tuple(tokens[: (index + 1) * self.size])
        known = set(self.content.values())
        if len(hits) < len(keys):
            assert tuple(tokens[: (len(hits) + 1) * self.size]) not in known
        total = self.blocks.blocks_for(len(tokens))
        idle = self.blocks.num_idle_among(hits)
        if total - len(hits) + idle > self.blocks.num_available:
            return Table([], [], [], 0)
        self.blocks.acquire(hits)
        table = Table(tokens, keys, list(hits), len(hits))
        self.open.append(table)
        table.blocks += self._hand_out(total - len(hits))
        return table

    @rule(table=tables)
    def commit_a_block(self, table: Table) -> None:
        index = table.num_registered
        if table not in self.open or index >= len(table.keys) or not table.may_register:
            return
        prefix = tuple(table.tokens[: (index + 1) * self.size])
        taken = prefix in self.content.values()
        parent = table.keys[index - 1] if index else None
        done = self.blocks.register(table.blocks[index], table.keys[index], parent=parent)
        assert done is not taken
        if done:
            self.content[table.blocks[index]] = prefix
            table.num_registered += 1
        else:
            table.may_register = False

    @rule(table=tables)
    def end(self, table: Table) -> None:
        if table in self.open:
            self.open.remove(table)
            self.blocks.release(table.blocks)

    @rule(table=tables)
    def grow(self, table: Table) -> None:
        if table in self.open and self.blocks.num_available:
            table.blocks += self._hand_out(1)

    @invariant()
    def accounts_agree(self) -> None:
        references: dict[int, int] = {}
        for table in self.open:
            for block in table.blocks:
                references[block] = references.get(block, 0) + 1
        self.blocks.check_integrity(references)
        assert self.blocks.generations.tolist() == self.generations
        statistics = self.blocks.statistics()
        assert statistics.num_cached == len(self.content)
        assert statistics.num_idle == len(set(self.content) - set(references))
        assert statistics.num_referenced == len(references)
        assert statistics.num_free + statistics.num_idle + statistics.num_referenced == 7

    @invariant()
    def cache_is_closed_under_prefixes(self) -> None:
        known = set(self.content.values())
        assert all(prefix[: -self.size] in known for prefix in known if len(prefix) > self.size)

    def teardown(self) -> None:
        for table in self.open:
            self.blocks.release(table.blocks)
        assert self.blocks.num_available == 7
        self.blocks.check_integrity({})


BlockManagerMachine.TestCase.settings = settings(
    max_examples=80, stateful_step_count=40, deadline=None
)
TestBlockManagerMachine = BlockManagerMachine.TestCase
