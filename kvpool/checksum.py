"""The checksum of KV bytes, wherever they lie or travel."""

from __future__ import annotations

import xxhash


def checksum(data: memoryview | bytes) -> int:
    """xxh3-64."""
    return xxhash.xxh3_64_intdigest(data)
