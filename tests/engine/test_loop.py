"""The loop between engine and runner: overlap, failures, idleness, the end."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Sequence

import pytest

from baton.core.clock import SystemClock
from baton.core.config import EngineConfig
from baton.core.request import Part, SamplingParams, Submission
from baton.engine.engine import Engine
from baton.engine.events import Event, TokensReady
from baton.engine.group import EngineGroup
from baton.engine.loop import EngineLoop
from baton.engine.plan import GroupPlan, GroupResult, StepPlan, StepResult
from tests.engine.simulated_runner import SimulatedGroupRunner, SimulatedRunner, generate

WAIT_S = 10.0
MAX_MODEL_LEN = 100


class GatedRunner(SimulatedRunner):
    """Each step waits for the gate; some raise after they ran."""

    def __init__(self) -> None:
        super().__init__(4)
        self.gate = threading.Event()
        self.gate.set()
        self.fails: set[int] = set()
        self.started: list[int] = []
        self.threads: set[str] = set()
        self.num_closed = 0

    def execute(self, plan: StepPlan) -> StepResult:
        self.started.append(plan.step)
        self.threads.add(threading.current_thread().name)
        if not self.gate.wait(WAIT_S):
            raise TimeoutError("the test never opened the gate")
        result = super().execute(plan)
        if plan.step in self.fails:
            raise RuntimeError(f"scripted: step {plan.step}")
        return result

    def close(self) -> None:
        self.num_closed += 1


class CountingEngine(Engine):
    """Counts how often it was asked for a plan."""

    num_schedules = 0

    def schedule(self, now: float) -> StepPlan | None:
        self.num_schedules += 1
        return super().schedule(now)


class Bench:
    def __init__(self, *, overlap: bool = True) -> None:
        config = EngineConfig(
            block_size=4,
            num_blocks=64,
            max_num_seqs=4,
            max_num_batched_tokens=8,
            async_scheduling=overlap,
        )
        self.engine = CountingEngine(config, max_model_len=MAX_MODEL_LEN, salt=b"")
        self.runner = GatedRunner()
        self.events: list[Event] = []
        self.failed: list[tuple[tuple[str, ...], BaseException]] = []
        self.loop = EngineLoop(
            self.engine,
            self.runner,
            clock=SystemClock(),
            on_events=self.events.extend,
            on_failed=self._on_failed,
            max_in_flight=2 if overlap else 1,
        )

    def _on_failed(self, request_ids: Sequence[str], error: BaseException) -> None:
        self.failed.append((tuple(request_ids), error))

    def submit(self, name: str, num_prompt_tokens: int = 6, max_tokens: int = 5) -> Submission:
        seed = sum(name.encode())
        sampling = SamplingParams(max_tokens=max_tokens, seed=seed)
        prompt = tuple((seed + i) % 23 for i in range(num_prompt_tokens))
        submission = Submission(name, 0, prompt, sampling)
        self.engine.submit(submission, Part.WHOLE, 0.0)
        self.loop.wake()
        return submission

    def closed(self) -> bool:
        assert self.runner.num_closed <= 1
        return self.runner.num_closed == 1

    def tokens(self, name: str) -> list[int]:
        mine = [e for e in self.events if isinstance(e, TokensReady) and e.request_id == name]
        return [token for event in mine for token in event.token_ids]

    async def ended(self, *submissions: Submission) -> None:
        await until(lambda: not self.engine.request_ids())
        for one in submissions:
            assert self.tokens(one.request_id) == generate(one, MAX_MODEL_LEN)[0]
        await until(lambda: not self.loop._in_flight)
        self.engine.check_integrity()
        assert self.engine.block_statistics().num_referenced == 0


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0.002)


@contextlib.asynccontextmanager
async def running(bench: Bench) -> AsyncIterator[Bench]:
    task = asyncio.create_task(bench.loop.run())
    try:
        yield bench
    finally:
        bench.runner.gate.set()
        await asyncio.wait_for(bench.loop.stop(), WAIT_S)
        await asyncio.wait_for(task, WAIT_S)
    assert bench.closed()


@pytest.mark.parametrize("overlap", [True, False])
async def test_a_plan_is_made_while_one_runs(overlap: bool) -> None:
    async with running(Bench(overlap=overlap)) as bench:
        bench.runner.gate.clear()
        one = bench.submit("a", num_prompt_tokens=20)
        await until(lambda: bench.runner.started == [0])
        await until(lambda: len(bench.loop._in_flight) == (2 if overlap else 1))
        plans = [plan.step for plan, _ in bench.loop._in_flight]
        assert plans == ([0, 1] if overlap else [0])
        assert bench.runner.started == [0], "the runner takes one step at a time"
        bench.runner.gate.set()
        await bench.ended(one)
        assert bench.runner.threads == {"runner_0"}
        assert bench.loop.counters.num_steps == len(bench.runner.started)
        assert bench.loop.counters.num_tokens >= 24


async def test_an_idle_loop_sleeps() -> None:
    async with running(Bench()) as bench:
        await asyncio.sleep(0.02)
        asked = bench.engine.num_schedules
        await asyncio.sleep(0.3)
        assert bench.engine.num_schedules == asked
        one = bench.submit("a")
        await bench.ended(one)
        asked = bench.engine.num_schedules
        await asyncio.sleep(0.3)
        assert bench.engine.num_schedules == asked
        # A few times per step, and no more: nothing spins while a step runs either.
        assert asked <= 3 * len(bench.runner.started) + 4
        assert bench.loop.counters.num_steps == len(bench.runner.started)


async def test_a_loop_that_waits_for_a_step_sleeps() -> None:
    async with running(Bench()) as bench:
        bench.runner.gate.clear()
        one = bench.submit("a")
        await until(lambda: bool(bench.runner.started))
        await asyncio.sleep(0.02)
        asked = bench.engine.num_schedules
        await asyncio.sleep(0.2)
        assert bench.engine.num_schedules == asked
        bench.runner.gate.set()
        await bench.ended(one)


async def test_a_step_that_raises_loses_its_requests_only() -> None:
    async with running(Bench()) as bench:
        bench.runner.gate.clear()
        bench.runner.fails = {0}
        bench.submit("lost", num_prompt_tokens=30)
        await until(lambda: len(bench.loop._in_flight) == 2)
        kept = [bench.submit(name) for name in ("b", "c")]
        bench.runner.gate.set()
        await bench.ended(*kept)
        [(names, error)] = bench.failed
        assert names == ("lost",)
        assert "scripted" in str(error)
        assert not bench.tokens("lost")
        assert bench.loop.counters.num_failed_steps == 1
        again = bench.submit("lost", num_prompt_tokens=30)
        await bench.ended(again)


async def test_every_step_raises() -> None:
    async with running(Bench()) as bench:
        bench.runner.fails = set(range(100))
        for name in "abc":
            bench.submit(name)
        await bench.ended()
        assert sorted(name for names, _ in bench.failed for name in names) == list("abc")


async def test_a_runner_that_only_raises_ends_the_loop() -> None:
    """The instance is its owner's to restart; one that fails fast would draw all the load."""
    bench = Bench()
    bench.runner.fails = set(range(100))
    task = asyncio.create_task(bench.loop.run())
    for number in range(20):
        if task.done():
            break
        bench.submit(f"r{number}")
        await asyncio.wait([task], timeout=0.1)
    with pytest.raises(RuntimeError, match="in a row"):
        await asyncio.wait_for(task, WAIT_S)
    await bench.loop.stop()
    assert bench.loop.counters.num_failed_steps == 5


