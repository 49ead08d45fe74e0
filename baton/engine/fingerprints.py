"""Tokens of emulated instances: a pure function of the prompt, so that anybody can check them.

The fingerprint of a position is a sum over all tokens up to it, each mixed with its position:
chained, as attention's keys and values are, and quick to compute for many positions at once. The
next token is drawn from the last one. Nothing else goes in (no seed, no temperature), so a request
gets the same tokens on any instance, however it is chunked, handed over or computed again.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint32]

_MASK = 0xFFFFFFFF
_TOKEN, _POSITION, _OFFSET = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D
_FIRST, _SECOND = 0x2C1B3C6D, 0x297A2D39


def mix(token_id: int, position: int) -> int:
    """What a token at a position adds to the fingerprints from there on; 32 bits."""
    x = (token_id * _TOKEN + position * _POSITION + _OFFSET) & _MASK
    x = ((x ^ x >> 15) * _FIRST) & _MASK
    x = ((x ^ x >> 12) * _SECOND) & _MASK
    return x ^ x >> 15


def fingerprints(token_ids: Words, start: int, before: int) -> Words:
    """Those of tokens at [start, ...), after a position whose fingerprint is ``before``."""
    x = np.arange(start, start + len(token_ids), dtype=np.uint32)
    x *= np.uint32(_POSITION)
    x += token_ids * np.uint32(_TOKEN)
    x += np.uint32(_OFFSET)
    x = (x ^ x >> np.uint32(15)) * np.uint32(_FIRST)
    x = (x ^ x >> np.uint32(12)) * np.uint32(_SECOND)
    x ^= x >> np.uint32(15)
    x[:1] += np.uint32(before)
    return np.cumsum(x, dtype=np.uint32)


def draw(fingerprint: int, vocab_size: int, avoid: Sequence[int]) -> int:
    """The token after a position. ``avoid``: sorted ids that are never drawn; not all of them."""
    token_id = mix(fingerprint, 0) % (vocab_size - len(avoid))
    for avoided in avoid:
        token_id += token_id >= avoided
    return token_id


def emulated_tokens(
    prompt_ids: Sequence[int], num_tokens: int, *, vocab_size: int, avoid: Collection[int] = ()
) -> list[int]:
    """What an emulated instance answers to a prompt: for tests and load generators.

    ``vocab_size`` and ``avoid`` (the end tokens) are those of the checkpoint that it is started
    with.
    """
    fingerprint = sum(mix(token_id, i) for i, token_id in enumerate(prompt_ids)) & _MASK
    avoided = sorted(set(avoid))
    tokens: list[int] = []
    for position in range(len(prompt_ids), len(prompt_ids) + num_tokens):
        tokens.append(draw(fingerprint, vocab_size, avoided))
        fingerprint = (fingerprint + mix(tokens[-1], position)) & _MASK
    return tokens
