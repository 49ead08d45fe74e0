"""The same model in ``transformers``, in the best way it has on a CPU."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.outcome import Outcome

EXPERTS = ("grouped_mm", "batched_mm", "eager")
"""Ways in which a release of ``transformers`` may compute experts; the fastest here is taken."""


@dataclasses.dataclass(slots=True)
class _Clock:
    """A logits processor that only looks at the time: it is called once per token."""

    times_s: list[float] = dataclasses.field(default_factory=list)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.times_s.append(time.perf_counter())
        return scores


class Reference:
    """Greedy batches with SDPA attention and a KV cache."""

    def __init__(
        self, folder: Path, max_threads: int, *, dtype: torch.dtype = torch.float32
    ) -> None:
        transformers.utils.logging.disable_progress_bar()
        self.threads = max_threads
        self.experts: str | None = None
        self._folder = folder
        self._dtype = dtype
        self._model = self._load(None)
        torch.set_num_threads(max_threads)

    def choose(self, prompts: list[list[int]], num_tokens: int) -> None:
        """Keep the way of computing experts and the number of threads that are fastest here."""
        config = self._model.config
        names = ("num_experts", "n_routed_experts")
        ways = EXPERTS if any(getattr(config, name, 0) for name in names) else (None,)
        timed: list[tuple[float, str | None, int]] = []
        for experts in ways:
            for threads in sorted({1, self.threads}):
                torch.set_num_threads(threads)
                try:
                    self._model = self._load(experts)
                    self.generate(prompts, num_tokens)
                    start_s = time.perf_counter()
                    self.generate(prompts, num_tokens)
                except (TypeError, ValueError, RuntimeError, KeyError):
                    continue  # this release, or this machine, cannot
                timed.append((time.perf_counter() - start_s, experts, threads))
        if not timed:
            raise RuntimeError("transformers cannot run this model here")
        _, self.experts, self.threads = min(timed, key=lambda entry: entry[0])
        torch.set_num_threads(self.threads)
        self._model = self._load(self.experts)

    def generate(self, prompts: list[list[int]], num_tokens: int) -> list[Outcome]:
        """One batch of prompts of equal length; each token's time is that of its step."""
        assert len({len(prompt) for prompt in prompts}) == 1
        ids = torch.tensor(prompts)
        clock = _Clock()
        start_s = time.perf_counter()
        with torch.inference_mode():
            made = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=num_tokens,
                max_new_tokens=num_tokens,
                use_cache=True,
                logits_processor=transformers.LogitsProcessorList([clock]),
                pad_token_id=0,
            )
        end_s = time.perf_counter()
        rows = made[:, ids.shape[1] :].tolist()
        return [
            Outcome(
                due_s=start_s,
                sent_s=start_s,
                arrival_s=start_s,
                num_prompt_tokens=ids.shape[1],
                num_wanted=num_tokens,
                token_times_s=list(clock.times_s),
                token_ids=row,
                end_s=end_s,
            )
            for row in rows
        ]

    def _load(self, experts: str | None) -> Any:
        more = {} if experts is None else {"experts_implementation": experts}
        model = transformers.AutoModelForCausalLM.from_pretrained(
            self._folder, dtype=self._dtype, attn_implementation="sdpa", **more
        ).eval()
        # Greedy and to the end, whatever the folder's generation config says.
        model.generation_config = transformers.GenerationConfig()
        return model
