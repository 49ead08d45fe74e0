"""The prefill side of a handoff.

A ``Part.PREFILL`` sequence's life here::

    submit → engine computes chunks → each chunk's blocks are *published* to the decode side's
    stream → last chunk: token 0 goes to the gateway and, with the last blocks, to the decode side
    → the sequence is *held* under a lease → ``Done`` from the decode side (or the lease's end, or
    an abort) → its blocks are released

The decode side speaks first (``Want``), on one stream per pair of instances, so a dead decode
side is seen as a broken stream, and a rebound one simply opens its own. Blocks are pulled by the
other side; nothing here copies bytes.
"""

from __future__ import annotations

import asyncio
import collections
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence

import grpc
import grpc.aio

from baton.core.clock import Clock
from baton.core.errors import Code
from baton.core.request import TokenOutput
from baton.engine.events import PrefillProgress
from kvpool.leases import LeaseTable
from kvpool.transport import Endpoint
from prefill_worker.handoff import Handoff, Key, PeerStream, PrefillCounters, endpoint_record
from prefill_worker.spill import Spill
from protos.baton.internal.v1 import instance_pb2
from protos.convert import output_to_record

logger = logging.getLogger(__name__)

_ORPHAN_LEASE_S = 2.0
"""What is left of a lease when the decode side's stream breaks: time to reconnect."""
_EARLY_WANT_S = 10.0
"""How long a ``Want`` may be ahead of the submission it asks for."""
_MAX_REMEMBERED_ENDS = 4096


