"""An instance in virtual time: the product's engine, and a runner that only takes its time.

The handoff is modelled here: chunks go to the decode side as they are computed, one after the other
over the link of that instance, and the request goes on when the last one is there.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from baton.core.cluster import InstanceLoad, Role
from baton.core.config import EngineConfig
from baton.core.cost_model import Profile, StepShape
from baton.core.request import Part, SamplingParams, Submission
from baton.engine.compact import CompactEngine
from baton.engine.events import (
    CacheChanged,
    Event,
    PrefillProgress,
    PrefixComplete,
    Reserved,
    TokensReady,
)

if TYPE_CHECKING:
    from baton.simulator.fleet import Fleet
    from baton.simulator.outcome import SimRequest
    from baton.simulator.pool import SimPoolSide


class SimInstance:
    """One instance. Calls of the fleet come at its ``now``."""

    def __init__(
        self, fleet: Fleet, name: str, role: Role, profile: Profile, *, prefix_cache: bool
    ) -> None:
        self.name = name
        self.role = role
        self.session_id = 0
        self.incarnation = 0
        self._fleet = fleet
        self._cost = profile.cost
        config = EngineConfig(
            block_size=profile.block_size,
            num_blocks=profile.num_blocks,
            max_num_seqs=profile.max_num_seqs,
            max_num_batched_tokens=profile.max_num_batched_tokens,
            enable_prefix_cache=prefix_cache,
            async_scheduling=False,
        )
        self.generations = np.zeros(profile.num_blocks, np.uint64)
        self.engine = CompactEngine(
            config,
            max_model_len=profile.max_model_len,
            salt=b"simulated",
            generations=self.generations,
            track_cache=prefix_cache,
        )
        self.engine.set_cost_model(profile.cost)
        self.pool: SimPoolSide | None = None
        """Set by the fleet, where there is one."""
        self._requests: dict[str, SimRequest] = {}
        self._stepping = False
        self._num_leaps = 0
        self._leap_steps = 0
        """Of the leap under way; 0: none is."""
        self._leap_start_s = self._leap_first_s = self._leap_more_s = 0.0
        self._link_free_s = 0.0
        self.num_steps = 0
        self.busy_s = 0.0
        self.prefill_tokens = 0
        self.handed_tokens = 0
        """That came here from prefill instances."""

    def load(self) -> InstanceLoad:
        """What a heartbeat says."""
        return self.engine.load()

    # Submissions.

    def submit(self, request: SimRequest, part: Part) -> None:
        """Take a part of a request on."""
        item, level = request.item, request.level
        name = request.request_id + ("/d" if part is Part.DECODE else "")
        submission = Submission(
            request_id=name,
            attempt=0,
            prompt_ids=_prompt(item.num_prompt_tokens),
            sampling=_sampling(item.num_output_tokens),
            priority=level.priority,
            service_class=level.service_class,
            slo=level.slo,
            rise_after_s=_rise_after_s(request, self._fleet.now),
        )
        self.touch()
        self._requests[name] = request
        fetch = part is not Part.DECODE and self.pool is not None and self.pool.ask(request, name)
        self.engine.submit(submission, part, self._fleet.now, keys=request.keys, fetch=fetch)
        self.wake()

    # Steps.

    def wake(self) -> None:
        """Something changed: begin a step if none is under way."""
        if not self._stepping:
            self._begin()

    def _begin(self) -> None:
        now = self._fleet.now
        self._handle(self.engine.admit(now))
        num_alike = self.engine.can_leap()
        if num_alike > 1:
            self._leap(num_alike)
        else:
            self._step(now)

    def _step(self, start_s: float) -> None:
        """Plan one step, which began or begins at ``start_s``."""
        shape = self.engine.step_shape(self._fleet.now)
        if shape is None:
            return
        self._stepping = True
        seconds = self._cost.step_s(shape)
        self.num_steps += 1
        self.busy_s += seconds
        self.prefill_tokens += shape.num_prefill_tokens
        self._fleet.at(start_s + seconds, self._end)

    def _leap(self, num_steps: int) -> None:
        """Steps that are alike need no event each: each takes a little longer than the last."""
        load = self.engine.load()
        first = StepShape(num_decodes=load.num_decoding, decode_context=load.num_context_tokens)
        self._leap_first_s = self._cost.step_s(first)
        self._leap_more_s = load.num_decoding * self._cost.decode.context_s
        self._leap_start_s, self._leap_steps = self._fleet.now, num_steps
        self._stepping = True
        self._num_leaps += 1
        self._fleet.at(self._leap_start_s + self._leap_s(num_steps), self._landed, self._num_leaps)

    def _leap_s(self, num_steps: int) -> float:
        """Seconds of so many of the steps that are leapt over."""
        return num_steps * self._leap_first_s + self._leap_more_s * num_steps * (num_steps - 1) / 2

    def _landed(self, number: int) -> None:
        if number != self._num_leaps or not self._leap_steps:
            return  # it was interrupted
        self._count_leap(self._leap_steps)
        self._stepping = False
        self.wake()

    def _count_leap(self, num_steps: int) -> None:
        if num_steps:
            self.engine.leap(num_steps, self._fleet.now)
        self.num_steps += num_steps
        self.busy_s += self._leap_s(num_steps)
        self._leap_steps = 0

    def touch(self) -> None:
        """To be called before anything changes in the engine: steps are under way one by one."""
        if not self._leap_steps:
            return
        past_s = self._fleet.now - self._leap_start_s
        low, high = 0, self._leap_steps - 1
        while low < high:  # the most steps that are over
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._leap_s(middle) <= past_s else (low, middle - 1)
        start_s = self._leap_start_s + self._leap_s(low)
        self._count_leap(low)
        self._step(start_s)

    def _end(self) -> None:
        self._stepping = False
        self._handle(self.engine.finish_step(self._fleet.now))
        self.wake()

    def _handle(self, events: Sequence[Event]) -> None:
        for event in events:
            match event:
                case TokensReady():
                    self._on_tokens(event)
                case PrefillProgress():
                    self._on_progress(event)
                case CacheChanged() if self.pool is not None:
                    self.pool.cache_changed(event)
                case PrefixComplete() if self.pool is not None:
                    self.pool.completed(event)
                case Reserved() if self.pool is None or not self.pool.reserved(event):
                    request = self._requests[event.request_id]
                    if not request.is_reserved:
                        request.is_reserved = True
                        request.num_sent_tokens = event.num_cached_tokens
                        self._pull(request)

    def _on_tokens(self, event: TokensReady) -> None:
        request = self._requests[event.request_id]
        if event.num_cached_tokens is not None and event.request_id == request.request_id:
            # What the decode side had saves a transfer, and no step.
            request.num_cached_tokens = max(request.num_cached_tokens, event.num_cached_tokens)
        if event.index == 0 and event.token_ids:
            self._fleet.first_token(request)
        if event.finish_reason is not None:
            del self._requests[event.request_id]
            self._fleet.finish(request)

    # Handoffs.

    def _on_progress(self, event: PrefillProgress) -> None:
        request = self._requests[event.request_id]
        request.num_computed_tokens = event.num_computed_tokens
        request.prefill_done = event.final
        if request.is_reserved and request.decode is not None:
            request.decode._pull(request)

    def _pull(self, request: SimRequest) -> None:
        """Bring what is computed and not here yet; after the last of it, go on."""
        now = self._fleet.now
        num_tokens = request.num_computed_tokens - request.num_sent_tokens
        if num_tokens > 0:
            request.num_sent_tokens = request.num_computed_tokens
            if request.prefill is not self:
                link = self._cost.handoff
                seconds = num_tokens * self._cost.kv_bytes_per_token / link.bytes_per_s
                self._link_free_s = max(self._link_free_s, now) + seconds
                request.handed_at_s = self._link_free_s + link.latency_s
                self.handed_tokens += num_tokens
        if request.prefill_done:
            self._fleet.at(max(now, request.handed_at_s), self._arrived, request)

    def _arrived(self, request: SimRequest) -> None:
        self.touch()
        self.engine.kv_arrived(request.request_id + "/d", 0)
        prefill = request.prefill
        assert prefill is not None
        self._fleet.at(self._fleet.now + self._fleet.config.message_s, prefill._release, request)
        self.wake()

    def _release(self, request: SimRequest) -> None:
        self.touch()
        self._requests.pop(request.request_id, None)
        self.engine.release(request.request_id)
        self.wake()


def _rise_after_s(request: SimRequest, now: float) -> float | None:
    deadline_s = request.level.deadline_s
    if deadline_s is None or not request.level.is_offline:
        return None
    # As the gateway does it: half of what is left.
    return max(0.0, (request.item.arrival_s + deadline_s - now) / 2)


@functools.lru_cache(maxsize=4096)
def _prompt(num_tokens: int) -> tuple[int, ...]:
    """Tokens that nobody looks at: their number counts."""
    return (0,) * num_tokens


@functools.lru_cache(maxsize=4096)
def _sampling(num_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
