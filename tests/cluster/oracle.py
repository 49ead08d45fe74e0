"""What `transformers` says the tokens are: the oracle of all token tests.

Greedy equality is checked by teacher forcing: one forward pass over prompt and output gives the
oracle's best token after every prefix. If each equals the next output token, then by induction
the oracle's own greedy decoding gives the very same output. (``generate`` itself is also run on
some prompts, in the acceptance form.)
"""

from __future__ import annotations

import dataclasses
import functools
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from baton.core.philox import uniforms
from tests.cluster.harness import DEMO_MODEL

LOGIT_TIE = 1e-4
ROUTER_TIE = 1e-5
DRAW_TIE = 1e-5
MAX_TIES = 3


@functools.cache
def model() -> Any:
    torch.set_num_threads(2)
    loaded = AutoModelForCausalLM.from_pretrained(
        DEMO_MODEL, dtype=torch.float32, attn_implementation="eager"
    )
    return loaded.eval()


@functools.cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO_MODEL)


@functools.cache
def corpus() -> list[int]:
    """Token ids of standard-library sources."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    names = ("argparse.py", "ast.py", "calendar.py", "configparser.py", "dataclasses.py")
    text = "".join((stdlib / name).read_text() for name in names)
    ids: list[int] = tokenizer()(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def prompts(count: int, *, longest: int = 1500) -> list[list[int]]:
    """Prompts of 1 to ``longest`` tokens; every fourth shares a long prefix with the one before."""
    ids = corpus()
    lengths = np.unique(np.geomspace(1, longest, count).astype(int))
    lengths = np.concatenate([lengths, np.arange(2, 2 + count - len(lengths)) * 7])[:count]
    made: list[list[int]] = []
    for index, length in enumerate(int(n) for n in lengths):
        start = (index * 977) % (len(ids) - 2 * longest)
        prompt = ids[start : start + length]
        if index % 4 == 3 and made:
            shared = made[-1]
            prompt = (shared + prompt)[: max(length, min(len(shared) + 5, longest))]
        made.append(prompt)
    return made


@dataclasses.dataclass(frozen=True, slots=True)
class Forced:
    """The oracle's view of one output, position by position."""

    logits: npt.NDArray[np.float64]
    """[num_outputs, vocab], before each output token."""
    router_margin: npt.NDArray[np.float64]
    """[num_outputs]: smallest gap between the last chosen expert and the first not chosen."""


def forced(prompt: Sequence[int], output: Sequence[int]) -> Forced:
    """One teacher-forced pass."""
    ids = torch.tensor([[*prompt, *output[:-1]]])
    with torch.inference_mode():
        result = model()(input_ids=ids, output_router_logits=True, use_cache=False)
    logits = result.logits[0, len(prompt) - 1 :].double().numpy()
    k = model().config.num_experts_per_tok
    margins = []
    for router_logits in result.router_logits:
        top = router_logits[len(prompt) - 1 :].float().softmax(-1).topk(k + 1).values
        margins.append((top[:, k - 1] - top[:, k]).double().numpy())
    return Forced(logits, np.min(margins, axis=0))


def check_greedy(prompt: Sequence[int], output: Sequence[int]) -> list[str]:
    """Ties met on the way (at most described, never hidden); raises on a wrong token."""
    view = forced(prompt, output)
    best = view.logits.argmax(-1)
    ties = []
    for i in np.nonzero(best != np.asarray(output))[0].tolist():
        gap = view.logits[i, best[i]] - view.logits[i, output[i]]
        margin = view.router_margin[i]
        where = f"prompt of {len(prompt)} tokens, output token {i}: {output[i]} for {best[i]}"
        assert gap < LOGIT_TIE or margin < ROUTER_TIE, f"wrong token: {where}; logit gap {gap:.2e}"
        ties.append(f"{where}; logit gap {gap:.2e}, router margin {margin:.2e}")
    return ties


def check_sampled(
    prompt: Sequence[int],
    output: Sequence[int],
    *,
    seed: int,
    temperature: float,
    top_k: int | None,
) -> list[str]:
    """Seeded draws likewise: inverse CDF, in token order, over all tokens or the ``top_k`` best."""
    view = forced(prompt, output)
    cdf = _cdf(view, temperature, top_k)
    draws = uniforms(
        np.full(len(output), seed, np.uint64),
        np.zeros(len(output)),
        np.arange(len(output)),
    )
    ties = []
    for i, (token, draw) in enumerate(zip(output, draws, strict=True)):
        off = _outside(cdf[i], token, draw)
        if not off:
            continue
        where = f"prompt of {len(prompt)} tokens, output token {i}: {token}"
        near = off < DRAW_TIE or view.router_margin[i] < ROUTER_TIE
        assert near, f"wrong draw: {where}; {draw:.6f} is off by {off:.2e}"
        ties.append(f"{where}; off by {off:.2e}")
    return ties


def near_boundary(
    prompt: Sequence[int],
    output: Sequence[int],
    other: int,
    *,
    seed: int,
    temperature: float,
    top_k: int | None,
) -> str | None:
    """Whether the last token of ``output`` and ``other`` may both have been drawn: in words."""
    view = forced(prompt, output)
    cdf = _cdf(view, temperature, top_k)[-1]
    draw = float(uniforms([seed], [0], [len(output) - 1])[0])
    off = max(_outside(cdf, token, draw) for token in (output[-1], other))
    margin = float(view.router_margin[-1])
    if off < DRAW_TIE or margin < ROUTER_TIE:
        return f"draw {draw:.6f} off by {off:.2e}, router margin {margin:.2e}"
    return None


def _cdf(view: Forced, temperature: float, top_k: int | None) -> npt.NDArray[np.float64]:
    kept = view.logits / temperature
    if top_k is not None:
        floor = np.partition(kept, -top_k, axis=-1)[:, -top_k, None]
        kept = np.where(kept >= floor, kept, -np.inf)
    probs = np.exp(kept - kept.max(-1, keepdims=True))
    return np.asarray((probs / probs.sum(-1, keepdims=True)).cumsum(-1))


def _outside(cdf: npt.NDArray[np.float64], token: int, draw: float) -> float:
    """How far ``draw`` lies outside the token's share of the distribution; 0 inside."""
    low = cdf[token - 1] if token else 0.0
    return float(max(low - draw, draw - cdf[token], 0.0))
