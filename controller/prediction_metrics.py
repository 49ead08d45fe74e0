"""What the controller tells Prometheus about its predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector


class PredictionCollector(Collector):
    """Asks at each scrape; ``errors`` as ``Predictions.errors``."""

    def __init__(self, errors: Callable[[], Mapping[str, float]]) -> None:
        self._errors = errors

    def collect(self) -> Iterable[Metric]:
        """One gauge."""
        gauge = GaugeMetricFamily(
            "baton_prediction_error_ratio",
            "Mean absolute error of recent predictions over what came, by what was predicted",
            labels=["kind"],
        )
        for kind, error in sorted(self._errors().items()):
            gauge.add_metric([kind], error)
        yield gauge
