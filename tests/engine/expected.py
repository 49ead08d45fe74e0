"""What an engine should tell about a submission, token for token, and whether it does."""

from __future__ import annotations

import dataclasses

from baton.core.request import FinishReason, Part, Submission, TokenLogprobs
from baton.engine.events import TokensReady
from tests.engine.simulated_runner import generate


@dataclasses.dataclass(eq=False)
class Expected:
    """What one engine should tell about one submission."""

    submission: Submission
    part: Part
    tokens: list[int]
    reason: FinishReason
    prompt_logprobs: list[TokenLogprobs]
    next_index: int
    owes_prompt_logprobs: bool
    first: bool = True
    done: bool = False

    @staticmethod
    def of(submission: Submission, part: Part, max_model_len: int) -> Expected:
        tokens, reason, logprobs = generate(submission, max_model_len)
        start = len(submission.output_ids) + (part is Part.DECODE)
        return Expected(submission, part, tokens, reason, logprobs, start, part is not Part.DECODE)

    def check(self, event: TokensReady) -> None:
        assert not self.done
        assert event.index == self.next_index
        end = event.index + len(event.token_ids)
        assert list(event.token_ids) == self.tokens[event.index : end]
        last = end == len(self.tokens)
        assert event.finish_reason == (self.reason if last else None)
        # Without tokens: what prefill drew is the last one that fits here.
        assert event.token_ids or (last and self.part is Part.DECODE)
        stopped = event.finish_reason is FinishReason.STOP
        assert event.stop_token_id == (event.token_ids[-1] if stopped else None)
        assert (event.num_cached_tokens is not None) is self.first
        owed = self.prompt_logprobs if self.owes_prompt_logprobs else []
        assert list(event.prompt_logprobs) == (owed if self.first else [])
        self.first = False
        self.next_index = end
        self.done = last or self.part is Part.PREFILL
