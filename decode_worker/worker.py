"""The decode side of a handoff.

A ``Part.DECODE`` sequence's life here::

    submit → ``Want`` to the prefill side → the engine reserves blocks (*Reserved*) → each
    published chunk is pulled by a transport thread while prefill computes the next → last chunk
    pulled and verified → token 0 is repeated to the gateway, the engine decodes from token 1,
    ``Done`` lets the prefill side release its blocks

Anything that goes wrong (a late or corrupt pull, a stale block, a broken stream, a layout that
does not match) ends in one place: the engine recomputes here what did not arrive verified. A pull
that still runs keeps its destination blocks quarantined: an abort or a fall-back waits for it.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import logging
from collections.abc import Callable

from baton.core.cluster import Target
from baton.core.errors import TransferFailed
from baton.core.request import TokenOutput
from baton.engine.events import Reserved
from decode_worker.peer import Key, PeerLink, endpoints_from
from kvpool.transport import BlockCopy, Endpoint, KVCache, Receipt
from kvpool.transports import TransportSet
from protos.baton.internal.v1 import instance_pb2
from protos.convert import output_from_record

logger = logging.getLogger(__name__)

_STOP_MARGIN_S = 1.0
_NEVER_RAN = "the line to the prefill instance ended before the pull began"


@dataclasses.dataclass(slots=True)
class _Pull:
    """What one request has been promised and what has arrived."""

    key: Key
    target: Target
    own_blocks: tuple[int, ...] | None = None
    """Ours, once reserved."""
    num_cached_blocks: int = 0
    """Leading blocks that were here already."""
    blocks: list[int] = dataclasses.field(default_factory=list)
    generations: list[int] = dataclasses.field(default_factory=list)
    """Theirs, published so far."""
    endpoints: tuple[Endpoint, ...] = ()
    num_pulled: int = 0
    """Leading blocks that are here and verified, the cached ones included."""
    first_output: TokenOutput | None = None
    """Token 0, with the last chunk."""
    pulling: bool = False
    moved: bool = False
    """The blocks being pulled were published anew, from elsewhere."""
    failure: str | None = None
    aborted: bool = False

    @property
    def arrived(self) -> bool:
        return self.first_output is not None and self.num_pulled >= len(self.blocks)


@dataclasses.dataclass(slots=True)
class DecodeCounters:
    """Totals since the start, for metrics."""

    num_handoffs: int = 0
    num_recomputed: int = 0
    num_pulls: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    """By transport."""
    num_pulled_blocks: int = 0
    num_pulled_bytes: int = 0
    pull_s: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class DecodeHooks:
    """How the worker acts on its instance. All are called on the event loop."""

    kv_arrived: Callable[[str, int], bool]
    """(request_id, first token): the engine may decode."""
    kv_failed: Callable[[str, int, int | None], bool]
    """(request_id, valid tokens, first token if known): the engine recomputes the rest."""
    engine_abort: Callable[[str], None]
    """The request's blocks may be freed."""
    repeat: Callable[[str, TokenOutput], None]
    """Send token 0 to the gateway again."""
    stage: Callable[[str, str], None]
    """(request_id, stage): something happened; for timelines."""


