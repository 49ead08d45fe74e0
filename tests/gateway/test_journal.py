from __future__ import annotations

import dataclasses
from collections import deque
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from baton.core.errors import InvalidRequest
from baton.core.request import FinishReason, SamplingParams, TokenLogprobs, TokenOutput
from baton.gateway.journal import MAX_EARLY_OUTPUTS, Delta, Journal, LossReason
from baton.gateway.request_states import State, Transition

TRUTH = [101, 102, 103, 104, 105, 106, 107, 108]


def output(
    index: int, tokens: list[int], *, attempt: int = 0, finish: FinishReason | None = None
) -> TokenOutput:
    return TokenOutput("r-0", attempt, index, tuple(tokens), finish_reason=finish)


def placed(**sampling: Any) -> Journal:
    params = SamplingParams(max_tokens=len(TRUTH), **sampling)
    journal = Journal("r-0", (1, 2, 3), params, gap_timeout_s=20.0)
    journal.step(Transition.ENQUEUE)
    journal.place(0.0)
    return journal


class TwoInstances(RuleBasedStateMachine):
    """Prefill and decode speak in any order, twice, not at all, or not to the end."""

    def __init__(self) -> None:
        super().__init__()
        self.journal = placed()
        self.seen: list[Delta] = []
        self.now = 0.0
        self.wires: list[deque[TokenOutput]] = []

    @initialize()
    def start(self) -> None:
        self._instances_begin()

    def _instances_begin(self) -> None:
        """What both instances will say about this attempt: decode repeats the first token."""
        journal, have = self.journal, len(self.journal.token_ids)
        end = len(TRUTH) - 1
        prefill = [have]
        decode = range(have, len(TRUTH))
        self.wires += [
            deque(
                output(
                    index,
                    [TRUTH[index]],
                    attempt=journal.attempt,
                    finish=FinishReason.LENGTH if index == end else None,
                )
                for index in indices
            )
            for indices in (prefill, decode)
        ]

    def _pick(self, data: st.DataObject) -> deque[TokenOutput]:
        full = [wire for wire in self.wires if wire]
        return full[data.draw(st.integers(0, len(full) - 1))]

    def _deliver(self, item: TokenOutput) -> None:
        self.now += 0.1
        deltas, loss = self.journal.accept(item, "d", self.now)
        assert loss is None
        self.seen += deltas

    @precondition(lambda self: any(self.wires))
    @rule(data=st.data())
    def next_output(self, data: st.DataObject) -> None:
        wire = self._pick(data)
        self._deliver(wire.popleft())

    @precondition(lambda self: any(self.wires))
    @rule(data=st.data(), depth=st.integers(0, 4))
    def overtake(self, data: st.DataObject, depth: int) -> None:
        """An output arrives before older ones (they come later)."""
        wire = self._pick(data)
        item = wire[min(depth, len(wire) - 1)]
        wire.remove(item)
        self._deliver(item)

    @precondition(lambda self: any(self.wires))
    @rule(data=st.data())
    def merged(self, data: st.DataObject) -> None:
        """Two outputs in one."""
        wire = self._pick(data)
        first = wire.popleft()
        if wire and wire[0].index == first.index + 1:
            second = wire.popleft()
            tokens = first.token_ids + second.token_ids
            first = dataclasses.replace(first, token_ids=tokens, finish_reason=second.finish_reason)
        self._deliver(first)

    @precondition(lambda self: any(self.wires))
    @rule(data=st.data())
    def duplicate(self, data: st.DataObject) -> None:
        wire = self._pick(data)
        self._deliver(wire[0])

    @rule(index=st.integers(0, len(TRUTH) - 1))
    def stray(self, index: int) -> None:
        """The first attempt speaks again, at any time."""
        self._deliver(output(index, [TRUTH[index]]))

    @precondition(lambda self: not self.journal.over and self.journal.attempt < 5)
    @rule(lose_wires=st.booleans())
    def instance_dies(self, lose_wires: bool) -> None:
        """Replay; what the old attempt still had on the wire may arrive or be lost."""
        self.journal.lose()
        if lose_wires:
            self.wires = []
        end = self.journal.finish_if_complete()
        if end is not None:
            self.seen.append(end)
        else:
            self.journal.place(self.now)
            submission = self.journal.submission(None, 0.0)
            assert list(submission.output_ids) == self.journal.token_ids
            assert submission.attempt == self.journal.attempt
            self._instances_begin()

    @invariant()
    def each_token_once_and_in_order(self) -> None:
        tokens = [token for delta in self.seen for token in delta.token_ids]
        assert tokens == TRUTH[: len(tokens)] == self.journal.token_ids
        indices = [delta.index + i for delta in self.seen for i in range(len(delta.token_ids))]
        assert indices == list(range(len(indices)))
        ends = [delta for delta in self.seen if delta.finish_reason is not None]
        assert len(ends) == (self.journal.state is State.FINISHED)
        if ends:
            assert len(tokens) == len(TRUTH)
            assert self.seen[-1] is ends[0]

    def teardown(self) -> None:
        """Nothing lost any more: it ends with all tokens."""
        while any(self.wires):
            for wire in self.wires:
                if wire:
                    self._deliver(wire.popleft())
        assert self.journal.over
        assert self.journal.token_ids == TRUTH
        self.each_token_once_and_in_order()


TwoInstances.TestCase.settings = settings(max_examples=80, stateful_step_count=25, deadline=None)
TestTwoInstances = TwoInstances.TestCase


