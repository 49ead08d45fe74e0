"""What arrives: requests of a trace, and ways to bend a trace. Pure but for reading files.

Formats (``--format``): ``azure`` (CSV: TIMESTAMP, ContextTokens, GeneratedTokens), ``mooncake``
(JSON lines: timestamp in ms, input_length, output_length, hash_ids of 512 tokens each) and
``baton`` (JSON lines: arrival_s, prompt_tokens, output_tokens, and optionally service_class,
tenant, hash_ids).
"""

from __future__ import annotations

import csv
import dataclasses
import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from baton.core.errors import ConfigError

TraceFormat = Literal["azure", "mooncake", "baton"]
Arrivals = Literal["compressed", "poisson"]

MOONCAKE_HASH_TOKENS = 512
_MOONCAKE_BIN_S = 3.0
"""Its timestamps are rounded to bins of this size."""


@dataclasses.dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request of a trace."""

    arrival_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    hash_ids: tuple[int, ...] = ()
    """Names of the prompt's leading pieces of ``MOONCAKE_HASH_TOKENS`` tokens, where known."""
    service_class: str = ""
    tenant: str = ""


Trace = tuple[TraceRequest, ...]


def read_trace(path: Path, kind: TraceFormat | None = None, *, seed: int = 0) -> Trace:
    """Requests in order of arrival, the first at 0. ``kind``: by the file's name where ``None``.

    ``seed``: of the jitter inside the bins of a Mooncake trace. Raises ConfigError.
    """
    if kind is None:
        kind = "azure" if path.suffix == ".csv" else "baton"
        if "mooncake" in path.name:
            kind = "mooncake"
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the trace {path} cannot be read: {error}", param="trace") from error
    try:
        match kind:
            case "azure":
                requests = [_azure(row) for row in csv.DictReader(text.splitlines())]
            case "mooncake":
                requests = _mooncake(text, seed)
            case "baton":
                requests = [_baton(json.loads(line)) for line in text.splitlines() if line]
    except (KeyError, ValueError, TypeError) as error:
        raise ConfigError(
            f"the trace {path} is not in the format {kind}: {error!r}", param="format"
        ) from error
    if not requests:
        raise ConfigError(f"the trace {path} holds no requests", param="trace")
    return _from_zero(requests)


def split(trace: Trace, share: float = 0.5) -> tuple[Trace, Trace]:
    """The first ``share`` of the requests, and the rest, each from time 0."""
    middle = int(len(trace) * share)
    return _from_zero(trace[:middle]), _from_zero(trace[middle:])


def rescale(trace: Trace, rate: float, arrivals: Arrivals, *, seed: int = 0) -> Trace:
    """The same requests in the same order at ``rate`` per second on average.

    ``compressed``: time is divided, bursts stay bursts. ``poisson``: gaps are drawn anew.
    """
    if arrivals == "compressed":
        factor = mean_rate(trace) / rate
        return tuple(dataclasses.replace(r, arrival_s=r.arrival_s * factor) for r in trace)
    gaps = np.random.default_rng(seed).exponential(1.0 / rate, len(trace))
    at = np.cumsum(gaps) - gaps[0]
    return tuple(dataclasses.replace(r, arrival_s=float(t)) for r, t in zip(trace, at, strict=True))


def rotate(trace: Trace, share: float) -> Trace:
    """Begin in the middle: what came before comes after the end, one mean gap later."""
    middle = int(len(trace) * (share % 1.0))
    return follow(_from_zero(trace[middle:]), _from_zero(trace[:middle])) if middle else trace


def mean_rate(trace: Trace) -> float:
    """Requests per second, first to last."""
    return (len(trace) - 1) / max(1e-9, trace[-1].arrival_s - trace[0].arrival_s)


def exchanged(trace: Trace) -> Trace:
    """Prompt and output lengths exchanged: what was prefill-heavy is decode-heavy."""
    return tuple(
        dataclasses.replace(
            r,
            num_prompt_tokens=max(1, r.num_output_tokens),
            num_output_tokens=max(1, r.num_prompt_tokens),
            hash_ids=(),
        )
        for r in trace
    )


def follow(*traces: Trace) -> Trace:
    """One after the other; each begins one mean gap after the last request of the one before."""
    joined: list[TraceRequest] = []
    start = 0.0
    for trace in traces:
        joined += (dataclasses.replace(r, arrival_s=r.arrival_s + start) for r in trace)
        start = joined[-1].arrival_s + 1.0 / mean_rate(trace)
    return tuple(joined)


def _from_zero(requests: Sequence[TraceRequest]) -> Trace:
    first = requests[0].arrival_s
    return tuple(dataclasses.replace(r, arrival_s=r.arrival_s - first) for r in requests)


def _azure(row: dict[str, str]) -> TraceRequest:
    # Seven digits after the point: one more than datetime takes.
    when = datetime.datetime.fromisoformat(row["TIMESTAMP"][:26]).replace(tzinfo=datetime.UTC)
    prompt, output = int(row["ContextTokens"]), int(row["GeneratedTokens"])
    return TraceRequest(when.timestamp(), max(1, prompt), max(1, output))


def _mooncake(text: str, seed: int) -> list[TraceRequest]:
    rows = [json.loads(line) for line in text.splitlines() if line]
    jitter = np.random.default_rng(seed).uniform(0.0, _MOONCAKE_BIN_S, len(rows))
    requests = [
        TraceRequest(
            row["timestamp"] / 1000 + float(extra),
            max(1, row["input_length"]),
            max(1, row["output_length"]),
            tuple(row["hash_ids"]),
        )
        for row, extra in zip(rows, jitter, strict=True)
    ]
    return sorted(requests, key=lambda r: r.arrival_s)


def _baton(row: dict[str, object]) -> TraceRequest:
    def number(name: str) -> float:
        value = row[name]
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError(f"{name} is {value!r}")
        return float(value)

    hash_ids = row.get("hash_ids", ())
    if not isinstance(hash_ids, list | tuple) or not all(isinstance(i, int) for i in hash_ids):
        raise ValueError(f"hash_ids is {hash_ids!r}")
    return TraceRequest(
        number("arrival_s"),
        max(1, int(number("prompt_tokens"))),
        max(1, int(number("output_tokens"))),
        tuple(hash_ids),
        str(row.get("service_class", "")),
        str(row.get("tenant", "")),
    )