@pytest.mark.parametrize("overlap", [True, False])
async def test_stop_while_a_step_runs(overlap: bool) -> None:
    bench = Bench(overlap=overlap)
    task = asyncio.create_task(bench.loop.run())
    bench.runner.gate.clear()
    bench.submit("a", num_prompt_tokens=30)
    await until(lambda: len(bench.loop._in_flight) == (2 if overlap else 1))
    stop = asyncio.create_task(bench.loop.stop())
    await asyncio.sleep(0.05)
    assert not stop.done(), "the running step may still use the device"
    assert not bench.closed()
    bench.runner.gate.set()
    await asyncio.wait_for(stop, WAIT_S)
    await asyncio.wait_for(task, WAIT_S)
    assert bench.runner.started == [0], "the step behind it was dropped"
    assert bench.closed()
    # The plan that never ran is accounted for: its request ended with it.
    assert [names for names, _ in bench.failed] == ([("a",)] if overlap else [])
    for name in bench.engine.request_ids():
        bench.engine.abort(name)
    bench.engine.check_integrity()
    assert bench.engine.block_statistics().num_referenced == 0


async def test_stop_before_run() -> None:
    bench = Bench()
    await asyncio.wait_for(bench.loop.stop(), WAIT_S)
    assert bench.closed()