def test_a_different_token_is_a_loss() -> None:
    journal = placed()
    journal.accept(output(0, [101]), "p", 1.0)
    deltas, loss = journal.accept(output(0, [999, 102]), "d", 1.0)
    assert deltas == []
    assert loss is not None
    assert (loss.reason, loss.instance_id) == (LossReason.MISMATCH, "d")


def test_an_end_before_known_tokens_is_a_loss() -> None:
    journal = placed()
    journal.accept(output(0, [101, 102]), "d", 1.0)
    _, loss = journal.accept(output(0, [101], finish=FinishReason.STOP), "p", 1.0)
    assert loss is not None
    assert loss.reason is LossReason.MISMATCH


def test_older_and_newer_attempts_are_dropped() -> None:
    journal = placed()
    journal.lose()
    journal.place(1.0)
    for attempt in (0, 2):
        assert journal.accept(output(0, [5], attempt=attempt), "d", 2.0) == ([], None)
    assert journal.token_ids == []


@pytest.mark.parametrize(
    ("code", "retried"),
    [("transfer_failed", True), ("unavailable", True), ("fenced", True), ("aborted", True)],
)
def test_retryable_errors_are_losses(code: str, retried: bool) -> None:
    item = TokenOutput("r-0", 0, 0, (), error_code=code, error_message="broken")
    _, loss = placed().accept(item, "d", 1.0)
    assert (loss is not None) == retried


def test_other_errors_end_the_request() -> None:
    item = TokenOutput("r-0", 0, 0, (), error_code="invalid_request", error_message="broken")
    with pytest.raises(InvalidRequest, match="broken"):
        placed().accept(item, "d", 1.0)


def test_an_abort_nobody_asked_for_is_a_loss() -> None:
    _, loss = placed().accept(output(0, [], finish=FinishReason.ABORT), "d", 1.0)
    assert loss is not None
    assert loss.reason is LossReason.ERROR


def test_a_hole_stays_open_for_a_bounded_time() -> None:
    journal = placed()
    journal.accept(output(0, [101]), "p", 1.0)
    journal.accept(output(2, [103]), "d", 2.0)
    assert journal.gap_due_s(last_heard_s=1000.0) == 22.0
    assert journal.gap(1000.0, 21.9) is None
    loss = journal.gap(1000.0, 22.0)
    assert loss is not None
    assert loss.reason is LossReason.GAP
    journal.accept(output(1, [102]), "d", 21.0)
    assert journal.token_ids == [101, 102, 103]
    assert journal.gap(1000.0, 30.0) is None


def test_waiting_in_the_queue_of_a_busy_instance_is_no_gap() -> None:
    journal = placed()
    assert journal.gap(last_heard_s=500.0, now=510.0) is None
    assert journal.gap(last_heard_s=0.0, now=20.0) is not None


def test_a_stream_may_not_stand_still_for_ever() -> None:
    journal = placed()
    journal.accept(output(0, [101]), "p", 1.0)
    assert journal.gap(last_heard_s=120.0, now=120.9) is None
    assert journal.gap(last_heard_s=120.0, now=121.0) is not None


def test_after_prefill_died_the_decode_side_has_one_gap_to_recover() -> None:
    journal = placed()
    journal.prefill_lost(5.0)
    assert journal.gap(last_heard_s=100.0, now=24.9) is None
    assert journal.gap(last_heard_s=100.0, now=25.0) is not None


def test_early_outputs_are_bounded() -> None:
    journal = placed()
    losses = [
        journal.accept(output(index, [1]), "d", 0.0)[1] for index in range(1, MAX_EARLY_OUTPUTS + 2)
    ]
    assert losses[:-1] == [None] * MAX_EARLY_OUTPUTS
    assert losses[-1] is not None


def test_lost_after_the_last_token_needs_no_replay() -> None:
    journal = placed(stop_token_ids=(105,))
    journal.accept(output(0, TRUTH[:5]), "d", 1.0)
    journal.lose()
    end = journal.finish_if_complete()
    assert end == Delta(5, (), finish_reason=FinishReason.STOP, stop_token_id=105)
    assert journal.state is State.FINISHED


def test_prompt_logprobs_come_once_and_are_not_asked_for_again() -> None:
    journal = placed(prompt_logprobs=1, logprobs=1)
    row = TokenLogprobs(2, -1.0, 1)
    both = dataclasses.replace(output(0, [101]), logprobs=(row,), prompt_logprobs=(row, row))
    (delta,), _ = journal.accept(both, "p", 1.0)
    assert delta.prompt_logprobs == (row, row)
    repeated = dataclasses.replace(both, token_ids=(101, 102), logprobs=(row, row))
    (delta,), _ = journal.accept(repeated, "d", 1.0)
    assert (delta.prompt_logprobs, delta.token_ids, delta.logprobs) == ((), (102,), (row,))
    journal.lose()
    assert journal.submission(None, 0.0).sampling.prompt_logprobs is None
    assert journal.submission(None, 0.0).sampling.logprobs == 1


def test_silence_of_a_bound_instance_counts_from_the_binding() -> None:
    journal = placed()
    journal.accept(output(0, [TRUTH[0]]), "prefill", 1.0)
    assert journal.gap_due_s(1.0) == 21.0
    journal.bound(15.0)
    assert journal.gap_due_s(1.0) == 35.0
    assert journal.state is State.STREAMING
