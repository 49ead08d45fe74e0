"""Runs the engine: plan on the event loop, compute on one thread, one plan ahead.

::

    submit/abort/... ──wake()──► admit → schedule ──plan n+1──► runner thread (n runs, n+1 waits)
                                    ▲                                │
                                    └────── commit(n) ◄──result n────┘

The engine object is only ever touched on the event loop; the runner only on its thread. While
plan n runs, plan n+1 is made and queued behind it, so the device does not wait for the host.
Nothing here polls: an idle loop sleeps on one event.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any, Generic

from baton.core.clock import Clock
from baton.core.errors import Aborted, Stage
from baton.engine.events import Event
from baton.engine.interface import AnyPlan, AnyResult, StepEngine
from baton.engine.plan import Runner, shape_of
from baton.engine.step_samples import StepSamples

logger = logging.getLogger(__name__)

_STOP_TIMEOUT_S = 5.0


_MAX_FAILURES_IN_A_ROW = 5
"""Then the runner is broken, not a step: the instance must start anew."""


@dataclasses.dataclass(slots=True)
class StepCounters:
    """Totals since the start, for metrics."""

    num_steps: int = 0
    num_tokens: int = 0
    num_failed_steps: int = 0
    execute_s: float = 0.0
    host_s: float = 0.0
    """Time spent in schedule and commit."""


class EngineLoop(Generic[AnyPlan, AnyResult]):
    """Drives one engine (or group of engines) on one runner of its kind until ``stop``.

    Args:
        engine: decides; used only on the event loop that calls :meth:`run`.
        runner: computes; used only on this object's thread.
        clock: for ``now``.
        on_events: called after each commit or admission that produced events, on the loop.
        on_failed: called with the requests that a failed step took down, on the loop.
    """

    def __init__(
        self,
        engine: StepEngine[AnyPlan, AnyResult],
        runner: Runner[AnyPlan, AnyResult],
        *,
        clock: Clock,
        on_events: Callable[[Sequence[Event]], None],
        on_failed: Callable[[Sequence[str], BaseException], None],
        max_in_flight: int,
    ) -> None:
        self._engine: StepEngine[AnyPlan, AnyResult] = engine
        self._runner: Runner[AnyPlan, AnyResult] = runner
        self._clock = clock
        self._on_events = on_events
        self._on_failed = on_failed
        self._max_in_flight = max_in_flight
        self._wake = asyncio.Event()
        self._stopping = False
        self._failures_in_a_row = 0
        self._running: asyncio.Task[None] | None = None
        self._in_flight: collections.deque[tuple[AnyPlan, asyncio.Future[AnyResult]]]
        self._in_flight = collections.deque()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="runner")
        self.counters = StepCounters()
        self.samples = StepSamples()
        """Of the steps since somebody last took them."""

    @property
    def runner(self) -> Runner[AnyPlan, AnyResult]:
        """For metrics: what it computes is this loop's."""
        return self._runner

    def wake(self) -> None:
        """Tell the loop that the engine's state changed. Cheap; call on the event loop."""
        self._wake.set()

    async def run(self) -> None:
        """Step until :meth:`stop`. Failed steps are reported; raises after several in a row."""
        self._running = asyncio.current_task()
        while not self._stopping:
            self._wake.clear()
            self._commit_done()
            while len(self._in_flight) < self._max_in_flight:
                plan = self._plan()
                if plan is None:
                    break
                self._launch(plan)
            await self._wake.wait()
        while self._in_flight:
            await asyncio.wait([self._in_flight[0][1]])
            self._commit_done()

    def _plan(self) -> AnyPlan | None:
        started = self._clock.now()
        events = self._engine.admit(started)
        if events:
            self._on_events(events)
        plan = self._engine.schedule(started)
        self.counters.host_s += self._clock.now() - started
        return plan

    def _launch(self, plan: AnyPlan) -> None:
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(self._thread, self._runner.execute, plan)
        future.add_done_callback(lambda _: self.wake())
        self._in_flight.append((plan, future))

    def _commit_done(self) -> None:
        while self._in_flight and self._in_flight[0][1].done():
            plan, future = self._in_flight.popleft()
            error: BaseException | None
            if future.cancelled():  # it waited behind the step during which the loop was stopped
                error = Aborted("the engine stopped", stage=Stage.CONTROL)
                self._on_failed(self._engine.fail_plan(plan), error)
            elif (error := future.exception()) is None:
                self._commit(plan, future.result())
            else:
                # Whatever the runner raised: this step is lost, not the process.
                self.counters.num_failed_steps += 1
                logger.error("step %d failed", plan.step, exc_info=error)
                self._on_failed(self._engine.fail_plan(plan), error)
                self._failures_in_a_row += 1
                if self._failures_in_a_row >= _MAX_FAILURES_IN_A_ROW:
                    # Idle, because it fails fast, it would draw ever more requests.
                    raise RuntimeError(
                        f"{self._failures_in_a_row} steps failed in a row"
                    ) from error

    def _commit(self, plan: AnyPlan, result: AnyResult) -> None:
        self._failures_in_a_row = 0
        started = self._clock.now()
        events = self._engine.commit(plan, result, started)
        counters = self.counters
        counters.num_steps += 1
        counters.num_tokens += plan.num_tokens
        counters.execute_s += result.seconds
        self.samples.add(shape_of(plan), result.seconds)
        if events:
            self._on_events(events)
        counters.host_s += self._clock.now() - started

    async def stop(self) -> None:
        """Let the running step end, drop the one behind it, release the thread and the runner.

        A step that does not end is left alone after a while: then only the end of the process
        helps, and that must not wait for it.
        """
        self._stopping = True
        self.wake()
        self._thread.shutdown(wait=False, cancel_futures=True)
        waited: list[asyncio.Future[Any]] = [future for _, future in self._in_flight]
        if self._running is not None:
            waited.append(self._running)
        if waited and (await asyncio.wait(waited, timeout=_STOP_TIMEOUT_S))[1]:
            logger.error("the runner's step does not end; it is left behind")
        else:
            await asyncio.get_running_loop().run_in_executor(None, self._release)

    def _release(self) -> None:
        self._thread.shutdown(wait=True)
        self._runner.close()
