"""The cost model learnt from steps as they are measured: least squares that forget. Pure.

Every observation is one line, ``seconds = costs · features``, and counts by its *relative* error,
so that short steps matter as much as long ones. Old lines fade. A weak pull towards an anchor (at
first a profile's numbers, later what was learnt) decides where the lines say nothing. Coefficients
never fall below zero.

One slow moment must not be believed, a machine that became slow must be: an observation that is
further off than the noise explains is clipped to what it explains; where such ones follow each
other in one direction, everything learnt is scaled by their median ratio, and the past counts
little from then on.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping

from baton.core.cluster import StepSample
from baton.core.cost_model import (
    CostModel,
    StepCosts,
    StepShape,
    decode_features,
    prefill_features,
)

Features = tuple[float, float, float]
_Matrix = tuple[float, float, float, float, float, float]
"""Symmetric: 00, 01, 02, 11, 12, 22."""

_MEMORY = 100
"""Observations after which one counts a third."""
_GATE = 4.0
"""Standard deviations of noise within which an observation is believed as it is."""
_GATE_UNKNOWN = 2.0
"""The same, of what is not known yet about such steps."""
_FIRST_NOISE, _LEAST_NOISE, _MOST_NOISE = 0.1, 0.02, 0.5
"""Standard deviation of the relative error."""
_NOISE_AFTER_CHANGE = 0.2
_NOISE_WEIGHT = 0.05
_MEAN_TO_DEVIATION = 1.25
"""Of a normal distribution: standard over mean absolute deviation."""
_PRIOR = (0.05 / 0.5) ** 2
"""Weight of a start that may be half off, where the noise is a twentieth."""
_WEAK_PRIOR = (0.05 / 30.0) ** 2
_SMALL_SHARE = 0.1
"""Of the seconds: what a coefficient that starts at zero may come to explain easily."""
_ANCHOR_WEIGHT = 0.01
_EXPECTED_SIZE = 0.75
_LARGEST_SIZE = 3.0
_CHANGE = 12.0
"""Deviations in one direction, each less the expected size, that add up to a change. A stray counts
for ``_LARGEST_SIZE`` at most, so that one in twenty does not."""
_NUM_LAST = 5
_AFTER_CHANGE = 5.0
"""Observations that the past counts as after a change."""
_NUM_LEARNT = 8
"""Observations from which coefficients mean something that had no start."""
_ERROR_WEIGHT = 0.05
_LARGEST_ERROR = 10.0
_LEAST_DETERMINANT = 1e-12
_SHORTEST_S, _LONGEST_S = 1e-9, 1e6


class OnlineCosts:
    """Coefficients of three features, followed while they change. Deterministic.

    ``start``: what they are believed to be, give or take a half; without one the first
    observations alone decide.
    """

    __slots__ = (
        "_anchor",
        "_fades",
        "_inverse",
        "_matrix",
        "_noise",
        "_num_counted",
        "_off_down",
        "_off_up",
        "_prior",
        "_ratios",
        "_scales",
        "_start",
        "_values",
        "_vector",
        "num_samples",
    )

    def __init__(self, start: StepCosts | None = None, *, memory: int = _MEMORY) -> None:
        self.num_samples = 0
        """Observations so far."""
        self._start: Features | None = None
        if start is not None:
            self._start = (start.overhead_s, start.item_s, start.context_s)
        self._anchor: Features = self._start or (0.0, 0.0, 0.0)
        self._values: Features = self._anchor
        self._prior = _WEAK_PRIOR if start is None else _PRIOR
        self._fades = 1.0 - 1.0 / memory
        self._noise = _FIRST_NOISE if start is not None else _NOISE_AFTER_CHANGE
        self._matrix: _Matrix = (0.0,) * 6
        self._vector: Features = (0.0, 0.0, 0.0)
        self._num_counted = 0.0
        self._inverse: _Matrix | None = None
        """With ``_scales``: of the matrix with its pull, once there is something in it."""
        self._scales: Features = (1.0, 1.0, 1.0)
        self._off_up = self._off_down = 0.0
        self._ratios: list[float] = []
        """Measured over predicted, of those that were off in a row."""

    @property
    def known(self) -> bool:
        """Whether there is anything to predict with."""
        return self._start is not None or self.num_samples > 0

    @property
    def learnt(self) -> bool:
        """Whether predictions mean something."""
        return self._start is not None or self.num_samples >= _NUM_LEARNT

    @property
    def costs(self) -> StepCosts:
        """The coefficients now."""
        return StepCosts(*self._values)

    def predict(self, features: Features) -> float:
        """Seconds."""
        return _dot(self._values, features)

    def observe(self, features: Features, seconds: float, *, beside_s: float = 0.0) -> None:
        """Take in a measurement. ``beside_s``: time of something else that was measured with it,
        and taken off; the error is relative to both. Nonsense is left out."""
        total_s = seconds + beside_s
        if not (_SHORTEST_S < total_s < _LONGEST_S and any(features)):
            return
        if self._start is None and not self.num_samples:
            self._anchor = self._values = _even_split(features, max(seconds, 0.1 * total_s))
        self.num_samples += 1
        if self.learnt:
            predicted_s = max(self.predict(features) + beside_s, 1e-3 * total_s)
            self._believe(features, total_s, predicted_s, beside_s)
        else:
            self._add(features, seconds, total_s)
        self._solve()

    def _believe(
        self, features: Features, total_s: float, predicted_s: float, beside_s: float
    ) -> None:
        """Count an observation as far as the noise, and what is not known yet, explain it."""
        ratio = total_s / predicted_s
        off = ratio - 1.0
        leverage = self._leverage(features, predicted_s)
        deviation = self._noise * math.sqrt(1.0 + leverage)
        limit = self._noise * math.sqrt(_GATE**2 + _GATE_UNKNOWN**2 * leverage)
        size = min(abs(off) / deviation, _LARGEST_SIZE) * self._noise * _MEAN_TO_DEVIATION
        noise = self._noise + _NOISE_WEIGHT * (size - self._noise)
        self._noise = min(_MOST_NOISE, max(_LEAST_NOISE, noise))
        if self._is_change(off / deviation, ratio):
            self._changed()
        elif abs(off) <= limit:
            self._add(features, total_s - beside_s, predicted_s)
        else:
            # The further off, the less it moves.
            share = math.sqrt(limit / abs(off))
            clipped_s = predicted_s * (1.0 + math.copysign(limit, off)) - beside_s
            self._add(features, clipped_s, predicted_s / share)

    def _is_change(self, size: float, ratio: float) -> bool:
        """Whether the last ones are off in one direction by more than noise adds up to."""
        size = max(-_LARGEST_SIZE, min(_LARGEST_SIZE, size))
        self._off_up = max(0.0, self._off_up + size - _EXPECTED_SIZE)
        self._off_down = max(0.0, self._off_down - size - _EXPECTED_SIZE)
        if not (self._off_up or self._off_down):
            self._ratios.clear()
            return False
        self._ratios.append(ratio)
        del self._ratios[:-_NUM_LAST]
        return max(self._off_up, self._off_down) >= _CHANGE

    def _changed(self) -> None:
        """All became slower, or faster, as the last ones say. The first ones may be from before;
        strays do not move the median."""
        ratio = statistics.median(self._ratios)
        self._anchor = _three(ratio * value for value in self._anchor)
        self._matrix = _six(value / ratio**2 for value in self._matrix)
        self._vector = _three(value / ratio for value in self._vector)
        if self._num_counted > _AFTER_CHANGE:
            self._scale_past(_AFTER_CHANGE / self._num_counted)
        self._noise = max(self._noise, _NOISE_AFTER_CHANGE)
        self._off_up = self._off_down = 0.0
        self._ratios.clear()

    def _add(self, features: Features, seconds: float, scale_s: float) -> None:
        """One more line, relative to ``scale_s``."""
        g, relative = self._fades, seconds / scale_s
        x, y, z = features[0] / scale_s, features[1] / scale_s, features[2] / scale_s
        a, b, c, d, e, f = self._matrix
        a, b, c = g * a + x * x, g * b + x * y, g * c + x * z
        self._matrix = (a, b, c, g * d + y * y, g * e + y * z, g * f + z * z)
        u, v, w = self._vector
        self._vector = (g * u + x * relative, g * v + y * relative, g * w + z * relative)
        self._num_counted = g * self._num_counted + 1.0

    def _scale_past(self, factor: float) -> None:
        self._matrix = _six(factor * value for value in self._matrix)
        self._vector = _three(factor * value for value in self._vector)
        self._num_counted *= factor

    def _leverage(self, features: Features, scale_s: float) -> float:
        """How little is known where these features point: variance of the prediction over that of
        the noise."""
        x, y, z = features
        if self._inverse is None:
            u, v, w = self._anchor
            return (max(u * x, v * y, w * z) / scale_s) ** 2 / self._prior
        r, s, t = self._scales
        scaled = (x * r / scale_s, y * s / scale_s, z * t / scale_s)
        return max(0.0, _quadratic(self._inverse, scaled))

    def _solve(self) -> None:
        """The coefficients that fit best, none below zero; then the anchor follows them."""
        a, b, c, d, e, f = self._matrix
        (u, v, w), (x, y, z) = self._vector, self._anchor
        p, q, r = self._pull(0, a), self._pull(1, d), self._pull(2, f)
        i, j, k = 1.0 / math.sqrt(a + p), 1.0 / math.sqrt(d + q), 1.0 / math.sqrt(f + r)
        self._scales = (i, j, k)
        matrix = (1.0, b * i * j, c * i * k, 1.0, e * j * k, 1.0)
        self._inverse = _inverted(matrix)
        wanted = (i * (u + p * x), j * (v + q * y), k * (w + r * z))
        u, v, w = _not_negative(matrix, self._inverse, wanted)
        self._values = u, v, w = (max(0.0, u * i), max(0.0, v * j), max(0.0, w * k))
        g = _ANCHOR_WEIGHT
        self._anchor = (x + g * (u - x), y + g * (v - y), z + g * (w - z))

    def _pull(self, index: int, seen: float) -> float:
        """How much the anchor's coefficient counts; ``seen``: of its feature, in the matrix."""
        reach = self._anchor[index]
        if self._start is not None and self._start[index] > 0.0:
            reach = max(reach, self._start[index])
        elif seen > 0.0:
            reach = max(reach, _SMALL_SHARE / math.sqrt(seen / self._num_counted))
        # A feature that was never there needs no more than to be kept apart from zero.
        return self._prior / reach**2 if reach > 0.0 else 1.0


