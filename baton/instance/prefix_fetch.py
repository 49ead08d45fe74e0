"""Prefixes from the pool: brought into an instance's cache before the rest is computed.

A sequence that is to fetch waits like one whose KV another instance computes: *hold* asks the pool
node what it has (and keeps it there), *Reserved* says that the engine has blocks, then a transport
thread copies and verifies, and the engine computes what is missing. Others are computed
meanwhile. Whatever fails (no pool node, a late answer, a wrong checksum) is a shorter prefix.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence

from baton.core.blocks import BlockKey
from baton.engine.events import Reserved
from baton.instance.fetch_rule import ALL_TIERS, FetchRule, Missing
from kvpool.block_io import BlockMover
from kvpool.pool_link import Hold, PoolLink
from kvpool.tiers import Tier

log = logging.getLogger(__name__)

_LOAD_TIMEOUT_S = 5.0
_NUM_THREADS = 1
_MAX_ATTRIBUTED = 4096


@dataclasses.dataclass(slots=True)
class _Fetch:
    keys: Sequence[BlockKey]
    skip: int
    """Leading blocks that were cached here when the pool was asked."""
    missing: Missing
    opened_s: float
    own_blocks: tuple[int, ...] | None = None
    num_cached: int = 0
    """Leading blocks that are cached here, once ``own_blocks`` are reserved."""
    hold: Hold | None = None
    asking: bool = True
    loading: bool = False
    aborted: bool = False
    doubtful: BlockKey | None = None
    """Key of the block at which the copy ended."""


@dataclasses.dataclass(slots=True)
class FetchCounters:
    """Totals since the start, for metrics."""

    num_asked: int = 0
    num_not_asked: int = 0
    """Prefixes that the pool was not asked for: to compute them was predicted to be faster."""
    num_not_worth: int = 0
    """The same, after the pool had said what it has."""
    num_corrupt: int = 0
    """Fetches that ended at a block that was late, changed, or not what its checksum says."""
    num_blocks: collections.Counter[Tier] = dataclasses.field(default_factory=collections.Counter)
    """By the tier they came from."""
    fetch_s: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class FetchHooks:
    """How the fetcher acts on its instance, on the event loop."""

    fetched: Callable[[str, int], bool]
    """(sequence_id, valid tokens): the engine computes the rest."""
    engine_abort: Callable[[str], None]
    """The sequence's blocks may be freed."""
    stage: Callable[[str, str], None]
    missing: Callable[[Sequence[BlockKey]], None] = lambda keys: None
    """The pool was asked for these and does not have them."""


