"""A simulated request, and what became of it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from baton.core.blocks import BlockKey
from baton.core.slo import ServiceLevel, Timing
from baton.simulator.workload import TraceRequest

if TYPE_CHECKING:
    from baton.simulator.instances import SimInstance


class SimRequest:
    """Mutable; the fleet and its instances change it."""

    __slots__ = (
        "attempt",
        "decode",
        "first_token_s",
        "handed_at_s",
        "is_reserved",
        "is_tentative",
        "item",
        "keys",
        "level",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_sent_tokens",
        "prefill",
        "prefill_done",
        "request_id",
    )

    def __init__(
        self,
        request_id: str,
        item: TraceRequest,
        level: ServiceLevel,
        keys: tuple[BlockKey, ...] = (),
    ) -> None:
        self.request_id = request_id
        self.item = item
        self.level = level
        self.keys = keys
        self.attempt = 0
        self.prefill: SimInstance | None = None
        self.decode: SimInstance | None = None
        self.first_token_s: float | None = None
        self.is_tentative = False
        """Decode is not bound yet."""
        self.is_reserved = False
        self.prefill_done = False
        self.num_computed_tokens = 0
        self.num_sent_tokens = 0
        """Of the prompt, cached at the decode side, on their way there or there."""
        self.handed_at_s = 0.0
        """When all that was sent is there."""
        self.num_cached_tokens = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """How one request ended; times in virtual seconds."""

    arrival_s: float
    service_class: str
    num_prompt_tokens: int
    num_output_tokens: int
    ttft_s: float | None
    tpot_s: float | None
    end_s: float
    good: bool
    """It finished, and met every target."""
    error: str = ""
    num_cached_tokens: int = 0
    prefill: str = ""
    decode: str = ""


def outcome_of(request: SimRequest, error: str, end_s: float) -> Outcome:
    """``error``: empty where it finished."""
    item = request.item
    ttft_s = tpot_s = None
    good = False
    if not error and request.first_token_s is not None:
        timing = Timing(item.arrival_s, request.first_token_s, end_s, item.num_output_tokens)
        ttft_s, tpot_s = timing.ttft_s, timing.tpot_s
        good = timing.meets(request.level.slo)
    return Outcome(
        item.arrival_s,
        request.level.service_class,
        item.num_prompt_tokens,
        item.num_output_tokens,
        ttft_s,
        tpot_s,
        end_s,
        good,
        error,
        request.num_cached_tokens,
        request.prefill.name if request.prefill else "",
        request.decode.name if request.decode else "",
    )
