"""The prefill side of the handoff, message by message."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from baton.core.clock import SystemClock
from baton.core.errors import Code
from baton.core.request import TokenOutput
from baton.engine.events import PrefillProgress
from kvpool.transport import Endpoint
from prefill_worker.worker import PrefillWorker
from protos.baton.internal.v1 import instance_pb2

WAIT_S = 5.0
ENDPOINT = Endpoint("loopback", "here", "token", "toy")
FIRST = TokenOutput("r", 0, index=0, token_ids=(7,))
WIDE = tuple(range(10, 15))


class Side:
    """A decode side's stream to a worker."""

    def __init__(self, worker: PrefillWorker) -> None:
        self._outgoing: asyncio.Queue[instance_pb2.HandoffMessage | Exception | None]
        self._outgoing = asyncio.Queue()
        self.events = worker.serve(self._messages())

    async def _messages(self) -> AsyncIterator[instance_pb2.HandoffMessage]:
        while (message := await self._outgoing.get()) is not None:
            if isinstance(message, Exception):
                raise message
            yield message

    async def open(self) -> Side:
        welcome = await self.next("welcome")
        assert welcome.welcome.incarnation == 3
        assert [e.transport for e in welcome.welcome.endpoints] == ["loopback"]
        hello = instance_pb2.HandoffHello(instance_id="d", incarnation=1, kv_layout="toy")
        self._outgoing.put_nowait(instance_pb2.HandoffMessage(hello=hello))
        return self

    def want(self, name: str = "r", attempt: int = 0) -> None:
        want = instance_pb2.HandoffWant(request_id=name, attempt=attempt)
        self._outgoing.put_nowait(instance_pb2.HandoffMessage(want=want))

    def done(self, name: str = "r", attempt: int = 0, ok: bool = True) -> None:
        done = instance_pb2.HandoffDone(request_id=name, attempt=attempt, ok=ok)
        self._outgoing.put_nowait(instance_pb2.HandoffMessage(done=done))

    def put(self, item: Exception | None) -> None:
        self._outgoing.put_nowait(item)

    async def next(self, kind: str) -> instance_pb2.HandoffEvent:
        event = await asyncio.wait_for(anext(self.events), WAIT_S)
        assert event.WhichOneof("what") == kind, event
        return event

    async def chunk(self) -> instance_pb2.ChunkReady:
        return (await self.next("chunk")).chunk

    async def failed(self) -> instance_pb2.HandoffFailed:
        return (await self.next("failed")).failed

    async def nothing(self) -> None:
        """No event is on its way."""
        await settled()
        task = asyncio.ensure_future(anext(self.events))
        await asyncio.sleep(0.02)
        assert not task.done(), task.result()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    async def close(self) -> None:
        await self.events.aclose()


class Bench:
    def __init__(self, lease_s: float = 5.0) -> None:
        self.released: list[str] = []
        self.worker = PrefillWorker(
            instance_id="p",
            incarnation=lambda: 3,
            endpoints=[ENDPOINT],
            lease_s=lease_s,
            clock=SystemClock(),
            release=self.released.append,
        )

    async def side(self) -> Side:
        return await Side(self.worker).open()

    def progress(
        self,
        blocks: tuple[int, ...],
        *,
        generations: tuple[int, ...] | None = None,
        final: bool = False,
    ) -> None:
        generations = generations or (1,) * len(blocks)
        self.worker.on_progress(PrefillProgress("r", 4 * len(blocks), blocks, generations, final))

    def finish(self, blocks: tuple[int, ...] = WIDE) -> None:
        """The last chunk and token 0, as one step brings them."""
        self.progress(blocks, final=True)
        self.worker.on_first_output("r", FIRST)

    def empty(self) -> bool:
        worker = self.worker
        return not (worker._handoffs or worker._early_wants or worker.num_leases)


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def until_empty(bench: Bench) -> None:
    async with asyncio.timeout(WAIT_S):
        while not bench.empty():
            await asyncio.sleep(0.005)