class PrefixFetcher:
    """Fetches for one instance. ``mover`` copies between its cache and the host tier."""

    def __init__(
        self,
        hooks: FetchHooks,
        link: PoolLink,
        mover: BlockMover,
        rule: FetchRule,
        *,
        block_size: int,
        timeout_s: float,
    ) -> None:
        """``timeout_s``: how long the pool node may take to bring blocks up to the host tier."""
        self._hooks = hooks
        self._link = link
        self._mover = mover
        self.rule = rule
        self._block_size = block_size
        self._timeout_s = timeout_s
        self._fetches: dict[str, _Fetch] = {}
        self._tiers: collections.OrderedDict[str, dict[Tier, int]] = collections.OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = concurrent.futures.ThreadPoolExecutor(
            _NUM_THREADS, thread_name_prefix="kv-fetch"
        )
        self.counters = FetchCounters()

    @property
    def faults(self) -> Mapping[str, int]:
        """Fetches that ended at a bad block, by ``kvpool.transport.TransferFault``."""
        return self._mover.faults

    @property
    def num_open(self) -> int:
        """Sequences that wait for a prefix."""
        return len(self._fetches)

    def missing(
        self, num_blocks: int, num_cached: int, num_tokens: int, waiting: Callable[[], int]
    ) -> Missing | None:
        """What to ask the pool for; ``None``: nothing, as far as can be told before it answers.

        Args:
            num_blocks: of the prompt's beginning, which a cache may have.
            num_cached: of these, the first ones, which are here.
            num_tokens: of the whole prompt.
            waiting: counts the prompt tokens that will be computed before it.
        """
        num_missing = num_blocks - num_cached
        if num_missing <= 0:
            return None
        queue_s = self.rule.queue_s(waiting()) if self.rule.policy == "auto" else 0.0
        missing = Missing(num_cached * self._block_size, num_missing, num_tokens, queue_s)
        tiers = self.rule.tiers_to_ask(missing)
        if tiers:
            return dataclasses.replace(missing, tiers=tiers)
        self.counters.num_not_asked += 1
        return None

    def open(
        self,
        sequence_id: str,
        keys: Sequence[BlockKey],
        num_cached: int,
        missing: Missing | None = None,
    ) -> None:
        """The engine took a sequence with ``fetch``; its first ``num_cached`` blocks are here.
        ``missing``: as it was decided on; by default, that the prompt ends with its keys."""
        if missing is None:
            here, total = num_cached * self._block_size, len(keys) * self._block_size
            missing = Missing(here, len(keys) - num_cached, total + 1)
        fetch = self._fetches[sequence_id] = _Fetch(keys, num_cached, missing, time.monotonic())
        self.counters.num_asked += 1
        task = asyncio.ensure_future(self._ask(sequence_id, fetch))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def on_reserved(self, event: Reserved) -> None:
        """The engine has blocks for a sequence."""
        fetch = self._fetches.get(event.request_id)
        if fetch is not None:
            fetch.own_blocks = event.blocks
            fetch.num_cached = event.num_cached_tokens // self._block_size
            self._advance(event.request_id, fetch)

    def abort(self, sequence_id: str) -> bool:
        """End a fetch; its blocks are freed once nothing writes to them. False: it is no fetch."""
        fetch = self._fetches.get(sequence_id)
        if fetch is None:
            return False
        fetch.aborted = True
        if not fetch.loading:
            self._settle(sequence_id, fetch, 0)
        return True

    def take_tiers(self, sequence_id: str) -> dict[Tier, int]:
        """Tokens of its prompt that came from each tier below this instance's cache."""
        return self._tiers.pop(sequence_id, {})

    async def stop(self) -> None:
        """End what runs. Bounded by the time limit of a copy."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.get_running_loop().run_in_executor(None, self._thread.shutdown)

    async def _ask(self, sequence_id: str, fetch: _Fetch) -> None:
        started = time.monotonic()
        try:
            fetch.hold = await self._link.hold(
                fetch.keys,
                skip=fetch.skip,
                timeout_s=self._timeout_s,
                tiers=fetch.missing.tiers,
            )
        except Exception:  # a bug must not leave the sequence waiting
            log.exception("asking the pool for %s", sequence_id)
        fetch.asking = False
        slots = () if fetch.hold is None else fetch.hold.slots
        found = collections.Counter(slot.tier for slot in slots)
        self.rule.answered(len(fetch.keys), found, time.monotonic() - started)
        if fetch.missing.tiers in ((), ALL_TIERS):
            self._hooks.missing(fetch.keys[fetch.skip + len(slots) :])
        if fetch.aborted:
            if fetch.hold is not None:
                self._link.release(fetch.hold.hold_id)
            return
        if fetch.hold is None:
            self._settle(sequence_id, fetch, 0)
        elif not self.rule.worth_fetching(_as_of_now(fetch), found):
            self.counters.num_not_worth += 1
            self._settle(sequence_id, fetch, 0)
        else:
            self._hooks.stage(sequence_id, "pool_hit")
            self._advance(sequence_id, fetch)

    def _advance(self, sequence_id: str, fetch: _Fetch) -> None:
        """Begin to copy once there are blocks on both sides."""
        hold, own = fetch.hold, fetch.own_blocks
        if hold is None or own is None or fetch.loading:
            return
        first = fetch.num_cached - fetch.skip
        slots = hold.slots[first:] if first >= 0 else ()
        if not slots:
            # Cached here by now; or, evicted meanwhile, it would leave a hole before what is held.
            self._settle(sequence_id, fetch, 0)
            return
        blocks = own[fetch.num_cached : fetch.num_cached + len(slots)]
        slots = slots[: len(blocks)]
        fetch.loading = True
        started = time.monotonic()
        future = asyncio.get_running_loop().run_in_executor(
            self._thread,
            self._mover.load,
            hold.arena,
            slots,
            blocks,
            started + _LOAD_TIMEOUT_S,
        )

        def loaded(future: asyncio.Future[int]) -> None:
            count = 0
            if not future.cancelled() and future.exception() is None:
                count = future.result()
            elif not future.cancelled():
                log.error("copying a prefix for %s", sequence_id, exc_info=future.exception())
            fetch.loading = False
            seconds = time.monotonic() - started
            self.counters.fetch_s += seconds
            found = collections.Counter(slot.tier for slot in slots[:count])
            self.rule.fetched(found, seconds)
            if count < len(slots):
                self.counters.num_corrupt += 1
                fetch.doubtful = fetch.keys[fetch.num_cached + count]
            self.counters.num_blocks.update(found)
            if found and not fetch.aborted:
                self._attribute(sequence_id, found)
            self._settle(sequence_id, fetch, fetch.num_cached + count)

        future.add_done_callback(loaded)

    def _attribute(self, sequence_id: str, found: collections.Counter[Tier]) -> None:
        self._tiers[sequence_id] = {tier: n * self._block_size for tier, n in found.items()}
        while len(self._tiers) > _MAX_ATTRIBUTED:
            self._tiers.popitem(last=False)

    def _settle(self, sequence_id: str, fetch: _Fetch, num_valid_blocks: int) -> None:
        if self._fetches.get(sequence_id) is fetch:
            del self._fetches[sequence_id]
        if fetch.hold is not None:
            self._link.release(fetch.hold.hold_id, fetch.doubtful)
        if fetch.aborted:
            self._hooks.engine_abort(sequence_id)
            return
        if num_valid_blocks:
            self._hooks.stage(sequence_id, "prefix_fetched")
        self._hooks.fetched(sequence_id, num_valid_blocks * self._block_size)


def _as_of_now(fetch: _Fetch) -> Missing:
    """What waited before it has been computed meanwhile."""
    passed_s = time.monotonic() - fetch.opened_s
    left_s = max(0.0, fetch.missing.queue_s - passed_s)
    return dataclasses.replace(fetch.missing, queue_s=left_s)
