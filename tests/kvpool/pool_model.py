"""Naive counterparts of the pool's index: holders that keep prefixes closed, and a dict of sets."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from baton.core.blocks import BlockKey
from kvpool.event_log import KVEventLog
from kvpool.tiers import KVEvent, KVEventBatch, KVEventKind, KVSnapshot, Tier

Content = dict[BlockKey, set[Tier]]

TIERS = list(Tier)
PARENTS: dict[BlockKey, BlockKey | None] = {}
"""A small forest: every block that the tests know, and the one before it."""


def _grow(name: str, length: int, below: BlockKey | None = None) -> list[BlockKey]:
    chain: list[BlockKey] = []
    for number in range(length):
        key = f"{name}{number}".encode().ljust(16, b".")
        PARENTS[key] = chain[-1] if chain else below
        chain.append(key)
    return chain


_SYSTEM = _grow("system", 5)
_TALK = _SYSTEM + _grow("talk", 6, _SYSTEM[-1])
CHAINS: list[list[BlockKey]] = [
    _TALK,
    _TALK[:8] + _grow("branch", 4, _TALK[7]),
    _SYSTEM + _grow("other", 3, _SYSTEM[-1]),
    _grow("alone", 7),
]
UNKNOWN = [f"unknown{number}".encode().ljust(16, b".") for number in range(4)]


def has(content: Content, key: BlockKey, tiers: Sequence[Tier]) -> bool:
    return any(tier in tiers for tier in content.get(key, ()))


def prefix(content: Content, keys: Sequence[BlockKey], tiers: Sequence[Tier]) -> int:
    count = 0
    for key in keys:
        if not has(content, key, tiers):
            break
        count += 1
    return count


def matches(content: Content, keys: Sequence[BlockKey]) -> list[tuple[Tier, int]]:
    """A match per tier that makes the prefix longer, fastest first."""
    found: list[tuple[Tier, int]] = []
    for number, tier in enumerate(TIERS):
        count = prefix(content, keys, TIERS[: number + 1])
        if count > (found[-1][1] if found else 0):
            found.append((tier, count))
    return found


def happen(content: Content, event: KVEvent) -> None:
    for key in event.keys:
        tiers = content.setdefault(key, set())
        if event.kind in (KVEventKind.REMOVED, KVEventKind.DEMOTED):
            tiers.discard(event.tier)
        else:
            tiers.add(event.tier)
        if event.to is not None:
            tiers.add(event.to)
        if not tiers:
            del content[key]


class Holder:
    """A holder that evicts leaves first, and its log."""

    def __init__(self, name: str, life: int, tiers: Sequence[Tier], content: Content) -> None:
        self.name, self.life, self.tiers = name, life, tiers
        self.content = content
        self.log = KVEventLog(name, life, capacity=6)
        self.sent = 0

    def snapshot(self) -> KVSnapshot:
        blocks = tuple(
            (tier, tuple(key for key, tiers in self.content.items() if tier in tiers))
            for tier in self.tiers
        )
        return KVSnapshot(self.name, self.life, self.log.next_seq, blocks)

    def store(self, chain: list[BlockKey]) -> None:
        """The prefix is computed here, into the fastest tier; in any case parents first."""
        missing = [key for key in chain if not has(self.content, key, self.tiers[:1])]
        self._do(KVEvent(KVEventKind.STORED, self.tiers[0], tuple(missing)))

    def give_up(self, chain: list[BlockKey], kind: KVEventKind) -> None:
        """The end of a chain leaves the fastest tier, up to where it has another child there."""
        first = self.tiers[:1]
        tail: list[BlockKey] = []
        for key in reversed(chain):
            others = (one for one, parent in PARENTS.items() if parent == key and one not in tail)
            if any(has(self.content, one, first) for one in others):
                break
            if has(self.content, key, first):
                tail.insert(0, key)
        to = self.tiers[-1] if kind is KVEventKind.DEMOTED else None
        self._do(KVEvent(kind, self.tiers[0], tuple(tail), to))

    def copy(self, chain: list[BlockKey], kind: KVEventKind) -> None:
        """Between the first tier and the last: written back, or promoted where parents are."""
        first, last = self.tiers[0], self.tiers[-1]
        if kind is KVEventKind.PROMOTED:
            start = prefix(self.content, chain, [first])
            end = prefix(self.content, chain, [first, last])
            keys = [key for key in chain[start:end] if last in self.content[key]]
            if len(keys) == end - start:
                self._do(KVEvent(kind, last, tuple(keys), first))
        else:
            keys = [key for key in chain if has(self.content, key, [first])]
            self._do(KVEvent(KVEventKind.STORED, last, tuple(keys)))

    def clean(self, chain: list[BlockKey]) -> None:
        """Blocks leave the last tier that are also in the first, or that nothing needs."""
        last = self.tiers[-1]
        for key in reversed(chain):
            tiers = self.content.get(key, set())
            children = [one for one, parent in PARENTS.items() if parent == key]
            if last in tiers and (
                len(tiers) > 1 or not any(one in self.content for one in children)
            ):
                self._do(KVEvent(KVEventKind.REMOVED, last, (key,)))

    def _do(self, event: KVEvent) -> None:
        happen(self.content, event)
        self.log.append(event)


@dataclasses.dataclass
class Known:
    """What the naive index knows of a holder."""

    life: int
    next_seq: int
    synced: bool
    content: Content


class NaiveIndex:
    """The documented rules, word by word."""

    def __init__(self) -> None:
        self.holders: dict[str, Known] = {}

    def apply(self, batch: KVEventBatch) -> bool:
        known = self.holders.get(batch.holder)
        if known is None:
            return False
        if batch.life < known.life:
            return True
        if batch.life > known.life:
            self.holders[batch.holder] = Known(batch.life, 0, False, {})
            return False
        if batch.first_seq > known.next_seq:
            known.synced = False
        if not known.synced:
            return False
        for seq, event in enumerate(batch.events, batch.first_seq):
            if seq == known.next_seq:
                happen(known.content, event)
                known.next_seq += 1
        return True

    def replace(self, snapshot: KVSnapshot) -> None:
        known = self.holders.get(snapshot.holder)
        if known is not None:
            if snapshot.life < known.life:
                return
            if snapshot.life == known.life and snapshot.next_seq < known.next_seq:
                return
        content: Content = {}
        for tier, keys in snapshot.blocks:
            happen(content, KVEvent(KVEventKind.STORED, tier, keys))
        self.holders[snapshot.holder] = Known(snapshot.life, snapshot.next_seq, True, content)
