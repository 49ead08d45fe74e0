"""What became of one request, and the seam that sends it."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Protocol

from baton.core.slo import Timing
from benchmarks.workload import Prompt


@dataclasses.dataclass(slots=True)
class Outcome:
    """Times are seconds of ``time.perf_counter``."""

    due_s: float
    """When it should have been sent."""
    sent_s: float
    arrival_s: float
    """What TTFT counts from: ``due_s``, or ``sent_s`` where a cap on concurrency held it back."""
    num_prompt_tokens: int
    num_wanted: int
    token_times_s: list[float] = dataclasses.field(default_factory=list)
    """When each token arrived; tokens of one message arrive together."""
    token_ids: list[int] = dataclasses.field(default_factory=list)
    end_s: float | None = None
    failure: str | None = None
    """Its kind, in one word: ``timeout``, ``connection``, ``shed``, ``http_400``, ``short`` ..."""
    detail: str = ""
    service_class: str = ""

    @property
    def timing(self) -> Timing | None:
        """For the arithmetic of service levels; None if it failed."""
        if self.failure is not None or not self.token_times_s:
            return None
        return Timing(
            arrival_s=self.arrival_s,
            first_token_s=self.token_times_s[0],
            last_token_s=self.token_times_s[-1],
            num_output_tokens=len(self.token_times_s),
        )

    @property
    def gaps_s(self) -> list[float]:
        """ITL: the gaps between tokens; zero within a message."""
        times = self.token_times_s
        return [later - earlier for earlier, later in itertools.pairwise(times)]

    def fail(self, kind: str, detail: str = "") -> None:
        """Note the first failure; later ones are its consequences."""
        if self.failure is None:
            self.failure, self.detail = kind, detail[:300]


class Sender(Protocol):
    """Sends one prompt and notes in ``outcome`` what comes back. Raises nothing but cancellation.

    A request that ends without all the tokens it asked for has failed: ``short``.
    """

    async def send(self, prompt: Prompt, outcome: Outcome) -> None:
        """Return when the request has ended, one way or the other."""

    async def close(self) -> None:
        """Free what the sender holds."""
