"""What the gateway counts. A registry of its own: several gateways may share a process in tests."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from baton.core.errors import Code
from baton.gateway.journal import LossReason

ENDPOINTS = ("completions", "chat", "grpc")
ABORT_REASONS = ("disconnect", "abort_call", "deadline", "error")
_LATENCIES_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5),
    *(0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 15.0, 30.0, 60.0, 120.0, 300.0, 600.0),
)


class GatewayMetrics:
    """Closed label sets: every series exists from the start, at zero."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "baton_requests",
            "Requests that ended, by door and outcome (stop, length, or an error code).",
            ("endpoint", "outcome"),
            registry=registry,
        )
        self.open = Gauge("baton_requests_open", "Requests being served.", registry=registry)
        self.ttft = self._histogram(
            "baton_time_to_first_token_seconds", "Arrival at the gateway to first token."
        )
        self.tpot = self._histogram(
            "baton_time_per_output_token_seconds", "(e2e - TTFT) / (n_out - 1), per choice."
        )
        self.itl = self._histogram(
            "baton_inter_token_latency_seconds", "Gap between outputs of one choice."
        )
        self.e2e = self._histogram("baton_e2e_seconds", "Arrival to end.")
        self.prompt_tokens = Counter(
            "baton_prompt_tokens", "Prompt tokens of ended requests.", registry=registry
        )
        self.generation_tokens = Counter(
            "baton_generation_tokens", "Tokens received for clients.", registry=registry
        )
        self.cached_tokens = Counter(
            "baton_cached_tokens", "Prompt tokens taken from a cache.", registry=registry
        )
        self.replays = Counter(
            "baton_replays", "Attempts that were lost.", ("reason",), registry=registry
        )
        self.aborts = Counter(
            "baton_aborts", "Requests ended early.", ("reason",), registry=registry
        )
        for endpoint in ENDPOINTS:
            for outcome in ("stop", "length", *Code):
                self.requests.labels(endpoint, str(outcome))
        for reason in LossReason:
            self.replays.labels(str(reason))
        for abort in ABORT_REASONS:
            self.aborts.labels(abort)

    def replayed(self, reason: LossReason) -> None:
        """Count a lost attempt."""
        self.replays.labels(str(reason)).inc()

    def render(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self.registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, buckets=_LATENCIES_S, registry=self.registry)
