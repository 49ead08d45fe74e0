"""The cluster in virtual time: the real controller core and engines, a made network and clock.

A request's way is that of the real cluster, message by message, as far as time depends on it::

    arrival → Place → submit to both → chunks computed, each handed over while the next is →
    token 0 from prefill → decode reserves, gets the last chunk, goes on → last token → outcome

What is replaced: the clock (``now`` is the time of the event at hand), the network (a latency per
message and a link per decode instance), the runner (the cost model's time) and the gateway, which
here does no more than what is written above. Everything that *decides* is the product's own.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from collections.abc import Callable
from typing import Any

from baton.core.blocks import BlockKey
from baton.core.cluster import InstanceInfo, Role
from baton.core.config import ControllerConfig
from baton.core.cost_model import Profile
from baton.core.request import Part
from baton.core.slo import ServiceLevel
from baton.simulator.instances import SimInstance
from baton.simulator.outcome import Outcome, SimRequest, outcome_of
from baton.simulator.pool import PoolSettings, SimPool
from baton.simulator.reuse import prompt_keys
from baton.simulator.workload import Trace
from controller import events
from controller.core import ControllerCore

GATEWAY = "gateway-0"


@dataclasses.dataclass(frozen=True, slots=True)
class FleetConfig:
    """What is simulated."""

    profile: Profile
    roles: tuple[Role, ...]
    controller: ControllerConfig
    message_s: float = 0.0005
    """One message between two processes."""
    pool: PoolSettings | None = None
    """``None``: instances keep no prefixes."""
    levels: dict[str, ServiceLevel] = dataclasses.field(default_factory=dict)
    """By class; requests of others have no targets."""
    max_tokens_told: int | None = None
    """What clients say they may want at most; ``None``: exactly what they will get."""
    max_virtual_s: float = 1e6


class Fleet:
    """One simulation. Make it, :meth:`run` it once, read ``outcomes``."""

    def __init__(
        self, config: FleetConfig, make_core: Callable[[ControllerConfig], ControllerCore]
    ) -> None:
        self.config = config
        self.now = 0.0
        self.core = make_core(config.controller)
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = itertools.count()
        self._tick_at: float | None = None
        self.instances: dict[str, SimInstance] = {}
        self._sessions: dict[int, SimInstance] = {}
        self._calls: dict[int, tuple[SimRequest, bool]] = {}
        """Placements under way: of which request, and whether for its decode side alone."""
        self._num_left = 0
        self._stop: Callable[[Fleet], bool] | None = None
        self.outcomes: list[Outcome] = []
        self._heartbeat_s = config.controller.heartbeat_s
        self.pool: SimPool | None = None
        if config.pool is not None:
            self.pool = SimPool(self, config.pool, len(config.roles))
        for index, role in enumerate(config.roles):
            self._add_instance(f"i{index}", role)
        self.role_log: list[tuple[float, str, Role]] = [
            (0.0, name, item.role) for name, item in self.instances.items()
        ]

    # Time.

    def at(self, time_s: float, call: Callable[..., None], *args: Any) -> None:
        """Have something happen then; of one time, in the order of these calls."""
        heapq.heappush(self._events, (time_s, next(self._order), call, args))

    def run(self, trace: Trace, *, stop: Callable[[Fleet], bool] | None = None) -> list[Outcome]:
        """Until every request has ended. ``stop`` may end it earlier: asked after each outcome."""
        self._num_left = len(trace)
        for index, item in enumerate(trace):
            level = self.config.levels.get(item.service_class, _NO_LEVEL)
            keys: tuple[BlockKey, ...] = ()
            if self.pool is not None:
                keys = prompt_keys(f"r{index}", item, self.pool.block_size)
            request = SimRequest(f"r{index}", item, level, keys)
            self.at(item.arrival_s, self._place, request, None)
        self._stop = stop
        self._arm()
        pop, queue = heapq.heappop, self._events
        while self._num_left > 0 and queue:
            self.now, _, call, args = pop(queue)
            if self.now > self.config.max_virtual_s:
                break
            call(*args)
        return self.outcomes

    def settle(self, for_s: float = 1.0) -> None:
        """After a run: let happen what follows from it, such as releases and reports."""
        end_s = self.now + for_s
        while self._events and self._events[0][0] <= end_s:
            self.now, _, call, args = heapq.heappop(self._events)
            call(*args)

    def _arm(self) -> None:
        due = self.core.next_deadline()
        if due is not None and (self._tick_at is None or due < self._tick_at):
            self._tick_at = due
            self.at(due, self._tick, due)

    def _tick(self, due: float) -> None:
        if self._tick_at != due:
            return  # an earlier one was set after this
        self._tick_at = None
        self._obey(self.core.on_tick(self.now))

    # Instances.

    def _add_instance(self, name: str, role: Role) -> None:
        profile = self.config.profile
        info = InstanceInfo(
            instance_id=name,
            incarnation=0,
            role=role,
            address=name,
            metrics_address="",
            node_id="node-0" if self.pool is None else self.pool.node_id_of(len(self.instances)),
            pid=1,
            model="simulated",
            model_fingerprint="simulated",
            kv_layout="simulated",
            block_size=profile.block_size,
            num_blocks=profile.num_blocks,
            max_model_len=profile.max_model_len,
            max_num_seqs=profile.max_num_seqs,
            max_num_batched_tokens=profile.max_num_batched_tokens,
        )
        instance = SimInstance(self, name, role, profile, prefix_cache=self.pool is not None)
        if self.pool is not None:
            instance.pool = self.pool.join(instance, len(self.instances))
        self.instances[name] = instance
        session_id = len(self.instances)
        self._sessions[session_id] = instance
        instance.session_id = session_id
        for command in self.core.on_event(events.RegisterInstance(session_id, info), 0.0):
            if isinstance(command, events.Registered):
                instance.incarnation = command.incarnation
        self._beat(instance)

    def _beat(self, instance: SimInstance, acks: tuple[events.Ack, ...] = ()) -> None:
        load = instance.load()
        self._feed(
            events.Heartbeat(instance.session_id, instance.name, instance.incarnation, load, acks)
        )
        if not acks:
            self.at(self.now + self._heartbeat_s, self._beat, instance)

    # The controller.

    def _feed(self, event: events.Event) -> None:
        self._obey(self.core.on_event(event, self.now))

    def _obey(self, commands: list[events.Command]) -> None:
        for command in commands:
            match command:
                case events.Placed():
                    self._placed(command)
                case events.SendDirective(session_id, directive_id, body):
                    instance = self._sessions[session_id]
                    later = self.now + self.config.message_s
                    self.at(later, self._directive, instance, directive_id, body)
        self._arm()

    def _directive(
        self, instance: SimInstance, directive_id: int, body: events.DirectiveBody
    ) -> None:
        if isinstance(body, events.CommitRole) and body.role is not instance.role:
            instance.role = body.role
            self.role_log.append((self.now, instance.name, body.role))
        ack = events.Ack(directive_id, ok=True)
        self.at(self.now + self.config.message_s, self._beat, instance, (ack,))

    # Requests.

    def _place(self, request: SimRequest, bind_to: str | None) -> None:
        level, item = request.level, request.item
        deadline_s = None
        if level.deadline_s is not None:
            deadline_s = item.arrival_s + level.deadline_s - self.now
        query = events.PlaceQuery(
            request_id=request.request_id,
            attempt=request.attempt,
            num_prompt_tokens=item.num_prompt_tokens,
            max_new_tokens=self.config.max_tokens_told or item.num_output_tokens,
            priority=level.priority,
            service_class=level.service_class,
            slo=level.slo,
            deadline_s=deadline_s,
            tenant=item.tenant,
            waited_s=self.now - item.arrival_s,
            prefix=() if self.pool is None else self.pool.prefix_of(request),
            bind_to=bind_to,
        )
        call_id = next(self._order)
        self._calls[call_id] = (request, bind_to is not None)
        self._feed(events.PlaceRequests(call_id, GATEWAY, (query,)))

    def _placed(self, command: events.Placed) -> None:
        request, binding = self._calls.pop(command.call_id)
        result = command.results[0]
        if isinstance(result, events.Failure):
            self._end(request, str(result.code))
            return
        prefill = self.instances[result.prefill.instance_id]
        request.decode = decode = self.instances[result.decode.instance_id]
        # From the controller to the gateway, and from there to the instances.
        later = self.now + 2 * self.config.message_s
        if binding:
            self.at(later, decode.submit, request, Part.DECODE)
            return
        request.prefill = prefill
        if prefill is decode or request.item.num_output_tokens == 1:
            request.decode = prefill
            self.at(later, prefill.submit, request, Part.WHOLE)
            return
        request.is_tentative = result.tentative
        if result.tentative:
            request.decode = None
        else:
            self.at(later, decode.submit, request, Part.DECODE)
        self.at(later, prefill.submit, request, Part.PREFILL)

    def first_token(self, request: SimRequest) -> None:
        """Token 0 was drawn; the client has it a message later."""
        later = self.now + self.config.message_s
        if request.first_token_s is None:
            request.first_token_s = later
        if request.is_tentative:
            assert request.prefill is not None
            request.is_tentative = False
            self.at(later, self._place, request, request.prefill.name)

    def finish(self, request: SimRequest) -> None:
        """Its last token was drawn."""
        self._end(request, "")

    def _end(self, request: SimRequest, error: str) -> None:
        outcome = outcome_of(request, error, self.now + self.config.message_s)
        self.outcomes.append(outcome)
        self._num_left -= 1
        ended = events.RequestEnded(
            request.request_id,
            error or "length",
            prompt_tokens=outcome.num_prompt_tokens,
            completion_tokens=0 if error else outcome.num_output_tokens,
            cached_tokens=outcome.num_cached_tokens,
            ttft_s=outcome.ttft_s or 0.0,
            tpot_s=outcome.tpot_s or 0.0,
            attempts=(events.AttemptEnded(request.request_id, request.attempt),),
            service_class=outcome.service_class,
            met=outcome.good,
        )
        self.at(self.now + self.config.message_s, self._report, ended)
        if self._stop is not None and self._stop(self):
            self._num_left = 0

    def _report(self, ended: events.RequestEnded) -> None:
        self._feed(events.OutcomesReported(GATEWAY, (ended,)))


_NO_LEVEL = ServiceLevel()
