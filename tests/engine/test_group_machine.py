"""Groups of engines under any order of events: no wrong token, no lost block, everything ends.

Whole, prefill and decode parts go to one ``EngineGroup``; the other side of a handoff is played by
the arena: it reads what is published there, and writes what a pull would bring.
"""

from __future__ import annotations

import dataclasses
from collections import deque

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from baton.core.config import EngineConfig
from baton.core.request import Part, SamplingParams, Submission
from baton.engine.events import (
    CacheChanged,
    Event,
    Preempted,
    PrefillProgress,
    Reserved,
    TokensReady,
)
from baton.engine.group import EngineGroup
from baton.engine.plan import GroupPlan, GroupResult
from baton.engine.states import SequenceState
from tests.engine.expected import Expected
from tests.engine.simulated_runner import SimulatedGroupRunner, generate

MAX_MODEL_LEN = 24
WAITS_FOR_KV = (SequenceState.PENDING_BLOCKS, SequenceState.PENDING_KV)

configs = st.builds(
    lambda dp, blocks, seqs, budget, asynchronous, cache: EngineConfig(
        dp=dp,
        block_size=2,
        num_blocks=blocks,
        max_num_seqs=seqs,
        max_num_batched_tokens=seqs + budget,
        async_scheduling=asynchronous,
        enable_prefix_cache=cache,
    ),
    dp=st.integers(2, 3),
    blocks=st.integers(5, 12),
    seqs=st.integers(1, 3),
    budget=st.integers(0, 6),
    asynchronous=st.booleans(),
    cache=st.booleans(),
)


