"""Service-level arithmetic: TTFT, TPOT, ITL, attainment, goodput (design, "Words")."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, slots=True)
class Slo:
    """Targets in seconds; ``None`` where there is none."""

    ttft_s: float | None = None
    tpot_s: float | None = None


NO_TARGETS = Slo()


@dataclasses.dataclass(frozen=True, slots=True)
class ServiceLevel:
    """What one request is promised: its class's values, as far as it did not ask for others.

    Carried with the request to every queue.
    """

    service_class: str = ""
    """Name of the class; empty where the cluster has none."""
    slo: Slo = NO_TARGETS
    priority: int = 0
    """Higher goes first. Below 0: offline work, which yields to all others at once."""
    deadline_s: float | None = None
    """Offline work: to be finished so long after it arrived; ``None``: whenever there is room."""

    @property
    def is_offline(self) -> bool:
        """Whether it fills the room that others leave."""
        return self.priority < 0


@dataclasses.dataclass(frozen=True, slots=True)
class Timing:
    """When one request arrived, got its first and its last token (same clock, seconds)."""

    arrival_s: float
    first_token_s: float
    last_token_s: float
    num_output_tokens: int

    @property
    def ttft_s(self) -> float:
        """Arrival at the gateway to first token out."""
        return self.first_token_s - self.arrival_s

    @property
    def e2e_s(self) -> float:
        """Arrival to last token."""
        return self.last_token_s - self.arrival_s

    @property
    def tpot_s(self) -> float | None:
        """(e2e - TTFT) / (n_out - 1); ``None`` for a single token, which meets any target."""
        if self.num_output_tokens <= 1:
            return None
        return (self.e2e_s - self.ttft_s) / (self.num_output_tokens - 1)

    def meets(self, slo: Slo) -> bool:
        """Whether every target is met."""
        tpot_s = self.tpot_s
        ttft_ok = slo.ttft_s is None or self.ttft_s <= slo.ttft_s
        tpot_ok = slo.tpot_s is None or tpot_s is None or tpot_s <= slo.tpot_s
        return ttft_ok and tpot_ok


def attainment(good: int, total: int) -> float | None:
    """Good requests over all requests (failed and shed ones are in ``total``); None of none."""
    return good / total if total else None


def percentile(values: Sequence[float], q: float) -> float | None:
    """Linear-interpolated percentile, ``q`` in [0, 100]; ``None`` of an empty sequence."""
    if not values:
        return None
    if not 0 <= q <= 100:
        raise ValueError(f"q must be between 0 and 100, got {q}")
    ordered = sorted(values)
    rank = (len(ordered) - 1) * q / 100
    low = int(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)
