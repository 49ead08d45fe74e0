"""What the prefill side knows of each handoff, and of each decode side."""

from __future__ import annotations

import asyncio
import dataclasses

from baton.core.request import TokenOutput
from kvpool.transport import Endpoint
from prefill_worker.spill import Spilled
from protos.baton.internal.v1 import instance_pb2

Key = tuple[str, int]
"""(sequence id, attempt): both sides name an attempt alike."""


class PeerStream:
    """Outgoing half of one decode side's stream."""

    def __init__(self, instance_id: str) -> None:
        self.instance_id = instance_id
        self.queue: asyncio.Queue[instance_pb2.HandoffEvent | None] = asyncio.Queue()
        """``None`` ends the stream."""


@dataclasses.dataclass(slots=True)
class Handoff:
    """What one request has published so far."""

    key: Key
    blocks: tuple[int, ...] = ()
    generations: tuple[int, ...] = ()
    num_computed_tokens: int = 0
    final: bool = False
    first_output: TokenOutput | None = None
    peer: PeerStream | None = None
    num_sent: int = 0
    """Blocks that ``peer`` knows of."""
    orphaned: bool = False
    """Its decode side's stream broke, and nobody has asked for it since."""
    abandoned: bool = False
    """The decode side gave up before the end: let go as soon as token 0 is drawn."""
    spilled: Spilled | None = None
    """Its blocks are in the host tier, and free here."""
    spilling: bool = False

    @property
    def complete(self) -> bool:
        """Everything is computed, and token 0 drawn."""
        return self.final and self.first_output is not None


@dataclasses.dataclass(slots=True)
class PrefillCounters:
    """Totals since the start, for metrics."""

    num_handed_off: int = 0
    num_refused_by_peer: int = 0
    num_expired_leases: int = 0
    num_spilled: int = 0
    """Handoffs whose blocks were moved to the host tier."""


def endpoint_record(endpoint: Endpoint) -> instance_pb2.EndpointRecord:
    """To the wire."""
    return instance_pb2.EndpointRecord(
        transport=endpoint.transport,
        address=endpoint.address,
        token=endpoint.token,
        layout=endpoint.layout,
    )
