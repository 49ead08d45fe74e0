"""Keys of KV blocks: a chained, salted, cryptographic hash of the tokens a block holds.

A key names the *whole prefix* up to and including its block, so equal keys mean equal KV: the
same bits where it was computed on as many ranks, and within rounding where not (design, "Blocks and
layout"). blake2b with 16-byte digests: fast in the standard library, and
collisions cannot be constructed by a tenant.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

BlockKey = bytes
"""16 bytes."""

_KEY_BYTES = 16


def block_salt(
    *, model_fingerprint: str, layout: str, adapter: str = "", tenant: str = ""
) -> bytes:
    """The root of a chain of keys: blocks of different models, layouts or tenants never match.

    ``layout``: text of the canonical layout, so that keys do not depend on the number of ranks.
    """
    parts = (model_fingerprint, layout, adapter, tenant)
    text = "\x1f".join(f"{len(part)}:{part}" for part in parts)
    return hashlib.blake2b(text.encode(), digest_size=_KEY_BYTES).digest()


def extend_block_keys(
    keys: list[BlockKey], token_ids: Sequence[int], *, block_size: int, salt: bytes
) -> list[BlockKey]:
    """Append the keys of all full blocks of ``token_ids`` that ``keys`` does not hold yet.

    ``keys`` must be the keys of a prefix of ``token_ids``; it is extended in place and returned.
    """
    for index in range(len(keys), len(token_ids) // block_size):
        parent = keys[-1] if keys else salt
        chunk = np.asarray(token_ids[index * block_size : (index + 1) * block_size], dtype="<i4")
        keys.append(hashlib.blake2b(chunk.tobytes(), digest_size=_KEY_BYTES, key=parent).digest())
    return keys


def block_keys(token_ids: Sequence[int], *, block_size: int, salt: bytes) -> list[BlockKey]:
    """Keys of the full blocks of ``token_ids``, first to last."""
    return extend_block_keys([], token_ids, block_size=block_size, salt=salt)
