"""What the rest of an instance sees of its engine, with one dp group or several.

``Engine`` is one group and makes a ``StepPlan`` at a time; ``EngineGroup`` is several and makes a
``GroupPlan``. Nobody outside needs to know which it has.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar

from baton.core.blocks import BlockKey
from baton.core.cluster import InstanceLoad
from baton.core.config import EngineConfig
from baton.core.cost_model import CostModel
from baton.core.request import Part, Submission
from baton.engine.block_manager import BlockStatistics
from baton.engine.events import Event
from baton.engine.plan import GroupPlan, GroupResult, StepPlan, StepResult
from baton.engine.states import SequenceState

AnyPlan = TypeVar("AnyPlan", StepPlan, GroupPlan)
AnyResult = TypeVar("AnyResult", StepResult, GroupResult)
_TakenResult = TypeVar("_TakenResult", StepResult, GroupResult, contravariant=True)


class SequenceEngine(Protocol):
    """Sequences and their KV, without steps. ``Engine`` says what each call does.

    Block numbers in events are those of the arena.
    """

    config: EngineConfig
    max_model_len: int

    def submit(
        self,
        submission: Submission,
        part: Part,
        now: float,
        *,
        keys: Iterable[BlockKey] = (),
        fetch: bool = False,
    ) -> None:
        """Take a submission on."""

    def set_cost_model(self, model: CostModel | None) -> None:
        """How long steps take, as far as is known: chunks are sized by it."""

    def prefix_keys(self, submission: Submission) -> list[BlockKey]:
        """Keys of the leading blocks that a lookup for it may find."""

    def num_cached_blocks(self, keys: list[BlockKey]) -> int:
        """How many leading blocks of these need not be fetched."""

    def cached_keys(self) -> list[BlockKey]:
        """Keys of all cached blocks, a parent before its children."""

    def fetched(self, request_id: str, num_valid_tokens: int) -> bool:
        """The fetch of a prefix is over."""

    def abort(self, request_id: str) -> bool:
        """End a sequence in any state."""

    def release(self, request_id: str) -> bool:
        """Let go of a held prefill."""

    def admit(self, now: float) -> list[Event]:
        """Reserve blocks for decode parts."""

    def kv_arrived(self, request_id: str, first_token: int) -> bool:
        """All KV of a decode part is there."""

    def kv_failed(self, request_id: str, num_valid_tokens: int, first_token: int | None) -> bool:
        """The KV of a decode part will not come."""

    def load(self) -> InstanceLoad:
        """A snapshot of all groups together."""

    def block_statistics(self) -> BlockStatistics:
        """An account of every block of all groups."""

    def check_integrity(self) -> None:
        """Account for everything; raises AssertionError with details."""

    def request_ids(self) -> list[str]:
        """Of all sequences that have not ended."""

    def state_of(self, request_id: str) -> SequenceState | None:
        """None for a sequence that is not here, or has ended."""


class StepEngine(SequenceEngine, Protocol[AnyPlan, _TakenResult]):
    """A :class:`SequenceEngine` with its cycle: schedule, (runner), commit."""

    def schedule(self, now: float) -> AnyPlan | None:
        """The next plan, to be executed after all earlier ones; None if there is none now."""

    def commit(self, plan: AnyPlan, result: _TakenResult, now: float) -> list[Event]:
        """Take in what the runner computed for the oldest uncommitted plan."""

    def fail_plan(self, plan: AnyPlan) -> list[str]:
        """The runner raised on the oldest uncommitted plan: the request ids that go with it."""


def check_result(plan: StepPlan, result: StepResult) -> None:
    """Raises ValueError where ``result`` is not of ``plan``."""
    if result.step != plan.step or len(result.rows) != len(plan.rows):
        raise ValueError(
            f"the result of step {result.step} with {len(result.rows)} rows is not of "
            f"step {plan.step} with {len(plan.rows)} rows"
        )
