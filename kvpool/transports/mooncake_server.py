"""The exporter's side of the mooncake transport: it vouches for bytes that others read.

The connection is that of the tcp transport (``tcp_wire``), but for what follows the first reply::

    exporter  per chunk: xxh3-64 of its bytes as uint64
    reader    ARRIVED                 it has read all chunks
    exporter  REPLY, message          OK: all generations are still unchanged
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import xxhash

from kvpool.transport import BlockCopy, KVCache, TransferFailed
from kvpool.transports import tcp_wire as wire
from kvpool.transports.blocks import Budget, check_generations, views
from kvpool.transports.mooncake_engine import MAX_SLICES, STAGING_BYTES
from kvpool.transports.tcp_channel import Channel, receive_bytes
from kvpool.transports.tcp_server import BlockServer

ARRIVED = b"BKVM"


class VouchingServer(BlockServer):
    """Tells checksums and generations of one cache until ``close``."""

    def _stream(self, channel: Channel, number: int, table: bytes, budget: Budget) -> None:
        blocks, generations = wire.unpack_copies(table)
        pairs = zip(blocks.tolist(), generations.tolist(), strict=True)
        copies = [BlockCopy(block, generation, 0) for block, generation in pairs]
        if not self._vouch(channel, number, copies, "before the pull", budget):
            return
        for chunk in chunks(copies, self._cache.block_bytes):
            told = checksum(self._cache, [copy.src for copy in chunk])
            channel.send([wire.CHECKSUM.pack(told)], budget)
        if receive_bytes(channel, len(ARRIVED), budget) != ARRIVED:
            raise wire.BadFrame("the reader did not say that all has arrived")
        self._vouch(channel, wire.last_number(number), copies, "during the pull", budget)

    def _vouch(
        self,
        channel: Channel,
        number: int,
        copies: Sequence[BlockCopy],
        when: str,
        budget: Budget,
    ) -> bool:
        try:
            check_generations(self._cache, copies, when)
        except TransferFailed as error:
            channel.send([wire.pack_reply(number, wire.Status.STALE, error.message)], budget)
            return False
        channel.send([wire.pack_reply(number, wire.Status.OK)], budget)
        return True


def chunks(copies: Sequence[BlockCopy], block_bytes: int) -> Iterator[Sequence[BlockCopy]]:
    """What is read at once and has one checksum; both sides cut alike."""
    step = max(1, min(MAX_SLICES, STAGING_BYTES // block_bytes))
    for at in range(0, len(copies), step):
        yield copies[at : at + step]


def checksum(cache: KVCache, blocks: Sequence[int]) -> int:
    """xxh3-64 over blocks in this order."""
    digest = xxhash.xxh3_64()
    for view in views(cache, blocks):
        digest.update(view)
    return digest.intdigest()
