"""An instance as a process: builds its parts, serves the data plane, stops cleanly.

Order matters at start: checkpoint, arena, runner (loads the weights), the measuring of its largest
steps (which warms it up), engine, transports, gRPC server, and only then the registration with the
controller, so that nothing is placed on an instance that cannot serve. Where the arena is to be
what memory is left, it comes after the measuring.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import secrets
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import psutil
from prometheus_client import make_asgi_app

from baton.core.blocks import block_salt
from baton.core.clock import SystemClock
from baton.core.cluster import InstanceInfo, InstanceLoad
from baton.core.errors import ConfigError, RankLost
from baton.engine.checkpoint import open_checkpoint
from baton.engine.emulated import EmulatedRunner, Emulation
from baton.engine.group import make_engine
from baton.engine.models.config import kv_layout, resolve_max_model_len
from baton.engine.parallel.launch import ProcessLauncher, RankLauncher
from baton.engine.parallel.mesh import Axes
from baton.engine.parallel.runner import (
    RankedGroupRunner,
    RankedRunner,
    make_ranked_runner,
)
from baton.engine.plan import Runner
from baton.engine.runners import check_ranks
from baton.instance.assembly import assemble
from baton.instance.instance import Instance
from baton.instance.metrics import make_registry
from baton.instance.own_costs import OwnCosts
from baton.instance.pool_client import PoolClient, find_pool
from baton.instance.pool_side import PoolSide, make_pool_side
from baton.instance.roles import RoleSwitch
from baton.instance.service import InstanceService
from baton.instance.session import ControllerSession
from baton.instance.spec import InstanceSpec
from kvpool.arena import BlockArena
from kvpool.layout import KVLayout
from kvpool.paced import PacedTransport
from kvpool.pool_link import PoolLink, tier_owner
from kvpool.transports import TransportSet, make_transports
from protos.baton.internal.v1 import instance_pb2_grpc
from protos.http import HttpServer
from protos.serving import server_options

if TYPE_CHECKING:
    from baton.engine.runner import InlineRunner

logger = logging.getLogger(__name__)

_REGISTER_TIMEOUT_S = 30.0
_GRACE_S = 0.5


class InstanceServer:
    """One instance, from start to stop. Implements ``protos.serving.Service``."""

    def __init__(
        self, spec: InstanceSpec, launcher: Callable[[], RankLauncher] = ProcessLauncher
    ) -> None:
        """``launcher``: what starts the ranks, where there are several."""
        self.spec = spec
        self._launcher = launcher
        self._process = psutil.Process()
        self._nonce = secrets.randbits(63)
        self._failed: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        self._exit = contextlib.AsyncExitStack()
        """What was started, to be stopped in the opposite order."""
        self._emulation: Emulation | None = None
        self._address = ""
        self._metrics_address = ""

    async def start(self) -> None:
        """Load, bind, warm up, register. Holds nothing if it raises.

        Raises ConfigError with one clear sentence.
        """
        try:
            await self._start()
        except BaseException:
            await self.stop()
            raise

    async def _start(self) -> None:
        spec = self.spec
        clock = SystemClock()
        self._checkpoint = checkpoint = open_checkpoint(spec.model)
        if spec.engine.device == "emulated":
            self._emulation = Emulation.from_config(spec.engine)
        layout = kv_layout(checkpoint.config, spec.engine)
        loop = asyncio.get_running_loop()
        runner: Runner[Any, Any]
        if self._emulation is not None:
            runner = await self._emulate(self._emulation, layout)
        elif Axes(spec.engine.tp, spec.engine.ep, spec.engine.dp).world_size > 1:
            runner = await self._start_ranks(layout)
        else:
            runner = await self._load_inline(layout)
        spec = self.spec
        self._max_model_len = resolve_max_model_len(checkpoint.config, spec.engine)
        self._memory = runner.memory
        engine = make_engine(
            spec.engine,
            max_model_len=self._max_model_len,
            salt=block_salt(model_fingerprint=checkpoint.fingerprint, layout=layout.canonical.text),
            generations=self._cache.generations,
            track_cache=self._has_pool,
        )
        emulation = self._emulation
        self._costs = OwnCosts(engine, None if emulation is None else emulation.cost)
        transports = self._make_transports()
        self._exit.push_async_callback(loop.run_in_executor, None, transports.close)
        self.role = RoleSwitch(spec.role)
        self.parts = parts = assemble(
            spec.instance_id,
            engine=engine,
            runner=runner,
            cache=self._cache,
            transports=transports,
            role=self.role,
            handoff=spec.handoff,
            clock=clock,
            vocab_size=checkpoint.config.vocab_size,
            on_empty=lambda: self._session.heartbeat_now(),
            pool=self._make_pool_side(layout) if self._has_pool else None,
            spill_after_s=spec.pool.spill_after_s,
        )
        self.instance = parts.instance
        self._session = ControllerSession(
            spec.controller_address,
            describe=self._describe,
            load=self._load,
            role=self.role,
            on_registered=self._on_registered,
            on_fenced=self._on_fenced,
        )
        self._exit.push_async_callback(parts.stop)
        await self._serve()
        self._spawn(parts.loop.run(), "engine loop")
        if parts.pool is not None:
            parts.pool.start()
        session = self._spawn(self._session.run(), "controller session")
        self._exit.push_async_callback(_cancel, session)
        await self._registered()

    @property
    def _has_pool(self) -> bool:
        return self.spec.pool_address is not None and self.spec.pool.host_bytes > 0

    def _make_pool_side(self, layout: KVLayout) -> Callable[[Instance], PoolSide]:
        spec = self.spec
        assert spec.pool_address is not None
        link = PoolLink(
            tier_owner(spec.instance_id, self._nonce),
            spec.pool_address,
            lambda: find_pool(spec.controller_address, spec.node_id),
            lease_s=spec.pool.lease_s,
        )

        def make(instance: Instance) -> PoolSide:
            return make_pool_side(
                instance,
                link,
                spec.controller_address,
                config=spec.pool,
                cache=self._cache,
                host_layout=layout.canonical.text,
                block_size=spec.engine.block_size,
                life=int(SystemClock().wall() * 1000),
                load_s=None if self._emulation is None else self._emulated_load_s,
            )

        return make

    def _make_transports(self) -> TransportSet:
        spec, emulation = self.spec, self._emulation
        transports = make_transports(_transport_names(spec), spec.host, tls=spec.handoff.tls)
        if emulation is not None:
            size = spec.engine.block_size
            transports = [
                PacedTransport(inner, lambda num_blocks: emulation.handoff_s(num_blocks * size))
                for inner in transports
            ]
        return TransportSet(transports)

    def _emulated_load_s(self, num_blocks: Mapping[str, int]) -> float:
        assert self._emulation is not None
        size = self.spec.engine.block_size
        return self._emulation.fetch_s({tier: n * size for tier, n in num_blocks.items()})

    async def _emulate(self, emulation: Emulation, layout: KVLayout) -> EmulatedRunner:
        """A runner that only takes the time, and the arena that it leaves its traces in."""
        spec = self.spec
        self._cache = await self._make_cache(layout.block_bytes, layout.text)
        runner = emulation.runner(self._checkpoint, spec.engine, self._cache.buffer)
        self._exit.callback(runner.close)
        return runner

    async def _load_inline(self, layout: KVLayout) -> InlineRunner:
        """The runner of a single rank, in this process, and the arena that it computes in."""
        # Only here: the driver of other processes' ranks does without torch.
        from baton.engine.runner import InlineRunner

        spec, checkpoint = self.spec, self._checkpoint
        loop = asyncio.get_running_loop()
        buffer = None
        if spec.engine.num_blocks is not None:
            self._cache = await self._make_cache(layout.block_bytes, layout.text)
            buffer = self._cache.buffer
        runner = await loop.run_in_executor(
            None, lambda: InlineRunner(checkpoint, spec.engine, kv_buffer=buffer)
        )
        self._exit.push_async_callback(loop.run_in_executor, None, runner.close)
        fitted = await loop.run_in_executor(None, runner.fit)
        self.spec = dataclasses.replace(spec, engine=fitted)
        if buffer is None:
            self._cache = await self._make_cache(layout.block_bytes, layout.text)
            runner.attach(fitted.kv_blocks, self._cache.buffer)
            # It must let go of the arena before that is closed.
            self._exit.push_async_callback(loop.run_in_executor, None, runner.close)
        self._memory = runner.memory
        return runner

    async def _start_ranks(self, layout: KVLayout) -> RankedRunner | RankedGroupRunner:
        """The runner of several ranks, each a process that maps the arena."""
        spec, checkpoint = self.spec, self._checkpoint
        check_ranks(checkpoint, spec.engine)
        if spec.engine.num_blocks is None or spec.pool_address is None:
            raise ConfigError(
                "several ranks need engine.num_blocks, and a pool node for the blocks that they "
                "share",
                param="engine.num_blocks",
            )
        self._cache = await self._make_cache(layout.block_bytes, layout.text)
        loop = asyncio.get_running_loop()

        def lost(error: RankLost) -> None:
            loop.call_soon_threadsafe(self._on_rank_lost, error)

        def load() -> RankedRunner | RankedGroupRunner:
            runner = make_ranked_runner(
                checkpoint,
                spec.engine,
                launcher=self._launcher(),
                arena=self._cache,
                instance_id=spec.instance_id,
                on_lost=lost,
            )
            try:
                runner.fit()
            except BaseException:
                runner.close()
                raise
            return runner

        runner = await loop.run_in_executor(None, load)
        self._exit.push_async_callback(loop.run_in_executor, None, runner.close)
        self._memory = runner.memory
        return runner

    def _on_rank_lost(self, error: RankLost) -> None:
        """The ranks of an instance live and die together, and the instance with them."""
        if not self._failed.done():
            logger.error("%s", error.message)
            self._failed.set_result(error)

    async def stop(self) -> None:
        """Stop serving and release everything, however far the start came. Bounded."""
        await self._exit.aclose()

    async def wait_failed(self) -> BaseException:
        """See ``protos.serving.Service``."""
        return await asyncio.shield(self._failed)

    async def _serve(self) -> None:
        parts = self.parts
        registry = make_registry(parts, self._process, self.role)
        metrics = HttpServer(make_asgi_app(registry), host=self.spec.host, setting="metrics port")
        self._exit.push_async_callback(metrics.stop)
        self._metrics_address = await metrics.start()
        server = grpc.aio.server(options=server_options())
        instance_pb2_grpc.add_InstanceServicer_to_server(
            InstanceService(parts.instance, parts.prefill, self._memory), server
        )
        self._exit.push_async_callback(server.stop, _GRACE_S)
        # Before the server waits for its calls to end: streams end by themselves now.
        self._exit.callback(parts.instance.hub.end_all)
        port = server.add_insecure_port(f"{self.spec.host}:0")
        await server.start()
        self._address = f"{self.spec.host}:{port}"

    async def _registered(self) -> None:
        """Wait until the controller knows us. Raises what makes that impossible."""
        registered = asyncio.ensure_future(self._session.registered.wait())
        waited: list[asyncio.Future[Any]] = [registered, self._failed]
        try:
            await asyncio.wait(
                waited,
                timeout=_REGISTER_TIMEOUT_S,
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            registered.cancel()
        if self._failed.done():
            raise self._failed.result()
        if not self._session.registered.is_set():
            raise TimeoutError(
                f"the controller at {self.spec.controller_address} did not register "
                f"{self.spec.instance_id} within {_REGISTER_TIMEOUT_S:g} s"
            )

    def _spawn(self, coroutine: Any, name: str) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.ensure_future(coroutine)
        task.set_name(name)
        task.add_done_callback(self._on_task_done)
        return task

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None and not self._failed.done():
            logger.error("%s of %s broke", task.get_name(), self.spec.instance_id, exc_info=error)
            self._failed.set_result(error)

    def _on_registered(self, incarnation: int) -> None:
        if self.instance.incarnation not in (0, incarnation):
            self._on_fenced(f"registered as {incarnation}, was {self.instance.incarnation}")
            return
        self.instance.incarnation = incarnation

    def _on_fenced(self, reason: str) -> None:
        if not self._failed.done():
            self._failed.set_result(RuntimeError(f"{self.spec.instance_id} is fenced: {reason}"))

    def _describe(self) -> InstanceInfo:
        spec = self.spec
        return InstanceInfo(
            instance_id=spec.instance_id,
            incarnation=self.instance.incarnation,
            role=self.role.duty.role,
            address=self._address,
            metrics_address=self._metrics_address,
            node_id=spec.node_id,
            pid=os.getpid(),
            model=spec.model_name,
            model_fingerprint=self._checkpoint.fingerprint,
            kv_layout=self._cache.layout,
            block_size=spec.engine.block_size,
            num_blocks=spec.num_blocks,
            max_model_len=self._max_model_len,
            max_num_seqs=spec.engine.dp * spec.engine.max_num_seqs,
            max_num_batched_tokens=spec.engine.dp * spec.engine.max_num_batched_tokens,
        )

    def _load(self) -> InstanceLoad:
        samples = self.parts.loop.samples.take()
        self._costs.observe(reversed(samples))
        if self.parts.pool is not None:
            # Newest first, and it is to be told in order.
            for sample in reversed(samples):
                self.parts.pool.fetcher.rule.stepped(sample)
        return dataclasses.replace(
            self.instance.load(),
            samples=samples,
            num_steps=self.parts.loop.counters.num_steps,
            rss_bytes=self._process.memory_info().rss,
        )

    async def _make_cache(self, block_bytes: int, layout: str) -> BlockArena:
        spec = self.spec
        if spec.pool_address is None:
            arena = BlockArena.private(
                num_blocks=spec.num_blocks, block_bytes=block_bytes, layout=layout
            )
            self._exit.callback(arena.close)
            return arena
        pool = PoolClient(spec, self._nonce)
        # Also where the answer does not reach us: the pool node may have made one.
        self._exit.push_async_callback(pool.release)
        arena = await pool.allocate(block_bytes=block_bytes, layout=layout)
        self._exit.callback(arena.close)
        return arena


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def _transport_names(spec: InstanceSpec) -> tuple[str, ...]:
    if spec.handoff.transport != "auto":
        return (spec.handoff.transport,)
    return ("shm", "tcp") if spec.pool_address is not None else ("tcp",)