class PrefillWorker:
    """Publishes chunks, holds blocks under leases, lets go when told to.

    Args:
        instance_id, incarnation: who we are, for the welcome message.
        endpoints: where our cache can be pulled from, in order of preference.
        lease_s: how long blocks are held for a decode side that says nothing.
        release: tells the engine that a held sequence's blocks are free.
        free: tells it that they are free, while the handoff goes on without them.
        spill: the way to the host tier, where there is one.
        short_of_blocks: whether others wait for the blocks that handoffs hold.
        spill_after_s: how long a decode side may take before that matters.
    """

    def __init__(
        self,
        *,
        instance_id: str,
        incarnation: Callable[[], int],
        endpoints: Sequence[Endpoint],
        lease_s: float,
        clock: Clock,
        release: Callable[[str], None],
        free: Callable[[str], None] = lambda request_id: None,
        spill: Spill | None = None,
        short_of_blocks: Callable[[], bool] = lambda: False,
        spill_after_s: float = 1.0,
    ) -> None:
        self._instance_id = instance_id
        self._incarnation = incarnation
        self._endpoints = tuple(endpoints)
        self._lease_s = lease_s
        self._clock = clock
        self._release = release
        self._free = free
        self._spill = spill
        self._short_of_blocks = short_of_blocks
        self._spill_after_s = spill_after_s
        self._spill_at: dict[Key, float] = {}
        """Handoffs that wait for their decode side, and when that becomes too long."""
        self._handoffs: dict[str, Handoff] = {}
        self._leases = LeaseTable()
        self._early_wants: dict[Key, tuple[PeerStream, float]] = {}
        self._ended: collections.OrderedDict[Key, bool] = collections.OrderedDict()
        """Whether nothing was left to do for the decode side either."""
        self._spilling: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._stopped = False
        self.counters = PrefillCounters()

    @property
    def num_leases(self) -> int:
        """Handoffs whose blocks are held for a decode side."""
        return len(self._leases)

    # Called by the instance.

    def open(self, request_id: str, attempt: int) -> None:
        """A ``Part.PREFILL`` submission was accepted by the engine."""
        handoff = Handoff((request_id, attempt))
        self._handoffs[request_id] = handoff
        early = self._early_wants.pop(handoff.key, None)
        if early is not None:
            handoff.peer = early[0]

    def on_progress(self, event: PrefillProgress) -> None:
        """A chunk's blocks are complete."""
        handoff = self._handoffs.get(event.request_id)
        if handoff is None:
            return
        sent = handoff.num_sent
        known = (handoff.blocks[:sent], handoff.generations[:sent])
        if (event.blocks[:sent], event.generations[:sent]) != known:
            # Preempted meanwhile, it started again in other blocks.
            handoff.num_sent = 0
        handoff.blocks = event.blocks
        handoff.generations = event.generations
        handoff.num_computed_tokens = event.num_computed_tokens
        if event.final:
            handoff.final = True
            lease_s = min(_ORPHAN_LEASE_S, self._lease_s) if handoff.orphaned else self._lease_s
            self._leases.grant(handoff.key, self._clock.now(), lease_s)
            if self._spill is not None:
                self._spill_at[handoff.key] = self._clock.now() + self._spill_after_s
            self._arm_timer()
        else:
            self._publish(handoff)

    def on_first_output(self, request_id: str, output: TokenOutput) -> None:
        """Token 0 was drawn; it travels with the last chunk."""
        handoff = self._handoffs.get(request_id)
        if handoff is not None:
            handoff.first_output = output
            if handoff.abandoned:
                self._let_go(handoff)
            else:
                self._publish(handoff)

    def close(self, request_id: str, *, code: str, message: str, finished: bool = False) -> None:
        """The request ended here (at token 0, by abort, by failure): tell who waits for it.

        ``finished``: it ended for the decode side too, which has nothing to recompute.
        """
        handoff = self._handoffs.pop(request_id, None)
        if handoff is None:
            return
        self._forget(handoff)
        self._remember_end(handoff.key, finished=finished)
        if handoff.peer is not None:
            self._send_failed(handoff.peer, handoff.key, code, message, finished=finished)

    def stop(self) -> None:
        """Set no timer any more; the engine frees what is held."""
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # Called by the wire.

    async def serve(
        self, messages: AsyncIterator[instance_pb2.HandoffMessage]
    ) -> AsyncGenerator[instance_pb2.HandoffEvent, None]:
        """One decode side's stream, from its first message to its end."""
        peer = PeerStream("")
        reader = asyncio.ensure_future(self._read(peer, messages))
        try:
            yield instance_pb2.HandoffEvent(welcome=self._welcome())
            while (event := await peer.queue.get()) is not None:
                yield event
        finally:
            reader.cancel()
            self._forget_peer(peer)

    def _welcome(self) -> instance_pb2.HandoffWelcome:
        return instance_pb2.HandoffWelcome(
            instance_id=self._instance_id,
            incarnation=self._incarnation(),
            endpoints=[endpoint_record(item) for item in self._endpoints],
        )

    async def _read(
        self, peer: PeerStream, messages: AsyncIterator[instance_pb2.HandoffMessage]
    ) -> None:
        try:
            async for message in messages:
                kind = message.WhichOneof("what")
                if kind == "hello":
                    peer.instance_id = message.hello.instance_id
                elif kind == "want":
                    self._want(peer, (message.want.request_id, message.want.attempt))
                elif kind == "done":
                    done = message.done
                    self._done((done.request_id, done.attempt), ok=done.ok)
        except (grpc.RpcError, grpc.aio.BaseError) as error:
            logger.info("handoff stream of %s broke: %s", peer.instance_id, error)
        except Exception:  # a bug: the stream ends, and the decode side recomputes
            logger.exception("handoff stream of %s", peer.instance_id)
        finally:
            peer.queue.put_nowait(None)

    def _want(self, peer: PeerStream, key: Key) -> None:
        handoff = self._handoffs.get(key[0])
        if handoff is None or handoff.key != key:
            newer = handoff is not None and handoff.key[1] > key[1]
            if newer or key in self._ended:
                self._send_failed(
                    peer,
                    key,
                    Code.ABORTED,
                    f"{key[0]} has ended on the prefill side",
                    finished=self._ended.get(key, False),
                )
            else:
                # A repeated want does not move the limit: it would never be reached.
                _, deadline = self._early_wants.get(key, (peer, self._clock.now() + _EARLY_WANT_S))
                self._early_wants[key] = (peer, deadline)
                self._arm_timer()
            return
        if key in self._leases:
            self._leases.renew(key, self._clock.now(), self._lease_s)
            if handoff.spilled is not None and self._spill is not None:
                self._spill.renew(handoff.spilled)
        if handoff.peer is not peer:
            handoff.peer = peer
            handoff.orphaned = handoff.abandoned = False
            handoff.num_sent = 0
            self._publish(handoff)

    def _done(self, key: Key, *, ok: bool) -> None:
        self._early_wants.pop(key, None)
        handoff = self._handoffs.get(key[0])
        if handoff is None or handoff.key != key:
            return
        if not handoff.complete:
            # The decode side gave up early (it recomputes, or its request is over). Prefill goes
            # on, because the client waits for token 0; the blocks go when that is drawn.
            handoff.peer = None
            handoff.abandoned = True
            return
        if ok:
            self.counters.num_handed_off += 1
        else:
            self.counters.num_refused_by_peer += 1
        self._let_go(handoff)

    def _let_go(self, handoff: Handoff) -> None:
        self._handoffs.pop(handoff.key[0], None)
        self._forget(handoff)
        self._remember_end(handoff.key, finished=False)
        self._release(handoff.key[0])

    def _forget(self, handoff: Handoff) -> None:
        self._leases.release(handoff.key)
        self._spill_at.pop(handoff.key, None)
        if handoff.spilled is not None and self._spill is not None:
            self._spill.drop(handoff.spilled.tickets)

    def _forget_peer(self, peer: PeerStream) -> None:
        now = self._clock.now()
        for key in [key for key, (who, _) in self._early_wants.items() if who is peer]:
            del self._early_wants[key]
        for handoff in self._handoffs.values():
            if handoff.peer is peer:
                handoff.peer = None
                handoff.orphaned = True
                if self._leases.release(handoff.key):
                    self._leases.grant(handoff.key, now, min(_ORPHAN_LEASE_S, self._lease_s))
        self._arm_timer()

    def _publish(self, handoff: Handoff) -> None:
        peer = handoff.peer
        if peer is None or (handoff.final and handoff.first_output is None):
            return
        if handoff.num_sent == len(handoff.blocks) and not handoff.complete:
            return
        first = handoff.num_sent
        chunk = instance_pb2.ChunkReady(
            request_id=handoff.key[0],
            attempt=handoff.key[1],
            first_block=first,
            blocks=handoff.blocks[first:],
            generations=handoff.generations[first:],
            num_computed_tokens=handoff.num_computed_tokens,
            final=handoff.complete,
        )
        if handoff.spilled is not None:
            chunk.endpoints.extend(map(endpoint_record, handoff.spilled.endpoints))
        if handoff.first_output is not None:
            chunk.first_output.CopyFrom(output_to_record(handoff.first_output))
        handoff.num_sent = len(handoff.blocks)
        peer.queue.put_nowait(instance_pb2.HandoffEvent(chunk=chunk))

    def _send_failed(
        self, peer: PeerStream, key: Key, code: str, message: str, *, finished: bool = False
    ) -> None:
        failed = instance_pb2.HandoffFailed(
            request_id=key[0], attempt=key[1], code=code, message=message, finished=finished
        )
        peer.queue.put_nowait(instance_pb2.HandoffEvent(failed=failed))

    def _remember_end(self, key: Key, *, finished: bool) -> None:
        self._ended[key] = finished
        while len(self._ended) > _MAX_REMEMBERED_ENDS:
            self._ended.popitem(last=False)

    # Time limits: one timer, armed to the earliest deadline.

    def _arm_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._stopped:
            return
        deadlines = [deadline for _, deadline in self._early_wants.values()]
        deadlines += self._spill_at.values()
        next_lease = self._leases.next_deadline()
        if next_lease is not None:
            deadlines.append(next_lease)
        if deadlines:
            delay_s = max(0.0, min(deadlines) - self._clock.now())
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._on_timer)

    def _on_timer(self) -> None:
        now = self._clock.now()
        for key in [key for key, (_, deadline) in self._early_wants.items() if deadline <= now]:
            peer, _ = self._early_wants.pop(key)
            self._send_failed(peer, key, Code.UNAVAILABLE, f"{key[0]} was never submitted here")
        for key in [key for key, at in self._spill_at.items() if at <= now]:
            self._spill_at[key] = now + self._spill_after_s
            self._consider_spill(key)
        for key in self._leases.expired(now):
            self._leases.release(key)
            handoff = self._handoffs.get(key[0])
            if handoff is not None and handoff.key == key:
                logger.warning("lease of %s ended unclaimed; its blocks are released", key[0])
                self.counters.num_expired_leases += 1
                if handoff.peer is not None:
                    self._send_failed(handoff.peer, key, Code.ABORTED, "its lease ended")
                self._let_go(handoff)
        self._arm_timer()

    # A decode side without room.

    def _consider_spill(self, key: Key) -> None:
        handoff = self._handoffs.get(key[0])
        if handoff is None or handoff.key != key:
            self._spill_at.pop(key, None)
        elif handoff.complete and not handoff.spilling and self._short_of_blocks():
            handoff.spilling = True
            task = asyncio.ensure_future(self._spill_handoff(handoff))
            self._spilling.add(task)
            task.add_done_callback(self._spilling.discard)

    async def _spill_handoff(self, handoff: Handoff) -> None:
        """Move its blocks, say where they are now, and free them here."""
        assert self._spill is not None
        try:
            spilled = await self._spill.store(handoff.blocks, handoff.generations)
        finally:
            handoff.spilling = False
        if spilled is None:
            return
        if self._handoffs.get(handoff.key[0]) is not handoff:
            self._spill.drop(spilled.tickets)
            return
        self._spill_at.pop(handoff.key, None)
        handoff.spilled = spilled
        handoff.blocks, handoff.generations = spilled.slots, spilled.generations
        handoff.num_sent = 0
        self._publish(handoff)
        self.counters.num_spilled += 1
        self._free(handoff.key[0])
