"""The contract between the scheduler, which decides, and the runner, which computes.

``Engine.schedule(now) -> StepPlan`` (pure) → ``Runner.execute(plan) -> StepResult`` (device) →
``Engine.commit(plan, result, now) -> [Event]`` (pure). One plan may be uncommitted while the next
is made, so a plan never needs the previous plan's tokens on the host: a row with
``token_ids=None`` takes the token that the runner last sampled for its slot.

A *slot* is a small integer that names a sequence inside the runner, from ``SlotBegin`` until
another ``SlotBegin`` takes the same number. The runner keeps per slot what sampling needs: the
parameters, token counts for penalties, and the last sampled token.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol, TypeVar

from baton.core.cost_model import StepShape, chunk_context
from baton.core.request import SamplingParams, TokenLogprobs


@dataclasses.dataclass(frozen=True, slots=True)
class SlotBegin:
    """A sequence takes a slot (also again, after a preemption or a handoff)."""

    slot: int
    sampling: SamplingParams
    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]
    """Output tokens known so far; they count for the penalties."""


@dataclasses.dataclass(frozen=True, slots=True)
class SequenceStep:
    """One sequence's row in a step."""

    slot: int
    start: int
    """Position of the first token computed here: tokens [0, start) are in the cache."""
    token_ids: tuple[int, ...] | None
    """Input tokens at [start, start + n); ``None``: one, the last one sampled for the slot."""
    block_table: tuple[int, ...]
    """Block numbers that cover positions [0, start + num_tokens)."""
    sample: bool
    """Draw a token after the last input token (a decode step, or a prompt's last chunk)."""
    uniform: float = 0.0
    """Philox draw for this row in [0, 1); unused for greedy rows."""
    prompt_logprobs: bool = False
    """Report logprobs of the tokens at positions (start, start + n] that are prompt tokens.

    Row i of the result is the distribution after position start + i, i.e. of prompt token
    start + i + 1; the last prompt position of the prompt yields no row.
    """

    @property
    def num_tokens(self) -> int:
        """Input tokens of this row."""
        return 1 if self.token_ids is None else len(self.token_ids)


@dataclasses.dataclass(frozen=True, slots=True)
class StepPlan:
    """Everything the runner must know about one step. ``rows`` is never empty."""

    step: int
    begins: tuple[SlotBegin, ...]
    rows: tuple[SequenceStep, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens computed in this step."""
        return sum(row.num_tokens for row in self.rows)


@dataclasses.dataclass(frozen=True, slots=True)
class RowResult:
    """What came back for one row, in the order of ``StepPlan.rows``."""

    token_id: int | None
    """``None`` where the row did not sample."""
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class StepResult:
    """The outcome of a plan."""

    step: int
    rows: tuple[RowResult, ...]
    seconds: float
    """Time in ``execute``."""


@dataclasses.dataclass(frozen=True, slots=True)
class GroupPlan:
    """One step of an engine with several dp groups: a plan for each, in order of dp rank.

    Block and slot numbers are each group's own. A group without a plan takes part idle.
    """

    step: int
    plans: tuple[StepPlan | None, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens computed in this step, by all groups."""
        return sum(plan.num_tokens for plan in self.plans if plan is not None)


@dataclasses.dataclass(frozen=True, slots=True)
class GroupResult:
    """The outcome of a group plan: ``None`` for groups without a plan."""

    step: int
    results: tuple[StepResult | None, ...]
    seconds: float
    """Time in ``execute``."""


def shape_of(plan: StepPlan | GroupPlan) -> StepShape:
    """What the time of a plan depends on; of several dp groups, all that they compute together.

    A row of one token that is sampled from is a decode: it costs what a decode does, also where it
    is what was left of a prompt.
    """
    plans = (plan,) if isinstance(plan, StepPlan) else plan.plans
    num_prefill_tokens = prefill_context = num_decodes = decode_context = 0
    for own in plans:
        for row in () if own is None else own.rows:
            num_tokens = row.num_tokens
            if num_tokens == 1 and row.sample and row.start:
                num_decodes += 1
                decode_context += row.start
            else:
                num_prefill_tokens += num_tokens
                prefill_context += chunk_context(row.start, num_tokens)
    return StepShape(num_prefill_tokens, prefill_context, num_decodes, decode_context)


PlanT = TypeVar("PlanT", StepPlan, GroupPlan, contravariant=True)
ResultT = TypeVar("ResultT", StepResult, GroupResult, covariant=True)


class Runner(Protocol[PlanT, ResultT]):
    """Computes plans. Called from one thread, in the order of ``plan.step``."""

    def execute(self, plan: PlanT) -> ResultT:
        """Run the model on all rows, write their KV, sample where asked."""

    def close(self) -> None:
        """Release the device. Idempotent."""
