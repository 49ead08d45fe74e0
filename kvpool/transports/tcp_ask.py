"""A reader's request to an exporter, and what it means when that one refuses."""

from __future__ import annotations

from collections.abc import Sequence

from kvpool.transport import BlockCopy, Endpoint, KVCache, TransferFailed, TransferFault
from kvpool.transports import tcp_wire as wire
from kvpool.transports.blocks import Budget, broken, failed
from kvpool.transports.tcp_channel import Channel

_REFUSALS = {
    wire.Status.STALE: TransferFault.STALE,
    wire.Status.LAYOUT: TransferFault.LAYOUT,
    wire.Status.TOKEN: TransferFault.GONE,
}


def refusal(address: str, status: wire.Status, message: str) -> TransferFailed:
    """What an exporter's status other than OK means for a pull."""
    another_way = status in (wire.Status.TOKEN, wire.Status.TLS)
    make = broken if another_way else failed
    fault = _REFUSALS.get(status, TransferFault.OTHER)
    return make(f"{address} refused: {message}", fault)


def ask(
    channel: Channel,
    endpoint: Endpoint,
    number: int,
    cache: KVCache | None,
    copies: Sequence[BlockCopy],
    budget: Budget,
) -> None:
    """Send request ``number``. Without a cache it is a probe, which any block size answers to."""
    layout = endpoint.layout.encode()
    fixed = wire.REQUEST.pack(
        wire.MAGIC,
        wire.VERSION,
        endpoint.token.encode(),
        len(copies),
        0 if cache is None else cache.block_bytes,
        min(int(budget() * 1000) + 1, 2**32 - 1),
        len(layout),
        number,
    )
    channel.send([fixed, layout, wire.pack_copies(copies)], budget)
