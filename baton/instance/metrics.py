"""An instance's metrics, read at scrape time on its own event loop, so that nothing is torn.

Those of its side of the pool are in ``pool_metrics.py``.
"""

from __future__ import annotations

from collections.abc import Iterable

import psutil
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from baton.core.cluster import Role
from baton.engine.emulated import EmulatedRunner
from baton.instance.assembly import InstanceParts
from baton.instance.pool_metrics import PoolSideCollector
from baton.instance.roles import RoleSwitch
from kvpool.transport import TransferFault
from kvpool.transports import NO_TRANSPORT


class InstanceCollector(Collector):
    """Reads the parts of an instance; keeps no copies of its own."""

    def __init__(self, parts: InstanceParts, process: psutil.Process, role: RoleSwitch) -> None:
        self._instance = parts.instance
        self._loop = parts.loop
        self._prefill = parts.prefill
        self._decode = parts.decode
        self._transports = parts.transports
        self._process = process
        self._role = role

    def collect(self) -> Iterable[Metric]:
        """See ``prometheus_client``."""
        yield from self._gauges()
        yield from self._counters()
        yield from self._transfers()

    def _gauges(self) -> Iterable[Metric]:
        instance = self._instance
        load = instance.load()
        blocks = instance.engine.block_statistics()
        states = GaugeMetricFamily(
            "baton_sequences", "Sequences in the engine by state.", labels=("state",)
        )
        for state, count in (
            ("waiting", load.num_waiting),
            ("running", load.num_running),
            ("pending_kv", load.num_pending_kv),
            ("held", load.num_held),
        ):
            states.add_metric((state,), count)
        yield states
        tiers = GaugeMetricFamily(
            "baton_kv_blocks", "KV blocks by state; they sum to the cache.", labels=("state",)
        )
        tiers.add_metric(("free",), blocks.num_free)
        tiers.add_metric(("cached",), blocks.num_idle)
        tiers.add_metric(("held",), blocks.num_referenced)
        yield tiers
        role = GaugeMetricFamily("baton_role", "1 for the current role.", labels=("role",))
        for item in Role:
            role.add_metric((item,), float(self._role.duty.role is item))
        yield role
        for name, text, value in (
            ("baton_sequences_open", "Submissions not yet ended.", instance.num_open),
            ("baton_kv_leases", "Handoffs held for a decode side.", self._prefill.num_leases),
            ("baton_kv_pulls_open", "Requests whose KV is under way.", self._decode.num_pulls_open),
            ("baton_draining", "1 while nothing new is admitted.", self._role.duty.draining),
            ("baton_incarnation", "This life's number.", instance.incarnation),
            (
                "baton_resident_memory_bytes",
                "Resident memory of the process.",
                self._process.memory_info().rss,
            ),
        ):
            yield GaugeMetricFamily(name, text, value=float(value))

    def _counters(self) -> Iterable[Metric]:
        totals = self._instance.counters
        ends = CounterMetricFamily(
            "baton_submissions", "Submissions by what became of them.", labels=("outcome",)
        )
        for outcome, count in (
            ("accepted", totals.num_submitted),
            ("refused", totals.num_refused),
            ("finished", totals.num_finished),
            ("aborted", totals.num_aborted),
            ("failed", totals.num_failed),
        ):
            ends.add_metric((outcome,), count)
        yield ends
        decode, prefill, steps = self._decode.counters, self._prefill.counters, self._loop.counters
        handoffs = CounterMetricFamily(
            "baton_handoffs", "Handoffs by side and result.", labels=("side", "result")
        )
        for side, result, count in (
            ("prefill", "released", prefill.num_handed_off),
            ("prefill", "refused", prefill.num_refused_by_peer),
            ("prefill", "expired", prefill.num_expired_leases),
            ("decode", "arrived", decode.num_handoffs),
            ("decode", "recomputed", decode.num_recomputed),
        ):
            handoffs.add_metric((side, result), count)
        yield handoffs
        for name, text, value in (
            ("baton_prompt_tokens", "Prompt tokens of requests begun.", totals.num_prompt_tokens),
            ("baton_cached_tokens", "Prompt tokens found in cache.", totals.num_cached_tokens),
            ("baton_generation_tokens", "Tokens drawn here.", totals.num_generated_tokens),
            ("baton_preemptions", "Sequences that lost their blocks.", totals.num_preemptions),
            ("baton_engine_steps", "Engine steps committed.", steps.num_steps),
            ("baton_engine_failed_steps", "Engine steps that raised.", steps.num_failed_steps),
            ("baton_engine_tokens", "Tokens computed.", steps.num_tokens),
            ("baton_engine_execute_seconds", "Time in the runner.", steps.execute_s),
            ("baton_engine_host_seconds", "Time in schedule and commit.", steps.host_s),
            ("baton_kv_pulled_blocks", "Blocks of KV pulled.", decode.num_pulled_blocks),
            ("baton_kv_pulled_bytes", "Bytes of KV pulled.", decode.num_pulled_bytes),
            ("baton_kv_pull_seconds", "Time in pulls.", decode.pull_s),
        ):
            yield CounterMetricFamily(name, text, value=float(value))
        runner: object = self._loop.runner
        if isinstance(runner, EmulatedRunner):
            for name, text, value in (
                ("baton_emulated_host_seconds", "Work within emulated steps.", runner.host_s),
                ("baton_emulated_late_seconds", "Emulated steps longer than asked.", runner.late_s),
                ("baton_emulated_faults", "Sequences whose blocks were wrong.", runner.num_faults),
            ):
                yield CounterMetricFamily(name, text, value=float(value))

    def _transfers(self) -> Iterable[Metric]:
        names = self._transports.names
        pulls = CounterMetricFamily(
            "baton_kv_pulls", "Pulls that verified, by transport.", labels=("transport",)
        )
        for name in names:
            pulls.add_metric((name,), self._decode.counters.num_pulls[name])
        yield pulls
        faults = CounterMetricFamily(
            "baton_kv_transfer_faults",
            "Attempts to pull that failed, mended by another transport or not.",
            labels=("transport", "fault"),
        )
        counted = self._transports.faults
        for name in (*names, NO_TRANSPORT):
            for fault in TransferFault:
                faults.add_metric((name, fault), counted.get((name, fault), 0))
        yield faults


def make_registry(
    parts: InstanceParts, process: psutil.Process, role: RoleSwitch
) -> CollectorRegistry:
    """A registry of its own: several instances may live in one test process."""
    registry = CollectorRegistry()
    registry.register(InstanceCollector(parts, process, role))
    if parts.pool is not None:
        registry.register(PoolSideCollector(parts.pool, parts.prefill))
    return registry
