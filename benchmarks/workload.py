"""What to send and when: arrival processes, length distributions, prompts. All from one seed."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

Arrivals = Literal["poisson", "constant", "burst"]
Prompt = list[int] | str


@dataclasses.dataclass(frozen=True, slots=True)
class Item:
    """One request of a workload; made into a prompt only when it is about to be sent."""

    at_s: float
    """When it is due, in seconds after the start."""
    input_len: int
    """Prompt length in tokens."""
    output_len: int
    prefix_ids: tuple[int, ...] = ()
    """One id per block of the prompt: equal ids, equal tokens. Empty: all tokens are its own."""
    text: str | None = None
    """A prompt of text, which is sent instead of token ids."""
    service_class: str = ""
    """Empty: the server's default."""


def arrival_times(
    count: int, rate: float, process: Arrivals, seed: int, burstiness: float = 0.25
) -> list[float]:
    """Seconds after the start of ``count`` arrivals at ``rate`` per second on average.

    ``burst`` draws gaps from a gamma distribution of shape ``burstiness``: 1 is Poisson, less is
    burstier. An infinite rate makes all arrive at once. The first arrives at 0.
    """
    if rate <= 0 or burstiness <= 0:
        raise ValueError(f"rate and burstiness must be positive, got {rate} and {burstiness}")
    if math.isinf(rate):
        return [0.0] * count
    if process == "constant":
        return [index / rate for index in range(count)]
    shape = 1.0 if process == "poisson" else burstiness
    generator = np.random.default_rng([seed, 1])
    gaps = generator.gamma(shape, 1.0 / (rate * shape), size=max(count - 1, 0))
    return [0.0, *(float(t) for t in np.cumsum(gaps))][:count]


def length_sampler(text: str) -> Callable[[np.random.Generator], int]:
    """A distribution of lengths: ``128``, ``uniform:64:256`` or ``lognormal:MEDIAN:SIGMA``.

    Raises ValueError for anything else. Draws are at least 1.
    """
    name, *numbers = text.split(":")
    try:
        if not numbers:
            fixed = int(name)
            if fixed < 1:
                raise ValueError
            return lambda generator: fixed
        first, second = (float(number) for number in numbers)
    except ValueError:
        raise ValueError(
            f"{text!r} is not a length; give N, uniform:LOW:HIGH or lognormal:MEDIAN:SIGMA"
        ) from None
    if name == "uniform" and 1 <= first <= second:
        return lambda generator: int(generator.integers(int(first), int(second) + 1))
    if name == "lognormal" and first >= 1 and second >= 0:
        mu = math.log(first)
        return lambda generator: max(1, round(float(generator.lognormal(mu, second))))
    raise ValueError(f"{text!r} is not a length distribution")


def synthetic(
    count: int,
    *,
    rate: float,
    arrivals: Arrivals,
    input_len: str,
    output_len: str,
    seed: int,
    burstiness: float = 0.25,
) -> list[Item]:
    """``count`` requests whose prompts share nothing."""
    generator = np.random.default_rng([seed, 2])
    draw_input, draw_output = length_sampler(input_len), length_sampler(output_len)
    times = arrival_times(count, rate, arrivals, seed, burstiness)
    return [Item(at, draw_input(generator), draw_output(generator)) for at in times]


def with_texts(items: Sequence[Item], texts: Sequence[str]) -> list[Item]:
    """The same arrivals, with ``texts`` as prompts in turn."""
    if not texts:
        raise ValueError("there are no prompts in the file")
    return [
        dataclasses.replace(item, text=text)
        for item, text in zip(items, itertools.cycle(texts), strict=False)
    ]


def read_prompts(path: Path) -> list[str]:
    """Prompts from a file: one per line; a literal backslash-n in a line is a new line."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line.replace("\\n", "\n") for line in lines if line.strip()]


def reshape(
    items: Sequence[Item],
    *,
    rate_scale: float = 1.0,
    length_scale: float = 1.0,
    clip_input: int | None = None,
    clip_output: int | None = None,
    limit: int | None = None,
) -> list[Item]:
    """Faster or slower, shorter or longer, clipped and cut; prefix structure stays.

    ``length_scale`` also scales the blocks that ``prefix_ids`` name, so shared parts stay shared.
    """
    if rate_scale <= 0 or length_scale <= 0:
        raise ValueError("rate_scale and length_scale must be positive")
    return [
        dataclasses.replace(
            item,
            at_s=item.at_s / rate_scale,
            input_len=_scaled(item.input_len, length_scale, clip_input),
            output_len=_scaled(item.output_len, length_scale, clip_output),
        )
        for item in items[:limit]
    ]


def _scaled(length: int, scale: float, clip: int | None) -> int:
    scaled = max(1, round(length * scale))
    return scaled if clip is None else min(scaled, clip)


class PromptMaker:
    """Makes the prompt of an item; the same (seed, index, item) gives the same prompt."""

    def __init__(
        self, vocab_size: int, seed: int, *, block_tokens: int = 512, first_id: int = 10
    ) -> None:
        if vocab_size <= first_id:
            raise ValueError(f"a vocabulary of {vocab_size} has no ids from {first_id} on")
        self._low, self._high = first_id, vocab_size
        self._seed = seed
        self._block_tokens = max(1, block_tokens)

    def prompt(self, index: int, item: Item) -> Prompt:
        """Token ids, or the item's own text."""
        if item.text is not None:
            return item.text
        ids: list[int] = []
        for prefix_id in item.prefix_ids:
            if len(ids) >= item.input_len:
                break
            ids.extend(self._draw(3, prefix_id, self._block_tokens))
        missing = item.input_len - len(ids)
        if missing > 0:
            ids.extend(self._draw(4, index, missing))
        return ids[: item.input_len]

    def _draw(self, stream: int, key: int, count: int) -> list[int]:
        generator = np.random.default_rng([self._seed, stream, key])
        drawn: list[int] = generator.integers(self._low, self._high, size=count).tolist()
        return drawn
