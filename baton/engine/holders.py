"""Sequences by state, and what they hold: slots of the runner, blocks of the cache. Pure.

Memory: a sequence gets the blocks of all its known tokens when it starts, and one more at a time
while it decodes. When none is left, the last in rank gives its blocks back and is computed again
later. What an uncommitted plan writes to is given back only when that plan is committed; until
then the sequence that wanted a block sits a step out.

Offline work (priority below 0) gives its slots and blocks to online work that wants to start, and
ranks with it from the time on that its deadline demands. What a preempted sequence leaves in the
cache is offered to other tiers; offline work, which must count with that, offers it as it goes.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections import Counter

from baton.core.cluster import InstanceLoad
from baton.core.config import EngineConfig
from baton.core.request import Part
from baton.engine.block_manager import BlockManager
from baton.engine.events import PrefixComplete
from baton.engine.prefixes import completed_prefix
from baton.engine.sequence import RankedQueue, Sequence
from baton.engine.states import (
    HOLDS_BLOCKS,
    HOLDS_SLOT,
    LIVE_STATES,
    SequenceEvent,
    SequenceState,
    next_state,
)

_S, _E = SequenceState, SequenceEvent

OFFER_BLOCKS = 8
"""Offline work offers its blocks to other tiers so many at a time."""


@dataclasses.dataclass(slots=True)
class Tally:
    """What there is to do: tokens that wait to be computed, sequences that get one token a step and
    the tokens in their cache. Of all, and of offline work."""

    waiting_tokens: int = 0
    offline_waiting_tokens: int = 0
    decoding: int = 0
    context: int = 0
    offline_decoding: int = 0
    offline_context: int = 0


class Holders:
    """Queues, slots and blocks; ``Scheduler`` makes plans of them."""

    def __init__(self, config: EngineConfig, blocks: BlockManager) -> None:
        self.blocks = blocks
        self._max_num_seqs = config.max_num_seqs
        self._free_slots = list(range(config.max_num_seqs - 1, -1, -1))
        self._watermark = max(1, blocks.num_blocks // 100)
        self._queues: dict[SequenceState, RankedQueue] = {
            state: RankedQueue() for state in LIVE_STATES
        }
        self._ended: set[Sequence] = set()
        """Finished sequences that an uncommitted plan still contains."""
        self._num_short = 0
        """Sequences that sat out the last step for want of a block."""
        self._num_taken = 0
        """Sequences preempted in the last step for want of blocks."""
        self.preempted: list[str] = []
        """Request ids preempted since the engine last told about them."""
        self.num_preemptions = 0
        self.tightest_ttft_s: float | None = None
        """Of all online work that came here."""
        self.num_offline = 0
        """Sequences that yield."""
        self._rising: dict[int, Sequence] = {}
        """By arrival: those of them that will no longer."""
        self._risings: list[tuple[float, int]] = []
        """(when, arrival)."""
        self.track_cache = False
        """Whether ``offers`` are wanted."""
        self.offers: list[PrefixComplete] = []
        """What other tiers may copy, since the engine last told about it."""

    # Queues.

    def queue(self, state: SequenceState) -> RankedQueue:
        """The sequences in ``state`` (any but FINISHED), by rank; for reading."""
        return self._queues[state]

    def add(self, sequence: Sequence) -> None:
        """A new sequence, in the state it enters with."""
        self._queues[sequence.state].add(sequence)
        if not sequence.is_offline:
            ttft_s = sequence.submission.slo.ttft_s
            if ttft_s is not None and (
                self.tightest_ttft_s is None or ttft_s < self.tightest_ttft_s
            ):
                self.tightest_ttft_s = ttft_s
        else:
            self.num_offline += 1
            if sequence.rises_at_s is not None:
                arrival = sequence.rank[1]
                self._rising[arrival] = sequence
                heapq.heappush(self._risings, (sequence.rises_at_s, arrival))

    def rise(self, now: float) -> None:
        """Offline sequences whose time has come rank with online ones."""
        while self._risings and self._risings[0][0] <= now:
            sequence = self._rising.pop(heapq.heappop(self._risings)[1], None)
            if sequence is not None:
                self._raise(sequence)

    def _raise(self, sequence: Sequence) -> None:
        queue = self._queues[sequence.state]
        queue.remove(sequence)
        sequence.rank = (0, sequence.rank[1])
        queue.add(sequence)
        self.num_offline -= 1

    def move(self, sequence: Sequence, event: SequenceEvent) -> None:
        """Apply ``event``: state, queue, and slot and blocks that the new state does not hold."""
        state = next_state(sequence.state, event)
        self._queues[sequence.state].remove(sequence)
        sequence.state = state
        if state not in HOLDS_SLOT and sequence.slot is not None:
            self._free_slots.append(sequence.slot)
            sequence.slot = None
        if state is not _S.FINISHED:
            self._queues[state].add(sequence)
        else:
            if sequence.is_offline:
                self.num_offline -= 1
                self._rising.pop(sequence.rank[1], None)
            if sequence.num_plans:
                self._ended.add(sequence)
        self._settle(sequence)

    def _settle(self, sequence: Sequence) -> None:
        """Give the blocks back if it is time."""
        if sequence.num_plans:
            return
        if sequence.state is _S.PREEMPTED:
            self._offer(sequence)
            self.blocks.release(sequence.take_blocks())
            self.num_preemptions += 1
            self.preempted.append(sequence.request_id)
            self.move(sequence, _E.DRAINED)
        elif sequence.state is _S.FINISHED:
            self._ended.discard(sequence)
            self.blocks.release(sequence.take_blocks())

    def registered(self, sequence: Sequence) -> None:
        """More of its blocks are in the cache."""
        if sequence.num_registered - sequence.num_offered >= OFFER_BLOCKS and sequence.is_offline:
            self._offer(sequence)

    def _offer(self, sequence: Sequence) -> None:
        if self.track_cache and sequence.num_registered > sequence.num_offered:
            sequence.num_offered = sequence.num_registered
            self.offers.append(completed_prefix(sequence, self.blocks))

    # Memory.

    def _give_blocks(self, sequence: Sequence, *, ahead: Sequence | None) -> bool:
        """Blocks for all known tokens of a sequence that has none, the cached ones first.

        False, and nothing changed, if the blocks do not fit now. Sets ``num_computed`` and
        ``num_committed`` to what the cache held.
        """
        hits, num_blocks = self._needs(sequence, ahead)
        if num_blocks > self.blocks.num_available:
            return False
        self.blocks.acquire(hits)
        total = self.blocks.blocks_for(len(sequence.token_ids))
        sequence.blocks = hits + self.blocks.allocate(total - len(hits))
        sequence.num_registered = len(hits)
        sequence.num_computed = sequence.num_committed = len(hits) * self.blocks.block_size
        if not sequence.has_looked_up:
            sequence.has_looked_up = True
            sequence.num_cached_tokens = min(sequence.num_computed, sequence.num_prompt_tokens)
        return True

    def _needs(self, sequence: Sequence, ahead: Sequence | None) -> tuple[list[int], int]:
        """Cached blocks to start from, and how many blocks must be available for it.

        ``ahead``: the first of the other queue for memory; if it ranks before, its blocks are
        left for it, so that neither queue starves the other.
        """
        hits, num_blocks = self._wants(sequence)
        if ahead is not None and ahead.rank < sequence.rank:
            num_blocks += self._wants(ahead)[1]
        if self._queues[_S.RUNNING] or self._queues[_S.READY]:
            num_blocks += self._watermark + self._num_short
        return hits, num_blocks

    def _wants(self, sequence: Sequence) -> tuple[list[int], int]:
        """Cached blocks to start from, and how many available blocks starting takes in all."""
        blocks = self.blocks
        hits: list[int] = []
        if blocks.enable_prefix_cache and not sequence.owes_prompt_logprobs:
            blocks.extend_keys(sequence.keys, sequence.token_ids, salt=sequence.salt)
            # The last token is always computed: its logits are what is wanted.
            hits = blocks.match(sequence.keys[: (len(sequence.token_ids) - 1) // blocks.block_size])
        num_new = blocks.blocks_for(len(sequence.token_ids)) - len(hits)
        return hits, num_new + blocks.num_idle_among(hits)

    def reserve(self) -> list[Sequence]:
        """Blocks for ``PENDING_BLOCKS`` sequences, in order, as far as memory reaches."""
        reserved: list[Sequence] = []
        waiting = self._queues[_S.WAITING].first
        for sequence in list(self._queues[_S.PENDING_BLOCKS]):
            if self.num_offline and not sequence.is_offline:
                self._make_way(*self._needs(sequence, waiting), 0)
            if not self._give_blocks(sequence, ahead=waiting):
                break
            self.move(sequence, _E.RESERVE)
            reserved.append(sequence)
        return reserved

    def _grow(self, sequence: Sequence) -> bool:
        """Make sure that one more token has a place; preempts from the end of the order."""
        if sequence.num_computed < len(sequence.blocks) * self.blocks.block_size:
            return True
        if not self.blocks.num_available and not self._make_room(sequence):
            return False
        sequence.blocks += self.blocks.allocate(1)
        return True

    def _make_room(self, sequence: Sequence) -> bool:
        """Preempt until a block is free now, or enough will be when plans are committed."""
        self._num_short += 1
        while self._num_promised() < self._num_short:
            victim = self._victim()
            if victim is None:
                return False
            self._num_taken += 1
            self.move(victim, _E.PREEMPT)
            if victim is sequence:
                self._num_short -= 1
                return False
            if self.blocks.num_available:
                self._num_short -= 1
                return True
        return False

    def _make_way(self, hits: list[int], num_blocks: int, num_slots: int) -> bool:
        """Preempt offline sequences until so many blocks and slots are there, or will be when plans
        are committed; but nobody if that is not enough. ``hits`` are needed beside those blocks."""
        blocks = num_blocks - self.blocks.num_available
        slots = num_slots - len(self._free_slots)
        if blocks > 0:
            blocks -= self._num_promised()
        victims: list[Sequence] = []
        # Of a block that several have, the last one's end makes it available.
        taken: Counter[int] = Counter()
        kept = set(hits)
        for victim in self._offline_victims() if blocks > 0 or slots > 0 else ():
            if blocks <= 0 and (slots <= 0 or victim.slot is None):
                continue
            victims.append(victim)
            slots -= victim.slot is not None
            for block in victim.blocks:
                taken[block] += 1
                last = taken[block] == self.blocks.num_references(block)
                blocks -= last and block not in kept
        if blocks > 0 or slots > 0:
            return False
        for victim in victims:
            self.move(victim, _E.PREEMPT)
        return True

    def _offline_victims(self) -> list[Sequence]:
        """The last in rank first."""
        found = [
            sequence
            for state in (_S.RUNNING, _S.READY)
            for sequence in self._queues[state].offline()
            if not self._draws_last(sequence)
        ]
        return sorted(found, key=lambda item: item.rank, reverse=True)

    def _draws_last(self, sequence: Sequence) -> bool:
        """Whether an uncommitted plan draws the last token that it can have here."""
        return sequence.draws_last_token

    def _num_promised(self) -> int:
        """Blocks that come free when the uncommitted plans are committed."""
        ending = [
            sequence
            for sequence in self._queues[_S.RUNNING]
            if self._draws_last(sequence) and sequence.part is not Part.PREFILL
        ]
        return sum(
            self.blocks.num_references(block) == 1
            for sequence in (*self._queues[_S.PREEMPTED], *self._ended, *ending)
            for block in sequence.blocks
        )

    def _victim(self) -> Sequence | None:
        """The last in rank of those that preemption can help with.

        Not one that is about to be done: its blocks come free, or are held, with the next commit.
        """
        candidates = [
            sequence
            for state in (_S.RUNNING, _S.READY)
            for sequence in self._queues[state]
            if not sequence.draws_last_token
        ]
        return max(candidates, key=lambda item: item.rank, default=None)

    # Accounts.

    def _running(self) -> list[Sequence]:
        """Running sequences that a step has to look at, by rank."""
        return list(self._queues[_S.RUNNING])

    def tally(self) -> Tally:
        """What there is to do now."""
        tally = Tally()
        for sequence in (*self._queues[_S.WAITING], *self._queues[_S.READY], *self._running()):
            state, uncomputed = sequence.state, sequence.num_uncomputed
            offline = sequence.is_offline
            if uncomputed > 1 or state is _S.WAITING:
                tally.waiting_tokens += uncomputed
                tally.offline_waiting_tokens += uncomputed * offline
            elif state is _S.RUNNING and sequence.part is not Part.PREFILL:
                tally.decoding += 1
                tally.context += sequence.num_computed
                tally.offline_decoding += offline
                tally.offline_context += sequence.num_computed * offline
        return tally

    def _planned(self) -> list[Sequence]:
        """Of each row of each uncommitted plan."""
        return []

    def load(self, *, num_steps: int, num_finished: int) -> InstanceLoad:
        """What ``Engine.load`` says."""
        count = {state: len(queue) for state, queue in self._queues.items()}
        tally, statistics = self.tally(), self.blocks.statistics()
        return InstanceLoad(
            num_waiting=count[_S.WAITING] + count[_S.PREEMPTED],
            num_running=count[_S.RUNNING] + count[_S.READY],
            num_pending_kv=count[_S.PENDING_BLOCKS] + count[_S.PENDING_KV],
            num_held=count[_S.HELD],
            num_waiting_tokens=tally.waiting_tokens,
            num_offline_waiting_tokens=tally.offline_waiting_tokens,
            num_decoding=tally.decoding,
            num_context_tokens=tally.context,
            num_offline_decoding=tally.offline_decoding,
            num_offline_context_tokens=tally.offline_context,
            num_free_blocks=statistics.num_free,
            num_cached_blocks=statistics.num_idle,
            num_steps=num_steps,
            num_finished=num_finished,
            num_preemptions=self.num_preemptions,
        )

    def check_integrity(self) -> None:
        """Every block, slot and row is accounted for; raises AssertionError with details."""
        references: dict[int, int] = {}
        rows = self._planned()
        slots = list(self._free_slots)
        live = [sequence for queue in self._queues.values() for sequence in queue]
        for sequence in (*live, *self._ended):
            name, state = sequence.request_id, sequence.state
            assert bool(sequence.slot is not None) == (state in HOLDS_SLOT), f"{name}: slot"
            if state is not _S.FINISHED:
                assert bool(sequence.blocks) == (state in HOLDS_BLOCKS), f"{name}: blocks"
                assert sequence in self._queues[state], f"{name}: not in the queue of {state}"
            known = len(sequence.token_ids) + sequence.num_in_flight
            assert sequence.num_committed <= sequence.num_computed <= known, f"{name}: counts"
            assert len(set(sequence.blocks)) == len(sequence.blocks), f"{name}: a block twice"
            for block in sequence.blocks:
                references[block] = references.get(block, 0) + 1
            if sequence.slot is not None:
                slots.append(sequence.slot)
            count = rows.count(sequence)
            assert count == sequence.num_plans, f"{name}: {count} plans, {sequence.num_plans} known"
        offline = sum(sequence.is_offline for sequence in live)
        assert self.num_offline == offline, f"{offline} offline sequences, {self.num_offline} known"
        assert sorted(slots) == list(range(self._max_num_seqs)), f"slots: {sorted(slots)}"
        self.blocks.check_integrity(references)
