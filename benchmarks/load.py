"""The open loop: send each request when it is due, whatever became of the ones before."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Sequence

from benchmarks.outcome import Outcome, Sender
from benchmarks.workload import Item, Prompt

LEAD_S = 0.05
"""Requests are all due this much later, so that the first is not late by the preparations."""


@dataclasses.dataclass(frozen=True, slots=True)
class LoadResult:
    """Outcomes in the order of the items, and what the client itself cost."""

    outcomes: list[Outcome]
    start_s: float
    end_s: float
    client_cpu_s: float

    @property
    def duration_s(self) -> float:
        """From when the first request was due to the end of the last."""
        return self.end_s - self.start_s


async def run_load(
    items: Sequence[Item],
    make: Callable[[int, Item], Prompt],
    sender: Sender,
    *,
    timeout_s: float,
    concurrency: int | None = None,
    on_change: Callable[[Outcome, bool], None] | None = None,
) -> LoadResult:
    """Send ``items``; at most ``concurrency`` at a time if that is given (then a closed loop).

    ``make(index, item)`` makes the prompt, shortly before it is due.

    ``on_change(outcome, ended)`` is called when a request is sent and when it has ended. Every
    request ends within ``timeout_s`` of being sent. Cancelling this cancels all requests.
    """
    gate = asyncio.Semaphore(concurrency) if concurrency else None
    outcomes: list[Outcome] = []
    cpu_s = time.process_time()
    start_s = time.perf_counter() + LEAD_S

    async def one(index: int, item: Item, outcome: Outcome) -> None:
        prompt = make(index, item)
        outcome.num_prompt_tokens = item.input_len if isinstance(prompt, str) else len(prompt)
        await asyncio.sleep(max(0.0, outcome.due_s - time.perf_counter()))
        outcome.sent_s = time.perf_counter()
        outcome.arrival_s = outcome.due_s if gate is None else outcome.sent_s
        if on_change is not None:
            on_change(outcome, False)
        try:
            async with asyncio.timeout(timeout_s):
                await sender.send(prompt, outcome)
        except TimeoutError:
            outcome.fail("timeout", f"not finished after {timeout_s} s")
        finally:
            outcome.end_s = time.perf_counter()
            if on_change is not None:
                on_change(outcome, True)
            if gate is not None:
                gate.release()

    async with asyncio.TaskGroup() as group:
        for index, item in enumerate(items):
            due_s = start_s + item.at_s
            outcome = Outcome(due_s, due_s, due_s, item.input_len, item.output_len)
            outcome.service_class = item.service_class
            outcomes.append(outcome)
            # Wake early to make the prompt, which takes a moment, before it is due.
            await asyncio.sleep(max(0.0, due_s - LEAD_S - time.perf_counter()))
            if gate is not None:
                await gate.acquire()
            group.create_task(one(index, item, outcome))
    end_s = max((o.end_s for o in outcomes if o.end_s is not None), default=start_s)
    return LoadResult(outcomes, start_s, end_s, time.process_time() - cpu_s)
