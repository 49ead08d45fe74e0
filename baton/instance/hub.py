"""Token streams: outputs of one engine step, grouped by gateway, one message each."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from baton.core.request import TokenOutput


class TokenStream:
    """One gateway's messages, in order."""

    def __init__(self, gateway_id: str) -> None:
        self.gateway_id = gateway_id
        self._queue: asyncio.Queue[list[TokenOutput] | None] = asyncio.Queue()

    def put(self, outputs: list[TokenOutput]) -> None:
        """Add a message."""
        self._queue.put_nowait(outputs)

    def end(self) -> None:
        """End the iteration after what was put."""
        self._queue.put_nowait(None)

    async def __aiter__(self) -> AsyncIterator[list[TokenOutput]]:
        while (outputs := await self._queue.get()) is not None:
            yield outputs


class TokenHub:
    """Fans outputs out to gateways. All methods run on the event loop.

    A gateway without an open stream gets nothing: its outputs are dropped, because it replays what
    it misses, and its requests here are ended by ``on_gateway_lost``.
    """

    def __init__(self, on_gateway_lost: Callable[[str], None]) -> None:
        self._on_gateway_lost = on_gateway_lost
        self._streams: dict[str, TokenStream] = {}
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
                stream.put(outputs)

    def open(self, gateway_id: str) -> TokenStream:
        """The gateway's stream; it counts as connected from here until :meth:`close`.

        An older stream of the same gateway ends, and its requests go on over the new one.
        """
        older = self._streams.get(gateway_id)
        stream = self._streams[gateway_id] = TokenStream(gateway_id)
        if older is not None:
            older.end()
        return stream

    def close(self, stream: TokenStream) -> None:
        """The stream's call ended, in whatever way."""
        if self._streams.get(stream.gateway_id) is stream:
            del self._streams[stream.gateway_id]
            self._on_gateway_lost(stream.gateway_id)

    def end_all(self) -> None:
        """End all streams: the instance stops."""
        for stream in self._streams.values():
            stream.end()
