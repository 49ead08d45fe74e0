"""The decode side against prefill sides that misbehave: it recomputes, and never waits for good."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import grpc.aio
import pytest

from baton.core.cluster import Target
from baton.core.config import HandoffConfig
from baton.core.request import Part
from kvpool.arena import BlockArena
from kvpool.transports.faulty import Fault
from kvpool.transports.loopback import LoopbackTransport
from protos.baton.internal.v1 import instance_pb2
from tests.instance.instance_kit import (
    BLOCK_SIZE,
    CONFIG,
    Client,
    Node,
    pair,
    plain,
    request,
    running,
    until,
)

Script = Callable[["ScriptedPeer"], AsyncIterator[instance_pb2.HandoffEvent]]


class ScriptedPeer:
    """Speaks a prefill instance's half of the handoff as a test wants it."""

    def __init__(self, script: Script) -> None:
        self._script = script
        self._server = grpc.aio.server()
        self.target = Target("p", 1, "")
        self.messages: list[instance_pb2.HandoffMessage] = []
        self.wanted = asyncio.Event()
        self.num_streams = 0
        self.cache = BlockArena.private(CONFIG.kv_blocks, BLOCK_SIZE * 4, "toy")
        self.cache.generations[:] = 1
        self._transport = LoopbackTransport()
        exported = self._transport.export(self.cache)
        self.endpoint = instance_pb2.EndpointRecord(
            transport=exported.transport,
            address=exported.address,
            token=exported.token,
            layout=exported.layout,
        )

    async def start(self) -> ScriptedPeer:
        handler = grpc.stream_stream_rpc_method_handler(
            self._handoff,
            request_deserializer=instance_pb2.HandoffMessage.FromString,
            response_serializer=instance_pb2.HandoffEvent.SerializeToString,
        )
        methods = grpc.method_handlers_generic_handler(
            "baton.internal.v1.Instance", {"Handoff": handler}
        )
        self._server.add_generic_rpc_handlers((methods,))
        port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        self.target = Target("p", 1, f"127.0.0.1:{port}")
        return self

    async def stop(self) -> None:
        await self._server.stop(None)
        self._transport.close()

    async def _handoff(
        self, request_iterator: AsyncIterator[instance_pb2.HandoffMessage], context: Any
    ) -> AsyncIterator[instance_pb2.HandoffEvent]:
        self.num_streams += 1
        reader = asyncio.create_task(self._read(request_iterator))
        try:
            async for event in self._script(self):
                yield event
        finally:
            reader.cancel()

    async def _read(self, messages: AsyncIterator[instance_pb2.HandoffMessage]) -> None:
        async for message in messages:
            self.messages.append(message)
            if message.HasField("want"):
                self.wanted.set()

    def done(self) -> list[tuple[str, int, bool]]:
        return [
            (m.done.request_id, m.done.attempt, m.done.ok)
            for m in self.messages
            if m.HasField("done")
        ]


def welcome(
    peer: ScriptedPeer, incarnation: int = 1, *, reachable: bool = True
) -> instance_pb2.HandoffEvent:
    """With a cache whose bytes can be pulled, but are no request's."""
    endpoints = [peer.endpoint] if reachable else []
    return instance_pb2.HandoffEvent(
        welcome=instance_pb2.HandoffWelcome(
            instance_id="p", incarnation=incarnation, endpoints=endpoints
        )
    )


def chunk(first: int, count: int, **values: Any) -> instance_pb2.HandoffEvent:
    record = instance_pb2.ChunkReady(
        request_id="r@0",
        attempt=values.pop("attempt", 0),
        first_block=first,
        blocks=range(first, first + count),
        generations=[1] * count,
        **values,
    )
    return instance_pb2.HandoffEvent(chunk=record)


def first_output() -> instance_pb2.TokenRecord:
    return instance_pb2.TokenRecord(request_id="r", index=0, token_ids=plain(request())[0][:1])


async def forever() -> None:
    await asyncio.Event().wait()


async def ends_at_once(peer: ScriptedPeer) -> AsyncIterator[instance_pb2.HandoffEvent]:
    for _ in ():
        yield welcome(peer)


