"""A host tier's accounts as tests use them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kvpool.host_records import RECORD
from kvpool.host_table import HostTable
from kvpool.host_values import Grant, Hold, HostSettings, Skip
from kvpool.tiers import BlockMeta, KVEvent
from tests.kvpool.host_model import Path, chain, key_of


class Host:
    """A table, its arrays and its events; time stands still unless a test moves it."""

    def __init__(self, num_slots: int = 8, *, admit_all: bool = False) -> None:
        self.records = np.zeros(num_slots, dtype=RECORD)
        self.generations = np.zeros(num_slots, dtype=np.uint64)
        self.events: list[KVEvent] = []
        self.settings = HostSettings(life=1, quarantine_s=5.0, admit_all=admit_all)
        self.table = HostTable(
            self.records, self.generations, on_event=self.events.append, settings=self.settings
        )
        self.now = 100.0

    def reserve(
        self, *paths: Path, owner: str = "a", priority: int = 0, transient: bool = False
    ) -> list[Grant | Skip]:
        metas = [meta(path, priority=priority) for path in paths]
        return self.table.reserve(
            metas, owner=owner, now=self.now, lease_s=10.0, transient=transient
        )

    def grants(self, *paths: Path, **more: Any) -> list[Grant]:
        granted = [answer for answer in self.reserve(*paths, **more) if isinstance(answer, Grant)]
        assert len(granted) == len(paths)
        return granted

    def publish(self, grants: Sequence[Grant]) -> list[bool]:
        return [self.table.publish(grant.ticket, grant.slot + 7, self.now) for grant in grants]

    def store(self, path: Path, *, priority: int = 0) -> None:
        """All blocks of a prompt that are not here yet."""
        paths = [path[: depth + 1] for depth in range(len(path))]
        answers = self.reserve(*paths, priority=priority)
        assert all(self.publish([a for a in answers if isinstance(a, Grant)]))

    def hold(self, path: Path, owner: str = "b") -> Hold | None:
        return self.table.hold(chain(path), owner=owner, now=self.now, lease_s=10.0)

    def match(self, path: Path, *, touch: bool = False) -> int:
        return self.table.match(chain(path), touch=touch, now=self.now)

    def rebuilt(self) -> HostTable:
        return HostTable.rebuild(
            self.records.copy(), self.generations.copy(), now=self.now, settings=self.settings
        )


def meta(path: Path, *, priority: int = 0) -> BlockMeta:
    parent = key_of(path[:-1]) if len(path) > 1 else None
    return BlockMeta(key_of(path), parent, len(path) - 1, num_tokens=16, priority=priority)
