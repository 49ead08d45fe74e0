"""What the tests of external stores share."""

from __future__ import annotations

from kvpool.external_memory import StoreFault

COUNTED = {
    StoreFault.MISS: "misses",
    StoreFault.SHORT: "wrong_lengths",
    StoreFault.LONG: "wrong_lengths",
    StoreFault.FLIP: "wrong_checksums",
    StoreFault.SWAP: "wrong_checksums",
    StoreFault.FAIL: "errors",
    StoreFault.STALL: "late",
}
"""By what a store's fault is counted: a field of ``ExternalStatistics``."""
