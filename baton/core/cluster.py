"""The cluster as its parts see it: roles, members, snapshots, placements."""

from __future__ import annotations

import dataclasses
import enum

from baton.core.cost_model import StepShape


class Role(enum.StrEnum):
    """Which parts of requests an instance takes on. Phases are of work; roles of instances."""

    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"

    @property
    def takes_prefill(self) -> bool:
        """Whether new prompts may be placed here."""
        return self is not Role.DECODE

    @property
    def takes_decode(self) -> bool:
        """Whether decoding may be placed here."""
        return self is not Role.PREFILL


@dataclasses.dataclass(frozen=True, slots=True)
class InstanceInfo:
    """What does not change during one life (incarnation) of an instance, but for ``role``."""

    instance_id: str
    incarnation: int
    role: Role
    address: str
    """host:port of its gRPC data plane."""
    metrics_address: str
    node_id: str
    pid: int
    model: str
    model_fingerprint: str
    kv_layout: str
    """Text of its KVLayout: with equal texts, or equal ``canonical_text``, blocks can be handed
    over."""
    block_size: int
    num_blocks: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int


@dataclasses.dataclass(frozen=True, slots=True)
class StepSample:
    """A step that an instance measured."""

    shape: StepShape
    seconds: float


@dataclasses.dataclass(frozen=True, slots=True)
class InstanceLoad:
    """A snapshot that an instance reports; counts of sequences, tokens and blocks."""

    num_waiting: int = 0
    num_running: int = 0
    num_pending_kv: int = 0
    num_held: int = 0
    num_waiting_tokens: int = 0
    num_free_blocks: int = 0
    num_cached_blocks: int = 0
    num_leases: int = 0
    num_steps: int = 0
    """Steps so far: a busy instance whose count stands still is frozen."""
    num_finished: int = 0
    num_preemptions: int = 0
    rss_bytes: int = 0
    num_decoding: int = 0
    """Running sequences that get one token a step."""
    num_context_tokens: int = 0
    """Tokens in the cache of those."""
    num_offline_waiting_tokens: int = 0
    """Of ``num_waiting_tokens``, those of offline work, which yields."""
    num_offline_decoding: int = 0
    num_offline_context_tokens: int = 0
    samples: tuple[StepSample, ...] = ()
    """A few of the steps since the last report, for the predictors."""


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """An instance, pinned to one of its lives."""

    instance_id: str
    incarnation: int
    address: str


@dataclasses.dataclass(frozen=True, slots=True)
class Placement:
    """Where one attempt of one submission runs. ``prefill == decode``: no handoff."""

    request_id: str
    attempt: int
    prefill: Target
    decode: Target
    fallback_prefill: Target | None = None
    fallback_decode: Target | None = None
    tentative: bool = False
    """The decode side is a guess: it is bound (asked for again) when prefill has made token 0."""

    @property
    def disaggregated(self) -> bool:
        """Whether a handoff is needed."""
        return self.prefill != self.decode
