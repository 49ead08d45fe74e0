"""Python's garbage collector in the controller's process: rare, as it stops placements."""

from __future__ import annotations

import gc

_THRESHOLDS = (20_000, 50, 100)


def collect_rarely() -> None:
    """Call once, when the modules are loaded.

    A full collection walks through the index and the traces, hundreds of thousands of objects, for
    tens of milliseconds; and what placements make holds no cycles, so it frees next to nothing.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_THRESHOLDS)
