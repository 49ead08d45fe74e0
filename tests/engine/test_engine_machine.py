"""Two engines under any order of events: no wrong token, no lost block, everything ends.

Engine 0 takes prefill and whole parts, engine 1 decode and whole parts. The "KV" that a handoff
copies is the simulated runners' memory. A fetched prefix is written there by the test.
"""

from __future__ import annotations

import dataclasses
import operator

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from baton.core.config import EngineConfig
from baton.core.request import Part, SamplingParams, Submission
from baton.core.slo import Slo
from baton.engine.events import (
    CacheChanged,
    Event,
    Preempted,
    PrefillProgress,
    PrefixComplete,
    Reserved,
    TokensReady,
)
from baton.engine.states import SequenceState
from tests.engine.expected import Expected
from tests.engine.machine_nodes import COSTS, Handoff, Node, configs
from tests.engine.simulated_runner import generate


class EngineMachine(RuleBasedStateMachine):
    @initialize(first=configs, second=configs, limited=st.booleans())
    def build(self, first: EngineConfig, second: EngineConfig, limited: bool) -> None:
        self.nodes = [Node(first), Node(second)]
        for node in self.nodes:
            node.engine.set_cost_model(COSTS if limited else None)
        self.handoffs: dict[str, Handoff] = {}
        self.fetches: dict[tuple[int, str], Reserved | None] = {}
        """By node and request: whose prefix is being fetched, and the blocks for it."""
        self.count = 0

    # Submissions.

    @rule(
        kind=st.sampled_from(["whole 0", "whole 1", "handoff", "handoff"]),
        stem=st.integers(0, 2),
        stem_tokens=st.integers(0, 9),
        own=st.lists(st.integers(0, 1), max_size=3),
        outputs=st.integers(0, 2),
        more=st.integers(1, 8),
        greedy=st.booleans(),
        stops=st.booleans(),
        logprobs=st.sampled_from([None, None, None, 0]),
        priority=st.integers(-1, 1),
        rise_after_s=st.sampled_from([None, None, 0.0]),
        slo=st.sampled_from([Slo(), Slo(), Slo(0.1, 0.02)]),
        tenant=st.sampled_from(["", "", "a"]),
        fetch=st.sampled_from([False, False, True]),
    )
    def submit(
        self,
        kind: str,
        stem: int,
        stem_tokens: int,
        own: list[int],
        outputs: int,
        more: int,
        greedy: bool,
        stops: bool,
        logprobs: int | None,
        priority: int,
        rise_after_s: float | None,
        slo: Slo,
        tenant: str,
        fetch: bool,
    ) -> None:
        prompt = (stem, *range(1, stem_tokens + 1), *own)
        sampling = SamplingParams(
            temperature=0.0 if greedy else 1.0,
            seed=stem * 2**40 + 5,
            max_tokens=outputs + more,
            stop_token_ids=(3, 11) if stops else (),
            prompt_logprobs=logprobs,
        )
        self.count += 1
        submission = Submission(
            request_id=f"r{self.count}",
            attempt=0,
            prompt_ids=prompt,
            sampling=sampling,
            choice=self.count % 2,
            priority=priority,
            rise_after_s=rise_after_s,
            slo=slo,
            tenant=tenant,
        )
        limit = min(node.engine.max_model_len for node in self.nodes)
        if submission.num_tokens >= limit:
            return
        before, _, _ = generate(submission, limit)
        kept = tuple(before[: min(outputs, len(before) - 1)])
        submission = dataclasses.replace(submission, output_ids=kept)
        if submission.num_tokens >= limit:
            return
        if kind == "handoff":
            self.handoffs[submission.request_id] = Handoff(submission)
            self._enter(0, submission, Part.PREFILL, fetch=fetch)
            self._enter(1, submission, Part.DECODE)
        else:
            self._enter(int(kind[-1]), submission, Part.WHOLE, fetch=fetch)

    def _enter(
        self, index: int, submission: Submission, part: Part, *, fetch: bool = False
    ) -> None:
        node = self.nodes[index]
        limit = node.engine.max_model_len
        node.expected[submission.request_id] = Expected.of(submission, part, limit)
        # As an instance does: nobody is asked for a prefix of no blocks.
        keys = node.engine.prefix_keys(submission) if fetch else []
        if keys:
            self.fetches[index, submission.request_id] = None
        node.engine.submit(submission, part, 0.0, keys=keys, fetch=bool(keys))

    # Steps.

    @rule(index=st.integers(0, 1))
    def admit(self, index: int) -> None:
        node = self.nodes[index]
        self._take_in(node, node.engine.admit(0.0))

    @rule(index=st.integers(0, 1))
    def schedule(self, index: int) -> None:
        node = self.nodes[index]
        outstanding = len(node.planned) + len(node.executed)
        plan = node.engine.schedule(0.0)
        limit = 2 if node.config.async_scheduling else 1
        if plan is not None:
            assert outstanding < limit
            assert plan.num_tokens <= node.config.max_num_batched_tokens
            assert len(plan.rows) <= node.config.max_num_seqs
            node.planned.append(plan)

    @rule(index=st.integers(0, 1), decline=st.integers(0, 5))
    def execute(self, index: int, decline: int) -> None:
        node = self.nodes[index]
        if node.planned:
            plan = node.planned.popleft()
            node.runner.declines = lambda: decline == 0
            node.executed.append((plan, node.runner.execute(plan)))

    @rule(index=st.integers(0, 1))
    def commit(self, index: int) -> None:
        node = self.nodes[index]
        if node.executed:
            plan, result = node.executed.popleft()
            self._take_in(node, node.engine.commit(plan, result, 0.0))

    @rule(index=st.integers(0, 1), cycles=st.integers(1, 6))
    def run(self, index: int, cycles: int) -> None:
        """As a driver does, with a plan made while another runs where that is allowed."""
        for _ in range(cycles):
            self.admit(index)
            self.schedule(index)
            self.schedule(index)
            self.execute(index, decline=1)
            self.commit(index)

    @rule(index=st.integers(0, 1), chance=st.integers(0, 7))
    def fail(self, index: int, chance: int) -> None:
        node = self.nodes[index]
        if chance or not node.executed:
            return
        plan, _ = node.executed.popleft()
        for request_id in node.engine.fail_plan(plan):
            del node.expected[request_id]
            assert node.engine.state_of(request_id) is None

    # Ends and handoffs.

    @rule(index=st.integers(0, 1), which=st.integers(0, 20))
    def abort(self, index: int, which: int) -> None:
        engine = self.nodes[index].engine
        known = engine.request_ids()
        if which < len(known):
            assert engine.abort(known[which])
            assert engine.state_of(known[which]) is None
            assert not engine.abort(known[which])
            del self.nodes[index].expected[known[which]]

    @rule(which=st.integers(0, 9))
    def lease_expires(self, which: int) -> None:
        engine = self.nodes[0].engine
        held = [i for i in engine.request_ids() if engine.state_of(i) is SequenceState.HELD]
        if which < len(held):
            assert engine.release(held[which])
            assert not engine.release(held[which])

    @precondition(lambda self: self.handoffs)
    @rule(which=st.integers(0, 20), fails=st.sampled_from([False, False, False, True]))
    def pull(self, which: int, fails: bool) -> None:
        names = list(self.handoffs)
        self._pull(names[which % len(names)], fails)

    @precondition(lambda self: self.fetches)
    @rule(which=st.integers(0, 20), num_found=st.integers(0, 8))
    def fetched(self, which: int, num_found: int) -> None:
        """The pool had so many blocks, and they are here if there was room for them."""
        index, request_id = list(self.fetches)[which % len(self.fetches)]
        self._end_fetch(index, request_id, num_found)

    def _end_fetch(self, index: int, request_id: str, num_found: int) -> None:
        node, reserved = self.nodes[index], self.fetches.pop((index, request_id))
        state = node.engine.state_of(request_id)
        if state is None:
            assert not node.engine.fetched(request_id, 0)
            return
        waits = SequenceState.PENDING_BLOCKS if reserved is None else SequenceState.PENDING_KV
        assert state is waits
        num_valid = 0
        if reserved is not None:
            expected = node.expected[request_id].submission
            tokens = (*expected.prompt_ids, *expected.output_ids)
            num_keys = len(node.engine.prefix_keys(expected))
            num_valid = min(num_found, num_keys) * node.config.block_size
            for position in range(reserved.num_cached_tokens, num_valid):
                node.runner.write(reserved.blocks, position, tokens[position])
        assert node.engine.fetched(request_id, num_valid)
        assert not node.engine.fetched(request_id, num_valid)
        assert not node.engine.kv_failed(request_id, 0, None)

    def _pull(self, request_id: str, fails: bool) -> bool:
        """Copy what prefill has published; whether anything happened."""
        handoff = self.handoffs[request_id]
        source, target = self.nodes
        if target.engine.state_of(request_id) not in (
            SequenceState.PENDING_BLOCKS,
            SequenceState.PENDING_KV,
        ):
            del self.handoffs[request_id]
            return False
        first_token = handoff.first_token
        if fails:
            self._fail_handoff(handoff, first_token if handoff.num_copied % 4 else None)
            return True
        progress, reserved = handoff.progress, handoff.reserved
        if progress is None or reserved is None:
            return False
        start = max(handoff.num_copied, reserved.num_cached_tokens)
        if start >= progress.num_computed_tokens and not progress.final:
            return False
        size = target.config.block_size
        for position in range(start, progress.num_computed_tokens):
            block = progress.blocks[position // size]
            if int(source.generations[block]) != progress.generations[position // size]:
                handoff.num_copied = position // size * size
                self._fail_handoff(handoff, first_token)
                return True
            token = source.runner.memory[block][position % size]
            target.runner.write(reserved.blocks, position, token)
            handoff.num_copied = position + 1
        if progress.final and first_token is not None:
            assert target.engine.kv_arrived(request_id, first_token)
            assert not target.engine.kv_arrived(request_id, first_token)
            source.engine.release(request_id)
            del self.handoffs[request_id]
            return True
        return start < progress.num_computed_tokens

    def _fail_handoff(self, handoff: Handoff, first_token: int | None) -> None:
        request_id, target = handoff.submission.request_id, self.nodes[1]
        expected = target.expected[request_id]
        if first_token is None:
            expected.next_index -= 1
            expected.owes_prompt_logprobs = True
        assert target.engine.kv_failed(request_id, handoff.num_copied, first_token)
        assert not target.engine.kv_failed(request_id, 0, None)
        del self.handoffs[request_id]

    def _take_in(self, node: Node, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, CacheChanged):
                for entered, key in event.changes:
                    assert (key in node.told) is not entered
                    (node.told.add if entered else node.told.remove)(key)
                continue
            if isinstance(event, PrefixComplete):
                assert 0 < len(event.keys) == len(event.blocks)
                current = [int(node.generations[block]) for block in event.blocks]
                # What a preempted sequence left may be gone by now.
                assert all(map(operator.le, event.generations, current))
            expected = node.expected.get(event.request_id)
            if isinstance(event, PrefixComplete) and expected is None:
                continue
            handoff = self.handoffs.get(event.request_id)
            assert expected is not None, f"{event} of a sequence that has ended"
            if isinstance(event, Preempted):
                # The event comes with the next commit; it may have started again by then.
                state = node.engine.state_of(event.request_id)
                assert state in (SequenceState.WAITING, SequenceState.RUNNING)
            elif isinstance(event, TokensReady):
                expected.check(event)
                if expected.part is Part.PREFILL and handoff:
                    (handoff.first_token,) = event.token_ids
                    if event.finish_reason is not None:
                        # The driver would tell the decode side that there is nothing to do.
                        del self.handoffs[event.request_id]
                        self.nodes[1].engine.abort(event.request_id)
                        self.nodes[1].expected.pop(event.request_id, None)
            elif isinstance(event, PrefillProgress):
                assert node.engine.block_statistics().num_referenced >= len(event.blocks)
                total = expected.submission.num_tokens
                assert event.num_computed_tokens <= total
                assert event.final is (event.num_computed_tokens == total) or not event.final
                current = [int(node.generations[block]) for block in event.blocks]
                assert list(event.generations) == current
                if handoff:
                    handoff.progress = event
            elif isinstance(event, PrefixComplete):
                keys = node.engine.prefix_keys(expected.submission)
                assert event.keys[: len(keys)] == tuple(keys[: len(event.keys)])
            elif isinstance(event, Reserved):
                assert event.num_cached_tokens % node.config.block_size == 0
                assert len(event.blocks) == -(-expected.submission.num_tokens // 2)
                name = (self.nodes.index(node), event.request_id)
                if name in self.fetches:
                    self.fetches[name] = event
                elif handoff:
                    handoff.reserved = event

    @invariant()
    def accounts_agree(self) -> None:
        for node in getattr(self, "nodes", []):
            node.engine.check_integrity()
            load = node.engine.load()
            unheld = load.num_free_blocks + load.num_cached_blocks
            if not node.engine.request_ids() and not node.planned and not node.executed:
                assert unheld == node.config.kv_blocks

    def teardown(self) -> None:
        # At one token a step and a sequence at a time, fifty requests take their time.
        for _ in range(4000):
            if not any(node.engine.request_ids() for node in getattr(self, "nodes", [])):
                break
            if self._advance():
                continue
            # Both sides may wait for each other's memory: leases and timeouts end that.
            assert self.handoffs
            self._fail_handoff(next(iter(self.handoffs.values())), None)
        for index, node in enumerate(getattr(self, "nodes", [])):
            while node.planned or node.executed:
                self.execute(index, decline=1)
                self.commit(index)
            self.admit(index)
            assert node.told == set(node.engine.cached_keys())
            assert node.engine.request_ids() == []
            assert node.engine.schedule(0.0) is None
            assert all(expected.done for expected in node.expected.values())
            node.engine.check_integrity()
            assert node.engine.block_statistics().num_referenced == 0

    def _advance(self) -> bool:
        """One cycle of everything; whether anything happened."""
        moved = False
        for index, node in enumerate(self.nodes):
            self.admit(index)
            before = len(node.planned) + len(node.executed)
            self.schedule(index)
            self.schedule(index)
            moved = moved or before > 0 or bool(node.planned)
            self.execute(index, decline=1)
            self.commit(index)
        for index, request_id in list(self.fetches):
            self._end_fetch(index, request_id, num_found=1)
            moved = True
        for request_id in list(self.handoffs):
            moved = self._pull(request_id, fails=False) or moved
        source = self.nodes[0].engine
        for request_id in source.request_ids():
            if source.state_of(request_id) is SequenceState.HELD and (
                request_id not in self.handoffs
            ):
                moved = source.release(request_id) or moved
        return moved


EngineMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=50, deadline=None)
TestEngineMachine = EngineMachine.TestCase