async def test_chunks_then_token_0_then_release() -> None:
    bench = Bench()
    side = await bench.side()
    bench.worker.open("r", 0)
    side.want()
    await settled()
    bench.progress(WIDE[:2])
    bench.progress(WIDE[:2])  # a chunk that completed no further block
    bench.progress(WIDE[:4])
    bench.finish()
    chunks = [await side.chunk() for _ in range(3)]
    assert [(c.first_block, tuple(c.blocks)) for c in chunks] == [
        (0, WIDE[:2]),
        (2, WIDE[2:4]),
        (4, WIDE[4:]),
    ]
    assert [c.final for c in chunks] == [False, False, True]
    assert list(chunks[2].first_output.token_ids) == [7]
    assert bench.worker.num_leases == 1
    assert not bench.released
    side.done()
    await settled()
    side.done()  # and once more
    await until_empty(bench)
    assert bench.released == ["r"]
    assert bench.worker.counters.num_handed_off == 1
    await side.close()


async def test_a_preempted_prefill_publishes_its_other_blocks_from_the_start() -> None:
    """Also where the new blocks happen to have the generations of the old ones."""
    bench = Bench()
    side = await bench.side()
    bench.worker.open("r", 0)
    side.want()
    await settled()
    bench.progress((1, 2, 3))
    bench.progress((4, 5))
    bench.progress((4, 5, 6, 7))
    bench.finish((4, 5, 6, 7, 8))
    chunks = [await side.chunk() for _ in range(4)]
    assert [(c.first_block, tuple(c.blocks)) for c in chunks] == [
        (0, (1, 2, 3)),
        (0, (4, 5)),
        (2, (6, 7)),
        (4, (8,)),
    ]
    bench.worker.close("r", code=Code.ABORTED, message="")
    await side.close()
    assert bench.empty()


async def test_a_preempted_prefill_in_one_step_with_other_blocks_only() -> None:
    bench = Bench()
    side = await bench.side()
    bench.worker.open("r", 0)
    side.want()
    await settled()
    bench.progress((1, 2))
    bench.progress((3, 4))
    assert [tuple((await side.chunk()).blocks) for _ in range(2)] == [(1, 2), (3, 4)]
    bench.worker.close("r", code=Code.ABORTED, message="")
    await side.close()


async def test_want_before_submit() -> None:
    bench = Bench()
    side = await bench.side()
    side.want()
    await settled()
    bench.worker.open("r", 0)
    bench.finish()
    assert tuple((await side.chunk()).blocks) == WIDE
    side.done()
    await until_empty(bench)
    await side.close()


async def test_want_of_what_never_comes_fails_in_time_however_often_it_is_repeated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("prefill_worker.worker._EARLY_WANT_S", 0.3)
    bench = Bench()
    side = await bench.side()
    side.want()
    failed = asyncio.ensure_future(side.failed())
    for _ in range(40):
        await asyncio.sleep(0.02)
        if failed.done():
            break
        side.want()
    assert failed.done(), "each repetition moved the limit"
    assert (failed.result().code, failed.result().finished) == (Code.UNAVAILABLE, False)
    await side.close()
    assert bench.empty()


async def test_want_of_an_ended_attempt() -> None:
    bench = Bench()
    side = await bench.side()
    for name, finished in (("done", True), ("lost", False)):
        bench.worker.open(name, 0)
        bench.worker.close(name, code=Code.ABORTED, message="", finished=finished)
        side.want(name)
        failed = await side.failed()
        assert (failed.request_id, failed.finished) == (name, finished)
    bench.worker.open("again", 1)
    side.want("again", 0)
    assert not (await side.failed()).finished
    bench.worker.close("again", code=Code.ABORTED, message="")
    await side.close()
    assert bench.empty()


async def test_the_end_is_told_to_who_waits() -> None:
    bench = Bench()
    side = await bench.side()
    bench.worker.open("r", 0)
    side.want()
    await settled()
    bench.progress(WIDE[:1])
    bench.worker.close("r", code=Code.ABORTED, message="why", finished=True)
    bench.worker.close("r", code=Code.ABORTED, message="twice")
    await side.chunk()
    failed = await side.failed()
    assert (failed.code, failed.message, failed.finished) == (Code.ABORTED, "why", True)
    await side.nothing()
    await side.close()
    assert not bench.released


