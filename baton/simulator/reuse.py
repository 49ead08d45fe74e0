"""Which blocks requests of a trace share: keys from the trace's names, and how much comes again."""

from __future__ import annotations

import dataclasses
import functools
import hashlib

from baton.core.blocks import BlockKey, block_keys
from baton.core.errors import ConfigError
from baton.simulator.workload import MOONCAKE_HASH_TOKENS, Trace, TraceRequest

_SALT = b"a trace's pieces"


def prompt_keys(request_id: str, item: TraceRequest, block_size: int) -> tuple[BlockKey, ...]:
    """Keys of all full blocks that a request will have: of named pieces of its prompt, and its own.

    A trace names pieces of ``MOONCAKE_HASH_TOKENS`` tokens, which a block has to divide. What it
    does not name (outputs, prompts without names) is nobody else's.
    """
    named = _named_keys(item, block_size)
    num_full = (item.num_prompt_tokens + item.num_output_tokens) // block_size
    own = range(len(named), num_full)
    return named + tuple(
        hashlib.blake2b(f"{request_id} {index}".encode(), digest_size=16).digest() for index in own
    )


def _named_keys(item: TraceRequest, block_size: int) -> tuple[BlockKey, ...]:
    """Of the prompt's full blocks, as far as they have names."""
    if not item.hash_ids:
        return ()
    if MOONCAKE_HASH_TOKENS % block_size:
        raise ConfigError(
            f"the trace names pieces of {MOONCAKE_HASH_TOKENS} tokens, which is no multiple of the "
            f"profile's block_size, {block_size}",
            param="block_size",
        )
    keys = _keys_of(item.hash_ids, MOONCAKE_HASH_TOKENS // block_size)
    return keys[: item.num_prompt_tokens // block_size]


@functools.lru_cache(maxsize=1 << 14)
def _keys_of(hash_ids: tuple[int, ...], num_parts: int) -> tuple[BlockKey, ...]:
    # Chained, so that a key names its whole prefix even where a trace's ids do not.
    parts = [(name * num_parts + i) % (1 << 31) for name in hash_ids for i in range(num_parts)]
    return tuple(block_keys(parts, block_size=1, salt=_SALT))


@dataclasses.dataclass(frozen=True, slots=True)
class Reuse:
    """What of a trace's prompts came before."""

    num_prompt_tokens: int
    num_hit_tokens: int
    num_blocks: int
    """Different full blocks of prompts and outputs: what a pool that forgets nothing holds."""

    @property
    def hit_rate(self) -> float:
        """Tokens found per prompt token."""
        return self.num_hit_tokens / max(1, self.num_prompt_tokens)


def ideal_reuse(trace: Trace, block_size: int = MOONCAKE_HASH_TOKENS) -> Reuse:
    """If every full block of every earlier prompt were there at once. The last token of a prompt is
    always computed, so a prompt's last full block counts only if more comes after it."""
    seen: set[BlockKey] = set()
    num_tokens = num_hit = num_own = 0
    for item in trace:
        num_prompt = item.num_prompt_tokens
        keys = _named_keys(item, block_size)
        found = next((i for i, key in enumerate(keys) if key not in seen), len(keys))
        num_hit += min(found, (num_prompt - 1) // block_size) * block_size
        num_tokens += num_prompt
        num_own += (num_prompt + item.num_output_tokens) // block_size - len(keys)
        seen.update(keys)
    return Reuse(num_tokens, num_hit, len(seen) + num_own)