async def never_welcomes(peer: ScriptedPeer) -> AsyncIterator[instance_pb2.HandoffEvent]:
    await forever()
    yield welcome(peer)


async def another_life(peer: ScriptedPeer) -> AsyncIterator[instance_pb2.HandoffEvent]:
    yield welcome(peer, incarnation=2)
    await forever()


async def no_welcome_first(peer: ScriptedPeer) -> AsyncIterator[instance_pb2.HandoffEvent]:
    await peer.wanted.wait()
    yield chunk(0, 2)
    await forever()


async def breaks_later(peer: ScriptedPeer) -> AsyncIterator[instance_pb2.HandoffEvent]:
    yield welcome(peer)
    await peer.wanted.wait()


async def raises(peer: ScriptedPeer) -> AsyncIterator[instance_pb2.HandoffEvent]:
    yield welcome(peer)
    await peer.wanted.wait()
    raise RuntimeError("a bug of the peer")


async def leaves_a_hole(peer: ScriptedPeer) -> AsyncIterator[instance_pb2.HandoffEvent]:
    yield welcome(peer)
    await peer.wanted.wait()
    yield chunk(2, 6, final=True, first_output=first_output())
    await forever()


async def too_many_blocks(peer: ScriptedPeer) -> AsyncIterator[instance_pb2.HandoffEvent]:
    yield welcome(peer)
    await peer.wanted.wait()
    yield chunk(0, 9, final=True, first_output=first_output())
    await forever()


async def too_few_blocks(peer: ScriptedPeer) -> AsyncIterator[instance_pb2.HandoffEvent]:
    yield welcome(peer)
    await peer.wanted.wait()
    yield chunk(0, 5, final=True, first_output=first_output())
    await forever()


async def unreachable_blocks(peer: ScriptedPeer) -> AsyncIterator[instance_pb2.HandoffEvent]:
    """Its welcome offers no endpoint."""
    yield welcome(peer, reachable=False)
    await peer.wanted.wait()
    yield chunk(0, 5)
    yield chunk(5, 1, final=True, first_output=first_output())
    await forever()


async def says_failed(peer: ScriptedPeer) -> AsyncIterator[instance_pb2.HandoffEvent]:
    yield welcome(peer)
    await peer.wanted.wait()
    for attempt in (1, 0, 0):
        failed = instance_pb2.HandoffFailed(request_id="r@0", attempt=attempt, code="aborted")
        yield instance_pb2.HandoffEvent(failed=failed)
    yield chunk(0, 6, attempt=1, final=True, first_output=first_output())
    yield chunk(0, 6, final=True, first_output=first_output())
    await forever()


async def hand_over(client: Client, peer: ScriptedPeer, decode: Node) -> None:
    fake: Any = peer
    assert not (await client.submit(request(), Part.DECODE, decode, fake)).HasField("error")


SCRIPTS: list[Script] = [
    ends_at_once,
    never_welcomes,
    another_life,
    no_welcome_first,
    breaks_later,
    raises,
    leaves_a_hole,
    too_many_blocks,
    too_few_blocks,
    unreachable_blocks,
    says_failed,
]