class GroupMachine(RuleBasedStateMachine):
    @initialize(config=configs)
    def build(self, config: EngineConfig) -> None:
        self.config = config
        self.generations = np.zeros(config.dp * config.kv_blocks, dtype=np.uint64)
        self.engine = EngineGroup(
            config, max_model_len=MAX_MODEL_LEN, salt=b"salt", generations=self.generations
        )
        self.runner = SimulatedGroupRunner(config.dp, config.kv_blocks, config.block_size)
        self.planned: deque[GroupPlan] = deque()
        self.executed: deque[tuple[GroupPlan, GroupResult]] = deque()
        self.expected: dict[str, Expected] = {}
        self.reserved: dict[str, Reserved] = {}
        self.count = 0

    # Submissions.

    @rule(
        part=st.sampled_from(Part),
        stem=st.integers(0, 2),
        stem_tokens=st.integers(0, 9),
        own=st.lists(st.integers(0, 1), max_size=3),
        outputs=st.integers(0, 2),
        more=st.integers(1, 8),
        greedy=st.booleans(),
        stops=st.booleans(),
        logprobs=st.sampled_from([None, None, 0]),
        priority=st.integers(0, 1),
    )
    def submit(
        self,
        part: Part,
        stem: int,
        stem_tokens: int,
        own: list[int],
        outputs: int,
        more: int,
        greedy: bool,
        stops: bool,
        logprobs: int | None,
        priority: int,
    ) -> None:
        self.count += 1
        submission = Submission(
            request_id=f"r{self.count}",
            attempt=0,
            prompt_ids=(stem, *range(1, stem_tokens + 1), *own),
            sampling=SamplingParams(
                temperature=0.0 if greedy else 1.0,
                seed=stem * 2**40 + 5,
                max_tokens=outputs + more,
                stop_token_ids=(3, 11) if stops else (),
                prompt_logprobs=logprobs,
            ),
            choice=self.count % 2,
            priority=priority,
        )
        limit = self.engine.max_model_len
        if submission.num_tokens >= limit:
            return
        before, _, _ = generate(submission, limit)
        kept = tuple(before[: min(outputs, len(before) - 1)])
        submission = dataclasses.replace(submission, output_ids=kept)
        if submission.num_tokens >= limit:
            return
        expected = Expected.of(submission, part, limit)
        if part is Part.DECODE and len(expected.tokens) == len(kept) + 1:
            return  # it ends at the token that prefill draws
        self.expected[submission.request_id] = expected
        before_submit = self.engine.block_statistics()
        self.engine.submit(submission, part, 0.0)
        assert self.engine.block_statistics() == before_submit
        assert self.engine.group_of(submission.request_id) in range(self.config.dp)

    # Steps.

    @rule()
    def admit(self) -> None:
        self._take_in(self.engine.admit(0.0))

    @rule()
    def schedule(self) -> None:
        outstanding = len(self.planned) + len(self.executed)
        plan = self.engine.schedule(0.0)
        if plan is None:
            return
        assert outstanding < (2 if self.config.async_scheduling else 1)
        assert len(plan.plans) == self.config.dp
        for own in plan.plans:
            if own is not None:
                assert own.num_tokens <= self.config.max_num_batched_tokens
                blocks = {block for row in own.rows for block in row.block_table}
                assert blocks <= set(range(self.config.kv_blocks))
        self.planned.append(plan)

    @rule(decline=st.integers(0, 5))
    def execute(self, decline: int) -> None:
        if self.planned:
            plan = self.planned.popleft()
            for runner in self.runner.runners:
                runner.declines = lambda: decline == 0
            self.executed.append((plan, self.runner.execute(plan)))

    @rule()
    def commit(self) -> None:
        if self.executed:
            plan, result = self.executed.popleft()
            self._take_in(self.engine.commit(plan, result, 0.0))

    @rule(cycles=st.integers(1, 6))
    def run(self, cycles: int) -> None:
        """As a driver does, with a plan made while another runs where that is allowed."""
        for _ in range(cycles):
            self.admit()
            self.schedule()
            self.schedule()
            self.execute(decline=1)
            self.commit()

    @rule(chance=st.integers(0, 7))
    def fail(self, chance: int) -> None:
        if chance or not self.executed:
            return
        plan, _ = self.executed.popleft()
        dropped = self.engine.fail_plan(plan)
        assert len(set(dropped)) == len(dropped)
        for request_id in dropped:
            del self.expected[request_id]
            assert self.engine.state_of(request_id) is None

    # Ends and handoffs.

    @rule(which=st.integers(0, 20))
    def abort(self, which: int) -> None:
        known = self.engine.request_ids()
        if which < len(known):
            assert self.engine.abort(known[which])
            assert self.engine.group_of(known[which]) is None
            assert not self.engine.abort(known[which])
            del self.expected[known[which]]

    @rule(which=st.integers(0, 9))
    def release(self, which: int) -> None:
        held = self._in_state(SequenceState.HELD)
        if which < len(held):
            assert self.engine.release(held[which])
            assert not self.engine.release(held[which])

    @rule(which=st.integers(0, 9), fails=st.booleans(), knows_first=st.booleans())
    def pull(self, which: int, fails: bool, knows_first: bool) -> None:
        waiting = self._in_state(*WAITS_FOR_KV)
        if which < len(waiting):
            self._pull(waiting[which], fails, knows_first)

    def _pull(self, request_id: str, fails: bool, knows_first: bool) -> None:
        """Bring all KV, or half of it and then nothing more."""
        reserved = self.reserved.get(request_id)
        expected = self.expected[request_id]
        submission = expected.submission
        first_token = expected.tokens[len(submission.output_ids)]
        history = (*submission.prompt_ids, *submission.output_ids)
        num_pulled = 0
        if reserved is not None:
            num_pulled = len(history) // 2 if fails else len(history)
            for position in range(reserved.num_cached_tokens, num_pulled):
                self.runner.write(reserved.blocks, position, history[position])
            assert self.runner.read(reserved.blocks, num_pulled) == list(history[:num_pulled])
            if not fails:
                assert self.engine.kv_arrived(request_id, first_token)
                assert not self.engine.kv_arrived(request_id, first_token)
                return
        elif not fails:
            return
        if not knows_first:
            expected.next_index -= 1
            expected.owes_prompt_logprobs = True
        known = first_token if knows_first else None
        assert self.engine.kv_failed(request_id, num_pulled, known)
        assert not self.engine.kv_failed(request_id, 0, None)

    def _in_state(self, *states: SequenceState) -> list[str]:
        engine = self.engine
        return [name for name in engine.request_ids() if engine.state_of(name) in states]

    def _take_in(self, events: list[Event]) -> None:
        size = self.config.kv_blocks
        for event in events:
            assert not isinstance(event, CacheChanged), "nobody asked for these"
            expected = self.expected.get(event.request_id)
            assert expected is not None, f"{event} of a sequence that has ended"
            submission = expected.submission
            history = [*submission.prompt_ids, *submission.output_ids]
            if isinstance(event, TokensReady):
                expected.check(event)
            elif isinstance(event, Reserved | PrefillProgress):
                group = self.engine.group_of(event.request_id)
                assert group is not None
                assert {block // size for block in event.blocks} <= {group}
                if isinstance(event, Reserved):
                    num_there = event.num_cached_tokens
                    self.reserved[event.request_id] = event
                else:
                    num_there = event.num_computed_tokens
                    current = self.generations[list(event.blocks)].tolist()
                    assert list(event.generations) == current
                if num_there:
                    assert self.runner.read(event.blocks, num_there) == history[:num_there]
            else:
                assert isinstance(event, Preempted)

    @invariant()
    def accounts_agree(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.engine.check_integrity()
        load, blocks = self.engine.load(), self.engine.block_statistics()
        total = self.config.dp * self.config.kv_blocks
        assert blocks.num_blocks == total
        assert load.num_free_blocks + load.num_cached_blocks == total - blocks.num_referenced
        if not self.engine.request_ids() and not self.planned and not self.executed:
            assert blocks.num_referenced == 0

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for _ in range(4000):
            if not self.engine.request_ids():
                break
            self.run(cycles=1)
            for request_id in self._in_state(SequenceState.HELD):
                self.engine.release(request_id)
            for request_id in self._in_state(*WAITS_FOR_KV):
                if request_id in self.reserved:
                    self._pull(request_id, fails=False, knows_first=True)
        while self.planned or self.executed:
            self.execute(decline=1)
            self.commit()
        self.admit()
        assert self.engine.request_ids() == []
        assert self.engine.schedule(0.0) is None
        assert all(expected.done for expected in self.expected.values())
        self.engine.check_integrity()
        assert self.engine.block_statistics().num_referenced == 0


GroupMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
TestGroupMachine = GroupMachine.TestCase