@dataclasses.dataclass(slots=True)
class PredictionError:
    """Mean absolute relative error of recent predictions."""

    mean: float | None = None
    """``None`` before the first one."""

    def observe(self, predicted: float, actual: float) -> float | None:
        """Compare two; the error, ``None`` where nothing was measured."""
        if not actual > 0.0:
            return None
        error = min(_LARGEST_ERROR, abs(predicted - actual) / actual)
        self.mean = error if self.mean is None else self.mean + _ERROR_WEIGHT * (error - self.mean)
        return error


PREFILL_STEP, DECODE_STEP, MIXED_STEP = "prefill_step", "decode_step", "mixed_step"


class InstancePredictor:
    """What one instance's steps take. ``start``: a profile's model, or that of its peers."""

    __slots__ = ("_errors", "decode", "prefill")

    def __init__(self, prefill: StepCosts | None = None, decode: StepCosts | None = None) -> None:
        self.prefill = OnlineCosts(prefill)
        self.decode = OnlineCosts(decode)
        self._errors: dict[str, PredictionError] = {}

    @property
    def errors(self) -> Mapping[str, float]:
        """By kind of step; kinds that were not there are missing."""
        return {kind: e.mean for kind, e in self._errors.items() if e.mean is not None}

    def observe(self, sample: StepSample) -> None:
        """A step was measured."""
        shape, seconds = sample.shape, sample.seconds
        if shape.num_prefill_tokens and shape.num_decodes:
            self._observe_mixed(shape, seconds)
        elif shape.num_prefill_tokens:
            self._observe_one(PREFILL_STEP, self.prefill, prefill_features(shape), seconds)
        elif shape.num_decodes:
            self._observe_one(DECODE_STEP, self.decode, decode_features(shape), seconds)

    def cost_model(self, base: CostModel) -> CostModel:
        """``base`` with what is known of steps."""
        prefill = self.prefill.costs if self.prefill.known else base.prefill
        decode = self.decode.costs if self.decode.known else base.decode
        return dataclasses.replace(base, prefill=prefill, decode=decode)

    def _observe_one(
        self, kind: str, online: OnlineCosts, features: Features, seconds: float
    ) -> None:
        if online.learnt:
            self._error(kind, online.predict(features), seconds)
        online.observe(features, seconds)

    def _observe_mixed(self, shape: StepShape, seconds: float) -> None:
        """Both kinds in one step: the decodes' part is taken as known, the rest says something of
        prefill. The weights are read once, so only the larger constant is in it."""
        if not self.decode.learnt:
            return
        decode_s = self.decode.predict(decode_features(shape))
        _, tokens, context = prefill_features(shape)
        decode_overhead_s = self.decode.costs.overhead_s
        features, beside_s = (0.0, tokens, context), decode_s
        if self.prefill.costs.overhead_s >= decode_overhead_s:
            features, beside_s = (1.0, tokens, context), decode_s - decode_overhead_s
        if self.prefill.learnt:
            self._error(MIXED_STEP, self.prefill.predict(features) + beside_s, seconds)
        self.prefill.observe(features, seconds - beside_s, beside_s=beside_s)

    def _error(self, kind: str, predicted_s: float, seconds: float) -> None:
        self._errors.setdefault(kind, PredictionError()).observe(predicted_s, seconds)