async def test_stop_does_not_wait_for_a_step_that_never_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("baton.engine.loop._STOP_TIMEOUT_S", 0.1)
    bench = Bench()
    task = asyncio.create_task(bench.loop.run())
    bench.runner.gate.clear()
    bench.submit("a")
    await until(lambda: bool(bench.runner.started))
    await asyncio.wait_for(bench.loop.stop(), 2.0)
    assert not bench.closed(), "it is in use"
    bench.runner.gate.set()
    await asyncio.wait_for(task, WAIT_S)


async def test_a_listener_that_raises_ends_the_loop_loudly() -> None:
    bench = Bench()

    def broken(events: Sequence[Event]) -> None:
        raise ZeroDivisionError

    bench.loop._on_events = broken
    task = asyncio.create_task(bench.loop.run())
    bench.submit("a")
    with pytest.raises(ZeroDivisionError):
        await asyncio.wait_for(task, WAIT_S)
    await asyncio.wait_for(bench.loop.stop(), WAIT_S)
    assert bench.closed()


class FailingGroupRunner(SimulatedGroupRunner):
    """Some steps raise after they ran; remembers which groups had a plan."""

    def __init__(self, dp: int, num_blocks: int, block_size: int) -> None:
        super().__init__(dp, num_blocks, block_size)
        self.fails: set[int] = set()
        self.busy: list[tuple[bool, ...]] = []

    def execute(self, plan: GroupPlan) -> GroupResult:
        self.busy.append(tuple(own is not None for own in plan.plans))
        result = super().execute(plan)
        if plan.step in self.fails:
            raise RuntimeError(f"scripted: step {plan.step}")
        return result


@pytest.mark.parametrize("overlap", [True, False])
async def test_a_loop_over_groups(overlap: bool) -> None:
    config = EngineConfig(
        block_size=4,
        num_blocks=32,
        max_num_seqs=4,
        max_num_batched_tokens=8,
        async_scheduling=overlap,
        dp=2,
    )
    engine = EngineGroup(config, max_model_len=MAX_MODEL_LEN, salt=b"")
    runner = FailingGroupRunner(2, 32, 4)
    runner.fails = {0}
    events: list[Event] = []
    failed: list[str] = []
    loop = EngineLoop(
        engine,
        runner,
        clock=SystemClock(),
        on_events=events.extend,
        on_failed=lambda names, _: failed.extend(names),
        max_in_flight=2 if overlap else 1,
    )

    def submit(name: str, num_prompt_tokens: int, max_tokens: int) -> Submission:
        seed = sum(name.encode())
        prompt = tuple((seed + i) % 23 for i in range(num_prompt_tokens))
        one = Submission(name, 0, prompt, SamplingParams(max_tokens=max_tokens, seed=seed))
        engine.submit(one, Part.WHOLE, 0.0)
        loop.wake()
        return one

    task = asyncio.create_task(loop.run())
    try:
        submit("lost", 20, 5)
        await until(lambda: failed == ["lost"])
        kept = [submit("a", 6, 30), submit("b", 9, 3), submit("c", 5, 4)]
        assert {engine.group_of(one.request_id) for one in kept} == {0, 1}
        await until(lambda: not engine.request_ids() and not loop._in_flight)
        for one in kept:
            ready = [e for e in events if isinstance(e, TokensReady)]
            mine = [t for e in ready if e.request_id == one.request_id for t in e.token_ids]
            assert mine == generate(one, MAX_MODEL_LEN)[0]
    finally:
        await asyncio.wait_for(loop.stop(), WAIT_S)
        await asyncio.wait_for(task, WAIT_S)
    engine.check_integrity()
    assert engine.block_statistics().num_referenced == 0
    assert {(True, True), (True, False)} <= set(runner.busy), "together, and one idle"
    assert loop.counters.num_failed_steps == 1
    assert loop.counters.num_steps == engine.load().num_steps
