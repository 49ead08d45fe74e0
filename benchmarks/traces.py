"""Readers of production traces. The repository holds none; the README says where they are.

* ``azure``: the Azure LLM inference traces, CSV with ``TIMESTAMP,ContextTokens,GeneratedTokens``.
* ``mooncake``: the Mooncake traces, JSON lines with ``timestamp`` (ms), ``input_length``,
  ``output_length`` and ``hash_ids``, one per 512 tokens of the prompt: equal ids mean equal
  tokens. Their timestamps are rounded to bins of about 3 s, so that many requests seem to arrive
  at one instant; they are spread over their bin, from the seed.
"""

from __future__ import annotations

import csv
import dataclasses
import datetime
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from benchmarks.workload import Item

Format = Literal["azure", "mooncake"]
MOONCAKE_BLOCK_TOKENS = 512
MOONCAKE_BIN_S = 3.0


def read_trace(path: Path, form: Format, seed: int) -> list[Item]:
    """The requests of a trace in order of arrival, the first at 0.

    Raises ValueError, with the line's number, for a line that is not of that form.
    """
    items = _read_azure(path) if form == "azure" else _spread(_read_mooncake(path), seed)
    if not items:
        raise ValueError(f"{path} holds no requests")
    items.sort(key=lambda item: item.at_s)
    start_s = items[0].at_s
    return [dataclasses.replace(item, at_s=item.at_s - start_s) for item in items]


def _read_azure(path: Path) -> list[Item]:
    items: list[Item] = []
    with path.open(newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.DictReader(file), start=2):
            try:
                items.append(
                    Item(
                        at_s=_seconds(row["TIMESTAMP"]),
                        input_len=_positive(row["ContextTokens"]),
                        output_len=_positive(row["GeneratedTokens"]),
                    )
                )
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}:{number} is not a line of an Azure trace") from error
    return items


def _seconds(timestamp: str) -> float:
    """``2023-11-16 18:15:46.6805900``; the trace has seven digits after the point."""
    whole, _, fraction = timestamp.partition(".")
    moment = datetime.datetime.fromisoformat(whole).replace(tzinfo=datetime.UTC)
    return moment.timestamp() + float(f"0.{fraction or 0}")


def _read_mooncake(path: Path) -> list[Item]:
    items: list[Item] = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                items.append(
                    Item(
                        at_s=float(row["timestamp"]) / 1000,
                        input_len=_positive(row["input_length"]),
                        output_len=_positive(row["output_length"]),
                        prefix_ids=tuple(int(i) for i in row["hash_ids"]),
                    )
                )
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}:{number} is not a line of a Mooncake trace") from error
    return items


def _spread(items: Sequence[Item], seed: int) -> list[Item]:
    """Move each arrival to a uniformly drawn place between its bin and the next one."""
    generator = np.random.default_rng([seed, 5])
    starts = sorted({item.at_s for item in items})
    gaps = [later - earlier for earlier, later in itertools.pairwise(starts)]
    # After a silence the bin is still only as wide as a bin.
    width_s = {start: min(gap, MOONCAKE_BIN_S) for start, gap in zip(starts, gaps, strict=False)}
    return [
        dataclasses.replace(
            item,
            at_s=item.at_s + float(generator.random()) * width_s.get(item.at_s, MOONCAKE_BIN_S),
        )
        for item in items
    ]


def _positive(value: str | int) -> int:
    number = int(value)
    # Azure has a few requests that generated nothing: a request always makes one token.
    return max(1, number)
