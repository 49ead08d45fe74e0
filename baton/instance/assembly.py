"""Wires an engine, a runner and a cache into one working instance, without process or wire."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from baton.core.clock import Clock
from baton.core.config import HandoffConfig
from baton.engine.interface import AnyPlan, AnyResult, StepEngine
from baton.engine.loop import EngineLoop
from baton.engine.plan import Runner
from baton.instance.instance import Instance
from baton.instance.pool_side import PoolSide
from baton.instance.roles import RoleSwitch
from decode_worker.worker import DecodeHooks, DecodeWorker
from kvpool.transport import KVCache
from kvpool.transports import TransportSet
from prefill_worker.worker import PrefillWorker

_SHORT = 4
"""Blocks are short while less than one in so many can be handed out."""


@dataclasses.dataclass(frozen=True, slots=True)
class InstanceParts:
    """What works together on one event loop. ``loop.run()`` is for the owner to start."""

    instance: Instance
    loop: EngineLoop[Any, Any]
    prefill: PrefillWorker
    decode: DecodeWorker
    transports: TransportSet
    pool: PoolSide | None = None

    async def stop(self) -> None:
        """End pulls, streams to peers and steps; the runner is closed. Bounded."""
        self.prefill.stop()
        try:
            await self.decode.stop()
            if self.pool is not None:
                await self.pool.stop()
        finally:
            await self.loop.stop()


def assemble(
    instance_id: str,
    *,
    engine: StepEngine[AnyPlan, AnyResult],
    runner: Runner[AnyPlan, AnyResult],
    cache: KVCache,
    transports: TransportSet,
    role: RoleSwitch,
    handoff: HandoffConfig,
    clock: Clock,
    vocab_size: int | None = None,
    on_empty: Callable[[], None],
    pool: Callable[[Instance], PoolSide] | None = None,
    spill_after_s: float = 1.0,
) -> InstanceParts:
    """Make the parts and join them. ``on_empty`` is called when the last submission has ended.
    ``pool`` makes the instance's side of the pool, where the machine has one.

    ``vocab_size``: see :class:`Instance`. ``cache`` is exported on all of ``transports`` here.
    Raises TransferFailed if none can.
    """
    config = engine.config
    instance = Instance(instance_id, engine=engine, role=role, clock=clock, vocab_size=vocab_size)
    side = None if pool is None else pool(instance)
    loop = EngineLoop(
        engine,
        runner,
        clock=clock,
        on_events=instance.on_events,
        on_failed=instance.on_failed,
        max_in_flight=2 if config.async_scheduling else 1,
    )
    prefill = PrefillWorker(
        instance_id=instance_id,
        incarnation=lambda: instance.incarnation,
        endpoints=transports.endpoints(cache),
        lease_s=handoff.lease_s,
        clock=clock,
        release=instance.release_held,
        free=instance.free_held,
        spill=None if side is None else side.spill,
        short_of_blocks=lambda: _short_of_blocks(engine),
        spill_after_s=spill_after_s,
    )
    decode = DecodeWorker(
        DecodeHooks(
            kv_arrived=instance.kv_arrived,
            kv_failed=instance.kv_failed,
            engine_abort=instance.engine_abort,
            repeat=instance.repeat_first,
            stage=instance.note_stage,
        ),
        instance_id=instance_id,
        incarnation=lambda: instance.incarnation,
        cache=cache,
        transports=transports,
        block_size=config.block_size,
        lease_s=handoff.lease_s,
        pull_timeout_s=handoff.pull_timeout_s,
    )
    instance.attach(prefill=prefill, decode=decode, wake=loop.wake, on_empty=on_empty, pool=side)
    return InstanceParts(instance, loop, prefill, decode, transports, side)


def _short_of_blocks(engine: StepEngine[AnyPlan, AnyResult]) -> bool:
    """Whether sequences wait that the blocks of held ones might let in."""
    load = engine.load()
    waiting = load.num_waiting + load.num_pending_kv
    available = load.num_free_blocks + load.num_cached_blocks
    short = available * _SHORT < engine.block_statistics().num_blocks
    # Where nothing runs although somebody waits, what is free is too little for that one.
    return waiting > 0 and (short or not load.num_running)
