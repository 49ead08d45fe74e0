"""What the gateway counts. A registry of its own: several gateways may share a process in tests."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from baton.core.errors import Code
from baton.core.slo import Timing, attainment
from baton.gateway.attainment import (
    NO_CLASS,
    TARGETS,
    WINDOW_S,
    AttainmentWindow,
    SloOutcome,
    Verdict,
)
from baton.gateway.journal import LossReason

ENDPOINTS = ("completions", "chat", "grpc")
ABORT_REASONS = ("disconnect", "abort_call", "deadline", "error")
_LATENCIES_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5),
    *(0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 15.0, 30.0, 60.0, 120.0, 300.0, 600.0),
)


class GatewayMetrics:
    """Closed label sets: every series exists from the start, at zero."""

    def __init__(self, service_classes: Iterable[str] = ()) -> None:
        """``service_classes``: names of the configured ones."""
        self.registry = registry = CollectorRegistry()
        self.service = ServiceMetrics((*service_classes, NO_CLASS), registry)
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

    def render(self, now: float) -> bytes:
        """The Prometheus text format; ``now`` is the clock that requests are timed with."""
        self.service.refresh(now)
        return generate_latest(self.registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, buckets=_LATENCIES_S, registry=self.registry)


class ServiceMetrics:
    """What the classes of service got; ``none`` is for requests of no class."""

    def __init__(self, names: Sequence[str], registry: CollectorRegistry) -> None:
        label = ("service_class",)
        self._outcomes = Counter(
            "baton_requests_slo",
            "Requests that ended: targets met or missed, failed, shed, aborted by the client.",
            (*label, "outcome"),
            registry=registry,
        )
        self._misses = Counter(
            "baton_slo_misses",
            "Finished requests that came too late, by target; one may miss several.",
            (*label, "target"),
            registry=registry,
        )
        self._attainment = Gauge(
            "baton_slo_attainment",
            "Requests that met their targets, over all but aborted ones, of the last 60 s.",
            label,
            registry=registry,
        )
        self._goodput = Gauge(
            "baton_goodput_requests_per_second",
            "Requests that met their targets, per second of the last 60 s.",
            label,
            registry=registry,
        )
        self._ttft = Histogram(
            "baton_class_time_to_first_token_seconds",
            "Arrival at the gateway to first token, per choice.",
            label,
            buckets=_LATENCIES_S,
            registry=registry,
        )
        self._tpot = Histogram(
            "baton_class_time_per_output_token_seconds",
            "(e2e - TTFT) / (n_out - 1), per choice.",
            label,
            buckets=_LATENCIES_S,
            registry=registry,
        )
        self._windows = {name: AttainmentWindow() for name in names}
        for name in names:
            for outcome in SloOutcome:
                self._outcomes.labels(name, str(outcome))
            for target in TARGETS:
                self._misses.labels(name, target)
            self._ttft.labels(name)
            self._tpot.labels(name)

    def ended(
        self, service_class: str, verdict: Verdict, timings: Iterable[Timing], now: float
    ) -> None:
        """Count a request."""
        name = service_class or NO_CLASS
        self._outcomes.labels(name, str(verdict.outcome)).inc()
        for target in verdict.missed:
            self._misses.labels(name, target).inc()
        if verdict.outcome is not SloOutcome.ABORTED:
            self._windows[name].add(verdict.outcome is SloOutcome.MET, now)
        for timing in timings:
            self._ttft.labels(name).observe(timing.ttft_s)
            if timing.tpot_s is not None:
                self._tpot.labels(name).observe(timing.tpot_s)

    def refresh(self, now: float) -> None:
        """Bring the gauges of the last minute up to date."""
        for name, window in self._windows.items():
            met, total = window.counts(now)
            share = attainment(met, total)
            self._attainment.labels(name).set(math.nan if share is None else share)
            self._goodput.labels(name).set(met / WINDOW_S)
