"""Served tokens and logits, step by step, against the reference implementation.

Sequences are driven through the real runner in mixed steps. Every logit that the runner computes
on the way is kept, and compared with one pass of the reference over prompt and output: if its best
token after every prefix is the next output token, then its own greedy decoding gives that output.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from baton.core.request import SamplingParams
from baton.engine.plan import SequenceStep
from tests.engine.tiny_models import VOCAB, Bench

TOLERANCE = 1e-4
"""Between logits."""
LOGIT_TIE = 1e-4
ROUTER_TIE = 1e-5
MAX_TIES = 3
_ALL_LOGITS = SamplingParams(temperature=0.0, logprobs=0, prompt_logprobs=0)


def random_prompt(length: int, seed: int = 0) -> list[int]:
    """Tokens drawn evenly."""
    return random.Random(1000 * length + seed).choices(range(VOCAB), k=length)


@dataclasses.dataclass
class Request:
    """A sequence to serve, and what came of it."""

    prompt: list[int]
    count: int
    """Tokens to generate."""
    chunk: int
    """Prompt tokens per step."""
    delay: int = 0
    """Steps before its first one."""
    prefix_of: int | None = None
    """Whose leading blocks it uses: index of a request that has been served long enough."""
    start: int = 0
    """First position that is computed; those before come from that prefix."""
    output: list[int] = dataclasses.field(default_factory=list)
    logits: list[Tensor] = dataclasses.field(default_factory=list)
    """[n, vocab] per step, from position ``start`` on."""


class _Recorder:
    """The model, with its logits kept."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.taken: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def logits(self, hidden_NH: Tensor) -> Tensor:
        logits: Tensor = self._model.logits(hidden_NH)
        self.taken.append(logits.clone())
        return logits