class DecodeWorker:
    """Pulls what prefill publishes and starts decoding when it has it all.

    Args:
        instance_id, incarnation: who we are.
        cache: our paged cache, the destination of pulls.
        transports: how blocks come here.
        block_size: tokens per block.
        lease_s: the prefill side's lease; wants are renewed three times as often.
        pull_timeout_s: bound of one pull.
    """

    def __init__(
        self,
        hooks: DecodeHooks,
        *,
        instance_id: str,
        incarnation: Callable[[], int],
        cache: KVCache,
        transports: TransportSet,
        block_size: int,
        lease_s: float,
        pull_timeout_s: float,
    ) -> None:
        self._hooks = hooks
        self._instance_id = instance_id
        self._incarnation = incarnation
        self._cache = cache
        self._transports = transports
        self._block_size = block_size
        self._renew_every_s = lease_s / 3
        self._pull_timeout_s = pull_timeout_s
        self._pulls: dict[str, _Pull] = {}
        self._peers: dict[tuple[str, int], PeerLink] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._running: set[asyncio.Future[Receipt]] = set()
        self.counters = DecodeCounters()

    @property
    def num_pulls_open(self) -> int:
        """Requests whose KV is on its way."""
        return len(self._pulls)

    # Called by the instance.

    def open(self, request_id: str, attempt: int, prefill: Target) -> None:
        """A ``Part.DECODE`` submission was accepted by the engine."""
        pull = _Pull((request_id, attempt), prefill)
        self._pulls[request_id] = pull
        self._peer(prefill).want(pull.key)

    def on_reserved(self, event: Reserved) -> None:
        """The engine has blocks for a request."""
        pull = self._pulls.get(event.request_id)
        if pull is None:
            return
        self._hooks.stage(event.request_id, "blocks_reserved")
        pull.own_blocks = event.blocks
        pull.num_cached_blocks = event.num_cached_tokens // self._block_size
        pull.num_pulled = pull.num_cached_blocks
        self._advance(pull)

    def abort(self, request_id: str) -> bool:
        """Stop a request whose KV is on its way. False if it is none of ours (any more)."""
        pull = self._pulls.get(request_id)
        if pull is None:
            return False
        pull.aborted = True
        self._settle(pull)
        return True

    async def stop(self) -> None:
        """Close all streams and transports; wait for running pulls (bounded by their time-out)."""
        links = list(self._peers.values())
        self._peers.clear()
        await asyncio.gather(*(link.close() for link in links), *self._closing)
        running = set(self._running)
        if running:
            # Makes them fail now, where the transport can.
            await asyncio.get_running_loop().run_in_executor(None, self._transports.close)
            await asyncio.wait(running, timeout=self._pull_timeout_s + _STOP_MARGIN_S)

    # Called by the peer links.

    def on_chunk(self, chunk: instance_pb2.ChunkReady, endpoints: tuple[Endpoint, ...]) -> None:
        """Blocks were published."""
        pull = self._pulls.get(chunk.request_id)
        if pull is None or pull.key[1] != chunk.attempt:
            return
        if not pull.blocks:
            self._hooks.stage(chunk.request_id, "first_chunk_published")
        if chunk.first_block > len(pull.blocks):
            # Never leave a hole: what would be pulled after it belongs elsewhere.
            pull.failure = f"blocks before {chunk.first_block} were never published"
            self._settle(pull)
            return
        if pull.pulling and chunk.first_block < len(pull.blocks):
            pull.moved = True
        # A prefill that was preempted starts again from block 0; so does one whose blocks moved.
        del pull.blocks[chunk.first_block :], pull.generations[chunk.first_block :]
        pull.blocks.extend(chunk.blocks)
        pull.generations.extend(chunk.generations)
        pull.endpoints = endpoints_from(chunk.endpoints) or endpoints
        if chunk.final:
            pull.first_output = output_from_record(chunk.first_output)
        self._advance(pull)

    def on_failed(self, failed: instance_pb2.HandoffFailed) -> None:
        """The prefill side has nothing (more) for a request."""
        pull = self._pulls.get(failed.request_id)
        if pull is None or pull.key[1] != failed.attempt:
            return
        if failed.finished:
            # It ended at token 0, which the client has from prefill: nothing is left to do here.
            pull.aborted = True
        else:
            pull.failure = failed.message
        self._settle(pull)

    def on_lost(self, peer: PeerLink, reason: str) -> None:
        """A stream ended: what it should have brought is computed here."""
        identity = _identity(peer.target)
        if self._peers.get(identity) is peer:
            del self._peers[identity]
        # A dead peer's arena would stay mapped here, and so allocated, for as long as we live.
        asyncio.get_running_loop().run_in_executor(None, self._transports.forget, peer.endpoints)
        for pull in [pull for pull in self._pulls.values() if _identity(pull.target) == identity]:
            pull.failure = f"lost the prefill instance {peer.target.instance_id}: {reason}"
            self._settle(pull)

    # The pulls.

    def _advance(self, pull: _Pull) -> None:
        """Start the next pull of a request, or finish it, if there is anything to do."""
        if pull.pulling or pull.own_blocks is None or pull.aborted or pull.failure:
            return
        start, end = pull.num_pulled, len(pull.blocks)
        num_own = len(pull.own_blocks)
        link = self._peers.get(_identity(pull.target))
        if end > num_own or (pull.first_output is not None and end < num_own):
            pull.failure = f"{end} blocks were published where {num_own} are needed"
            self._settle(pull)
        elif start < end and link is not None:
            copies = [
                BlockCopy(pull.blocks[i], pull.generations[i], pull.own_blocks[i])
                for i in range(start, end)
            ]
            pull.pulling = True
            running = asyncio.get_running_loop().run_in_executor(
                link.threads, self._copy, pull, pull.endpoints, copies
            )
            self._running.add(running)
            running.add_done_callback(lambda future: self._on_pulled(pull, end, future))
        elif pull.arrived:
            self._settle(pull)

    def _copy(
        self, pull: _Pull, endpoints: tuple[Endpoint, ...], copies: list[BlockCopy]
    ) -> Receipt:
        """On a transport thread. ``endpoints`` are those that ``copies`` were published with: by
        now the blocks may have been published anew, under other numbers."""
        if pull.aborted or pull.failure is not None:
            raise TransferFailed("the request ended before the pull began")
        cache, timeout_s = self._cache, self._pull_timeout_s
        try:
            return self._transports.pull(endpoints, cache, copies, timeout_s=timeout_s)
        except BaseException:
            # Half-arrived bytes may be NaN, which attention's masks do not stop.
            for copy in copies:
                cache.block(copy.dst)[:] = bytes(cache.block_bytes)
            raise

    def _on_pulled(self, pull: _Pull, end: int, future: asyncio.Future[Receipt]) -> None:
        self._running.discard(future)
        pull.pulling = False
        moved, pull.moved = pull.moved, False
        try:
            receipt = future.result()
        except asyncio.CancelledError:
            pull.failure = pull.failure or _NEVER_RAN
        except TransferFailed as error:
            # From where the blocks no longer are: what is missing is pulled from where they are.
            if not moved:
                pull.failure = pull.failure or error.message
        except Exception as error:  # whatever it was, the bytes are not to be trusted
            logger.exception("pull for %s", pull.key[0])
            pull.failure = repr(error)
        else:
            pull.num_pulled = end
            if pull.arrived:
                pull.failure = None  # all is here: it no longer matters what broke meanwhile
            counters = self.counters
            counters.num_pulls[receipt.transport] += 1
            counters.num_pulled_blocks += receipt.num_blocks
            counters.num_pulled_bytes += receipt.num_bytes
            counters.pull_s += receipt.seconds
        if pull.aborted or pull.failure or pull.arrived:
            self._settle(pull)
        else:
            self._advance(pull)

    def _settle(self, pull: _Pull) -> None:
        """End a request's handoff, one way or another, once no pull writes to its blocks."""
        if pull.pulling or self._pulls.get(pull.key[0]) is not pull:
            return
        request_id = pull.key[0]
        del self._pulls[request_id]
        link = self._peers.get(_identity(pull.target))
        first = pull.first_output
        arrived = not pull.aborted and pull.failure is None
        if link is not None:
            link.done(pull.key, ok=arrived)
        if pull.aborted:
            self._hooks.engine_abort(request_id)
            return
        if first is not None:
            self._hooks.repeat(request_id, first)
        if arrived:
            assert first is not None
            self.counters.num_handoffs += 1
            self._hooks.stage(request_id, "kv_arrived")
            self._hooks.kv_arrived(request_id, first.token_ids[0])
            return
        logger.warning("recomputing %s here: %s", request_id, pull.failure)
        self.counters.num_recomputed += 1
        self._hooks.stage(request_id, "recompute")
        num_valid_tokens = pull.num_pulled * self._block_size
        first_token = first.token_ids[0] if first is not None else None
        self._hooks.kv_failed(request_id, num_valid_tokens, first_token)

    def _peer(self, target: Target) -> PeerLink:
        identity = _identity(target)
        link = self._peers.get(identity)
        if link is None:
            self._retire_older_lives(target)
            link = self._peers[identity] = PeerLink(
                target,
                self,
                instance_id=self._instance_id,
                incarnation=self._incarnation(),
                kv_layout=self._cache.layout,
                renew_every_s=self._renew_every_s,
                wanted=self._wanted,
            )
        return link

    def _wanted(self, link: PeerLink) -> list[Key]:
        identity = _identity(link.target)
        return [pull.key for pull in self._pulls.values() if _identity(pull.target) == identity]

    def _retire_older_lives(self, target: Target) -> None:
        for name, incarnation in list(self._peers):
            # A submission that names an older life must not end the line to the newer one.
            if name != target.instance_id or incarnation > target.incarnation:
                continue
            link = self._peers.pop((name, incarnation))
            link.abandon()
            task = asyncio.ensure_future(link.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
            self.on_lost(link, "a newer incarnation took its place")


def _identity(target: Target) -> tuple[str, int]:
    return target.instance_id, target.incarnation
