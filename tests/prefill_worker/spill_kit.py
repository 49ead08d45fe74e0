"""A prefill instance with little memory, a decode instance, and a pool node between them."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from baton.core.cluster import Role
from baton.core.config import HandoffConfig
from baton.core.request import Submission
from baton.engine.states import SequenceState
from kvpool.transport import BlockCopy, Endpoint, KVCache, Receipt
from kvpool.transports.loopback import LoopbackTransport
from kvpool.transports.shm import ShmTransport
from tests.instance.fetch_kit import LAYOUT, Pool, pool_of
from tests.instance.instance_kit import CONFIG, WAIT_S, Client, Node, request, running, until

SLOW = HandoffConfig(lease_s=20.0, pull_timeout_s=WAIT_S)


class GatedLoopback(LoopbackTransport):
    """Pulls wait before their first byte while the gate is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.gate.set()
        self.num_waiting = 0

    def pull(
        self, endpoint: Endpoint, cache: KVCache, copies: Sequence[BlockCopy], *, timeout_s: float
    ) -> Receipt:
        self.num_waiting += 1
        self.gate.wait(WAIT_S)
        return super().pull(endpoint, cache, copies, timeout_s=timeout_s)


@dataclasses.dataclass(frozen=True, slots=True)
class Scene:
    """A small prefill instance, a decode instance, their pool node and a client."""

    pool: Pool
    prefill: Node
    decode: Node
    line: GatedLoopback
    """How the decode instance pulls from the prefill instance."""
    client: Client

    async def fill_decode(self) -> Submission:
        """A request that has nearly all of the decode instance's blocks, and makes no progress
        until ``go_on``."""
        self.decode.runner.gate.clear()
        big = request("big", num_prompt_tokens=40)
        await self.client.hand_over(big, self.prefill, self.decode)
        await until(lambda: bool(self.decode.runner.started))
        await until(lambda: not self.prefill.parts.prefill.num_leases)
        return big

    def go_on(self) -> None:
        self.decode.runner.gate.set()
        self.line.gate.set()

    async def held(self, *names: str) -> None:
        """Wait until these are finished prefills that nobody has taken."""
        engine = self.prefill.engine
        await until(
            lambda: all(engine.state_of(f"{n}@0") is SequenceState.HELD for n in names),
            lambda: f"{[(n, engine.state_of(f'{n}@0')) for n in names]}",
        )

    async def spilled(self, *names: str) -> None:
        """Wait until the blocks of these are free on the prefill instance."""
        handoffs = self.prefill.parts.prefill._handoffs
        await until(lambda: all(handoffs[f"{name}@0"].spilled for name in names))
        for name in names:
            assert self.prefill.engine.state_of(f"{name}@0") is None
        assert self.pool.held()["transient"] > 0

    @property
    def num_spilled(self) -> int:
        return self.prefill.parts.prefill.counters.num_spilled


@contextlib.asynccontextmanager
async def scene(
    directory: Path,
    *,
    num_slots: int = 64,
    num_blocks: int = 16,
    decode_blocks: int = 16,
    handoff: HandoffConfig = SLOW,
    spill_after_s: float = 0.02,
) -> AsyncIterator[Scene]:
    line = GatedLoopback()
    async with pool_of(directory, num_slots) as pool:
        prefill = Node(
            "p",
            Role.PREFILL,
            config=dataclasses.replace(CONFIG, num_blocks=num_blocks),
            handoff=handoff,
            transports=[LoopbackTransport()],
            layout=LAYOUT,
            pool=pool.side,
            spill_after_s=spill_after_s,
        )
        decode = Node(
            "d",
            Role.DECODE,
            config=dataclasses.replace(CONFIG, num_blocks=decode_blocks),
            handoff=handoff,
            transports=[line, ShmTransport()],
            layout=LAYOUT,
        )
        async with running(prefill, decode) as client:
            made = Scene(pool, prefill, decode, line, client)
            try:
                yield made
            finally:
                made.go_on()