class Server:
    """Serves requests on one runner, each in a slot of its number."""

    def __init__(self, folder: Path, *, max_len: int, slots: int, **engine: Any) -> None:
        each = -(-max_len // 4)
        self.bench = Bench(
            folder, blocks_each=each, num_blocks=each * slots, max_num_seqs=slots, **engine
        )
        runner: Any = self.bench.runner
        self._recorder = _Recorder(runner._model)
        runner._model = self._recorder

    def serve(self, requests: Sequence[Request], seed: int = 0) -> None:
        """All of them together: chunks and decode rows in shuffled rows of the same steps."""
        shuffle = random.Random(seed).shuffle
        step = 0
        while any(len(request.output) < request.count for request in requests):
            rows = []
            for slot, request in enumerate(requests):
                if step < request.delay or len(request.output) == request.count:
                    continue
                if step == request.delay:
                    self._begin(slot, request)
                rows.append(self._row(slot, request))
            step += 1
            if not rows:
                continue
            shuffle(rows)
            self._execute(rows, requests)

    def _begin(self, slot: int, request: Request) -> None:
        self.bench.begin(slot, request.prompt, _ALL_LOGITS)
        if request.prefix_of is None:
            return
        size = self.bench.config.block_size
        assert request.start % size == 0
        donor, own = self.bench.sequences[request.prefix_of], self.bench.sequences[slot]
        assert donor.num_computed >= request.start, "the prefix must have been computed"
        own.blocks = donor.blocks[: request.start // size] + own.blocks
        own.num_computed = request.start

    def _row(self, slot: int, request: Request) -> SequenceStep:
        done = self.bench.sequences[slot].num_computed
        chunk = request.prompt[done : done + request.chunk] or None
        last = chunk is None or done + len(chunk) == len(request.prompt)
        return self.bench.row(slot, chunk, sample=last, prompt_logprobs=chunk is not None)

    def _execute(self, rows: Sequence[SequenceStep], requests: Sequence[Request]) -> None:
        self._recorder.taken = []
        results = self.bench.step(*rows)
        taken = iter(self._recorder.taken)
        sampled = iter(next(taken) if any(row.sample for row in rows) else ())
        lasts = {row.slot: next(sampled) for row in rows if row.sample}
        for row, result in zip(rows, results, strict=True):
            request = requests[row.slot]
            # The runner gives a chunk's logits but for the prompt's last token, which is sampled.
            if row.num_tokens > int(row.sample):
                request.logits.append(next(taken))
                assert len(request.logits[-1]) == row.num_tokens - int(row.sample)
            if row.sample:
                assert result.token_id is not None
                request.logits.append(lasts[row.slot].unsqueeze(0))
                request.output.append(result.token_id)
            else:
                assert result.token_id is None
        assert next(taken, None) is None


def check(reference: Any, request: Request) -> tuple[float, list[str]]:
    """Largest difference of any logit, and ties met, described; raises on anything wrong.

    Where the two best logits of the reference are nearly equal, either token will do. Where two
    experts are, the other one may have been chosen, which changes that token and those after it.
    """
    ids = [*request.prompt, *request.output[:-1]]
    expected, margins = _reference(reference, ids)
    expected, margins = expected[request.start :], margins[request.start :]
    logits = torch.cat(request.logits)
    assert logits.shape == expected.shape == (len(ids) - request.start, VOCAB)
    apart = (logits - expected).abs().amax(-1)
    where = f"prompt of {len(request.prompt)} tokens"
    ties: list[str] = []
    wrong = (apart > TOLERANCE).nonzero().flatten().tolist()
    if wrong:
        text = f"{where}, position {request.start + wrong[0]}: logits {apart.max():.1e} apart"
        margin = margins[wrong[0]].item()
        assert margin < ROUTER_TIE, f"{text}; router margin {margin:.1e}"
        ties.append(f"{text}; router margin {margin:.1e}")
        apart = apart[: wrong[0]]
    best = expected[-request.count :].topk(2, -1)
    for i in range(request.count):
        if request.output[i] == best.indices[i, 0]:
            continue
        gap = (best.values[i, 0] - expected[i - request.count, request.output[i]]).item()
        text = f"{where}, output token {i}: logit gap {gap:.1e}"
        assert gap < LOGIT_TIE or ties, text
        ties.append(text)
    return apart.max().item() if len(apart) else 0.0, ties


@torch.no_grad()
def _reference(model: Any, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Logits [T, vocab], and [T]: the smallest router margin up to each position."""
    outputs: list[Tensor] = []
    routers = [m for m in model.modules() if type(m).__name__.endswith("Router")]
    hooks = [
        router.register_forward_hook(lambda _m, _i, out: outputs.append(out[0]))
        for router in routers
    ]
    try:
        logits = model(torch.tensor([list(ids)]), use_cache=False).logits[0].float()
    finally:
        for hook in hooks:
            hook.remove()
    margins = [torch.full((len(ids),), float("inf"), dtype=torch.float64)]
    for router, router_logits in zip(routers, outputs, strict=True):
        margins += _margins(router, router_logits.double())
    return logits, torch.stack(margins).amin(0).cummin(0).values


def _margins(router: Any, logits_TE: Tensor) -> Iterator[Tensor]:
    """[T] each: how far the last chosen group or expert is from the first not chosen."""
    bias = getattr(router, "e_score_correction_bias", None)
    scores = logits_TE.softmax(-1) if bias is None else logits_TE.sigmoid() + bias
    greedy = getattr(router, "topk_method", "") == "greedy"
    groups, chosen = (getattr(router, name, None) or 1 for name in ("num_group", "topk_group"))
    if chosen < groups and not greedy:
        grouped = scores.view(len(scores), groups, -1)
        judged = grouped.amax(-1) if bias is None else grouped.topk(2, -1).values.sum(-1)
        yield _gap(judged, chosen)
        outside = torch.ones_like(judged).scatter_(-1, judged.topk(chosen).indices, 0).bool()
        scores = grouped.masked_fill(outside.unsqueeze(-1), float("-inf")).flatten(1)
    if router.top_k < scores.shape[-1]:
        yield _gap(scores, router.top_k)


def _gap(scores: Tensor, count: int) -> Tensor:
    top = scores.topk(count + 1).values
    return top[:, -2] - top[:, -1]
