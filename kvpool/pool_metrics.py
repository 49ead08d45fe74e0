"""What a pool node says of itself: for Prometheus, and for ``baton kv``."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvpool.arena_owners import ArenaOwners
from kvpool.host_tier import HostTier
from kvpool.tiers import Tier

_HOST_STATES = ("free", "filling", "quarantined", "idle", "held")


class PoolCollector(Collector):
    """Read at the scrape, so that no number can be stale."""

    def __init__(self, owners: ArenaOwners, tier: Callable[[], HostTier | None]) -> None:
        self._owners = owners
        self._tier = tier

    def collect(self) -> Iterable[Metric]:
        """The families."""
        arenas = self._owners.arenas()
        yield GaugeMetricFamily(
            "baton_pool_arenas", "Arena files that this pool node owns.", len(arenas)
        )
        yield GaugeMetricFamily(
            "baton_pool_arena_bytes",
            "Bytes of shared memory reserved by arenas.",
            sum(arena.header.num_bytes for arena in arenas),
        )
        tier = self._tier()
        if tier is None:
            return
        host = tier.table.statistics()
        slots = GaugeMetricFamily(
            "baton_pool_host_blocks", "Slots of the host tier by state.", labels=("state",)
        )
        for state in _HOST_STATES:
            slots.add_metric((state,), getattr(host, f"num_{state}"))
        yield slots
        numbers = tier_numbers(tier)
        for name, text in _GAUGES.items():
            if name in numbers:
                yield GaugeMetricFamily(name, text, numbers[name])
        for name, text in _COUNTERS.items():
            if name in numbers:
                yield CounterMetricFamily(name, text, value=numbers[name])
        remote = tier.promotion.remote
        if remote is not None:
            faults = CounterMetricFamily(
                "baton_pool_remote_faults",
                "Fetches from other machines that failed, by fault.",
                labels=("fault",),
            )
            for fault, count in remote.faults.items():
                faults.add_metric((fault,), count)
            yield faults


_GAUGES = {
    "baton_pool_host_bytes": "Bytes of the host tier.",
    "baton_pool_host_tickets": "Slots that somebody fills.",
    "baton_pool_host_holds": "Prefixes that somebody reads.",
    "baton_pool_disk_blocks": "Blocks in the disk tier.",
    "baton_pool_disk_bytes": "Bytes of the disk tier's files.",
    "baton_pool_disk_suspended": "1 while nothing is written, after a failed write.",
    "baton_pool_external_connected": "1 once the external store could be opened.",
    "baton_pool_external_queued": "Blocks that wait to be written to the external store.",
}
_EXTERNAL = {
    "hits": "Blocks that the external store had, and that verified.",
    "misses": "Blocks that it said it had, and had not.",
    "refused": "Blocks that it did not take.",
    "wrong_lengths": "Blocks of the external store with more or fewer bytes than were stored.",
    "wrong_checksums": "Blocks of the external store that are not what was stored.",
    "errors": "Calls that the external store failed at.",
    "late": "Calls that the external store took too long for.",
    "skipped": "Calls not made, because it was left alone after failures.",
}
_COUNTERS = {
    "baton_pool_host_hits": "Blocks that lookups found.",
    "baton_pool_host_misses": "Blocks that lookups asked for and did not find.",
    "baton_pool_host_published": "Blocks that were written.",
    "baton_pool_host_evictions": "Blocks that had to go.",
    "baton_pool_host_declined": "Blocks that got no slot: others are asked for more, or in use.",
    "baton_pool_host_expired": "Leases that nobody renewed.",
    "baton_pool_host_damaged": "Blocks in memory that were not what was written.",
    "baton_pool_disk_hits": "Blocks read from disk.",
    "baton_pool_disk_misses": "Blocks that could not be read from disk, or did not verify.",
    "baton_pool_disk_corrupt": "Damaged records, segments and blocks.",
    "baton_pool_disk_torn": "Writes that were never completed.",
    "baton_pool_disk_write_errors": "Writes that failed.",
    "baton_pool_promoted_disk": "Blocks brought up from disk.",
    "baton_pool_promoted_remote": "Blocks fetched from other machines.",
    "baton_pool_failed_disk": "Blocks that were to come from disk and did not.",
    "baton_pool_failed_remote": "Blocks that were to come from other machines and did not.",
    "baton_pool_demoted": "Blocks written to disk.",
    "baton_pool_promoted_external": "Blocks brought up from the external store.",
    "baton_pool_failed_external": "Blocks that were to come from the external store and did not.",
    "baton_pool_external_stored": "Blocks that the external store accepted.",
    "baton_pool_external_unwritten": "Blocks not offered to it: too many waited, or evicted first.",
    **{f"baton_pool_external_{name}": text for name, text in _EXTERNAL.items()},
}


def tier_numbers(tier: HostTier) -> dict[str, float]:
    """The tiers of one machine in numbers, by the names of their metrics."""
    host, counters = tier.table.statistics(), tier.counters
    numbers: dict[str, float] = {
        "baton_pool_host_slots": host.num_slots,
        "baton_pool_host_used": host.num_idle + host.num_held,
        "baton_pool_host_bytes": host.num_slots * tier.spec.slot_bytes,
        "baton_pool_host_tickets": host.num_tickets,
        "baton_pool_host_holds": host.num_holds,
        "baton_pool_host_hits": host.num_hits,
        "baton_pool_host_misses": host.num_misses,
        "baton_pool_host_published": host.num_published,
        "baton_pool_host_evictions": host.num_evictions,
        "baton_pool_host_declined": host.num_not_admitted + host.num_full,
        "baton_pool_host_expired": host.num_expired,
        "baton_pool_host_damaged": counters.num_damaged,
        "baton_pool_promoted_disk": counters.num_promoted[Tier.DISK],
        "baton_pool_promoted_remote": counters.num_promoted[Tier.REMOTE],
        "baton_pool_failed_disk": counters.num_failed[Tier.DISK],
        "baton_pool_failed_remote": counters.num_failed[Tier.REMOTE],
        "baton_pool_demoted": counters.num_demoted,
    }
    if tier.disk is not None:
        disk = tier.disk.statistics()
        numbers |= {
            "baton_pool_disk_blocks": disk.num_blocks,
            "baton_pool_disk_bytes": disk.num_bytes,
            "baton_pool_disk_max_bytes": disk.max_bytes,
            "baton_pool_disk_suspended": disk.suspended,
            "baton_pool_disk_hits": disk.num_hits,
            "baton_pool_disk_misses": disk.num_misses,
            "baton_pool_disk_corrupt": disk.num_corrupt,
            "baton_pool_disk_torn": disk.num_torn,
            "baton_pool_disk_write_errors": disk.num_write_errors,
        }
    if tier.external is not None:
        external, found = tier.external, tier.external.statistics()
        lost = external.counters.num_dropped + external.counters.num_gone
        numbers |= {
            "baton_pool_external_connected": external.connected,
            "baton_pool_external_queued": external.num_queued,
            "baton_pool_promoted_external": counters.num_promoted[Tier.EXTERNAL],
            "baton_pool_failed_external": counters.num_failed[Tier.EXTERNAL],
            "baton_pool_external_stored": found.stored,
            "baton_pool_external_unwritten": lost,
            **{f"baton_pool_external_{name}": getattr(found, name) for name in _EXTERNAL},
        }
    return numbers
