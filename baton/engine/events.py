"""What the engine tells the role behaviours after a step. Pure values."""

from __future__ import annotations

import dataclasses

from baton.core.blocks import BlockKey
from baton.core.request import FinishReason, TokenLogprobs


@dataclasses.dataclass(slots=True)
class TokensReady:
    """New output tokens of a sequence; ``finish_reason`` set with its last ones.

    Not to be changed either; not frozen, because one is made per sequence and step, and a frozen
    dataclass takes three times as long to make.
    """

    request_id: str
    index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: FinishReason | None
    stop_token_id: int | None = None
    num_cached_tokens: int | None = None
    """Prompt tokens reused from the cache; set with the first tokens of this life here."""
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class PrefillProgress:
    """KV of tokens [0, num_computed_tokens) is complete in ``blocks`` (a prefix of the table).

    Sent for ``Part.PREFILL`` sequences after each chunk. Before the last chunk only full blocks
    count; with ``final`` the partial last block is included, and the sequence is *held*: its
    blocks stay until ``Engine.release``.
    """

    request_id: str
    num_computed_tokens: int
    blocks: tuple[int, ...]
    generations: tuple[int, ...]
    final: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Reserved:
    """A sequence that waits for KV has got its blocks; pulls may begin.

    ``blocks`` cover all of the prompt (and outputs so far); the first ``num_cached_tokens`` tokens
    (whole blocks) are already there.
    """

    request_id: str
    blocks: tuple[int, ...]
    num_cached_tokens: int


@dataclasses.dataclass(frozen=True, slots=True)
class Preempted:
    """A sequence lost its blocks to others and will be recomputed; for metrics and timelines."""

    request_id: str


@dataclasses.dataclass(frozen=True, slots=True)
class PrefixComplete:
    """A sequence is done here; these blocks of it are in the prefix cache, first to last.

    They may be evicted any time: whoever copies one checks its generation after the last byte.
    Only from engines that ``track_cache``.
    """

    request_id: str
    blocks: tuple[int, ...]
    generations: tuple[int, ...]
    keys: tuple[BlockKey, ...]
    priority: int


@dataclasses.dataclass(frozen=True, slots=True)
class CacheChanged:
    """Blocks entered or left the prefix cache, in this order. Only with ``track_cache``."""

    changes: tuple[tuple[bool, BlockKey], ...]
    """(entered, key)."""


Event = TokensReady | PrefillProgress | Reserved | Preempted | PrefixComplete | CacheChanged
