"""How much a step may take on, so that online work meets its targets. Pure; needs a cost model.

* Prompt chunks beside decodes that have a target for TPOT are cut so that the step stays within
  the tightest; but never to nothing, or prompts would starve.
* Offline decodes are taken on as far as the step stays within that target, and no new ones where it
  would be near it.
* Offline chunks leave online decodes all of their time. They also keep steps short where online
  work has a target for TTFT: whoever comes waits for the end of a step.

Without a cost model, or without targets, there are no limits.
"""

from __future__ import annotations

from baton.core.cost_model import CostModel
from baton.engine.sequence import Sequence

TPOT_SHARE = 0.8
"""Of a TPOT target that a step with prompts or offline work in it may take: the way from prefill to
decode, and the step that it finds running there, take some of it too."""
START_SHARE = 0.7
"""The same, for offline work to begin: less, so that it does not end again at once."""
TTFT_SHARE = 0.1
"""Of a TTFT target that a step with offline chunks in it may take."""
_TYPICAL_START = 1024
"""Tokens before a chunk, where its attention is estimated."""


class Limits:
    """Of one step, while it is being planned."""

    __slots__ = (
        "_context_expected",
        "_model",
        "_num_chunk_tokens",
        "_num_expected",
        "_smallest_chunk",
        "_tightest_expected_s",
        "_ttft_s",
        "context",
        "num",
        "tightest_s",
    )

    def __init__(self, model: CostModel | None, smallest_chunk: int, ttft_s: float | None) -> None:
        """``ttft_s``: the tightest target of online work for its first token."""
        self._model = model
        self._smallest_chunk = smallest_chunk
        self._ttft_s = ttft_s
        self.num = 0
        """Decodes."""
        self.context = 0
        """Tokens in their cache."""
        self.tightest_s: float | None = None
        """TPOT target of those that are online work."""
        self._num_expected = self._context_expected = 0
        self._tightest_expected_s: float | None = None
        """The same three of sequences that will decode soon."""
        self._num_chunk_tokens = 0

    def count(self, sequence: Sequence, context: int) -> None:
        """A decode is planned, with so many tokens in its cache."""
        self.add(1, context, None if sequence.rank[0] > 0 else sequence.submission.slo.tpot_s)

    def add(self, num: int, context: int, tpot_s: float | None) -> None:
        """Several are; ``tpot_s``: the tightest target of those that are online work."""
        self.num += num
        self.context += context
        self.tightest_s = _tighter(self.tightest_s, tpot_s)

    def expect(self, sequence: Sequence) -> None:
        """It will decode when its prompt is computed."""
        self._num_expected += 1
        self._context_expected += len(sequence.token_ids)
        if sequence.rank[0] <= 0:
            tpot_s = sequence.submission.slo.tpot_s
            self._tightest_expected_s = _tighter(self._tightest_expected_s, tpot_s)

    def chunk(self, num_tokens: int) -> None:
        """A chunk is planned."""
        self._num_chunk_tokens += num_tokens

    def bears(self, sequence: Sequence) -> bool:
        """Whether online decodes meet their targets with this offline decode beside them."""
        return self._bears(1, len(sequence.token_ids) - 1, self.tightest_s, TPOT_SHARE)

    def bears_all(self) -> bool:
        """Whether they meet them with all decodes that are planned."""
        return self._bears(0, 0, self.tightest_s, TPOT_SHARE)

    def may_start(self, sequence: Sequence) -> bool:
        """Whether this offline sequence may begin, with regard to all that is to come."""
        tightest_s = _tighter(self.tightest_s, self._tightest_expected_s)
        num, context = self._num_expected, self._context_expected
        return self._bears(num + 1, context + len(sequence.token_ids), tightest_s, START_SHARE)

    def _bears(self, num: int, context: int, tightest_s: float | None, share: float) -> bool:
        if self._model is None or tightest_s is None:
            return True
        seconds = self._model.decode_s(self.num + num, self.context + context)
        return seconds <= tightest_s * share

    def online_chunk(self, budget: int) -> int:
        """Prompt tokens that the step may compute, of so many."""
        if self._model is None or self.tightest_s is None:
            return budget
        chunk = self._chunk_within(self._model, self.tightest_s * TPOT_SHARE)
        return min(budget, max(chunk, self._smallest_chunk))

    def offline_chunk(self, budget: int) -> int:
        """The same for offline work, of what online work left of the budget."""
        model = self._model
        if model is None:
            return budget
        if self.tightest_s is not None:
            chunk = self._chunk_within(model, self.tightest_s * TPOT_SHARE)
            budget = min(budget, chunk - self._num_chunk_tokens)
        if self._ttft_s is not None:
            chunk = self._chunk_within(model, self._ttft_s * TTFT_SHARE)
            budget = min(budget, max(chunk, self._smallest_chunk) - self._num_chunk_tokens)
        return budget

    def _chunk_within(self, model: CostModel, limit_s: float) -> int:
        return model.chunk_for(limit_s, self.num, self.context, _TYPICAL_START)


def _tighter(one_s: float | None, other_s: float | None) -> float | None:
    """Of two targets, where there are any."""
    if one_s is None or other_s is None:
        return one_s if other_s is None else other_s
    return min(one_s, other_s)
