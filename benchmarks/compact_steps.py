"""How many steps a second the simulator's engine takes, on one core.

    python -m benchmarks.compact_steps

Decoding alone: batches of 8, 100 and 400 sequences, prompts of 500 to 4,000 tokens, outputs of 100
to 1,000; one that ends is followed by a new one, whose KV has "arrived". ``plain``: every step is
planned; ``leaps``: those that are alike are advanced together.
"""

from __future__ import annotations

import random
import time

from baton.core.config import EngineConfig
from baton.core.request import Part, SamplingParams, Submission
from baton.engine.compact import CompactEngine
from baton.engine.events import TokensReady

MIN_SECONDS = 2.0


class Bench:
    """An engine that always has so many sequences that decode."""

    def __init__(self, batch: int) -> None:
        config = EngineConfig(
            block_size=128,
            num_blocks=batch * 40,
            max_num_seqs=batch,
            max_num_batched_tokens=8192,
            enable_prefix_cache=False,
            async_scheduling=False,
        )
        self.engine = CompactEngine(config, max_model_len=32768, salt=b"bench")
        self._random = random.Random(batch)
        self._prompts = [(0,) * num for num in range(500, 4000, 50)]
        self._count = 0
        self.num_steps = 0
        for _ in range(batch):
            self._enter()

    def _enter(self) -> None:
        self._count += 1
        name = f"r{self._count}"
        sampling = SamplingParams(temperature=0.0, max_tokens=self._random.randint(100, 1000))
        submission = Submission(name, 0, self._random.choice(self._prompts), sampling)
        self.engine.submit(submission, Part.DECODE, 0.0)
        self.engine.admit(0.0)
        self.engine.kv_arrived(name, 0)

    def run(self, seconds: float, *, leaps: bool) -> float:
        """Steps a second."""
        engine = self.engine
        start, first = time.process_time(), self.num_steps
        while (passed := time.process_time() - start) < seconds:
            for _ in range(100):
                if leaps and (count := engine.can_leap()):
                    engine.leap(count, 0.0)
                    self.num_steps += count
                assert engine.step_shape(0.0) is not None
                for event in engine.finish_step(0.0):
                    if isinstance(event, TokensReady) and event.finish_reason is not None:
                        self._enter()
                self.num_steps += 1
        return (self.num_steps - first) / passed


def main() -> None:
    """Print a line for each batch."""
    for batch in (8, 100, 400):
        bench = Bench(batch)
        bench.run(MIN_SECONDS / 2, leaps=False)
        plain = bench.run(MIN_SECONDS, leaps=False)
        leaping = bench.run(MIN_SECONDS, leaps=True)
        print(f"{batch:4d} sequences: {plain:9,.0f} steps/s plain, {leaping:11,.0f} with leaps")


if __name__ == "__main__":
    main()
