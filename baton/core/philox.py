"""Counter-based random numbers: the same (seed, choice, position) gives the same draw anywhere.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), vectorised
over rows. numpy's own ``Philox`` is the 4x64 variant and makes one generator object per row,
which at 64 rows a step costs more than the whole scheduler; tests check this file against the
published known-answer vectors.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_M0 = np.uint64(0xD2511F53)
_M1 = np.uint64(0xCD9E8D57)
_W0 = 0x9E3779B9
_W1 = 0xBB67AE85
_MASK = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)

Words = npt.NDArray[np.uint64]


def philox_4x32_10(counter: Words, key: Words) -> Words:
    """The block function. ``counter`` [N, 4], ``key`` [N, 2], 32-bit words held in uint64."""
    c0, c1, c2, c3 = (counter[:, i].copy() for i in range(4))
    k0, k1 = key[:, 0].copy(), key[:, 1].copy()
    for round_index in range(10):
        if round_index:
            k0 = (k0 + np.uint64(_W0)) & _MASK
            k1 = (k1 + np.uint64(_W1)) & _MASK
        p0, p1 = _M0 * c0, _M1 * c2
        c0, c1, c2, c3 = (p1 >> _SHIFT) ^ c1 ^ k0, p1 & _MASK, (p0 >> _SHIFT) ^ c3 ^ k1, p0 & _MASK
    return np.stack([c0, c1, c2, c3], axis=1)


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
