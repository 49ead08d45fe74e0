"""Engines of a state machine's test, their sizes, and what is under way between them."""

from __future__ import annotations

import dataclasses
from collections import deque

import numpy as np
from hypothesis import strategies as st

from baton.core.config import EngineConfig
from baton.core.cost_model import CostModel, LinkCosts, StepCosts
from baton.core.request import Submission
from baton.engine.engine import Engine
from baton.engine.events import PrefillProgress, Reserved
from baton.engine.plan import StepPlan, StepResult
from tests.engine.expected import Expected
from tests.engine.simulated_runner import SimulatedRunner

MAX_MODEL_LEN = 24
SALT = b"salt"
COSTS = CostModel(
    prefill=StepCosts(0.01, 0.001, 0.0),
    decode=StepCosts(0.005, 0.001, 0.0001),
    handoff=LinkCosts(0.0, 1.0),
    kv_bytes_per_token=1.0,
)
"""With which a target for TPOT of 0.02 s bears a few decodes."""

configs = st.builds(
    lambda size, blocks, seqs, budget, asynchronous, cache: EngineConfig(
        block_size=size,
        num_blocks=blocks,
        max_num_seqs=seqs,
        max_num_batched_tokens=seqs + budget,
        async_scheduling=asynchronous,
        enable_prefix_cache=cache,
    ),
    size=st.just(2),
    blocks=st.integers(5, 14),
    seqs=st.integers(1, 4),
    budget=st.integers(0, 6),
    asynchronous=st.booleans(),
    cache=st.booleans(),
)


@dataclasses.dataclass(eq=False)
class Handoff:
    submission: Submission
    progress: PrefillProgress | None = None
    first_token: int | None = None
    reserved: Reserved | None = None
    num_copied: int = 0


class Node:
    """An engine, its runner, and what is under way between them."""

    def __init__(self, config: EngineConfig) -> None:
        self.generations = np.zeros(config.kv_blocks, dtype=np.uint64)
        self.engine = Engine(
            config,
            max_model_len=MAX_MODEL_LEN,
            salt=SALT,
            generations=self.generations,
            track_cache=True,
        )
        self.told: set[bytes] = set()
        """Keys that the engine told of as cached."""
        self.config = config
        self.runner = SimulatedRunner(config.block_size)
        self.planned: deque[StepPlan] = deque()
        self.executed: deque[tuple[StepPlan, StepResult]] = deque()
        self.expected: dict[str, Expected] = {}
