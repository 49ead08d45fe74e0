"""Handoffs in which something fails: tokens of one plain instance, all counted, nothing left."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import grpc.aio
import pytest

from baton.core.cluster import Role, Target
from baton.core.config import HandoffConfig
from baton.core.request import Part, Submission
from kvpool.transport import TransferFault, Transport
from kvpool.transports import make_transports
from kvpool.transports.faulty import Fault, FaultyTransport
from kvpool.transports.loopback import LoopbackTransport
from kvpool.transports.tcp import TcpTransport
from protos.baton.internal.v1 import instance_pb2, instance_pb2_grpc
from protos.serving import channel_options, server_options
from tests.instance.instance_kit import Client, Node, pair, request, running, until

COUNTED = {
    Fault.FAIL: TransferFault.GONE,
    Fault.SHORT: TransferFault.SHORT,
    Fault.CORRUPT: TransferFault.CORRUPT,
    Fault.STALE: TransferFault.STALE,
    Fault.STALL: TransferFault.LATE,
}
LONG = 40
"""Tokens of a prompt that is computed in three chunks."""


def test_every_fault_is_known_here() -> None:
    assert set(COUNTED) == set(Fault) - {Fault.NONE}


async def in_chunks(client: Client, one: Submission, prefill: Node, decode: Node, via: Any) -> None:
    """Hand over, with the decode side asking before anything is computed."""
    assert not (await client.submit(one, Part.DECODE, decode, via)).HasField("error")
    await until(lambda: bool(prefill.parts.prefill._early_wants))
    assert not (await client.submit(one, Part.PREFILL, prefill)).HasField("error")


@pytest.mark.parametrize("fault", COUNTED)
@pytest.mark.parametrize("at", [0, 1])
async def test_a_pull_that_fails_is_recomputed(fault: Fault, at: int) -> None:
    """At the second pull, if there is one: chunks that come together are pulled together."""
    script = [Fault.NONE] * at + [fault]
    prefill, decode = pair(script=script, handoff=HandoffConfig(lease_s=20.0, pull_timeout_s=0.2))
    async with running(prefill, decode) as client:
        one = request(num_prompt_tokens=LONG)
        await in_chunks(client, one, prefill, decode, prefill)
        await client.check(one)
        await prefill.idle()
        await decode.idle()
        counters = decode.parts.decode.counters
        assert counters.num_recomputed + counters.num_handoffs == 1
        assert counters.num_recomputed == 1 or at == 1
        failed = {("loopback", COUNTED[fault]): 1} if counters.num_recomputed else {}
        assert decode.transports.faults == failed
        again = request("again")
        await client.hand_over(again, prefill, decode)
        await client.check(again)


@pytest.mark.parametrize("fault", [Fault.FAIL, Fault.SHORT, Fault.CORRUPT])
async def test_what_another_transport_mends_is_counted_and_nothing_recomputed(fault: Fault) -> None:
    broken: list[Transport] = [FaultyTransport(LoopbackTransport(), [fault])]
    prefill = Node("p", Role.PREFILL, transports=make_transports(["loopback", "tcp"], "127.0.0.1"))
    decode = Node("d", Role.DECODE, transports=[*broken, TcpTransport()])
    async with running(prefill, decode) as client:
        one = request(num_prompt_tokens=LONG)
        await client.hand_over(one, prefill, decode)
        await client.check(one)
        await prefill.idle()
        await decode.idle()
        counters = decode.parts.decode.counters
        assert (counters.num_handoffs, counters.num_recomputed) == (1, 0)
        assert set(counters.num_pulls) == {"tcp"}
        assert decode.transports.faults == {("loopback", COUNTED[fault]): 1}


@pytest.mark.parametrize("fault", [Fault.SHORT, Fault.CORRUPT, Fault.STALE])
async def test_what_half_arrived_is_wiped_before_anything_is_computed(fault: Fault) -> None:
    """It may be NaN, which a mask does not stop."""
    prefill, decode = pair(script=[fault])
    async with running(prefill, decode) as client:
        decode.runner.gate.clear()
        await client.hand_over(request(num_prompt_tokens=14), prefill, decode)
        await until(lambda: bool(decode.runner.started))
        assert decode.arena.buffer.tobytes() == bytes(len(decode.arena.buffer))
        decode.runner.gate.set()
        await client.check(request(num_prompt_tokens=14))


Events = AsyncIterator[instance_pb2.HandoffEvent]
Messages = AsyncIterator[instance_pb2.HandoffMessage]


class Relay:
    """Between a decode side and its prefill side, with other ideas of what is said when."""

    def __init__(
        self,
        prefill: Node,
        events: Callable[[Events], Events] = lambda events: events,
        messages: Callable[[Messages], Messages] = lambda messages: messages,
    ) -> None:
        self._prefill = prefill
        self._twist_events = events
        self._twist_messages = messages
        self._server = grpc.aio.server(options=server_options())
        self.target = prefill.target
        self.num_chunks = 0
        """That the prefill side published."""

    async def start(self) -> None:
        handler = grpc.stream_stream_rpc_method_handler(
            self._handoff,
            request_deserializer=instance_pb2.HandoffMessage.FromString,
            response_serializer=instance_pb2.HandoffEvent.SerializeToString,
        )
        service = {"Handoff": handler}
        name = "baton.internal.v1.Instance"
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(name, service),)
        )
        port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        real = self._prefill.target
        self.target = Target(real.instance_id, real.incarnation, f"127.0.0.1:{port}")

    async def stop(self) -> None:
        await self._server.stop(None)

    async def _handoff(self, messages: Messages, context: Any) -> Events:
        address = self._prefill.target.address
        async with grpc.aio.insecure_channel(address, options=channel_options()) as channel:
            stub: Any = instance_pb2_grpc.InstanceStub(channel)
            call = stub.Handoff(self._twist_messages(messages))
            async for event in self._twist_events(self._counted(aiter(call))):
                yield event

    async def _counted(self, events: Events) -> Events:
        async for event in events:
            self.num_chunks += event.HasField("chunk")
            yield event


@contextlib.asynccontextmanager
async def relayed(
    *,
    events: Callable[[Events], Events] = lambda events: events,
    messages: Callable[[Messages], Messages] = lambda messages: messages,
) -> AsyncIterator[tuple[Client, Node, Node, Relay]]:
    prefill, decode = pair()
    async with running(prefill, decode) as client:
        relay = Relay(prefill, events, messages)
        await relay.start()
        try:
            yield client, prefill, decode, relay
        finally:
            await relay.stop()


async def all_twice(events: Events) -> Events:
    """The welcome, too."""
    async for event in events:
        yield event
        yield event


async def again_after_the_next(events: Events) -> Events:
    """Each chunk comes once more when the one after it has been said."""
    before: instance_pb2.HandoffEvent | None = None
    async for event in events:
        yield event
        if event.HasField("chunk"):
            if before is not None:
                yield before
            before = event


async def second_first(events: Events) -> Events:
    held: instance_pb2.HandoffEvent | None = None
    swapped = False
    async for event in events:
        if event.HasField("chunk") and held is None and not swapped:
            held = event
            continue
        yield event
        if held is not None and event.HasField("chunk"):
            swapped = True
            yield held
            held = None


@pytest.mark.parametrize(
    ("twist", "recomputed"), [(all_twice, 0), (again_after_the_next, 1), (second_first, 1)]
)
async def test_chunks_that_come_twice_late_or_in_another_order(
    twist: Callable[[Events], Events], recomputed: int
) -> None:
    async with relayed(events=twist) as (client, prefill, decode, relay):
        one = request(num_prompt_tokens=LONG)
        await in_chunks(client, one, prefill, decode, relay)
        await client.check(one)
        await prefill.idle()
        await decode.idle()
        counters = decode.parts.decode.counters
        assert relay.num_chunks == 3
        assert (counters.num_recomputed, counters.num_handoffs) == (recomputed, 1 - recomputed)
        assert decode.transports.faults == {}
        again = request("again", num_prompt_tokens=LONG)
        await in_chunks(client, again, prefill, decode, relay)
        await client.check(again)


REQUESTS = (("a", 0), ("b", 0), ("b", 1), ("a", 1))
"""Names and attempts, one after the other."""


async def test_chunks_of_earlier_requests_and_attempts_do_not_count_for_later_ones() -> None:
    told: list[instance_pb2.HandoffEvent] = []

    async def old_ones_first(events: Events) -> Events:
        async for event in events:
            if event.HasField("chunk"):
                for old in [one for one in told if one.chunk.request_id != event.chunk.request_id]:
                    yield old
                told.append(event)
            yield event

    async with relayed(events=old_ones_first) as (client, prefill, decode, relay):
        for name, attempt in REQUESTS:
            one = request(name, attempt=attempt, num_prompt_tokens=LONG)
            await in_chunks(client, one, prefill, decode, relay)
            await client.check(one)
            await prefill.idle()
            await decode.idle()
        assert decode.parts.decode.counters.num_handoffs == len(REQUESTS)
        assert {event.chunk.request_id for event in told} == {f"{n}@{i}" for n, i in REQUESTS}


async def done_twice(messages: Messages) -> Messages:
    async for message in messages:
        yield message
        if message.HasField("done"):
            yield message


async def done_again_after_the_next_want(messages: Messages) -> Messages:
    done: list[instance_pb2.HandoffMessage] = []
    async for message in messages:
        yield message
        if message.HasField("done"):
            done.append(message)
        if message.HasField("want"):
            for old in done:
                yield old


@pytest.mark.parametrize("twist", [done_twice, done_again_after_the_next_want])
async def test_a_done_that_comes_twice_or_late_releases_nothing_else(
    twist: Callable[[Messages], Messages],
) -> None:
    async with relayed(messages=twist) as (client, prefill, decode, relay):
        via: Any = relay
        handoffs = prefill.parts.prefill._handoffs
        for name, attempt in REQUESTS:
            one = request(name, attempt=attempt, num_prompt_tokens=LONG)
            # The decode side asks when prefill has begun, and is not done.
            prefill.runner.gate.clear()
            assert not (await client.submit(one, Part.PREFILL, prefill)).HasField("error")
            assert not (await client.submit(one, Part.DECODE, decode, via)).HasField("error")
            await until(lambda: any(handoff.peer for handoff in handoffs.values()))
            prefill.runner.gate.set()
            await client.check(one)
            await prefill.idle()
            await decode.idle()
        count = len(REQUESTS)
        assert prefill.parts.prefill.counters.num_handed_off == count
        assert prefill.parts.prefill.counters.num_refused_by_peer == 0
        assert decode.parts.decode.counters.num_handoffs == count
