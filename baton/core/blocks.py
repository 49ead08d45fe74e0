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
_TOKEN_BYTES = 4


def block_salt(
    *, model_fingerprint: str, layout: str, adapter: str = "", tenant: str = ""
) -> bytes:
    """The root of a chain of keys: blocks of different models, layouts or tenants never match.

    ``layout``: text of the canonical layout, so that keys do not depend on the number of ranks.
    """
    parts = (model_fingerprint, layout, adapter, tenant)
    text = "\x1f".join(f"{len(part)}:{part}" for part in parts)
    return hashlib.blake2b(text.encode(), digest_size=_KEY_BYTES).digest()


def tenant_salt(salt: bytes, *, tenant: str, adapter: str = "") -> bytes:
    """Root of the keys of one tenant and adapter; ``salt`` itself where both are empty."""
    if not tenant and not adapter:
        return salt
    text = f"{len(tenant)}:{tenant}\x1f{len(adapter)}:{adapter}"
    return hashlib.blake2b(text.encode(), digest_size=_KEY_BYTES, key=salt[:64]).digest()


def extend_block_keys(
    keys: list[BlockKey], token_ids: Sequence[int], *, block_size: int, salt: bytes
) -> list[BlockKey]:
    """Append the keys of all full blocks of ``token_ids`` that ``keys`` does not hold yet.

    ``keys`` must be the keys of a prefix of ``token_ids``; it is extended in place and returned.
    """
    first, end = len(keys), len(token_ids) // block_size
    if first >= end:
        return keys
    # One conversion for all: it takes longer than the hashes.
    data = np.asarray(token_ids[first * block_size : end * block_size], dtype="<i4").tobytes()
    parent = keys[-1] if keys else salt
    size = block_size * _TOKEN_BYTES
    for at in range(0, len(data), size):
        parent = hashlib.blake2b(data[at : at + size], digest_size=_KEY_BYTES, key=parent).digest()
        keys.append(parent)
    return keys


def block_keys(token_ids: Sequence[int], *, block_size: int, salt: bytes) -> list[BlockKey]:
    """Keys of the full blocks of ``token_ids``, first to last."""
    return extend_block_keys([], token_ids, block_size=block_size, salt=salt)