def _dot(a: Features, b: Features) -> float:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _three(values: Iterable[float]) -> Features:
    a, b, c = values
    return (a, b, c)


def _six(values: Iterable[float]) -> _Matrix:
    a, b, c, d, e, f = values
    return (a, b, c, d, e, f)


def _even_split(features: Features, seconds: float) -> Features:
    """Coefficients of which each explains the same part."""
    count = sum(value > 0.0 for value in features)
    return _three(seconds / (count * x) if x > 0.0 else 0.0 for x in features)


def _quadratic(m: _Matrix, v: Features) -> float:
    x, y, z = v
    return (
        m[0] * x * x
        + m[3] * y * y
        + m[5] * z * z
        + 2.0 * (m[1] * x * y + m[2] * x * z + m[4] * y * z)
    )


def _inverted(m: _Matrix) -> _Matrix:
    """Of a positive definite matrix with ones on its diagonal."""
    _, b, c, _, e, _ = m
    w = 1.0 / max(_LEAST_DETERMINANT, 1.0 + 2.0 * b * c * e - b * b - c * c - e * e)
    first = (w * (1.0 - e * e), w * (c * e - b), w * (b * e - c))
    return (*first, w * (1.0 - c * c), w * (b * c - e), w * (1.0 - b * b))


def _not_negative(m: _Matrix, inverse: _Matrix, wanted: Features) -> Features:
    """The v >= 0 with the smallest ``v m v / 2 - wanted v``; ``m`` has ones on its diagonal."""
    u, v, w = wanted
    a, b, c, d, e, f = inverse
    free = (a * u + b * v + c * w, b * u + d * v + e * w, c * u + e * v + f * w)
    if min(free) >= 0.0:
        return free
    best, gain = (0.0, 0.0, 0.0), 0.0
    couplings = {(0, 1): m[1], (0, 2): m[2], (1, 2): m[4]}
    for (i, j), coupling in couplings.items():
        determinant = max(_LEAST_DETERMINANT, 1.0 - coupling * coupling)
        x = (wanted[i] - coupling * wanted[j]) / determinant
        y = (wanted[j] - coupling * wanted[i]) / determinant
        if x >= 0.0 and y >= 0.0 and x * wanted[i] + y * wanted[j] > gain:
            best = _three(x if at == i else y if at == j else 0.0 for at in range(3))
            gain = x * wanted[i] + y * wanted[j]
    for i in range(3):
        if wanted[i] > 0.0 and wanted[i] ** 2 > gain:
            best, gain = _three(wanted[i] if at == i else 0.0 for at in range(3)), wanted[i] ** 2
    return best
