"""An engine with its simulated runner, driven step by step."""

from __future__ import annotations

import dataclasses
from typing import Any

from baton.core.config import EngineConfig
from baton.core.request import SamplingParams, Submission
from baton.engine.engine import Engine
from baton.engine.events import Event, Reserved, TokensReady
from baton.engine.plan import StepPlan
from tests.engine.simulated_runner import SimulatedRunner

CONFIG = EngineConfig(
    block_size=4, num_blocks=32, max_num_seqs=4, max_num_batched_tokens=8, async_scheduling=False
)
ASYNC = dataclasses.replace(CONFIG, async_scheduling=True)


class Bench:
    """An engine with its simulated runner."""

    def __init__(self, config: EngineConfig = CONFIG, *, max_model_len: int = 100) -> None:
        self.engine = Engine(config, max_model_len=max_model_len, salt=b"salt")
        self.runner = SimulatedRunner(config.block_size)

    def plan(self) -> StepPlan:
        plan = self.engine.schedule(0.0)
        assert plan is not None
        return plan

    def finish(self, plan: StepPlan) -> list[Event]:
        events = self.engine.commit(plan, self.runner.execute(plan), 0.0)
        self.engine.check_integrity()
        return events

    def step(self) -> list[Event]:
        return self.finish(self.plan())

    def run(self) -> list[Event]:
        """Until nothing is left to do."""
        events: list[Event] = []
        while (plan := self.engine.schedule(0.0)) is not None:
            events += self.finish(plan)
        return events

    def num_held(self) -> int:
        return self.engine.block_statistics().num_referenced


def submission(
    name: str = "a", prompt: range | tuple[int, ...] = range(10), **changes: Any
) -> Submission:
    sampling = SamplingParams(temperature=0.0, max_tokens=5)
    values = {"attempt": 0, "sampling": sampling, **changes}
    return Submission(request_id=name, prompt_ids=tuple(prompt), **values)


def tokens(events: list[Event], name: str = "a") -> list[int]:
    ready = [e for e in events if isinstance(e, TokensReady) and e.request_id == name]
    return [token for event in ready for token in event.token_ids]


def reserve(bench: Bench) -> Reserved:
    (event,) = bench.engine.admit(0.0)
    assert isinstance(event, Reserved)
    return event
