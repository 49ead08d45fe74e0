"""An external store as a tier: what the pool may expect of one, whatever the store promises.

Between the pool and the store (``Values``) stands :class:`CheckedStore`. It verifies each block,
counts what goes wrong instead of raising it, bounds each call, and leaves a store alone that keeps
failing. A block that is not there, late or wrong is a miss: it is computed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from baton.core.blocks import BlockKey
from kvpool.breaker import Breaker
from kvpool.external_values import (
    HEADER_BYTES,
    StoreFailed,
    Values,
    WrongChecksum,
    WrongLength,
    pack_header,
    unpack,
)
from kvpool.tiers import BlockMeta

log = logging.getLogger(__name__)

_MAX_NAMES = 256


@dataclasses.dataclass(slots=True)
class ExternalStatistics:
    """Counts since the start. Blocks, unless said otherwise."""

    hits: int = 0
    """Arrived and verified."""
    misses: int = 0
    """Asked for and not there."""
    stored: int = 0
    """Accepted by the store, which may drop them at any time."""
    refused: int = 0
    """Not accepted: the store is full, or the block too large."""
    wrong_lengths: int = 0
    wrong_checksums: int = 0
    errors: int = 0
    """Calls that the store failed at."""
    late: int = 0
    """Calls that took too long."""
    skipped: int = 0
    """Calls not made, because the store was being left alone."""


class ExternalStore(Protocol):
    """A tier in a store that is not ours. Any thread may call; all block, for a bounded time.

    Nothing is raised for what the store does wrong: it is counted.
    """

    def match(self, keys: Sequence[BlockKey]) -> int:
        """How many of the keys, from the first on, the store says it has. It may be wrong."""

    def get(self, keys: Sequence[BlockKey], into: Sequence[memoryview]) -> int:
        """Read blocks to ``into``; returns how many, from the first on, arrived and are verified.

        What lies in the others is garbage. Raises ValueError if there is not one target per key.
        """

    def put(self, blocks: Sequence[tuple[BlockMeta, memoryview]]) -> int:
        """Store blocks; returns how many, from the first on, the store accepted.

        The memory is not looked at any more after the return.
        """

    def statistics(self) -> ExternalStatistics:
        """A copy of the counts."""

    def close(self) -> None:
        """Release everything. Idempotent."""


class CheckedStore:
    """An :class:`ExternalStore` over ``values``, for blocks of one layout.

    ``timeout_s``: bound of each call. ``name``: for messages.
    """

    def __init__(
        self,
        values: Values,
        *,
        name: str,
        layout: str,
        timeout_s: float = 5.0,
        breaker: Breaker | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._values = values
        self._name = name
        digest = hashlib.blake2b(layout.encode(), digest_size=8).hexdigest()
        self._prefix = f"baton/{digest}/"
        self._timeout_s = timeout_s
        self._breaker = breaker if breaker is not None else Breaker()
        self._clock = clock
        self._lock = threading.Lock()
        self._counts = ExternalStatistics()
        self._closed = False

    def match(self, keys: Sequence[BlockKey]) -> int:
        """See :class:`ExternalStore`."""
        return self._guarded(lambda call: self._match(call, keys)) if keys else 0

    def get(self, keys: Sequence[BlockKey], into: Sequence[memoryview]) -> int:
        """See :class:`ExternalStore`."""
        if len(keys) != len(into):
            raise ValueError(f"{len(keys)} keys for {len(into)} blocks")
        return self._guarded(lambda call: self._get(call, keys, into)) if keys else 0

    def put(self, blocks: Sequence[tuple[BlockMeta, memoryview]]) -> int:
        """See :class:`ExternalStore`."""
        return self._guarded(lambda call: self._put(call, blocks)) if blocks else 0

    def statistics(self) -> ExternalStatistics:
        """See :class:`ExternalStore`."""
        with self._lock:
            return dataclasses.replace(self._counts)

    def close(self) -> None:
        """See :class:`ExternalStore`."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._values.close()

    def _guarded(self, work: Callable[[_Call], None]) -> int:
        with self._lock:
            if self._closed or not self._breaker.allows(self._clock()):
                self._counts.skipped += 1
                return 0
        call = _Call(time.monotonic() + self._timeout_s)
        why = ""
        try:
            work(call)
        except TimeoutError as error:
            call.counts.late += 1
            why = str(error) or f"no answer within {self._timeout_s:g} s"
        except (WrongLength, WrongChecksum, StoreFailed) as error:
            why = str(error)
            if isinstance(error, StoreFailed):
                call.counts.errors += 1
        except Exception as error:
            log.exception("%s failed", self._name)
            call.counts.errors += 1
            why = repr(error)
        self._finish(call, why)
        return call.done

    def _finish(self, call: _Call, why: str) -> None:
        with self._lock:
            for field in dataclasses.fields(self._counts):
                total = getattr(self._counts, field.name) + getattr(call.counts, field.name)
                setattr(self._counts, field.name, total)
            if why:
                changed = self._breaker.failed(self._clock())
                pause_s = self._breaker.pause_s
            else:
                changed = self._breaker.succeeded()
        if changed and why:
            log.warning(
                "%s keeps failing and is left alone, at first for %g s: %s",
                self._name,
                pause_s,
                why,
            )
        elif changed:
            log.info("%s works again", self._name)

    def _match(self, call: _Call, keys: Sequence[BlockKey]) -> None:
        for at in range(0, len(keys), _MAX_NAMES):
            names = [self._named(key) for key in keys[at : at + _MAX_NAMES]]
            found = self._values.exist(names, call.left_s())
            if False in found:
                call.done += found.index(False)
                return
            call.done += len(found)

    def _get(self, call: _Call, keys: Sequence[BlockKey], into: Sequence[memoryview]) -> None:
        sizes = [HEADER_BYTES + len(target) for target in into]
        for start, end in self._batches(sizes):
            names = [self._named(key) for key in keys[start:end]]
            with self._values.load(names, sizes[start:end], call.left_s()) as values:
                for index, value in enumerate(values, start):
                    if value is None:
                        call.counts.misses += len(keys) - index
                        return
                    if isinstance(value, StoreFailed):
                        raise value
                    self._take(call, keys[index], value, into[index])

    def _take(self, call: _Call, key: BlockKey, value: memoryview, into: memoryview) -> None:
        try:
            unpack(value, key, into)
        except (WrongLength, WrongChecksum) as error:
            if isinstance(error, WrongLength):
                call.counts.wrong_lengths += 1
            else:
                call.counts.wrong_checksums += 1
            # Stores keep the old value for a name: as long as this one is there, no good one is.
            self._values.drop(self._named(key), call.left_s())
            raise
        call.counts.hits += 1
        call.done += 1

    def _put(self, call: _Call, blocks: Sequence[tuple[BlockMeta, memoryview]]) -> None:
        sizes = [HEADER_BYTES + len(payload) for _, payload in blocks]
        for start, end in self._batches(sizes):
            part = blocks[start:end]
            names = [self._named(meta.key) for meta, _ in part]
            values = [(pack_header(meta, payload), payload) for meta, payload in part]
            stored = self._values.save(names, values, call.left_s())
            call.counts.stored += stored
            call.done += stored
            if stored < len(part):
                # Full, which is no reason to leave it alone.
                call.counts.refused += len(blocks) - call.done
                return

    def _batches(self, sizes: Sequence[int]) -> list[tuple[int, int]]:
        """Consecutive blocks, as many at a time as may be moved at once, but one at least."""
        batches = []
        start = total = 0
        for index, size in enumerate(sizes):
            full = total + size > self._values.batch_bytes or index - start >= _MAX_NAMES
            if full and index > start:
                batches.append((start, index))
                start, total = index, 0
            total += size
        batches.append((start, len(sizes)))
        return batches

    def _named(self, key: BlockKey) -> str:
        return self._prefix + key.hex()


class _Call:
    """What one call has achieved so far, so that a failure does not lose it."""

    def __init__(self, deadline: float) -> None:
        self._deadline = deadline
        self.done = 0
        self.counts = ExternalStatistics()

    def left_s(self) -> float:
        """Seconds. Raises TimeoutError when none are left."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left
