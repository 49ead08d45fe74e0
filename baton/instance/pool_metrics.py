"""What an instance's side of the pool says of itself. Absent where an instance has none."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from baton.instance.pool_side import PoolSide
from kvpool.tiers import Tier
from kvpool.transport import TransferFault
from prefill_worker.worker import PrefillWorker

_FETCH_FAULTS = (TransferFault.LATE, TransferFault.STALE, TransferFault.CORRUPT)


class PoolSideCollector(Collector):
    """Read at the scrape, on the instance's event loop; keeps no copies of its own."""

    def __init__(self, side: PoolSide, prefill: PrefillWorker) -> None:
        self._side = side
        self._prefill = prefill

    def collect(self) -> Iterable[Metric]:
        """See ``prometheus_client``."""
        yield from self._fetches()
        yield from self._write_back()
        link = self._side.link.counters
        for name, text, value in (
            ("baton_pool_link_failed_calls", "Pool calls without answer.", link.num_failed_calls),
            ("baton_pool_link_holds", "Questions that found a prefix.", link.num_holds),
            ("baton_pool_link_misses", "Questions that found none.", link.num_misses),
            (
                "baton_kv_spilled_blocks",
                "Blocks moved out of the way.",
                self._side.spill.num_blocks,
            ),
            (
                "baton_kv_spilled_handoffs",
                "Handoffs whose blocks went to the host tier, for want of room here.",
                self._prefill.counters.num_spilled,
            ),
        ):
            yield CounterMetricFamily(name, text, value=float(value))

    def _fetches(self) -> Iterable[Metric]:
        fetcher = self._side.fetcher
        counters = fetcher.counters
        yield GaugeMetricFamily(
            "baton_kv_fetches_open", "Sequences that wait for a prefix.", value=fetcher.num_open
        )
        fetches = CounterMetricFamily(
            "baton_kv_fetches", "Prefixes asked for, by what became of them.", labels=("outcome",)
        )
        fetches.add_metric(("asked",), counters.num_asked)
        fetches.add_metric(("not_asked",), counters.num_not_asked)
        fetches.add_metric(("not_worth",), counters.num_not_worth)
        fetches.add_metric(("cut_short",), counters.num_corrupt)
        yield fetches
        faults = CounterMetricFamily(
            "baton_kv_fetch_faults", "Fetches that ended at a bad block.", labels=("fault",)
        )
        for fault in _FETCH_FAULTS:
            faults.add_metric((fault,), fetcher.faults.get(fault, 0))
        yield faults
        blocks = CounterMetricFamily(
            "baton_kv_fetched_blocks", "Blocks that came from the pool, by tier.", labels=("tier",)
        )
        for tier in Tier:
            if tier is not Tier.DEVICE:
                blocks.add_metric((tier,), counters.num_blocks[tier])
        yield blocks
        yield CounterMetricFamily(
            "baton_kv_fetch_seconds", "Time in copies of prefixes.", value=counters.fetch_s
        )

    def _write_back(self) -> Iterable[Metric]:
        write_back = self._side.write_back
        if write_back is None:
            return
        counters = write_back.counters
        yield GaugeMetricFamily(
            "baton_kv_write_back_queued",
            "Blocks that wait to be offered to the pool.",
            value=write_back.num_queued,
        )
        blocks = CounterMetricFamily(
            "baton_kv_write_back_blocks",
            "Blocks offered to the pool, by what became of them.",
            labels=("outcome",),
        )
        for outcome, count in (
            ("written", counters.num_written),
            ("declined", counters.num_declined),
            ("lost", counters.num_lost),
            ("dropped", counters.num_dropped),
        ):
            blocks.add_metric((outcome,), count)
        yield blocks
