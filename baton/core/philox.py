"""Counter-based random numbers: the same (seed, choice, position) gives the same draw anywhere.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), vectorised
over rows. numpy's own ``Philox`` is the 4x64 variant and makes one generator object per row,
which at 64 rows a step costs more than the whole scheduler; tests check this file against the
published known-answer vectors.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_ROUNDS = 10
_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], dtype=np.uint64)
_WEYL = np.array(
    [[[index * 0x9E3779B9], [index * 0xBB67AE85]] for index in range(_ROUNDS)], dtype=np.uint64
)
"""[rounds, 2, 1]: what each round adds to the key's words."""
_MASK = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)

Words = npt.NDArray[np.uint64]


def philox_4x32_10(counter: Words, key: Words) -> Words:
    """The block function. ``counter`` [N, 4], ``key`` [N, 2], 32-bit words held in uint64."""
    # Both halves of a round at once: for the few rows of a step, time is the number of calls.
    even, odd = counter.T[0::2], counter.T[1::2]  # words 0 and 2, words 1 and 3
    round_keys = (key.T + _WEYL) & _MASK
    for round_key in round_keys:
        product = even * _MULTIPLIERS
        even = (product[::-1] >> _SHIFT) ^ odd ^ round_key
        odd = product[::-1] & _MASK
    return np.stack([even[0], odd[0], even[1], odd[1]], axis=1)


def uniforms(
    seeds: npt.ArrayLike, choices: npt.ArrayLike, positions: npt.ArrayLike
) -> npt.NDArray[np.float64]:
    """One uniform in [0, 1) per row. Shapes [N]; ``seeds`` are 64-bit, the others 32-bit."""
    seed = np.atleast_1d(np.asarray(seeds, dtype=np.uint64))
    choice = np.atleast_1d(np.asarray(choices, dtype=np.uint64)) & _MASK
    position = np.atleast_1d(np.asarray(positions, dtype=np.uint64)) & _MASK
    zero = np.zeros_like(seed)
    counter = np.stack([position, choice, zero, zero], axis=1)
    key = np.stack([seed & _MASK, seed >> _SHIFT], axis=1)
    words = philox_4x32_10(counter, key)
    # 53 bits: 32 of the first word, 21 of the second, as every double in [0, 1) is built.
    high = words[:, 0].astype(np.float64)
    low = (words[:, 1] >> np.uint64(11)).astype(np.float64)
    return np.asarray((high * 2.0**21 + low) / 2.0**53)
