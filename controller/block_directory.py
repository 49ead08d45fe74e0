"""Who has which KV block, as far as the holders have told: the index, and its way to the wire.

What it says may be old by a moment: whoever goes there may find less, and then computes.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence

from baton.core.blocks import BlockKey
from baton.core.errors import InvalidRequest, Stage
from controller.events import PrefixMatch
from kvpool.index import KVIndex
from kvpool.tiers import KVEvent, KVEventBatch, KVEventKind, KVSnapshot, Tier
from protos.baton.internal.v1 import controller_pb2

MAX_MATCHES = 32
"""Holders of one prompt's beginning that placement is told of, longest first."""

_make: Callable[[tuple[str, str, int]], PrefixMatch] = functools.partial(tuple.__new__, PrefixMatch)
"""A third of the time of ``PrefixMatch(...)``."""

PrefixLookup = Callable[[Sequence[BlockKey]], tuple[PrefixMatch, ...]]
"""Who has how much of a prompt whose blocks have these keys."""


class BlockDirectory:
    """The controller's index. Not persisted: after a restart every holder sends a snapshot."""

    def __init__(self) -> None:
        self.index = KVIndex()

    def report(self, report: controller_pb2.BlockReport) -> controller_pb2.BlockReportReply:
        """Take in what a holder says. Raises InvalidRequest for what no holder of ours says."""
        try:
            if report.snapshot:
                self.index.replace(_snapshot(report))
                return controller_pb2.BlockReportReply()
            known = self.index.apply(_batch(report))
        except ValueError as error:
            raise InvalidRequest(str(error), stage=Stage.CONTROL, param="events") from error
        return controller_pb2.BlockReportReply(need_snapshot=not known)

    def locate(
        self, keys: Sequence[BlockKey], address_of: Callable[[str], str], num_pool_nodes: int
    ) -> controller_pb2.LocateBlocksReply:
        """Longest prefixes by holder and tier. ``address_of`` a pool node: else empty."""
        return controller_pb2.LocateBlocksReply(
            num_pool_nodes=num_pool_nodes,
            matches=[
                controller_pb2.BlockMatch(
                    holder=match.holder,
                    tier=match.tier,
                    num_blocks=match.num_blocks,
                    address=address_of(match.holder),
                )
                for match in self.index.lookup(keys)
            ],
        )

    def prefix_lookup(self, block_size: int) -> PrefixLookup:
        """For one batch of placements: choices of one request are looked up once."""
        found: dict[BlockKey, tuple[PrefixMatch, ...]] = {}

        def lookup(keys: Sequence[BlockKey]) -> tuple[PrefixMatch, ...]:
            if not keys:
                return ()
            last = keys[-1]  # names all that comes before it
            if last not in found:
                matches: list[PrefixMatch] = []
                turn = int.from_bytes(last[-4:], "little")
                runs = self.index.lookup(keys).best_of(MAX_MATCHES, turn)
                for num_blocks, holders, tiers in runs:
                    lengths = itertools.repeat(num_blocks * block_size)
                    matches += map(_make, zip(holders, tiers, lengths, strict=False))
                found[last] = tuple(matches)
            return found[last]

        return lookup

    def keep_only(self, holders: Iterable[str]) -> None:
        """Forget all other holders: they are gone."""
        alive = set(holders)
        for holder in list(self.index.holders()):
            if holder not in alive:
                self.index.drop(holder)


def _batch(report: controller_pb2.BlockReport) -> KVEventBatch:
    events = tuple(
        KVEvent(
            KVEventKind(event.kind),
            Tier(event.tier),
            tuple(event.keys),
            Tier(event.to) if event.to else None,
        )
        for event in report.events
    )
    return KVEventBatch(report.holder, report.life, report.first_seq, events)


def _snapshot(report: controller_pb2.BlockReport) -> KVSnapshot:
    blocks = tuple((Tier(item.tier), tuple(item.keys)) for item in report.blocks)
    return KVSnapshot(report.holder, report.life, report.first_seq, blocks)
