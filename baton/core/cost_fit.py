"""The cost model's coefficients from measured steps: least squares that stays at or above zero.

Errors count relative to the time of their step, so that a step of a millisecond says as much as one
of a second. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from baton.core.cluster import StepSample
from baton.core.cost_model import StepCosts, StepShape, decode_features, prefill_features

Phase = Literal["prefill", "decode"]

_FEATURES = {"prefill": prefill_features, "decode": decode_features}


def fit_step_costs(samples: Sequence[StepSample], kind: Phase) -> StepCosts:
    """Fit the samples of one kind: steps of prompts alone, or of decodes alone.

    Others are left out. A coefficient that the samples do not tell apart from others is as small as
    they allow. Raises ValueError where no sample is left.
    """
    chosen = samples_of(samples, kind)
    if not chosen:
        raise ValueError(f"there is no sample of a {kind} step")
    features = np.array([_FEATURES[kind](sample.shape) for sample in chosen])
    seconds = np.array([sample.seconds for sample in chosen])
    # Relative errors, and columns of one size: tokens times context dwarfs a constant.
    weighted = features / seconds[:, None]
    scale = np.maximum(np.abs(weighted).max(axis=0), 1e-300)
    found = _non_negative(weighted / scale, np.ones(len(seconds))) / scale
    overhead_s, item_s, context_s = (float(value) for value in found)
    return StepCosts(overhead_s, item_s, context_s)


def samples_of(samples: Sequence[StepSample], kind: Phase) -> list[StepSample]:
    """Those with prompts alone, or with decodes alone, that took some time."""
    return [sample for sample in samples if sample.seconds > 0 and _kind(sample.shape) == kind]


def relative_error(samples: Sequence[StepSample], kind: Phase, costs: StepCosts) -> float:
    """Mean of |predicted - measured| / measured over the samples of one kind (MAPE, as a share)."""
    coefficients = (costs.overhead_s, costs.item_s, costs.context_s)
    errors = [
        abs(float(np.dot(coefficients, _FEATURES[kind](sample.shape))) / sample.seconds - 1)
        for sample in samples_of(samples, kind)
    ]
    return sum(errors) / len(errors)


def _kind(shape: StepShape) -> Phase | None:
    if bool(shape.num_prefill_tokens) == bool(shape.num_decodes):
        return None
    return "prefill" if shape.num_prefill_tokens else "decode"


def _non_negative(
    matrix: npt.NDArray[np.float64], target: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """The x >= 0 with the least |matrix x - target|: of so few columns, every choice is tried."""
    width = matrix.shape[1]
    best, best_error = np.zeros(width), float(np.inf)
    # Few columns first: a choice with more of them must be better to be taken.
    for chosen in sorted(range(1, 2**width), key=int.bit_count):
        columns = [i for i in range(width) if chosen >> i & 1]
        found = np.linalg.lstsq(matrix[:, columns], target, rcond=None)[0]
        if (found < 0).any():
            continue
        candidate = np.zeros(width)
        candidate[columns] = found
        error = float(np.square(matrix @ candidate - target).sum())
        if error < best_error * (1 - 1e-9) - 1e-15:
            best, best_error = candidate, error
    return best
