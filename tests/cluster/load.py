"""A steady load of streams that knows what it should get."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from tests.cluster import oracle
from tests.cluster.harness import Cluster, Reply, body, complete, http_client


@dataclasses.dataclass(slots=True)
class Load:
    """Replies of a load, in order of their end."""

    replies: list[tuple[int, Reply]] = dataclasses.field(default_factory=list)
    """(index of the prompt, reply)."""

    @property
    def failed(self) -> list[Reply]:
        return [reply for _, reply in self.replies if reply.error is not None]

    def check_tokens(self, prompts: Sequence[Sequence[int]], *, num_tokens: int) -> list[str]:
        """Every finished reply against the oracle; returns the ties."""
        ties: list[str] = []
        seen: set[tuple[int, tuple[int, ...]]] = set()
        for index, reply in self.replies:
            if reply.error is not None:
                continue
            assert len(reply.token_ids) == num_tokens, (index, len(reply.token_ids))
            key = (index, tuple(reply.token_ids))
            if key not in seen:
                seen.add(key)
                ties += oracle.check_greedy(prompts[index], reply.token_ids)
        assert len(ties) <= oracle.MAX_TIES, ties
        return ties


@asynccontextmanager
async def streaming_load(
    cluster: Cluster, prompts: Sequence[Sequence[int]], *, num_tokens: int, concurrency: int
) -> AsyncIterator[Load]:
    """``concurrency`` streams at all times during the block; then lets the open ones end."""
    load = Load()
    stop = asyncio.Event()

    async with http_client(cluster) as client:

        async def worker(number: int) -> None:
            index = number
            while not stop.is_set():
                request = body(prompts[index % len(prompts)], max_tokens=num_tokens)
                load.replies.append((index % len(prompts), await complete(client, request)))
                index += concurrency

        workers = [asyncio.ensure_future(worker(i)) for i in range(concurrency)]
        try:
            yield load
        finally:
            stop.set()
            await asyncio.gather(*workers)
