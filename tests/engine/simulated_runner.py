"""A runner whose KV memory is a table of tokens, and the generation it must agree with.

A token is a hash of the whole history *as read back through the block table*, so a wrong table, a
block given away too early, a wrong start or a wrong uniform shows as a wrong token.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Sequence

from baton.core.philox import uniforms
from baton.core.request import FinishReason, SamplingParams, Submission, TokenLogprobs
from baton.engine.plan import GroupPlan, GroupResult, RowResult, StepPlan, StepResult

VOCABULARY = 23


def draw(history: Sequence[int], uniform: float) -> int:
    text = struct.pack(f"<{len(history)}i", *history) + struct.pack("<d", uniform)
    return hashlib.blake2b(text, digest_size=8).digest()[0] % VOCABULARY


def prompt_logprob(history: Sequence[int], token_id: int) -> TokenLogprobs:
    """Of ``token_id`` after ``history``."""
    return TokenLogprobs(token_id, -float(draw(history, 0.5)), rank=1)


def generate(
    submission: Submission, max_model_len: int
) -> tuple[list[int], FinishReason, list[TokenLogprobs]]:
    """All output tokens from the start of ``output_ids``, the reason of the end, the logprobs."""
    sampling = submission.sampling
    outputs = list(submission.output_ids)
    while True:
        history = [*submission.prompt_ids, *outputs]
        uniform = 0.0
        if not sampling.greedy:
            uniform = float(uniforms(sampling.seed, submission.choice, len(outputs))[0])
        outputs.append(draw(history, uniform))
        total = len(submission.prompt_ids) + len(outputs)
        if outputs[-1] in sampling.stop_token_ids:
            reason = FinishReason.STOP
        elif len(outputs) == sampling.max_tokens or total >= max_model_len:
            reason = FinishReason.LENGTH
        else:
            continue
        prompt = submission.prompt_ids
        logprobs = [prompt_logprob(prompt[:i], prompt[i]) for i in range(1, len(prompt))]
        return outputs, reason, logprobs if sampling.prompt_logprobs is not None else []


class SimulatedRunner:
    """Executes plans in their order against a memory of ``block → offset → token``."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.memory: dict[int, dict[int, int]] = {}
        self.declines: Callable[[], bool] = lambda: False
        """Asked per sampling row: whether it draws nothing this time."""
        self._prompts: dict[int, tuple[int, ...]] = {}
        self._sampling: dict[int, SamplingParams] = {}
        self._last: dict[int, int] = {}
        self.next_step = 0

    def write(self, table: Sequence[int], position: int, token: int) -> None:
        block = self.memory.setdefault(table[position // self.block_size], {})
        block[position % self.block_size] = token

    def read(self, table: Sequence[int], num_tokens: int) -> list[int]:
        size = self.block_size
        return [self.memory[table[i // size]][i % size] for i in range(num_tokens)]

    def execute(self, plan: StepPlan) -> StepResult:
        assert plan.step == self.next_step
        assert plan.rows
        self.next_step += 1
        started = {begin.slot for begin in plan.begins}
        assert started <= {row.slot for row in plan.rows}
        for begin in plan.begins:
            self._prompts[begin.slot] = begin.prompt_ids
            self._sampling[begin.slot] = begin.sampling
            self._last.pop(begin.slot, None)
        for row in plan.rows:
            assert row.num_tokens >= 1
            end = row.start + row.num_tokens
            assert len(row.block_table) == -(-end // self.block_size)
            tokens = row.token_ids or (self._last[row.slot],)
            for offset, token in enumerate(tokens):
                self.write(row.block_table, row.start + offset, token)
        results: list[RowResult] = []
        for row in plan.rows:
            end = row.start + row.num_tokens
            history = self.read(row.block_table, end)
            prompt = self._prompts[row.slot]
            assert tuple(history[: len(prompt)]) == prompt[: len(history)]
            token_id = None
            if row.sample:
                token_id = draw(history, row.uniform)
                self._last[row.slot] = token_id
                if self.declines():
                    token_id = None
            logprobs: tuple[TokenLogprobs, ...] = ()
            if row.prompt_logprobs:
                assert self._sampling[row.slot].prompt_logprobs is not None
                positions = range(row.start + 1, min(end + 1, len(prompt)))
                logprobs = tuple(prompt_logprob(history[:i], prompt[i]) for i in positions)
            results.append(RowResult(token_id, None, logprobs))
        return StepResult(plan.step, tuple(results), 0.0)

    def close(self) -> None:
        pass


class SimulatedGroupRunner:
    """A simulated runner per dp group, and their memories as the one that others see."""

    def __init__(self, dp: int, num_blocks: int, block_size: int) -> None:
        self.runners = [SimulatedRunner(block_size) for _ in range(dp)]
        self.num_blocks = num_blocks
        self.next_step = 0

    def execute(self, plan: GroupPlan) -> GroupResult:
        assert plan.step == self.next_step
        assert any(plan.plans), "a step without any plan"
        self.next_step += 1
        results = tuple(
            None if own is None else runner.execute(own)
            for own, runner in zip(plan.plans, self.runners, strict=True)
        )
        return GroupResult(plan.step, results, 0.0)

    def close(self) -> None:
        pass

    def _locate(self, table: Sequence[int]) -> tuple[SimulatedRunner, list[int]]:
        """The runner that has these blocks of the arena, and their numbers there."""
        (group,) = {block // self.num_blocks for block in table}
        return self.runners[group], [block % self.num_blocks for block in table]

    def write(self, table: Sequence[int], position: int, token: int) -> None:
        """``table``: blocks of the arena."""
        runner, own = self._locate(table)
        runner.write(own, position, token)

    def read(self, table: Sequence[int], num_tokens: int) -> list[int]:
        """``table``: blocks of the arena."""
        runner, own = self._locate(table)
        return runner.read(own, num_tokens)