@pytest.mark.parametrize("script", SCRIPTS)
async def test_what_a_prefill_side_may_do_wrong(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("decode_worker.peer._WELCOME_TIMEOUT_S", 0.3)
    decode = Node("d")
    async with running(decode) as client:
        before = len(asyncio.all_tasks())
        peer = await ScriptedPeer(script).start()
        await hand_over(client, peer, decode)
        await client.check(request())
        await decode.idle()
        assert decode.parts.decode.counters.num_recomputed == 1
        await peer.stop()
        await until(lambda: not decode.parts.decode._peers)
        # Neither the stream nor the task that writes to it stays behind.
        await until(lambda: len(asyncio.all_tasks()) <= before)


async def test_nobody_there() -> None:
    decode = Node("d")
    async with running(decode) as client:
        peer = await ScriptedPeer(ends_at_once).start()
        await peer.stop()
        await hand_over(client, peer, decode)
        await client.check(request())


async def test_an_early_end_is_told_to_the_prefill_side_once() -> None:
    async def waits(peer: ScriptedPeer) -> AsyncIterator[instance_pb2.HandoffEvent]:
        yield welcome(peer)
        await forever()

    decode = Node("d")
    async with running(decode) as client:
        peer = await ScriptedPeer(waits).start()
        await hand_over(client, peer, decode)
        await asyncio.wait_for(peer.wanted.wait(), 5)
        await client.abort("r", 0, decode)
        await client.abort("r", 0, decode)
        await until(lambda: bool(peer.done()))
        assert peer.done() == [("r@0", 0, False)]
        assert peer.messages[0].hello.instance_id == "d"
        assert peer.messages[0].hello.kv_layout == "toy"
        await decode.idle()
        await peer.stop()


async def test_wants_are_repeated_while_blocks_are_waited_for() -> None:
    async def waits(peer: ScriptedPeer) -> AsyncIterator[instance_pb2.HandoffEvent]:
        yield welcome(peer)
        await forever()

    decode = Node("d", handoff=HandoffConfig(lease_s=0.15, pull_timeout_s=1.0))
    async with running(decode) as client:
        peer = await ScriptedPeer(waits).start()
        await hand_over(client, peer, decode)
        await until(lambda: sum(m.HasField("want") for m in peer.messages) >= 4)
        await client.abort("r", 0, decode)
        count = len(peer.messages)
        await asyncio.sleep(0.2)
        assert sum(m.HasField("want") for m in peer.messages[count:]) == 0
        [link] = decode.parts.decode._peers.values()
        assert link._renewer is None, "nothing is wanted: nothing ticks"
        await peer.stop()


async def test_a_stalled_peer_does_not_stall_another() -> None:
    handoff = HandoffConfig(lease_s=20.0, pull_timeout_s=1.5)
    stalled, decode = pair(script=[Fault.STALL] * 6, handoff=handoff)
    healthy = Node("q")
    async with running(stalled, healthy, decode) as client:
        for i in range(6):
            await client.hand_over(request(f"stuck{i}"), stalled, decode)
        await until(lambda: len(decode.parts.decode._running) >= 6)
        script = decode.transports._transports[0]
        script._script.clear()  # type: ignore[attr-defined]
        await client.hand_over(request("well"), healthy, decode)
        await client.check(request("well"))
        assert decode.parts.decode.num_pulls_open == 6
        for i in range(6):
            await client.check(request(f"stuck{i}"))
        await stalled.idle()


async def test_pulls_that_have_not_begun_end_with_the_line() -> None:
    handoff = HandoffConfig(lease_s=20.0, pull_timeout_s=0.5)
    prefill, decode = pair(script=[Fault.STALL] * 8, handoff=handoff)
    async with running(prefill, decode) as client:
        for i in range(8):
            await client.hand_over(request(f"r{i}"), prefill, decode)
        await until(lambda: decode.parts.decode.num_pulls_open == 8)
        await until(lambda: len(decode.parts.decode._running) == 8)
        await prefill.kill()
        await until(lambda: len(decode.parts.decode._running) <= 2)
        for i in range(8):
            await client.check(request(f"r{i}"))


async def test_a_line_to_a_newer_life_survives_a_late_submission_for_the_older() -> None:
    old = Node("p", incarnation=1)
    new, decode = Node("p", incarnation=2), Node("d")
    async with running(new, decode) as client:
        await old.start()
        new.runner.gate.clear()
        current = request("current")
        await client.hand_over(current, new, decode)
        await until(lambda: bool(new.parts.prefill._handoffs))
        await client.submit(request("late"), Part.DECODE, decode, old)
        assert [key[1] for key in decode.parts.decode._peers] == [2, 1]
        await client.abort("late", 0, decode)
        new.runner.gate.set()
        await client.check(current)
        assert decode.parts.decode.counters.num_handoffs == 1
        await old.stop()


async def test_a_newer_life_ends_the_line_to_the_older() -> None:
    old = await Node("p", incarnation=1).start()
    new, decode = Node("p", incarnation=2), Node("d")
    async with running(new, decode) as client:
        waiting = request("waiting")
        await client.submit(waiting, Part.DECODE, decode, old)
        await client.hand_over(request("current"), new, decode)
        await client.check(request("current"))
        await client.check(waiting)
        assert [key[1] for key in decode.parts.decode._peers] == [2]
    await old.stop()