async def test_done_before_the_end_lets_go_at_token_0() -> None:
    bench = Bench()
    side = await bench.side()
    bench.worker.open("r", 0)
    side.want()
    await settled()
    bench.progress(WIDE[:2])
    await side.chunk()
    side.done(ok=False)
    await settled()
    assert not bench.released
    bench.progress(WIDE[:4])
    bench.finish()
    assert bench.released == ["r"]
    assert bench.empty()
    await side.nothing()
    await side.close()


async def test_messages_about_others_change_nothing() -> None:
    bench = Bench()
    side = await bench.side()
    bench.worker.open("r", 2)
    side.want("r", 2)
    await settled()
    side.done("r", 1)
    side.done("stranger", 0)
    bench.worker.on_progress(PrefillProgress("stranger", 4, (1,), (1,), True))
    bench.worker.on_first_output("stranger", FIRST)
    await settled()
    bench.finish()
    assert (await side.chunk()).final
    assert not bench.released
    side.done("r", 2)
    await until_empty(bench)
    await side.close()


async def test_an_unclaimed_lease_ends() -> None:
    bench = Bench(lease_s=0.1)
    bench.worker.open("r", 0)
    bench.finish()
    await until_empty(bench)
    assert bench.released == ["r"]
    assert bench.worker.counters.num_expired_leases == 1


async def test_a_lease_that_ends_is_told_to_a_silent_decode_side() -> None:
    bench = Bench(lease_s=0.1)
    side = await bench.side()
    bench.worker.open("r", 0)
    side.want()
    await settled()
    bench.finish()
    await side.chunk()
    assert not (await side.failed()).finished
    side.want()
    assert not (await side.failed()).finished
    await side.close()
    assert bench.empty()


async def test_wants_renew_the_lease() -> None:
    bench = Bench(lease_s=0.2)
    side = await bench.side()
    bench.worker.open("r", 0)
    bench.finish()
    for _ in range(10):
        side.want()
        await asyncio.sleep(0.05)
    assert not bench.released
    assert tuple((await side.chunk()).blocks) == WIDE
    await side.nothing()  # it was published once
    side.done()
    await until_empty(bench)
    await side.close()


async def test_a_broken_stream_shortens_the_lease_and_another_side_may_take_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("prefill_worker.worker._ORPHAN_LEASE_S", 0.15)
    bench = Bench(lease_s=60.0)
    first, second = await bench.side(), await bench.side()
    bench.worker.open("r", 0)
    first.want()
    await settled()
    bench.progress(WIDE[:3])
    second.want()
    await settled()
    bench.finish()
    assert tuple((await second.chunk()).blocks) == WIDE[:3]
    assert tuple((await second.chunk()).blocks) == WIDE[3:]
    await first.close()
    await asyncio.sleep(0.3)
    assert not bench.released, "it was no longer the first one's"
    await second.close()
    await until_empty(bench)
    assert bench.released == ["r"]


async def test_a_stream_that_broke_before_the_end_leaves_a_short_lease_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("prefill_worker.worker._ORPHAN_LEASE_S", 0.1)
    bench = Bench(lease_s=60.0)
    side = await bench.side()
    bench.worker.open("r", 0)
    side.want()
    await settled()
    bench.progress(WIDE[:2])
    await side.close()
    bench.finish()
    await until_empty(bench)
    assert bench.released == ["r"]


@pytest.mark.parametrize("error", [None, ValueError("nonsense")])
async def test_the_stream_ends_with_its_reader(error: Exception | None) -> None:
    bench = Bench()
    side = await bench.side()
    side.want()
    await settled()
    side.put(error)
    with pytest.raises(StopAsyncIteration):
        await asyncio.wait_for(anext(side.events), WAIT_S)
    assert bench.empty()


async def test_stop_leaves_no_timer() -> None:
    bench = Bench(lease_s=0.05)
    side = await bench.side()
    bench.worker.open("r", 0)
    side.want()
    await settled()
    bench.finish()
    bench.worker.stop()
    await side.close()
    await asyncio.sleep(0.1)
    assert bench.worker._timer is None
    assert not bench.released
