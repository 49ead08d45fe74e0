"""Token streams: outputs of one engine step, grouped by gateway, one message each."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from baton.core.request import TokenOutput


class TokenHub:
    """Fans outputs out to gateways. All methods run on the event loop.

    A gateway without an open stream gets nothing: its outputs are dropped, because it replays what
    it misses, and its requests here are ended by ``on_gateway_lost``.
    """

    def __init__(self, on_gateway_lost: Callable[[str], None]) -> None:
        self._on_gateway_lost = on_gateway_lost
        self._streams: dict[str, asyncio.Queue[list[TokenOutput] | None]] = {}
        self._pending: dict[str, list[TokenOutput]] = {}

    def connected(self, gateway_id: str) -> bool:
        """Whether the gateway listens."""
        return gateway_id in self._streams

    def put(self, gateway_id: str, output: TokenOutput) -> None:
        """Add an output to the gateway's next message."""
        self._pending.setdefault(gateway_id, []).append(output)

    def flush(self) -> None:
        """Send what :meth:`put` gathered: one message per gateway."""
        if not self._pending:
            return
        pending, self._pending = self._pending, {}
        for gateway_id, outputs in pending.items():
            stream = self._streams.get(gateway_id)
            if stream is not None:
                stream.put_nowait(outputs)

    async def stream(self, gateway_id: str) -> AsyncIterator[list[TokenOutput]]:
        """Messages for one gateway until it goes away or opens another stream."""
        older = self._streams.get(gateway_id)
        queue: asyncio.Queue[list[TokenOutput] | None] = asyncio.Queue()
        self._streams[gateway_id] = queue
        if older is not None:
            older.put_nowait(None)
        try:
            while (outputs := await queue.get()) is not None:
                yield outputs
        finally:
            if self._streams.get(gateway_id) is queue:
                del self._streams[gateway_id]
                self._on_gateway_lost(gateway_id)

    def close(self) -> None:
        """End all streams."""
        for stream in self._streams.values():
            stream.put_nowait(None)
